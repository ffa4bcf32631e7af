"""Frames of the guest agent protocol (docs/agent-protocol.md), without any I/O."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

MAGIC = b"SFA1"
VERSION = 1
MAX_PAYLOAD = 65536
INITIAL_CREDIT = 262144
_HEAD = struct.Struct("<4sB3xII")
_CRC = struct.Struct("<I")
HEADER_SIZE = _HEAD.size + _CRC.size


class FrameType(IntEnum):
    """Frame types, numbered as in the protocol document."""

    HELLO = 1
    HELLO_OK = 2
    EVENT = 3
    EXEC = 16
    STDIN = 17
    RESIZE = 18
    SIGNAL = 19
    STDOUT = 20
    STDERR = 21
    EXIT = 22
    CREDIT = 23
    CLOSE = 24
    STAT = 32
    READ = 33
    WRITE = 34
    IDENTIFY = 35
    SHUTDOWN = 36
    OK = 48
    ENTRY = 49
    DATA = 50
    END = 51
    ERROR = 52


class Frame(NamedTuple):
    """One message. ``type`` is an int so that unknown types can be seen and skipped."""

    type: int
    channel: int
    payload: bytes


def encode(frame: Frame) -> bytes:
    """The bytes of a frame. Raises ValueError when the payload exceeds 65536 bytes."""
    if len(frame.payload) > MAX_PAYLOAD:
        raise ValueError(f"payload of {len(frame.payload)} bytes")
    head = _HEAD.pack(MAGIC, frame.type, frame.channel, len(frame.payload))
    return head + _CRC.pack(zlib.crc32(head)) + frame.payload


class Decoder:
    """Turns a byte stream into frames, skipping whatever is not a valid header.

    Memory is bounded by one frame plus one chunk, however hostile the sender.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.skipped = 0  # bytes thrown away while looking for a header

    def prime(self, data: bytes) -> None:
        """Put bytes in without taking frames out; the next ``feed`` yields them."""
        self._buffer += data

    def feed(self, data: bytes) -> list[Frame]:
        """Add bytes from the stream; return the frames they complete."""
        self._buffer += data
        frames: list[Frame] = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        return frames

    def _next(self) -> Frame | None:
        buffer = self._buffer
        while True:
            start = buffer.find(MAGIC)
            if start < 0:  # a magic may still begin in the last three bytes
                self._drop(max(0, len(buffer) - len(MAGIC) + 1))
                return None
            self._drop(start)
            if len(buffer) < HEADER_SIZE:
                return None
            head = bytes(buffer[: _HEAD.size])
            _, kind, channel, length = _HEAD.unpack(head)
            (crc,) = _CRC.unpack_from(buffer, _HEAD.size)
            if crc != zlib.crc32(head) or length > MAX_PAYLOAD:
                self._drop(1)
                continue
            if len(buffer) < HEADER_SIZE + length:
                return None
            payload = bytes(buffer[HEADER_SIZE : HEADER_SIZE + length])
            del buffer[: HEADER_SIZE + length]
            return Frame(kind, channel, payload)

    def _drop(self, count: int) -> None:
        del self._buffer[:count]
        self.skipped += count


def text_list(pairs: Iterable[tuple[str, str]]) -> bytes:
    """``key NUL value NUL`` for each pair. Raises ValueError when a part contains NUL."""
    parts: list[bytes] = []
    for key, value in pairs:
        for part in (key, value):
            raw = part.encode("utf-8", "surrogateescape")
            if b"\0" in raw:
                raise ValueError("NUL in a text list")
            parts.append(raw + b"\0")
    return b"".join(parts)


def printable(text: str) -> str:
    """Text from a guest as it can be stored and sent on: question marks for escaped bytes."""
    return text.encode("utf-8", "replace").decode()


def parse_text_list(payload: bytes) -> list[tuple[str, str]]:
    """The pairs of a text list. Raises ValueError when it is cut off or odd.

    Bytes that are not UTF-8, as names of files may be, are escaped (PEP 383).
    """
    if not payload:
        return []
    if not payload.endswith(b"\0"):
        raise ValueError("text list is cut off")
    parts = [p.decode("utf-8", "surrogateescape") for p in payload[:-1].split(b"\0")]
    if len(parts) % 2:
        raise ValueError("text list has a key without a value")
    return list(zip(parts[::2], parts[1::2], strict=True))
