"""The instance state machine, as a table.

Verbs consult ``ALLOWED``; drivers know nothing of it. The rows follow the contract's
operation-by-state matrix: ``DO`` performs the verb, ``NOTHING`` answers 200 unchanged, and an
absent pair is refused with 409.
"""

from __future__ import annotations

from enum import StrEnum

from stillframe.model.errors import InvalidState


class InstanceState(StrEnum):
    """States of an instance, spelt as in the contract."""

    CREATED = "Created"
    INITIALIZING = "Initializing"
    RUNNING = "Running"
    PAUSED = "Paused"
    SHUTDOWN = "Shutdown"
    STOPPED = "Stopped"
    STANDBY = "Standby"
    UNKNOWN = "Unknown"

    @property
    def has_vmm(self) -> bool:
        """Whether a VMM process belongs to an instance in this state."""
        return self not in (InstanceState.STOPPED, InstanceState.STANDBY)

    @property
    def phase(self) -> str:
        """The billing phase: the state in lower case."""
        return self.value.lower()


class Verb(StrEnum):
    """Operations whose permission depends on the state."""

    START = "start"
    STOP = "stop"
    STANDBY = "standby"
    RESTORE = "restore"
    FORK = "fork"
    FORK_RUNNING = "fork from running"
    SNAPSHOT_STANDBY = "snapshot (Standby)"
    SNAPSHOT_STOPPED = "snapshot (Stopped)"
    RESTORE_SNAPSHOT = "restore a snapshot"
    GUEST = "exec"


class Permission(StrEnum):
    """What a verb does in a state where it is not refused."""

    DO = "do"
    NOTHING = "nothing"


_S = InstanceState
_DO, _NOTHING = Permission.DO, Permission.NOTHING

ALLOWED: dict[Verb, dict[InstanceState, Permission]] = {
    Verb.START: {_S.STOPPED: _DO, _S.RUNNING: _NOTHING, _S.INITIALIZING: _NOTHING},
    Verb.STOP: {_S.RUNNING: _DO, _S.INITIALIZING: _DO, _S.STOPPED: _NOTHING},
    Verb.STANDBY: {_S.RUNNING: _DO, _S.STANDBY: _NOTHING},
    Verb.RESTORE: {_S.STANDBY: _DO, _S.RUNNING: _NOTHING, _S.INITIALIZING: _NOTHING},
    Verb.FORK: {_S.STANDBY: _DO, _S.STOPPED: _DO},
    Verb.FORK_RUNNING: {_S.RUNNING: _DO, _S.STANDBY: _DO, _S.STOPPED: _DO},
    Verb.SNAPSHOT_STANDBY: {_S.RUNNING: _DO, _S.STANDBY: _DO},
    Verb.SNAPSHOT_STOPPED: {_S.STOPPED: _DO},
    Verb.RESTORE_SNAPSHOT: {_S.STANDBY: _DO, _S.STOPPED: _DO},
    Verb.GUEST: {_S.RUNNING: _DO},
}

# Single hops a live VM may make; multi-hop verbs are orchestrated from these.
TRANSITIONS: dict[InstanceState, frozenset[InstanceState]] = {
    _S.CREATED: frozenset({_S.INITIALIZING, _S.STOPPED, _S.UNKNOWN}),
    _S.INITIALIZING: frozenset({_S.RUNNING, _S.SHUTDOWN, _S.STOPPED, _S.UNKNOWN}),
    _S.RUNNING: frozenset(
        {_S.PAUSED, _S.INITIALIZING, _S.SHUTDOWN, _S.STOPPED, _S.STANDBY, _S.UNKNOWN}
    ),
    _S.PAUSED: frozenset({_S.RUNNING, _S.SHUTDOWN, _S.STANDBY, _S.STOPPED, _S.UNKNOWN}),
    _S.SHUTDOWN: frozenset({_S.STOPPED, _S.INITIALIZING, _S.UNKNOWN}),
    _S.STOPPED: frozenset({_S.CREATED, _S.INITIALIZING, _S.STANDBY}),
    _S.STANDBY: frozenset({_S.RUNNING, _S.INITIALIZING, _S.PAUSED, _S.STOPPED}),
    _S.UNKNOWN: frozenset({_S.STOPPED}),
}


def permission(verb: Verb, state: InstanceState, *, refusal_code: str | None = None) -> Permission:
    """Say whether ``verb`` acts or is a no-op in ``state``.

    Raises InvalidState (with ``refusal_code`` when the contract wants another code) if refused.
    """
    allowed = ALLOWED[verb].get(state)
    if allowed is not None:
        return allowed
    wanted = [s for s, p in ALLOWED[verb].items() if p is _DO]
    raise InvalidState(
        f"cannot {verb.value}: instance is {state.value}, must be "
        + " or ".join(one.value for one in wanted),
        code=refusal_code,
        hint=_way(verb, state, wanted),
        state=state.value,
    )


# From a state in which an instance stays to another: what to ask for.
_WAYS = {
    (_S.STANDBY, _S.RUNNING): "restore the instance first",
    (_S.STANDBY, _S.STOPPED): "restore the instance, then stop it",
    (_S.STOPPED, _S.RUNNING): "start the instance first",
    (_S.STOPPED, _S.STANDBY): "start the instance, then put it into standby",
    (_S.RUNNING, _S.STANDBY): "put the instance into standby, or stop it",
    (_S.RUNNING, _S.STOPPED): "stop the instance first",
}


def _way(verb: Verb, state: InstanceState, wanted: list[InstanceState]) -> str:
    """What to do so that the verb is possible."""
    if (verb, state) == (Verb.START, _S.STANDBY):
        return "restore the instance: its memory is in standby"
    if (verb, state) == (Verb.FORK, _S.RUNNING):
        return "with from_running=true it is forked while it runs on"
    ways = [_WAYS[state, one] for one in wanted if (state, one) in _WAYS]
    return ways[0] if ways else "wait until the instance has settled, or delete it"
