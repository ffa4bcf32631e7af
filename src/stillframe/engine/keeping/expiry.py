"""When an instance is deleted by itself: set at its creation, changed later, never inherited.

The scheduler deletes it by the ordinary verb once the believed clock (``clock.py``) says so.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from stillframe.engine.context import Context
from stillframe.model.errors import Conflict, InvalidRequest, InvalidState
from stillframe.model.states import InstanceState
from stillframe.model.units import to_utc
from stillframe.model.values import Instance


def deadline(
    context: Context, expires_at: datetime | None, lifetime: timedelta | None
) -> datetime | None:
    """The time of deletion: ``expires_at``, or ``lifetime`` from now on, of which zero is none.

    Raises InvalidRequest (``invalid_expires_at``, ``invalid_ttl``) for both, or what cannot be.
    """
    now = context.now()
    if expires_at is not None and lifetime is not None:
        raise InvalidRequest("give expires_at or ttl, not both")
    if expires_at is not None:
        expires_at = to_utc(expires_at, what="expires_at", code="invalid_expires_at")
        if expires_at <= now:
            raise InvalidRequest("expires_at is in the past", code="invalid_expires_at")
        return expires_at
    if not lifetime:
        return None
    if lifetime < timedelta(0):
        raise InvalidRequest("ttl is negative", code="invalid_ttl")
    try:
        return now + lifetime
    except OverflowError as error:
        raise InvalidRequest("ttl ends after the year 9999", code="invalid_ttl") from error


async def set_expiry(
    context: Context,
    instance_id: str,
    believed: datetime,
    *,
    expires_at: datetime | None = None,
    lifetime: timedelta | None = None,
) -> Instance:
    """Change when an instance is deleted; a lifetime counts from the moment it is written.

    ``believed`` is the time that deletions go by. Raises NotFound, InvalidRequest, InvalidState (it
    is being made), Conflict (``instance_expired``).
    """
    deadline(context, expires_at, lifetime)  # what cannot be right need not wait for its turn
    async with context.exclusive(instance_id, "set expiry") as instance:
        if instance.state is InstanceState.CREATED:
            raise InvalidState("the instance is still being made", state=instance.state.value)
        if instance.expires_at is not None and instance.expires_at <= believed:
            raise Conflict("the instance has expired", code="instance_expired")
        moment = deadline(context, expires_at, lifetime)
        if moment == instance.expires_at:
            return instance
        until = f"expires at {moment.isoformat()}" if moment is not None else "does not expire"
        return context.commit(replace(instance, expires_at=moment), note=until)
