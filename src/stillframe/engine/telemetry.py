"""Measurements for Prometheus: how long the verbs take and where, how often they fail, what exists.

Names and units follow Prometheus' conventions: seconds and bytes, counters end in ``_total``.
Every label has a closed set of values; ids and names never become one.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Any, TypeVar

import prometheus_client as prometheus
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from stillframe.engine.interface import ForkOutcome, WarmStatus
from stillframe.model.errors import StillframeError
from stillframe.model.states import InstanceState
from stillframe.model.values import Instance, Snapshot

# Seconds. A warm fork takes a few milliseconds, a boot under emulation many seconds.
_BUCKETS = (
    0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60,
)  # fmt: skip
# More than the verbs have; a label that grew without bound would fill the server's memory.
_MOST_VALUES = 64
_OTHER = "other"
E = TypeVar("E")


class Operation(StrEnum):
    """What is measured and counted; the values of the label ``operation``.

    ``fork`` starts a VMM for a fork of a snapshot, ``warm_fork`` takes one that waited;
    ``fork_instance`` has a capture before it when its source runs. ``compress`` happens in the
    background.
    """

    CREATE = "create"
    START = "start"
    STOP = "stop"
    DELETE = "delete"
    FORK = "fork"
    WARM_FORK = "warm_fork"
    FORK_INSTANCE = "fork_instance"
    SNAPSHOT = "snapshot"
    DELETE_SNAPSHOT = "delete_snapshot"
    STANDBY = "standby"
    RESTORE = "restore"
    RESTORE_SNAPSHOT = "restore_snapshot"
    COMPRESS = "compress"


_OPERATIONS = frozenset(Operation)
# The engine's verbs whose failures are counted. Which fork was to be a warm one is not known then.
VERBS: Mapping[str, Operation] = {
    "create": Operation.CREATE,
    "start": Operation.START,
    "stop": Operation.STOP,
    "delete": Operation.DELETE,
    "fork": Operation.FORK_INSTANCE,
    "fork_snapshot": Operation.FORK,
    "fork_many": Operation.FORK,
    "snapshot": Operation.SNAPSHOT,
    "delete_snapshot": Operation.DELETE_SNAPSHOT,
    "standby": Operation.STANDBY,
    "restore": Operation.RESTORE,
    "restore_snapshot": Operation.RESTORE_SNAPSHOT,
}


class Telemetry:
    """The measurements of one engine, in a registry of their own.

    ``instances`` and ``snapshots`` give what exists; they are called when somebody reads.
    """

    def __init__(
        self,
        instances: Callable[[], Iterable[Instance]],
        snapshots: Callable[[], Iterable[Snapshot]],
    ) -> None:
        self._registry = prometheus.CollectorRegistry()
        self._inventory = _Inventory(instances, snapshots)
        self._registry.register(self._inventory)
        self._phases_seen: set[str] = set()
        self._codes_seen: set[str] = set()
        self._operations = prometheus.Histogram(
            "stillframe_operation_duration_seconds",
            "Time from the request to the result of an operation that succeeded.",
            ["operation"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._phases = prometheus.Histogram(
            "stillframe_phase_duration_seconds",
            "Time spent in one phase of an operation that succeeded.",
            ["operation", "phase"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._pauses = prometheus.Histogram(
            "stillframe_snapshot_pause_seconds",
            "Time a guest stood still while a snapshot of it was taken.",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._failures = prometheus.Counter(
            "stillframe_operation_failures_total",
            "Operations that failed or were refused, by the code of the error.",
            ["operation", "code"],
            registry=self._registry,
        )

    def observe(self, operation: str, timings_ms: Mapping[str, float]) -> None:
        """Record an operation that succeeded: milliseconds by phase, ``total`` is the whole.

        ``operation`` is one of ``Operation``; any other is recorded as ``other``.
        """
        operation = operation if operation in _OPERATIONS else _OTHER
        for phase, milliseconds in timings_ms.items():
            if phase == "total":
                self._operations.labels(operation).observe(milliseconds / 1000)
            else:
                label = _bounded(phase, self._phases_seen)
                self._phases.labels(operation, label).observe(milliseconds / 1000)

    def observe_pause(self, pause_ms: float) -> None:
        """Record how many milliseconds a guest stood still for a snapshot."""
        self._pauses.observe(pause_ms / 1000)

    def count_failure(self, operation: Operation, error: Exception) -> None:
        """Count an operation that did not succeed under the code of its error."""
        code = error.code if isinstance(error, StillframeError) else StillframeError.default_code
        self._failures.labels(operation, _bounded(code, self._codes_seen)).inc()

    def watch_warm(self, statuses: Callable[[], Iterable[WarmStatus]]) -> None:
        """Say where the warm forks of every snapshot are told; until then there are none."""
        self._inventory.warm = statuses

    def render(self) -> bytes:
        """All measurements in Prometheus' text format, version 0.0.4."""
        return prometheus.generate_latest(self._registry)


def count_failures(engine: type[E]) -> type[E]:
    """Class decorator of the engine: failures of its ``VERBS`` are counted and passed on.

    The engine's ``context.telemetry`` counts them, its ``context.under_way`` those at work. Of many
    forks each failed outcome counts.
    """
    for name, operation in VERBS.items():
        verb = getattr(engine, name, None)
        if verb is not None:
            setattr(engine, name, _counting(verb, operation))
    return engine


def _counting(
    verb: Callable[..., Awaitable[Any]], operation: Operation
) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(verb)
    async def counting(self: Any, *arguments: Any, **keywords: Any) -> Any:
        telemetry: Telemetry = self.context.telemetry
        try:
            with self.context.under_way():
                result = await verb(self, *arguments, **keywords)
        except Exception as error:
            telemetry.count_failure(operation, error)
            raise
        for outcome in result if isinstance(result, list) else ():
            if isinstance(outcome, ForkOutcome) and outcome.error is not None:
                telemetry.count_failure(operation, outcome.error)
        return result

    return counting


def _bounded(value: str, seen: set[str]) -> str:
    if value not in seen and len(seen) >= _MOST_VALUES:
        return _OTHER
    seen.add(value)
    return value


class _Inventory(Collector):
    """What exists at the moment somebody reads."""

    def __init__(
        self,
        instances: Callable[[], Iterable[Instance]],
        snapshots: Callable[[], Iterable[Snapshot]],
    ) -> None:
        self._instances, self._snapshots = instances, snapshots
        self.warm: Callable[[], Iterable[WarmStatus]] = tuple

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges."""
        states = Counter(instance.state for instance in self._instances())
        by_state = GaugeMetricFamily(
            "stillframe_instances", "Instances, by their state.", labels=["state"]
        )
        for state in InstanceState:
            by_state.add_metric([state.value], states[state])
        yield by_state
        snapshots = list(self._snapshots())
        yield _gauge("stillframe_snapshots", "Snapshots.", len(snapshots))
        yield _gauge(
            "stillframe_snapshot_stored_bytes",
            "Disk space that all snapshots take.",
            sum(snapshot.stored_bytes for snapshot in snapshots),
        )
        warm = list(self.warm())
        yield _gauge(
            "stillframe_warm_forks_target",
            "Warm forks wanted, over all snapshots.",
            sum(status.target for status in warm),
        )
        yield _gauge(
            "stillframe_warm_forks_ready",
            "Warm forks that stand ready, over all snapshots.",
            sum(status.ready for status in warm),
        )


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_text, value=value)
