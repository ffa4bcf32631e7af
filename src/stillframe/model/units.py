"""Sizes, durations, names, tags and ids as people and the contract write them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from stillframe.model.errors import InvalidRequest

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4
# Bytes a second; QEMU takes no higher limit (THROTTLE_VALUE_MAX in its include/qemu/throttle.h).
MAX_RATE = 10**15

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*$", re.IGNORECASE)
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
LONGEST_DURATION = timedelta(seconds=9.2e9)  # a little less than Go's, of 2**63 nanoseconds
_LONGEST_TEXT = 64  # characters of a duration
_NANOSECONDS = {
    "ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6,
    "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9,
}  # fmt: skip
_BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTkmgt]?)bps\s*", re.ASCII)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_TAG_TEXT = re.compile(r"[A-Za-z0-9 _.:/=+@-]*")
_ID = re.compile(r"[a-z][a-z0-9]{23}")
_ID_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_ID_ALPHABET = _ID_LETTERS + "0123456789"


def parse_size(text: str, *, code: str = "invalid_size") -> int:
    """Bytes in a human size such as ``1GB``, ``512 MB`` or ``1073741824`` (units are 1024-based).

    Raises InvalidRequest with ``code`` when the text is not a positive size.
    """
    match = _SIZE.match(text) if len(text) < 64 else None
    if match is None:
        raise InvalidRequest(
            f"invalid size {text[:64]!r}", code=code, hint="write for example 512MB or 2GB"
        )
    number, unit = match.groups()
    factor = (
        1024 ** "KMGT".index(unit[0].upper()) * 1024 if unit[:1].upper() in "KMGT" and unit else 1
    )
    size = int(float(number) * factor) if "." in number else int(number) * factor
    if not 0 < size < 2**63:
        raise InvalidRequest(f"size {text!r} is out of range", code=code)
    return size


def format_size(size: int) -> str:
    """A size in bytes as the contract prints it: 1024-based with one decimal (``1.0 GB``)."""
    value = float(size)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1024:
            return f"{value:.1f} {unit}" if unit != "B" else f"{size} B"
        value /= 1024
    return f"{value:.1f} TB"


def parse_disk_rate(text: str, *, code: str = "invalid_disk_io_bps") -> int:
    """Bytes a second in ``100MB/s``, ``100MBps`` or ``100MB``. Raises InvalidRequest with ``code``.

    Here ``b`` is a byte in either case: the contract knows no bits of disks.
    """
    bare = text.strip()
    bare = next((bare[: -len(end)] for end in ("/s", "ps") if bare.lower().endswith(end)), bare)
    return _rate_in_range(parse_size(bare, code=code), text, code)


def parse_bandwidth(text: str, *, code: str) -> int:
    """Bytes a second in ``1Gbps`` (bits, 1000-based) or ``125MB/s`` (bytes, 1024-based).

    Raises InvalidRequest with ``code``, for ``MBps`` too: some read it as bits, some as bytes.
    """
    match = _BITS.fullmatch(text) if len(text) < 64 else None
    if match is not None:
        number, unit = match.groups()
        bits = float(number) * 1000 ** (" KMGT".index(unit.upper()) if unit else 0)
        return _rate_in_range(int(bits / 8), text, code)
    bare = text.strip()
    if bare.lower().endswith("ps"):
        raise InvalidRequest(
            f"invalid bandwidth {text[:64]!r}", code=code,
            hint="write 1Gbps for bits or 125MB/s for bytes",
        )  # fmt: skip
    return _rate_in_range(
        parse_size(bare[:-2] if bare.endswith("/s") else bare, code=code), text, code
    )


def _rate_in_range(rate: int, text: str, code: str) -> int:
    if not 0 < rate <= MAX_RATE:
        raise InvalidRequest(f"rate {text[:64]!r} is out of range", code=code)
    return rate


def format_rate(rate: int) -> str | None:
    """A rate in bytes a second as the contract prints it: ``1.0 MB/s``; None for 0, no limit."""
    return f"{format_size(rate)}/s" if rate else None


def parse_duration(text: str, *, code: str = "invalid_request") -> timedelta:
    """A Go duration (``1h30m``, ``500ms``, ``0s``). Raises InvalidRequest with ``code``."""
    stripped = text.strip()
    rest, sign = (stripped, 1) if len(stripped) <= _LONGEST_TEXT else ("", 1)
    if rest[:1] in "+-" and rest:
        sign = -1 if rest[0] == "-" else 1
        rest = rest[1:]
    if rest == "0":
        return timedelta(0)
    total, position = 0.0, 0
    while position < len(rest):
        part = _DURATION_PART.match(rest, position)
        if part is None:
            break
        total += float(part[1]) * _NANOSECONDS[part[2]]
        position = part.end()
    if not rest or position != len(rest) or total > LONGEST_DURATION.total_seconds() * 10**9:
        raise InvalidRequest(
            f"invalid duration {text[:64]!r}", code=code, hint="write for example 30s, 5m or 1h30m"
        )
    return timedelta(microseconds=sign * total / 1000)


def format_duration(value: timedelta) -> str:
    """A duration in Go's normal form: ``24h0m0s``, ``1m30s``, ``500ms``."""
    microseconds = round(value / timedelta(microseconds=1))
    if microseconds == 0:
        return "0s"
    sign, microseconds = ("-", -microseconds) if microseconds < 0 else ("", microseconds)
    if microseconds < 1000:
        return f"{sign}{microseconds}µs"
    if microseconds < 10**6:
        return f"{sign}{microseconds / 1000:.3f}".rstrip("0").rstrip(".") + "ms"
    minutes, rest = divmod(microseconds, 60 * 10**6)
    seconds = f"{rest / 10**6:.6f}".rstrip("0").rstrip(".") or "0"
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{sign}{hours}h{minutes}m{seconds}s"
    return f"{sign}{minutes}m{seconds}s" if minutes else f"{sign}{seconds}s"


