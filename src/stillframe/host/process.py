"""The one door to other programs: argument lists, a minimal environment, proof of death.

``run`` is for programs that end by themselves, ``spawn`` for VMMs, which get a session of their own
and outlive us. A process is told apart from later ones with its number by start time and boot id,
and waited for by its pidfd (pidfd_open(2)): no threads, no polling, child or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from stillframe.host.darwin import processes as darwin
from stillframe.model.errors import HostFailure, MissingComponent, NotSupported, Timeout, VmmFailure
from stillframe.model.values import ProcessIdentity

Argument = str | Path
_KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL")
_PRIVATE_MEMORY = re.compile(r"^Private_(?:Clean|Dirty): +(\d+) kB$", re.MULTILINE)
_KILL_WAIT = 30.0  # seconds until an unkillable process is an error


@dataclass(frozen=True, slots=True)
class Completed:
    """How a program ended and what it printed."""

    returncode: int
    stdout: bytes
    stderr: bytes


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The minimal environment programs are given: paths and language, no secrets of ours."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **kept, **(extra or {})}


def run_blocking(
    arguments: Sequence[Argument],
    *,
    input: bytes | None = None,
    stdin: int | IO[bytes] | None = None,
    cwd: Path | None = None,
    extra_environment: Mapping[str, str] | None = None,
    timeout: float,
    check: bool = True,
) -> Completed:
    """Run a program to its end (from a thread); kills it after ``timeout`` seconds.

    Raises MissingComponent when there is no such program, Timeout, and with ``check`` HostFailure
    for a failure, quoting the command and its last words.
    """
    command = [str(argument) for argument in arguments]
    source = None if input is not None else (subprocess.DEVNULL if stdin is None else stdin)
    try:
        done = subprocess.run(
            command, input=input, stdin=source, capture_output=True, cwd=cwd,
            env=environment(extra_environment), timeout=timeout, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise missing_program(command[0]) from error
    except PermissionError as error:
        raise MissingComponent(f"{command[0]} may not be executed") from error
    except subprocess.TimeoutExpired as error:
        raise Timeout(f"{shlex.join(command)} did not end within {timeout:.0f} s") from error
    completed = Completed(done.returncode, done.stdout, done.stderr)
    if check and done.returncode != 0:
        raise failure(command, completed)
    return completed


async def run(
    arguments: Sequence[Argument],
    *,
    input: bytes | None = None,
    stdin: int | IO[bytes] | None = None,
    cwd: Path | None = None,
    extra_environment: Mapping[str, str] | None = None,
    timeout: float,
    check: bool = True,
) -> Completed:
    """``run_blocking`` in a worker thread."""
    return await asyncio.to_thread(
        run_blocking, arguments, input=input, stdin=stdin, cwd=cwd,
        extra_environment=extra_environment, timeout=timeout, check=check,
    )  # fmt: skip


def missing_program(name: str) -> MissingComponent:
    """The error for a program that is not installed."""
    return MissingComponent(
        f"the program {name!r} is not installed",
        hint="run `make setup`, or install it with apt-get",
        program=name,
    )


def failure(command: Sequence[str], completed: Completed) -> HostFailure:
    """The error for a program that failed: by which signal or code, and its last words."""
    code = completed.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
    words = completed.stderr.decode(errors="replace").strip().splitlines()[-3:]
    return HostFailure(
        f"{Path(command[0]).name} {how}: {' / '.join(words) or 'no message'}",
        hint=f"the command was: {shlex.join(command)}",
    )


def private_memory(pid: int) -> int:
    """Bytes that only this process holds (smaps_rollup of proc(5)). Raises HostFailure."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError as error:
        raise HostFailure(f"process {pid} cannot be looked at: {error.strerror}") from error
    return 1024 * sum(map(int, _PRIVATE_MEMORY.findall(text)))


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """What a process has taken: seconds of processors, bytes resident and mapped."""

    cpu_seconds: float
    resident_bytes: int
    virtual_bytes: int


def process_use(identity: ProcessIdentity) -> ProcessUse:
    """Fields 14, 15, 23 and 24 of /proc/PID/stat (proc(5)). Raises HostFailure when it has ended.

    Raises NotSupported on macOS, whose kernel does not tell.
    """
    if sys.platform == "darwin":
        raise NotSupported("what a process takes is not measured on macOS")
    try:
        fields = _stat_fields(identity.pid)
    except ProcessLookupError:
        fields = []
    if not fields or (int(fields[19]), boot_id()) != (identity.start_time, identity.boot_id):
        raise HostFailure(f"process {identity.pid} has ended")
    ticks = int(fields[11]) + int(fields[12])
    return ProcessUse(
        cpu_seconds=ticks / os.sysconf("SC_CLK_TCK"),
        resident_bytes=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        virtual_bytes=int(fields[20]),
    )


