"""Programs are run with argument lists, told apart by identity, and proved dead."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from stillframe.host import process
from stillframe.model.errors import HostFailure, MissingComponent, Timeout, VmmFailure

SLEEP = ["sleep", "1000"]


@pytest.fixture
async def sleeper(tmp_path: Path) -> AsyncIterator[process.Process]:
    spawned = process.spawn(SLEEP, output=tmp_path / "log")
    yield spawned
    await spawned.kill()
    spawned.close()


async def test_output_and_code_come_back() -> None:
    done = await process.run(["cat"], input=b"hello", timeout=30)
    assert (done.returncode, done.stdout) == (0, b"hello")
    failed = await process.run(["false"], timeout=30, check=False)
    assert failed.returncode == 1


async def test_arguments_are_never_words_for_a_shell() -> None:
    done = await process.run(["echo", "$HOME; rm -rf x", "a b"], timeout=30)
    assert done.stdout == b"$HOME; rm -rf x a b\n"


async def test_a_failure_quotes_the_command_and_its_last_words() -> None:
    with pytest.raises(HostFailure, match="No such file") as failed:
        await process.run(["ls", "/nonexistent place"], timeout=30)
    assert "'/nonexistent place'" in (failed.value.hint or "")


async def test_a_missing_program_and_a_slow_one_are_told_apart() -> None:
    with pytest.raises(MissingComponent) as missing:
        await process.run(["no-such-program-here"], timeout=30)
    assert missing.value.facts["program"] == "no-such-program-here"
    with pytest.raises(Timeout):
        await process.run(SLEEP, timeout=0.1)


async def test_secrets_of_ours_are_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLFRAME_JWT_SECRET", "hush")
    done = await process.run(["env"], extra_environment={"GIVEN": "1"}, timeout=30)
    assert b"hush" not in done.stdout
    assert b"GIVEN=1\n" in done.stdout


async def test_a_spawned_program_has_a_session_of_its_own_and_no_core(
    sleeper: process.Process,
) -> None:
    pid = sleeper.identity.pid
    assert os.getsid(pid) == pid != os.getsid(0)
    limits = Path(f"/proc/{pid}/limits").read_text()
    core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]


async def test_kill_proves_the_death_and_reaps(sleeper: process.Process) -> None:
    assert sleeper.alive
    await sleeper.kill()
    assert not sleeper.alive
    assert not Path(f"/proc/{sleeper.identity.pid}").exists()
    await sleeper.kill()  # no error the second time


async def test_what_a_child_ended_with_is_known_unless_a_signal_ended_it(
    sleeper: process.Process, tmp_path: Path
) -> None:
    ended = process.spawn(["sh", "-c", "exit 7"], output=tmp_path / "ended")
    await ended.wait()
    assert ended.exit_code == 7
    await sleeper.kill()
    assert sleeper.exit_code is None


async def test_every_waiter_hears_of_a_death(sleeper: process.Process) -> None:
    waiters = [asyncio.create_task(sleeper.wait()) for _ in range(3)]
    given_up = asyncio.create_task(sleeper.wait())
    await asyncio.sleep(0)
    given_up.cancel()  # one who gives up takes nothing from the others
    os.kill(sleeper.identity.pid, signal.SIGTERM)
    async with asyncio.timeout(30):
        await asyncio.gather(*waiters)
    assert given_up.cancelled()


async def test_a_process_is_adopted_by_its_identity_only(sleeper: process.Process) -> None:
    """F29: another one with the same number is neither adopted nor ended."""
    adopted = process.adopt(sleeper.identity)
    assert adopted.alive
    for other in (
        replace(sleeper.identity, start_time=sleeper.identity.start_time + 1),
        replace(sleeper.identity, boot_id="another boot"),
    ):
        with pytest.raises(VmmFailure):
            process.adopt(other)
    await adopted.kill()
    async with asyncio.timeout(30):
        await sleeper.wait()
    with pytest.raises(VmmFailure):
        process.adopt(sleeper.identity)
    adopted.close()


async def test_close_leaves_the_process_running(sleeper: process.Process) -> None:
    other = process.adopt(sleeper.identity)
    other.close()
    assert sleeper.alive


async def test_what_a_program_says_before_it_ends_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    spawned = process.spawn([sys.executable, "-S", "-c", "print('last words')"], output=log)
    async with asyncio.timeout(30):
        await spawned.wait()
    spawned.close()
    assert log.read_text() == "last words\n"


def test_start_time_of_nobody() -> None:
    with pytest.raises(ProcessLookupError):
        process.start_time(2**22 + 1)
