"""A sample of the crash harness, and the faults of the catalogue, each by its id.

`make crash` tries every call of every verb; here is the place that each id names.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from crash.harness import Bench, open_bench, try_verb
from crash.injection import Fault
from crash.many import make_many
from crash.random_kills import kill_at_random
from crash.verbs import VERBS
from crash.world import running_world

VERB = {verb.name: verb for verb in VERBS}
SNAPSHOT, FORK, PLACE = "snapshot of Running", "fork to Running", "restore in place to Running"


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with open_bench() as opened:
        yield opened


# A snapshot's directory gets its name, an id of 24 characters, when all in it is durable.
COMMITTED = "rename */snapshots/[!.]" + "?" * 23

# Where the server is killed: the verb, the call as inject.c names it, and which of those.
KILLS = {
    "F01 before the name is reserved": (SNAPSHOT, "pwrite64 *.db-wal", 1),
    "F02 after the reservation": (SNAPSHOT, "mkdir */snapshots/.*.new", 1),
    "F03 after the pause": (SNAPSHOT, "send to a VMM", 2),
    "F04 after the device state": (SNAPSHOT, "create */snapshots/.*.new/overlay.raw", 1),
    "F05 while memory is written": (SNAPSHOT, "* */snapshots/.*.new/memory", 3),
    "F06 after memory, before its digests": (SNAPSHOT, "create */memory.blake3", 1),
    "F07 between two files": (SNAPSHOT, "create */overlay.raw.blake3", 1),
    "F08 before the manifest": (SNAPSHOT, "create */.manifest.json.new", 1),
    "F09 before the rename": (SNAPSHOT, COMMITTED, 1),
    "F10 before the directory is durable": (SNAPSHOT, "fsync */data/snapshots", 1),
    "F11 before the source is resumed": (SNAPSHOT, "send to a VMM", 3),
    "F12 before the answer": (SNAPSHOT, "send to a client", 1),
    "F13 compress: mid-stream": ("compress", "pwrite* */snapshots/*/.memory.zst.new", 1),
    "F14 compress: before the switch": ("compress", "rename */snapshots/*/memory.zst", 1),
    "F15 compress: before the old goes": ("compress", "unlink */snapshots/*/memory", 1),
    "F16 before the disk of a fork": (FORK, "create */overlay.raw", 1),
    "F17 after the VMM was started": (FORK, "connect to a VMM", 1),
    "F18 after the record, before the first step": (FORK, "send to a VMM", 2),
    "F19 after the old state was set aside": (PLACE, "fsync */data/instances", 1),
    "F20 after the swap": (PLACE, "connect to a VMM", 1),
    "F21 delete: before the first file": ("delete snapshot", "unlink */snapshots/*", 1),
    "F22 delete: between files": ("delete snapshot", "unlink */snapshots/*", 3),
    "F22 delete instance: between files": ("delete instance", "unlink */instances/*", 3),
    "F23 between create and prune": ("scheduled run", "unlink */snapshots/*", 1),
}


@pytest.mark.parametrize(("verb", "only", "number"), KILLS.values(), ids=list(KILLS))
def test_kill_at(bench: Bench, verb: str, only: str, number: int) -> None:
    tally = try_verb(bench, VERB[verb], Fault.KILL, points=[number], only=only)
    assert tally.failures == []
    assert tally.points == 1, f"{verb} makes no such call: {only}"


def test_kill_at_f24_during_recovery_itself(bench: Bench) -> None:
    stage = bench.stage()
    world, stage.name = stage.world, bench.fresh_name()
    world.injector.arm(Fault.KILL, 1, "connect to a VMM")
    assert VERB[FORK].request(stage)[0] == 0
    for call in ("unlink */instances/*", "rmdir */instances/*", "pwrite64 *.db-wal"):
        world.injector.arm(Fault.KILL, 1, call)
        with pytest.raises(AssertionError):  # no ready line
            world.restart()
        assert world.injector.disarm().struck, call
    world.restart()
    world.check_everything()
    stage.check()
    assert world.instance(stage.name) is None
    assert VERB[FORK].request(stage)[0] == 201
    world.delete(stage.name)


def test_f39_a_reboot_of_the_host(bench: Bench) -> None:
    world, stage = bench.stage().world, bench.stage()
    world.server.stop(signal.SIGKILL)
    for pid in world.server.vmm_pids():
        os.kill(pid, signal.SIGKILL)
    world.restart()
    world.expect(stage.source, "Stopped")
    world.check_everything()
    world.must("POST", f"/instances/{stage.asleep}/restore")
    world.expect(stage.asleep, "Running", "of-asleep")
    bench.spoiled()


STORAGE = {
    "F41 ENOSPC": Fault.NO_SPACE,
    "F41 a disk that stays full": Fault.FULL,
    "F43 EDQUOT": Fault.QUOTA,
    "F43 EROFS": Fault.READ_ONLY,
    "F43 EIO at write": Fault.EIO_WRITE,
    "F44 EIO at fsync": Fault.EIO_FSYNC,
}


@pytest.mark.parametrize("fault", STORAGE.values(), ids=list(STORAGE))
def test_storage_fails(bench: Bench, fault: Fault) -> None:
    for verb in (SNAPSHOT, "create", FORK, "standby", PLACE):
        tally = try_verb(bench, VERB[verb], fault, points=[2, 7])
        assert tally.failures == []
        assert tally.points


def test_f41_a_full_disk_keeps_no_server_from_starting(bench: Bench) -> None:
    stage, verb = bench.stage(), VERB["scheduled run"]
    world, stage.name = stage.world, bench.fresh_name()
    verb.prepare(stage)
    world.injector.arm(Fault.KILL, 1, "mkdir */snapshots/.*.new")
    assert verb.request(stage)[0] == 0
    # All but opening for writing, where the injector cannot tell what is there from what is new,
    # and SQLite's shared index (-shm), which gets the blocks again that it gave back just before.
    world.injector.arm(Fault.FULL, 1, "[!c]*[!m]")
    world.restart()  # it has a run to settle, and its own address to write down
    assert world.injector.disarm().struck
    world.must("PATCH", f"/snapshots/{stage.live}", {"description": "there is room again"})
    world.must("POST", f"/instances/{stage.subject}/snapshot-schedule/run")
    assert verb.complete(stage)
    verb.cleanup(stage)
    stage.check()
    world.check_everything()


def test_f42_a_disk_that_will_be_full_is_refused_before_the_pause(tmp_path: Path) -> None:
    with running_world(tmp_path, STILLFRAME_LIMITS_MIN_FREE="1000000GB") as world:
        source = world.boot("source", "of-source")
        world.injector.arm(Fault.KILL, 1, "send to a VMM")  # a pause would be said to it
        status, answer = world.request(
            "POST", f"/instances/{source}/snapshots", {"kind": "Standby", "name": "wanted"}
        )
        assert not world.injector.disarm().struck
        assert (status, answer["code"]) == (507, "storage_full")
        world.expect(source, "Running", "of-source")
        world.check_everything()


def test_f44_a_commit_whose_fsync_failed_is_not_found_done_after_a_crash(bench: Bench) -> None:
    tally = try_verb(
        bench, VERB[SNAPSHOT], Fault.EIO_FSYNC_KILL, points=[1, 2], only="f*sync *.db-wal"
    )
    assert tally.failures == []
    assert tally.points == 2


OTHERS = [name for name in VERB if name not in {verb for verb, _, _ in KILLS.values()}]


# A call in the middle of each; it comes sooner in those that touch less.
MIDDLE = {
    "stop": 8,
    "delete image": 8,
    "end of warm forks": 10,
    "export": 2,
    "edit snapshot": 3,
    "set schedule": 3,
    "end schedule": 3,
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_verb_survives_a_kill_in_its_middle(bench: Bench, name: str) -> None:
    tally = try_verb(bench, VERB[name], Fault.KILL, points=[MIDDLE.get(name, 17)])
    assert tally.failures == []
    assert tally.points == 1


def test_kills_at_random_lose_nothing(tmp_path: Path) -> None:
    with running_world(tmp_path) as world:
        assert kill_at_random(world, 3, seed=1).promised > 0


def test_a_thousand_snapshots_do_not_hold_up_a_start(tmp_path: Path) -> None:
    make_many(tmp_path / "data", 1000)
    with running_world(tmp_path) as world:
        assert len(world.must("GET", "/snapshots")) == 1000
        began = time.monotonic()
        world.restart()  # the first start loaded the program, too
        assert time.monotonic() - began < 5  # seconds: what is promised
        (found,) = world.must("GET", "/snapshots?tags[number]=7")
        assert found["name"] == "snapshot-7"


def test_a_thousand_snapshots_do_not_hold_up_a_start_after_a_kill_at_work(tmp_path: Path) -> None:
    make_many(tmp_path / "data", 1000)
    with running_world(tmp_path) as world:
        guests = {name: world.boot(name, f"of-{name}") for name in ("one", "two")}
        wish = {"kind": "Standby", "name": "wanted"}
        for call in ("create */memory.blake3", "send to a VMM", COMMITTED):
            world.injector.arm(Fault.KILL, 1, call)
            assert world.request("POST", f"/instances/{guests['one']}/snapshots", wish)[0] == 0
            assert world.injector.disarm().struck
            world.restart()
            assert world.intents() == []
            for name, identifier in guests.items():
                world.expect(identifier, "Running", f"of-{name}")
        # One may be late on a machine that does other things: what is promised goes for most.
        assert median(world.starts[1:]) < 5
        kept = {snapshot["id"] for snapshot in world.must("GET", "/snapshots")}
        assert len(kept) == 1000
        assert {path.name for path in world.data.snapshots.iterdir()} == kept
        assert world.request("POST", f"/instances/{guests['one']}/snapshots", wish)[0] == 201