def to_utc(moment: datetime, *, what: str = "time", code: str = "invalid_request") -> datetime:
    """The moment in UTC, in which all times are kept.

    Raises InvalidRequest with ``code`` for one without a zone, or outside UTC's years 1 to 9999.
    """
    try:
        if moment.utcoffset() is not None:
            return moment.astimezone(UTC)
    except OverflowError:
        pass
    raise InvalidRequest(
        f"{what} has no zone, or lies outside the years 1 to 9999 in UTC",
        code=code,
        hint="write for example 2030-01-31T12:00:00Z",
    )


def check_name(name: str, *, what: str = "name", code: str = "invalid_request") -> str:
    """Return ``name`` if it is 1-63 of a-z, 0-9 and inner hyphens; else raise InvalidRequest."""
    if len(name) <= 63 and _NAME.fullmatch(name):
        return name
    raise InvalidRequest(
        f"invalid {what} {name[:80]!r}",
        code=code,
        hint="use 1 to 63 lower-case letters, digits and hyphens, no hyphen at either end",
    )


def check_tags(tags: Mapping[str, str] | None) -> dict[str, str]:
    """Return the tags as a dict (empty for None); InvalidRequest beyond the contract's limits."""
    tags = dict(tags or {})
    if len(tags) > 50:
        raise InvalidRequest(f"{len(tags)} tags, at most 50 are allowed")
    for key, value in tags.items():
        good = 1 <= len(key) <= 128 and len(value) <= 256
        if not good or not _TAG_TEXT.fullmatch(key) or not _TAG_TEXT.fullmatch(value):
            raise InvalidRequest(
                f"invalid tag {key[:40]!r}",
                hint="keys 1-128, values 0-256 letters, digits, spaces and _ . : / = + @ -",
            )
    return tags


def check_encodable(text: str, *, what: str) -> str:
    """Return text that can be written down; InvalidRequest for half a surrogate pair.

    JSON's ``\\ud800`` becomes such a half: no character, which UTF-8 has no bytes for.
    """
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InvalidRequest(f"{what} has half a surrogate pair, which is no character")
    return text


def new_id() -> str:
    """A fresh CUID2-shaped id: 24 lower-case letters and digits, starting with a letter."""
    rest = "".join(secrets.choice(_ID_ALPHABET) for _ in range(23))
    return secrets.choice(_ID_LETTERS) + rest


def is_id(text: str) -> bool:
    """Whether ``text`` has the shape of an id (so it is safe as a path component)."""
    return _ID.fullmatch(text) is not None
