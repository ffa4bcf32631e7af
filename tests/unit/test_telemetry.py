"""Measurements: what a scrape shows after verbs succeeded, failed, and things came to exist."""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stillframe.engine.interface import EngineInterface, ForkOutcome, ForkRequest, WarmStatus
from stillframe.engine.telemetry import VERBS, Operation, Telemetry, count_failures
from stillframe.model.errors import InvalidState, NotFound, StorageFull
from stillframe.model.states import InstanceState
from stillframe.model.values import Instance, Snapshot
from support.api_double import instance, snapshot
from support.engine import open_engine

SOURCE = Path(__file__).resolve().parents[2] / "src/stillframe"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scraped(text: bytes) -> Samples:
    """Every sample of a scrape by its name and labels, as Prometheus' own parser reads it."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    """The value of ``stillframe_<name>`` with exactly these labels."""
    return samples.get((f"stillframe_{name}", frozenset(labels.items())))


def telemetry(instances: Sequence[Instance] = (), snapshots: Sequence[Snapshot] = ()) -> Telemetry:
    return Telemetry(lambda: instances, lambda: snapshots)


def test_an_operation_is_measured_whole_and_by_phase() -> None:
    measured = telemetry()
    measured.observe("fork", {"load": 55.0, "resume": 0.5, "total": 80.0})
    measured.observe(Operation.FORK, {"load": 65.0, "total": 90.0})
    samples = scraped(measured.render())
    whole, phase = "operation_duration_seconds", "phase_duration_seconds"
    assert value(samples, f"{whole}_count", operation="fork") == 2
    assert value(samples, f"{whole}_sum", operation="fork") == pytest.approx(0.170)
    assert value(samples, f"{phase}_sum", operation="fork", phase="load") == pytest.approx(0.120)
    assert value(samples, f"{phase}_count", operation="fork", phase="resume") == 1
    assert value(samples, f"{phase}_count", operation="fork", phase="total") is None


@pytest.mark.parametrize("operation", ["fork", "warm_fork"])
def test_buckets_tell_milliseconds_apart_and_reach_a_minute(operation: str) -> None:
    measured = telemetry()
    for milliseconds in (0.9, 1.9, 4.9, 20_000, 59_000, 61_000):
        measured.observe(operation, {"total": milliseconds})
    samples = scraped(measured.render())
    counts = [
        value(samples, "operation_duration_seconds_bucket", operation=operation, le=edge)
        for edge in ("0.001", "0.002", "0.005", "30.0", "60.0", "+Inf")
    ]
    assert counts == [1, 2, 3, 4, 5, 6]


def test_pauses_are_measured_in_seconds() -> None:
    measured = telemetry()
    measured.observe_pause(12.5)
    samples = scraped(measured.render())
    assert value(samples, "snapshot_pause_seconds_sum") == pytest.approx(0.0125)
    assert value(samples, "snapshot_pause_seconds_bucket", le="0.015") == 1
    assert value(samples, "snapshot_pause_seconds_bucket", le="0.01") == 0


def test_labels_are_a_closed_set_whatever_is_observed() -> None:
    measured = telemetry()
    for number in range(500):
        measured.observe(f"fork of {number}", {f"phase-{number}": 1.0, "total": 1.0})
        measured.count_failure(Operation.FORK, StorageFull("full", code=f"code-{number}"))
    samples = scraped(measured.render())
    assert value(samples, "operation_duration_seconds_count", operation="other") == 500
    labels = {name: set[str]() for name in ("operation", "phase", "code")}
    for _, pairs in samples:
        for name, text in pairs:
            labels.setdefault(name, set()).add(text)
    assert len(labels["operation"]) == 2
    assert len(labels["phase"]) == len(labels["code"]) == 65
    assert value(samples, "operation_failures_total", operation="fork", code="other") == 436


def test_every_phase_of_the_engine_has_a_name_written_in_the_source() -> None:
    names = set()
    for path in (SOURCE / "engine").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".measure"):
                (argument,) = node.args
                assert isinstance(argument, ast.Constant), f"{path.name}:{node.lineno}"
                names.add(argument.value)
    assert {"load", "resume", "identify"} <= names
    assert len(names) < 64


def test_what_exists_is_counted_when_it_is_asked_for() -> None:
    instances, snapshots = [instance("a"), instance("b")], list[Snapshot]()
    measured = telemetry(instances, snapshots)
    samples = scraped(measured.render())
    assert value(samples, "instances", state="Running") == 2
    assert value(samples, "instances", state="Standby") == 0
    assert (value(samples, "snapshots"), value(samples, "snapshot_stored_bytes")) == (0, 0)
    instances[0] = instance("a", state=InstanceState.STANDBY)
    snapshots += [snapshot(instances[0]), snapshot(instances[1], stored_bytes=5000)]
    samples = scraped(measured.render())
    assert value(samples, "instances", state="Running") == 1
    assert value(samples, "instances", state="Standby") == 1
    assert (value(samples, "snapshots"), value(samples, "snapshot_stored_bytes")) == (2, 6024)


def test_warm_forks_are_summed_over_all_snapshots() -> None:
    measured = telemetry()
    samples = scraped(measured.render())
    assert value(samples, "warm_forks_target") == value(samples, "warm_forks_ready") == 0
    statuses = [WarmStatus(target=4, ready=1), WarmStatus(target=2, ready=2)]
    measured.watch_warm(lambda: statuses)
    samples = scraped(measured.render())
    assert (value(samples, "warm_forks_target"), value(samples, "warm_forks_ready")) == (6, 3)


def test_two_engines_do_not_share_their_measurements() -> None:
    one, other = telemetry(), telemetry()
    one.observe_pause(1)
    assert value(scraped(other.render()), "snapshot_pause_seconds_count") == 0


# -- failures ---------------------------------------------------------------------------------
@count_failures
class Verbs:
    """An engine in small: each verb raises or answers what it is given."""

    def __init__(self) -> None:
        self.context = SimpleNamespace(telemetry=telemetry(), under_way=nullcontext)

    async def snapshot(self, given: BaseException | str) -> str:
        """Raise or answer."""
        if isinstance(given, BaseException):
            raise given
        return given

    async def fork_many(self, snapshot_id: str, requests: list[ForkRequest]) -> list[ForkOutcome]:
        """Fail every fork but the first."""
        good, *bad = requests
        return [
            ForkOutcome(good.name, instance(good.name)),
            *(ForkOutcome(request.name, error=NotFound(snapshot_id)) for request in bad),
        ]

    async def exec(self) -> None:
        """No verb that is counted."""
        raise NotFound("nothing")


def failures(verbs: Verbs, **labels: str) -> float | None:
    return value(scraped(verbs.context.telemetry.render()), "operation_failures_total", **labels)


async def test_failures_are_counted_by_their_code_and_passed_on() -> None:
    verbs = Verbs()
    assert await verbs.snapshot("fine") == "fine"
    error = InvalidState("not now", code="conflict")
    for _ in range(2):
        with pytest.raises(InvalidState) as caught:
            await verbs.snapshot(error)
        assert caught.value is error
    with pytest.raises(ZeroDivisionError):
        await verbs.snapshot(ZeroDivisionError())
    with pytest.raises(NotFound):
        await verbs.exec()
    assert failures(verbs, operation="snapshot", code="conflict") == 2
    assert failures(verbs, operation="snapshot", code="internal_error") == 1
    assert failures(verbs, operation="snapshot", code="not_found") is None


async def test_a_request_that_was_given_up_is_no_failure() -> None:
    verbs = Verbs()
    with pytest.raises(asyncio.CancelledError):
        await verbs.snapshot(asyncio.CancelledError())
    assert b"operation_failures_total{" not in verbs.context.telemetry.render()


async def test_each_failed_one_of_many_forks_counts() -> None:
    verbs = Verbs()
    outcomes = await verbs.fork_many("s", [ForkRequest(name) for name in "abc"])
    assert [outcome.error is None for outcome in outcomes] == [True, False, False]
    assert failures(verbs, operation="fork", code="not_found") == 2


def test_every_counted_verb_is_a_verb_of_the_engine() -> None:
    for name in VERBS:
        assert inspect.iscoroutinefunction(getattr(EngineInterface, name)), name
    assert Verbs.snapshot.__doc__ == "Raise or answer."


async def test_the_engine_shows_what_it_has_and_what_failed(tmp_path: Path) -> None:
    async with open_engine(tmp_path) as engine:
        with pytest.raises(NotFound):
            await engine.stop("none")
        samples = scraped(engine.metrics())
    assert value(samples, "instances", state="Running") == 0
    assert value(samples, "operation_failures_total", operation="stop", code="not_found") == 1
