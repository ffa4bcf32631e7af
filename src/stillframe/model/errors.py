"""Every error Stillframe answers with: one tree, one file.

    StillframeError                     code / HTTP status given by the class
    ├── InvalidRequest      400         a value that can never be right
    ├── Unauthorized        401         no token, or a bad one
    ├── Forbidden           403         the token lacks the scope
    ├── NotFound            404         nothing by that id, name or prefix
    ├── Conflict            409         right request, wrong moment
    │   ├── InvalidState    409           the instance's state forbids it
    │   ├── NameConflict    409           the name is taken
    │   ├── Ambiguous       409           the prefix matches several
    │   └── InsufficientResources 409     the host has not enough left
    ├── RateLimited         429         too much of it at once
    ├── NotSupported        501         this hypervisor or build cannot
    ├── HostFailure         500         this machine let us down
    │   ├── MissingComponent 500          a binary, kernel or permission is absent
    │   ├── StorageFull     507           no space left
    │   ├── VmmFailure      500           the VMM refused, died or hung
    │   ├── GuestFailure    500           the guest agent refused or is silent
    │   └── DamagedData     500           stored bytes are not what was written
    └── Timeout             504         a deadline passed

``code`` is the contract's machine-readable word. ``facts`` are the particulars (ids, states,
sizes) and appear in the answer's ``details``. ``hint`` tells a person what to do next.
"""

from __future__ import annotations

from typing import ClassVar


class StillframeError(Exception):
    """Root of all errors that reach a caller.

    ``message`` is one sentence for a person; ``code`` overrides the class's contract code;
    ``hint`` is what to do about it; every other keyword is a fact kept in ``facts``.
    """

    default_code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500

    def __init__(
        self, message: str, *, code: str | None = None, hint: str | None = None, **facts: object
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint
        self.facts = facts


class InvalidRequest(StillframeError):
    """A value in the request can never be right; nothing was touched."""

    default_code, status = "invalid_request", 400


class Unauthorized(StillframeError):
    """No token, or one that does not verify."""

    default_code, status = "Unauthorized", 401


class Forbidden(StillframeError):
    """The token is genuine but lacks the scope."""

    default_code, status = "Forbidden", 403


class NotFound(StillframeError):
    """Nothing is known by that id, name or prefix."""

    default_code, status = "not_found", 404


class Conflict(StillframeError):
    """The request is right but not now."""

    default_code, status = "conflict", 409


class InvalidState(Conflict):
    """The state of the instance forbids the operation."""

    default_code = "invalid_state"


class NameConflict(Conflict):
    """The name is already taken."""

    default_code = "name_conflict"


class Ambiguous(Conflict):
    """A prefix matches more than one object."""

    default_code = "ambiguous"


class InsufficientResources(Conflict):
    """The host has not enough memory, CPU or disk left."""

    default_code = "insufficient_resources"


class RateLimited(StillframeError):
    """Too many of these are under way."""

    default_code, status = "rate_limited", 429


class NotSupported(StillframeError):
    """This hypervisor, host or build cannot do it."""

    default_code, status = "not_supported", 501


class HostFailure(StillframeError):
    """The host failed us; what was begun has been undone."""


class MissingComponent(HostFailure):
    """A program, kernel or permission is missing on this host."""

    default_code = "dependency_missing"


class StorageFull(HostFailure):
    """No space (or quota) is left in the data directory."""

    default_code, status = "storage_full", 507


class VmmFailure(HostFailure):
    """The VMM refused a command, died or did not answer."""

    default_code = "hypervisor_error"


class GuestFailure(HostFailure):
    """The guest agent refused, broke off or did not answer."""

    default_code = "guest_agent_error"


class DamagedData(HostFailure):
    """Stored bytes differ from what their manifest says."""

    default_code = "damaged"


class Timeout(StillframeError):
    """A deadline passed before the operation finished."""

    default_code, status = "timeout", 504
