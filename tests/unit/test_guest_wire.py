"""Frames survive any cutting of the stream, and nothing hostile costs more than a frame."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.guest import wire
from stillframe.guest.wire import Decoder, Frame, encode

frames = st.builds(Frame, st.integers(0, 255), st.integers(0, 2**32 - 1), st.binary(max_size=300))
text = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=30)


@given(st.lists(frames, max_size=6), st.integers(1, 50))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(
    sent: list[Frame], step: int
) -> None:
    stream, decoder = b"".join(map(encode, sent)), Decoder()
    got = [f for at in range(0, len(stream), step) for f in decoder.feed(stream[at : at + step])]
    assert got == sent
    assert decoder.skipped == 0


@given(st.binary(max_size=200).filter(lambda junk: b"S" not in junk), frames)
def test_a_frame_is_found_behind_garbage(junk: bytes, frame: Frame) -> None:
    decoder = Decoder()
    assert decoder.feed(junk + encode(frame)) == [frame]
    assert decoder.skipped == len(junk)


@given(st.binary(max_size=4000))
def test_noise_never_raises_and_never_accumulates(noise: bytes) -> None:
    decoder = Decoder()
    decoder.feed(noise)
    assert len(decoder._buffer) <= wire.HEADER_SIZE + wire.MAX_PAYLOAD


def test_a_length_beyond_the_limit_is_not_believed() -> None:
    good = encode(Frame(20, 1, b"x"))
    forged = struct.pack("<4sB3xII", b"SFA1", 20, 1, 2**31)
    forged += struct.pack("<I", zlib.crc32(forged))
    decoder = Decoder()
    assert decoder.feed(forged + good) == [Frame(20, 1, b"x")]
    assert decoder.skipped == len(forged)


def test_a_truncated_frame_waits_for_its_rest() -> None:
    whole, decoder = encode(Frame(50, 7, b"payload")), Decoder()
    assert decoder.feed(whole[:-1]) == []
    assert decoder.feed(whole[-1:]) == [Frame(50, 7, b"payload")]


@given(st.lists(st.tuples(text, text)))
def test_text_lists_round_trip(pairs: list[tuple[str, str]]) -> None:
    assert wire.parse_text_list(wire.text_list(pairs)) == pairs


@pytest.mark.parametrize("payload", [b"key", b"key\0", b"key\0value", b"\0\0\0"])
def test_text_lists_that_are_cut_off_are_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="text list"):
        wire.parse_text_list(payload)
