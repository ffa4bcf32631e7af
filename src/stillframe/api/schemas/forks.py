"""Forks of a snapshot on the wire: one, many at once, and those kept warm."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from pydantic import Field

from stillframe.api.schemas.base import Answer, Body, Env, Error, Int, Name, Tags
from stillframe.api.schemas.instances import InstanceAnswer
from stillframe.api.schemas.snapshots import SnapshotRestoreBody, TargetState
from stillframe.engine.interface import ForkRequest, WarmStatus
from stillframe.model.errors import InvalidRequest
from stillframe.model.states import InstanceState
from stillframe.model.units import check_name, check_tags

MAX_FORKS = 1000


class SnapshotForkBody(SnapshotRestoreBody):
    """A wish for a fork of a snapshot. Fields after ``name`` are Stillframe's own.

    ``tags`` take the place of the snapshot's; ``env`` is laid over its environment.
    """

    name: Name
    tags: Tags | None = None
    env: Env | None = None

    def parse(self) -> ForkRequest:
        """The request for the engine. Raises InvalidRequest for a bad name or tag."""
        return ForkRequest(
            name=check_name(self.name),
            target_state=self.state(),
            target_hypervisor=self.target_hypervisor,
            tags=None if self.tags is None else check_tags(self.tags),
            env=self.env,
        )


class ForkOverride(Body):
    """What one of many forks has of its own; ``tags`` and ``env`` are laid over the common ones."""

    name: Name | None = None
    target_state: TargetState | None = None
    tags: Tags | None = None
    env: Env | None = None


class SnapshotForksBody(SnapshotRestoreBody):
    """A wish for many forks at once.

    The i-th override is for the i-th fork, which is named by it, else ``<name_prefix>-<i>``
    counted from 1.
    """

    count: Annotated[Int, Field(ge=1, le=MAX_FORKS)]
    name_prefix: Name | None = None
    tags: Tags | None = None
    env: Env | None = None
    overrides: Annotated[list[ForkOverride], Field(max_length=MAX_FORKS)] | None = None

    def parse(self) -> list[ForkRequest]:
        """The requests for the engine, in order.

        Raises InvalidRequest for too many overrides, a fork without a name, a bad or repeated
        name, a bad tag.
        """
        overrides = list(self.overrides or ())
        if len(overrides) > self.count:
            raise InvalidRequest(
                f"{len(overrides)} overrides for {self.count} forks",
                hint="give at most one override for each fork",
            )
        overrides += [ForkOverride()] * (self.count - len(overrides))
        requests = [self._child(i, override) for i, override in enumerate(overrides, start=1)]
        names = Counter(request.name for request in requests)
        if repeated := [name for name, times in names.items() if times > 1]:
            raise InvalidRequest(
                f"more than one fork would be named {repeated[0]!r}",
                hint="give every fork a name of its own",
                names=repeated[:20],
            )
        return requests

    def _child(self, number: int, own: ForkOverride) -> ForkRequest:
        name = own.name
        if name is None:
            if self.name_prefix is None:
                raise InvalidRequest(
                    f"fork {number} has no name", hint="give name_prefix, or a name in overrides"
                )
            name = f"{self.name_prefix}-{number}"
        return ForkRequest(
            name=check_name(name),
            target_state=InstanceState(own.target_state) if own.target_state else self.state(),
            target_hypervisor=self.target_hypervisor,
            tags=_tags(self.tags, own.tags),
            env=_laid_over(self.env, own.env),
        )


def _tags(common: Tags | None, own: Tags | None) -> Tags | None:
    tags = _laid_over(common, own)
    return None if tags is None else check_tags(tags)


def _laid_over(common: dict[str, str] | None, own: dict[str, str] | None) -> dict[str, str] | None:
    return None if common is None and own is None else {**(common or {}), **(own or {})}


class ForkOutcomeAnswer(Answer):
    """What became of one fork: the instance, or the error that kept it from being."""

    name: str
    instance: InstanceAnswer | None = None
    error: Error | None = None

    def plain(self) -> dict[str, Any]:
        """The body as JSON-ready values, the instance as it is answered elsewhere."""
        body = super().plain()
        return body if self.instance is None else {**body, "instance": self.instance.plain()}


class ForksAnswer(Answer):
    """One outcome for each fork asked for, in that order."""

    outcomes: list[ForkOutcomeAnswer]
    succeeded: int
    failed: int

    def plain(self) -> dict[str, Any]:
        """The body as JSON-ready values."""
        return {
            "outcomes": [outcome.plain() for outcome in self.outcomes],
            "succeeded": self.succeeded,
            "failed": self.failed,
        }


class WarmBody(Body):
    """How many forks of a snapshot to keep loaded and waiting; 0 is none."""

    count: Annotated[Int, Field(ge=0, le=MAX_FORKS)]


class WarmAnswer(Answer):
    """The warm forks of a snapshot.

    ``memory_bytes`` is the host memory that the ready ones hold; ``limited_by`` says why there are
    fewer than wanted, when that will not change by itself.
    """

    target: int
    ready: int
    filling: int
    memory_bytes: int
    limited_by: str | None = None

    @classmethod
    def of(cls, status: WarmStatus) -> WarmAnswer:
        """The wire form of a warm status."""
        return cls(
            target=status.target,
            ready=status.ready,
            filling=status.filling,
            memory_bytes=status.memory_bytes,
            limited_by=status.limited_by,
        )
