"""Sizes, durations, names, tags and the state table."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.model.errors import InvalidRequest, InvalidState
from stillframe.model.states import (
    ALLOWED,
    TRANSITIONS,
    InstanceState,
    Permission,
    Verb,
    permission,
)
from stillframe.model.units import (
    check_name,
    check_tags,
    format_duration,
    format_size,
    is_id,
    new_id,
    parse_duration,
    parse_size,
    to_utc,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GB", 2**30), ("512 mb", 2**29), ("10", 10), ("1.5K", 1536), ("2TiB", 2**41), ("7B", 7)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1XB", "1e9", "0", "9" * 80, "1 0GB", "9999999TB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_size(text, code="invalid_overlay_size")
    assert caught.value.code == "invalid_overlay_size"


def test_sizes_are_printed_as_in_the_contract() -> None:
    assert [format_size(n) for n in (2**30, 2**29, 1536, 5)] == [
        "1.0 GB",
        "512.0 MB",
        "1.5 KB",
        "5 B",
    ]


@given(st.integers(min_value=0, max_value=10**15))
def test_a_printed_duration_reads_back(microseconds: int) -> None:
    value = timedelta(microseconds=microseconds)
    assert abs(parse_duration(format_duration(value)) - value) <= timedelta(microseconds=1)


@pytest.mark.parametrize(
    ("text", "printed"), [("24h", "24h0m0s"), ("90s", "1m30s"), ("500ms", "500ms"), ("0s", "0s"),
                          ("1h30m", "1h30m0s"), ("1.5s", "1.5s"), ("-5s", "-5s")],
)  # fmt: skip
def test_durations_have_go_s_normal_form(text: str, printed: str) -> None:
    assert format_duration(parse_duration(text)) == printed


@pytest.mark.parametrize("text", ["", "5", "s", "1x", "1 s", "--1s", "1h-3m", "9" * 70 + "h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_duration(text)


@given(st.text())
def test_a_name_that_passes_is_safe_as_a_host_name(text: str) -> None:
    try:
        check_name(text)
    except InvalidRequest:
        return
    assert 1 <= len(text) <= 63
    assert text.isascii()
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert text.strip("-") == text


@pytest.mark.parametrize(
    "tags", [{"": "x"}, {"a" * 129: "x"}, {"a": "x" * 257}, {"a\n": "x"}, {"a": "é"},
             {str(n): "" for n in range(51)}],
)  # fmt: skip
def test_tags_beyond_the_contract_are_refused(tags: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        check_tags(tags)


def test_ids_are_unguessable_names_safe_for_paths() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(is_id(identifier) for identifier in ids)
    assert not any(
        is_id(text) for text in ("", "..", "a/b", "A" * 24, "a" * 23, "a" * 25, "1" * 24)
    )


def test_every_verb_and_state_is_either_allowed_or_refused_with_a_reason() -> None:
    for verb in Verb:
        for state in InstanceState:
            if state in ALLOWED[verb]:
                assert permission(verb, state) in tuple(Permission)
            else:
                with pytest.raises(InvalidState) as caught:
                    permission(verb, state)
                assert state.value in caught.value.message
                assert caught.value.hint


def test_a_refusal_says_what_to_ask_for_first() -> None:
    for verb, state, way in (
        (Verb.START, InstanceState.STANDBY, "restore the instance: its memory is in standby"),
        (Verb.STOP, InstanceState.STANDBY, "restore the instance first"),
        (Verb.GUEST, InstanceState.STOPPED, "start the instance first"),
        (Verb.RESTORE, InstanceState.STOPPED, "start the instance, then put it into standby"),
        (Verb.RESTORE_SNAPSHOT, InstanceState.RUNNING, "put the instance into standby, or stop it"),
        (
            Verb.FORK,
            InstanceState.RUNNING,
            "with from_running=true it is forked while it runs on",
        ),
        (Verb.STANDBY, InstanceState.CREATED, "wait until the instance has settled, or delete it"),
    ):
        with pytest.raises(InvalidState) as caught:
            permission(verb, state)
        assert caught.value.hint == way


def test_no_verb_acts_on_an_unknown_instance() -> None:
    assert all(InstanceState.UNKNOWN not in allowed for allowed in ALLOWED.values())
    assert set(TRANSITIONS) == set(InstanceState)


def test_a_duration_that_is_too_long_is_not_read_in_part() -> None:
    assert parse_duration(" " + "0s" * 31 + "1s ") == timedelta(seconds=1)
    with pytest.raises(InvalidRequest):
        parse_duration("0s" * 31 + "1s" + "garbage")


def test_times_are_kept_in_utc() -> None:
    noon = datetime(2030, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    assert to_utc(noon).isoformat() == "2030-01-01T10:00:00+00:00"
    for odd in (
        datetime(2030, 1, 1),
        datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))),
        datetime(9999, 12, 31, 23, 59, tzinfo=timezone(timedelta(hours=-1))),
    ):
        with pytest.raises(InvalidRequest):
            to_utc(odd)