@cache
def boot_id() -> str:
    """This boot of the host (/proc/sys/kernel/random/boot_id; macOS: kern.bootsessionuuid)."""
    if sys.platform == "darwin":
        return darwin.boot_session()
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat: clock ticks since boot. Raises ProcessLookupError.

    On macOS microseconds since 1970: either tells two processes of one boot apart.
    """
    if sys.platform == "darwin":
        return darwin.start_time(pid)
    return int(_stat_fields(pid)[19])


def _stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from field 3 on, of a process that lives. Raises ProcessLookupError."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessLookupError(pid) from error
    # The name in parentheses may itself contain spaces and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    return fields


def _open_exit(pid: int) -> int:
    """A descriptor that is readable once the process has ended. Raises OSError."""
    if sys.platform == "darwin":
        return darwin.open_exit(pid)
    return os.pidfd_open(pid)


class Process:
    """A process by pidfd. ``wait`` and ``kill`` work for adopted processes as for children."""

    def __init__(self, identity: ProcessIdentity, pidfd: int) -> None:
        self.identity = identity
        self._pidfd = pidfd
        # Once it has ended: what it ended with, if it is our child and no signal ended it.
        self.exit_code: int | None = None
        self._gone: asyncio.Future[None] | None = None
        self._ended = False

    async def wait(self) -> None:
        """Return when the process is gone (and reaped, if it is our child)."""
        if self._ended:
            return
        if self._gone is None:
            loop = asyncio.get_running_loop()
            self._gone = loop.create_future()
            loop.add_reader(self._pidfd, self._readable)
        await asyncio.shield(self._gone)

    def _readable(self) -> None:
        self._ended = True
        asyncio.get_running_loop().remove_reader(self._pidfd)
        if sys.platform == "darwin":
            darwin.reap(self.identity.pid)
        else:
            self._reap()
        self._release()
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError, OSError):
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
            if ended is not None and ended.si_code == os.CLD_EXITED:
                self.exit_code = ended.si_status

    @property
    def alive(self) -> bool:
        """Whether it still runs, as far as the kernel says now."""
        if self._ended:
            return False
        try:
            return start_time(self.identity.pid) == self.identity.start_time
        except ProcessLookupError:
            return False

    async def kill(self) -> None:
        """SIGKILL and wait for the death. Raises VmmFailure if it cannot be ended."""
        if self._ended:
            return
        with contextlib.suppress(ProcessLookupError):
            self._signal_death()
        try:
            async with asyncio.timeout(_KILL_WAIT):
                await self.wait()
        except TimeoutError as error:
            raise VmmFailure(
                f"process {self.identity.pid} does not end", pid=self.identity.pid
            ) from error

    def _signal_death(self) -> None:
        if sys.platform != "darwin":
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        elif self.alive:  # by number: not a later process that has it
            os.kill(self.identity.pid, signal.SIGKILL)

    def close(self) -> None:
        """Stop watching; the process runs on."""
        if self._gone is not None and not self._ended:
            asyncio.get_running_loop().remove_reader(self._pidfd)
        self._ended = True
        self._release()

    def _release(self) -> None:
        """Close the descriptor: of a process that has ended nobody asks anything more by it."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def spawn(
    arguments: Sequence[Argument],
    *,
    output: Path,
    standard_output: Path | None = None,
    pass_fds: Sequence[int] = (),
    cwd: Path | None = None,
    extra_environment: Mapping[str, str] | None = None,
) -> Process:
    """Start a program that outlives us: own session, output appended to a file, no core dumps.

    ``standard_output`` is another file for that, and leaves errors to ``output``.
    Raises MissingComponent, HostFailure.
    """
    command = [str(argument) for argument in arguments]
    with _appending(output) as errors, _appending(standard_output or output) as words:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=words, stderr=errors, cwd=cwd,
                env=environment(extra_environment), pass_fds=tuple(pass_fds),
                start_new_session=True, umask=0o077,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise missing_program(command[0]) from error
        except OSError as error:
            raise HostFailure(f"{command[0]} could not be started: {error.strerror}") from error
    # Guest memory must not end up in a core file.
    if sys.platform != "darwin":  # there a VMM has to see to that itself
        with contextlib.suppress(ProcessLookupError, PermissionError):
            resource.prlimit(child.pid, resource.RLIMIT_CORE, (0, 0))
    try:
        pidfd = _open_exit(child.pid)
    except OSError as error:  # no descriptor is left: nobody would know it
        child.kill()
        child.wait()
        raise HostFailure(f"{command[0]} cannot be watched: {error.strerror}") from error
    child.returncode = 0  # we reap it by pidfd; Popen must not warn or wait
    try:
        started = start_time(child.pid)
    except ProcessLookupError:
        started = 0  # it has ended already; wait() tells
    return Process(ProcessIdentity(child.pid, started, boot_id()), pidfd)


@contextlib.contextmanager
def _appending(path: Path) -> Iterator[int]:
    """A descriptor of a log, for appending. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def adopt(identity: ProcessIdentity) -> Process:
    """The process of that identity, started by an earlier server. Raises VmmFailure if gone."""
    try:
        pidfd = _open_exit(identity.pid)
    except (ProcessLookupError, OSError) as error:
        raise VmmFailure(f"process {identity.pid} is gone") from error
    try:
        same = identity.boot_id == boot_id() and start_time(identity.pid) == identity.start_time
    except ProcessLookupError:
        same = False
    if not same:
        os.close(pidfd)
        raise VmmFailure(f"process {identity.pid} is gone")
    return Process(identity, pidfd)
