"""Does KVM run guests under Firecracker here? Found by running one, of 576 bytes.

See ``host/probes.py``: that ``/dev/kvm`` opens and creates VMs says little.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from stillframe.host.probes import PROBE_ANSWER, PROBE_KERNEL, kvm_hindrance
from stillframe.host.process import run
from stillframe.model.errors import StillframeError, Timeout

_DEADLINE = 5.0  # seconds; the guest takes 0.1
_NOISE = (
    "Error: ",
    "RunWithoutApiError",
)  # what Firecracker says of any guest that did not end well


async def kvm_refusal(binary: str) -> str | None:
    """Why no guest can run, in a sentence; None if one did, with interrupts, in 64-bit mode."""
    hindrance = kvm_hindrance()
    if hindrance is not None:
        return hindrance
    with tempfile.TemporaryDirectory(prefix="stillframe-probe-") as directory:
        kernel, config = Path(directory) / "kernel", Path(directory) / "config.json"
        kernel.write_bytes(PROBE_KERNEL)
        config.write_text(
            json.dumps(
                {
                    "boot-source": {"kernel_image_path": str(kernel)},
                    "machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
                    "drives": [],
                }
            )
        )
        command = [binary, "--no-api", "--config-file", str(config), "--level", "Info"]
        try:
            done = await run(command, timeout=_DEADLINE, check=False)
        except Timeout:
            return "it starts but does not run a 64-bit guest to its end"
        except StillframeError as error:
            return error.message
    return None if PROBE_ANSWER in done.stdout else _last_reason(done.stdout + done.stderr)


def _last_reason(output: bytes) -> str:
    """What of Firecracker's log says why its guest did not get to its end."""
    lines = output.decode(errors="replace").splitlines()
    exits = [line for line in lines if "KVM_EXIT" in line]
    errors = [line for line in lines if "rror" in line and not any(word in line for word in _NOISE)]
    said = (exits or errors or lines or ["no message"])[-1]
    return f"it does not run a 64-bit guest ({said.rpartition('] ')[2].strip()})"
