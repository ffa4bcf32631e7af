"""The command that starts a VMM apart from others, and what of this host that takes.

The network is the user-mode one that QEMU has by itself: the same addresses in every VM, nothing to
set up, nothing that two forks could both want. See ``launch.py`` for how it is made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stillframe.host.programs import find_program
from stillframe.model.errors import MissingComponent
from stillframe.vmm.logs import log_end

TAP = "stillframe0"  # the VM's end of its network, the same name in every VM
_LAUNCHER = Path(__file__).with_name("launch.py")
_TUN = Path("/dev/net/tun")
_REFUSAL = b"no private network: "
# What an ordinary user's VMM takes to be kept apart, as a hint.
USER_NAMESPACES = (
    "run the server as root, or allow user namespaces (user_namespaces(7)); on Ubuntu set "
    "kernel.apparmor_restrict_unprivileged_userns to 0"
)
_OTHERWISE = "turn the instance's network off, or use qemu or qemu-microvm"


def apart(
    program: str,
    name: str,
    arguments: Sequence[str],
    *,
    uplink: str | None = None,
    console: Path | None = None,
    tree: Sequence[str] = (),
) -> list[str]:
    """The command that runs ``program`` as ``name`` with ``arguments``, without any capability.

    ``uplink`` is a program found by ``find_uplink``: the VMM then finds ``TAP`` in a network of
    its own. Its standard output is appended to ``console``. ``tree`` describes a private file tree
    in the launcher's words. One of the arguments must name a file of the VM, by which its process
    is found when nobody knows its pid any more.
    """
    # Isolated and without site packages the interpreter starts in half the time.
    command = [sys.executable, "-I", "-S", str(_LAUNCHER)]
    if console is not None:
        command += ["console", str(console)]
    if uplink is not None:
        command += ["network", uplink, TAP]
    return [*command, *tree, "--", program, name, *arguments]


def find_uplink(program: str = "slirp4netns") -> str:
    """What serves a VM's network here, by its path. Raises MissingComponent."""
    if not os.access(_TUN, os.R_OK | os.W_OK):
        why = "may not be opened" if _TUN.exists() else "does not exist"
        raise MissingComponent(
            f"the VM cannot have a network: {_TUN} {why}", hint=f"modprobe tun; or {_OTHERWISE}"
        )
    found = find_program(program)
    if found is None:
        raise MissingComponent(
            f"the VM cannot have a network: {program} is not installed",
            hint=f"apt-get install {program}; or {_OTHERWISE}",
        )
    return found


def check_launch(log: Path, start: int) -> None:
    """Raises MissingComponent if what was logged since ``start`` says that no network was made."""
    for line in log_end(log, start).splitlines():
        if line.startswith(_REFUSAL):
            why = line.removeprefix(_REFUSAL).decode(errors="replace")
            raise MissingComponent(
                f"the VM cannot have a network: {why}", hint=f"{USER_NAMESPACES}; or {_OTHERWISE}"
            )
