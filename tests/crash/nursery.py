"""Servers one after another, each a process of its own, without loading the program each time.

Loaded once, this process forks a server for every line on its standard input, and says when it has
ended. A server started this way is what ``stillframe serve`` is, a second earlier.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pkgutil
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastapi.testclient import TestClient

import stillframe
from stillframe.api import app as api
from stillframe.host.orphans import processes_naming
from support.server import READY, START_DEADLINE

ENDED, PID = b"ended", b"pid "
# What a server loads beside all of ours, while it starts or at the first request of a kind.
_LOADED = (
    "httptools",
    "uvicorn.main",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.websockets_sansio_impl",
)


class NurseryServer:
    """A server on a data directory that can be killed and started often."""

    def __init__(self, data_dir: Path, environment: Mapping[str, str]) -> None:
        self.data_dir = data_dir
        self.url = ""
        self.pid = 0  # 0: none runs
        self._buffer = b""
        self._log = data_dir.with_name("server.log").open("ab")
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "crash.nursery"],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "STILLFRAME_DATA_DIR": str(data_dir),
                "STILLFRAME_LISTEN": "127.0.0.1:0",
                **environment,
            },
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

    def start(self) -> None:
        """Start a server and wait for its ready line. Raises AssertionError when it has none."""
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(b"\n")
        self._nursery.stdin.flush()
        self.pid = int(self._line().removeprefix(PID))
        line = self._line()
        match = READY.search(line)
        if match is None:
            self.pid = 0
            words = Path(self._log.name).read_text(errors="replace")[-2000:]
            raise AssertionError(f"the server does not start ({line!r}): {words}")
        self.url = match[0].decode()

    def stop(self, number: int) -> None:
        """Send a signal, if it still runs, and wait for its end."""
        if self.pid:
            self.signal(number)
            while self._line() != ENDED:
                pass
            self.pid = 0

    def signal(self, number: int) -> None:
        """Send a signal; nothing is said if it is dead already."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def vmm_pids(self) -> list[int]:
        """VMM processes that work on this data directory."""
        return processes_naming(self.data_dir / "instances")

    def close(self) -> None:
        """End the server, and what it was forked from, which may have been ended already."""
        if self.pid:
            self.signal(9)
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.close()
        self._nursery.wait(START_DEADLINE)
        self._nursery.stdout.close()
        self._log.close()

    def _line(self) -> bytes:
        assert self._nursery.stdout is not None
        descriptor = self._nursery.stdout.fileno()
        while b"\n" not in self._buffer:
            if not select.select([descriptor], [], [], START_DEADLINE)[0]:
                raise AssertionError("the server says nothing")
            data = os.read(descriptor, 65536)
            assert data, "the nursery of servers is gone"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def main() -> None:
    """Fork a server for each line; see the module's text."""
    for name in (*_LOADED, *_ours()):
        with contextlib.suppress(ModuleNotFoundError):  # what is optional, and not here
            importlib.import_module(name)
    from typer.main import get_command

    from stillframe.cli.main import app

    command = get_command(app)
    _build_routes()
    gc.freeze()  # a collection in the child would write to, and so copy, every page of it
    for _ in sys.stdin:
        if (pid := os.fork()) == 0:
            print(PID.decode() + str(os.getpid()), flush=True)
            command.main(["serve"], prog_name="stillframe", standalone_mode=False)
            os._exit(0)
        os.waitpid(pid, 0)
        print(ENDED.decode(), flush=True)


def _build_routes() -> None:
    """Have the routes built, which takes most of a server's first request, and used by all."""
    built = api.bare_app(stillframe.__version__)
    TestClient(built).get("/nowhere")  # it is looked for among all of them
    setattr(api, "bare_app", lambda _: built)  # noqa: B010 - a plain assignment is a type error


def _ours() -> Iterator[str]:
    for module in pkgutil.walk_packages(stillframe.__path__, "stillframe."):
        if not module.name.endswith("__main__"):
            yield module.name


if __name__ == "__main__":
    main()
