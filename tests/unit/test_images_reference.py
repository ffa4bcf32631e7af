"""Image references as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.images.reference import check_platform, parse_reference
from stillframe.images.registry import check_address
from stillframe.model.errors import InvalidRequest, NotFound

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3", "docker.io/library/alpine:3"),
        ("team/app", "docker.io/team/app:latest"),
        (f"docker.io/library/alpine@{DIGEST}", f"docker.io/library/alpine@{DIGEST}"),
        ("localhost:5000/x/y:tag", "localhost:5000/x/y:tag"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        ("stillframe/base", "stillframe/base:latest"),
    ],
)
def test_the_normal_form(written: str, normal: str) -> None:
    assert str(parse_reference(written)) == normal
    assert str(parse_reference(normal)) == normal


@pytest.mark.parametrize(
    "bad",
    ["", "A", "../x", "a//b", "a:", "a@sha256:00", "-a", "a b", "a\n", "x.io:99999/a", "é",
     "file:///etc/passwd", "a" * 600, "a\0b", "[::zz]:5000/x"],
)  # fmt: skip
def test_bad_names_are_refused(bad: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_reference(bad)
    assert caught.value.code == "invalid_name"


@given(st.text(alphabet="aZ0.:/@-_[]\u0663 \n", max_size=40))
def test_any_text_is_refused_or_has_a_stable_normal_form(text: str) -> None:
    try:
        normal = str(parse_reference(text))
    except InvalidRequest:
        return
    assert str(parse_reference(normal)) == normal


def test_platforms() -> None:
    assert check_platform(None) == check_platform("linux/amd64") == "linux/amd64"
    for bad in ("linux", "Linux/amd64", "windows/amd64", "linux/amd64/../x"):
        with pytest.raises(InvalidRequest):
            check_platform(bad)
    with pytest.raises(NotFound) as caught:
        check_platform("linux/arm64")
    assert caught.value.code == "platform_not_available"


@pytest.mark.parametrize(
    "url",
    ["https://169.254.169.254/token", "http://169.254.169.254/", "https://[fe80::1]/",
     "https://127.0.0.1/", "http://192.0.2.1/", "file:///etc/passwd",
     "https://metadata.google.internal/", "https://[::ffff:169.254.169.254]/"],
)  # fmt: skip
async def test_s30_a_registry_cannot_lead_us_inward(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await check_address(url, allow_loopback=False)
    assert caught.value.code == "forbidden_address"
