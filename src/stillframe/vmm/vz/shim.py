"""The process around one VM: a VM of Virtualization.framework lives in the process that made it.

``python -m stillframe.vmm.vz.shim --listen FD --directory DIR`` serves the listening socket FD;
``... --probe`` prints as JSON whether VMs can be made here. The main thread belongs to the
framework, another one to the event loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys
import threading
import traceback
from collections.abc import Sequence

from stillframe.vmm.vz.protocol import Framework
from stillframe.vmm.vz.service import Service

_FAILED = 1  # exit code


def main(arguments: Sequence[str]) -> int:
    """Serve a VM to its end, or probe. Does not return while there is a guest."""
    from stillframe.vmm.vz import framework  # only here: it cannot be imported elsewhere

    if arguments == ["--probe"]:
        print(json.dumps({"unusable": framework.unusable()}))
        return 0
    listen, fd, directory, _ = arguments  # the directory tells whose process this is
    if (listen, directory) != ("--listen", "--directory"):
        raise SystemExit("usage: --listen FD --directory DIR, or --probe")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no guest memory in a core file
    listener = socket.socket(fileno=int(fd))
    serving = threading.Thread(
        target=serve_and_exit, args=(framework.AppleFramework(), listener), daemon=True
    )
    serving.start()
    framework.serve_main_queue()
    return _FAILED  # the main queue has no end


def serve_and_exit(framework: Framework, listener: socket.socket) -> None:
    """Serve in this thread, and end the process when the guest has ended."""
    code = _FAILED
    try:
        asyncio.run(serve(framework, listener))
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)  # the main thread is in the framework and would not hear of it


async def serve(framework: Framework, listener: socket.socket) -> str:
    """Serve one VM; why its guest ended."""
    return await Service(framework, lambda line: print(line, flush=True)).run(listener)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
