"""Requests that clients repeat: each wish is carried out once, and two wishes are two.

F67 and F68 of the catalogue: a client that goes in the middle, and idempotency keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from threading import Event
from typing import Any, cast

import httpx
import pytest
from fastapi import Request, Response
from hypeman import Hypeman
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from stillframe.api import repeats as module
from stillframe.api.app import create_app
from stillframe.api.repeats import Repeats
from stillframe.engine.interface import CreateRequest, EngineInterface
from stillframe.model.errors import Conflict, HostFailure, InvalidRequest, NameConflict
from stillframe.model.values import Instance, Snapshot
from support.api_double import SECRET, DoubleEngine, app_over, bearer, instance, served, token


class Client:
    """One request as the server sees it: sent in full, and gone when the scenario says so."""

    def __init__(self, body: bytes = b"{}", path: str = "/x", **headers: str) -> None:
        self.gone = asyncio.Event()
        self._body: bytes | None = body
        raw = {"authorization": "Bearer one", **headers}
        self.request = Request(
            {
                "type": "http",
                "method": "POST",
                "path": path,
                "query_string": b"",
                "headers": [
                    (name.replace("_", "-").encode(), value.encode()) for name, value in raw.items()
                ],
            },
            self._receive,
        )

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}


class Work:
    """What a route does: takes until the scenario lets it go, and counts."""

    def __init__(self) -> None:
        self.done = 0
        self.go_on = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self, request: Request) -> Response:
        self.done += 1
        number = self.done
        await self.go_on.wait()
        if self.failure is not None:
            raise self.failure
        return Response(f"answer {number}")


@pytest.fixture
def repeats() -> Repeats:
    return Repeats()


@pytest.fixture
def work() -> Work:
    return Work()


def ask(repeats: Repeats, client: Client, work: Work) -> asyncio.Task[Response]:
    return asyncio.create_task(repeats.answer(client.request, work))


async def settled() -> None:
    """Let every task go as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def goes(client: Client) -> None:
    client.gone.set()
    await settled()


def again(number: int = 1, **options: Any) -> Client:
    return Client(x_stainless_retry_count=str(number), **options)


# -- what is joined ---------------------------------------------------------------------------
async def test_a_repetition_joins_the_attempt_that_its_client_gave_up(
    repeats: Repeats, work: Work
) -> None:
    first, second, third = Client(), again(1), again(2)
    one = ask(repeats, first, work)
    await settled()
    await goes(first)
    two = ask(repeats, second, work)
    await settled()
    await goes(second)
    three = ask(repeats, third, work)
    await settled()
    work.go_on.set()
    assert {(await task).body for task in (one, two, three)} == {b"answer 1"}
    assert (work.done, repeats._attempts, repeats._kept) == (1, {}, {})


async def test_the_answer_is_kept_for_a_repetition_that_comes_after_it(
    repeats: Repeats, work: Work
) -> None:
    first = Client()
    one = ask(repeats, first, work)
    await settled()
    await goes(first)
    work.go_on.set()
    await one
    assert (await repeats.answer(again().request, work)).body == b"answer 1"
    assert (await repeats.answer(again().request, work)).body == b"answer 2"  # it was given


async def test_a_failure_is_told_to_the_repetition_too(repeats: Repeats, work: Work) -> None:
    first, second = Client(), again()
    one = ask(repeats, first, work)
    await settled()
    await goes(first)
    two = ask(repeats, second, work)
    work.failure = Conflict("the name is taken")
    work.go_on.set()
    for task in (one, two):
        with pytest.raises(Conflict):
            await task
    assert (work.done, repeats._attempts) == (1, {})


# -- what is not ------------------------------------------------------------------------------
async def test_two_equal_requests_side_by_side_are_two_wishes(repeats: Repeats, work: Work) -> None:
    tasks = [ask(repeats, client, work) for client in (Client(), Client(), again())]
    await settled()
    work.go_on.set()
    assert len({(await task).body for task in tasks}) == 3


async def test_each_repetition_joins_an_attempt_of_its_own(repeats: Repeats, work: Work) -> None:
    firsts = [Client(), Client()]
    tasks = [ask(repeats, client, work) for client in firsts]
    await settled()
    for client in firsts:
        await goes(client)
    joined = [ask(repeats, again(), work) for _ in firsts]
    await settled()
    work.go_on.set()
    assert {(await task).body for task in joined} == {b"answer 1", b"answer 2"}
    await asyncio.gather(*tasks)
    assert (work.done, repeats._attempts) == (2, {})


@pytest.mark.parametrize(
    "other",
    [
        {},  # it does not call itself a repetition
        {"x_stainless_retry_count": "0"},
        {"x_stainless_retry_count": "1", "body": b"[]"},
        {"x_stainless_retry_count": "1", "path": "/y"},
        {"x_stainless_retry_count": "1", "authorization": "Bearer two"},
    ],
)
async def test_another_request_joins_nothing(
    repeats: Repeats, work: Work, other: dict[str, Any]
) -> None:
    first = Client()
    one = ask(repeats, first, work)
    await settled()
    await goes(first)
    two = ask(repeats, Client(**other), work)
    await settled()
    work.go_on.set()
    assert [(await task).body for task in (one, two)] == [b"answer 1", b"answer 2"]


async def test_an_answer_that_was_given_or_is_old_is_not_given_again(
    repeats: Repeats, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    work.go_on.set()
    assert (await repeats.answer(Client().request, work)).body == b"answer 1"
    assert (await repeats.answer(again().request, work)).body == b"answer 2"
    work.go_on.clear()
    left = Client()
    one = ask(repeats, left, work)
    await settled()
    await goes(left)
    work.go_on.set()
    await one
    monkeypatch.setattr(module, "WINDOW_SECONDS", -1.0)
    assert (await repeats.answer(again().request, work)).body == b"answer 4"
    assert repeats._attempts == {}


async def test_kept_answers_are_bounded(
    repeats: Repeats, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 10 * 4096)
    work.go_on.set()
    for number in range(50):
        await repeats.answer(Client(idempotency_key=f"key-{number}").request, work)
    assert len(repeats._kept) <= 11
    assert len(repeats._attempts) == len(repeats._kept)
    newest = await repeats.answer(Client(idempotency_key="key-49").request, work)
    assert newest.body == b"answer 50"


async def test_a_server_that_stops_tells_whoever_joined(repeats: Repeats, work: Work) -> None:
    first = Client()
    one = ask(repeats, first, work)
    await settled()
    await goes(first)
    two = ask(repeats, again(), work)
    await settled()
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    with pytest.raises(HostFailure):
        await two


async def test_a_client_that_goes_while_it_still_sends_is_no_internal_error(
    repeats: Repeats, work: Work
) -> None:
    client = Client()
    client._body = None
    client.gone.set()
    with pytest.raises(InvalidRequest):
        await repeats.answer(client.request, work)


# -- keys -------------------------------------------------------------------------------------
async def test_f68_the_same_key_is_the_same_answer_and_another_body_is_refused(
    repeats: Repeats, work: Work
) -> None:
    keyed = {"idempotency_key": "mine"}
    one, two = (ask(repeats, Client(b"{}", **keyed), work) for _ in range(2))
    await settled()
    with pytest.raises(HTTPException) as refused:
        await repeats.answer(Client(b"[]", **keyed).request, work)
    assert refused.value.status_code == 422
    work.go_on.set()
    third = await repeats.answer(Client(b"{}", **keyed).request, work)
    assert {(await one).body, (await two).body, third.body} == {b"answer 1"}
    stranger = Client(b"[]", authorization="Bearer two", **keyed)
    assert (await repeats.answer(stranger.request, work)).body == b"answer 2"


async def test_a_failure_lets_go_of_its_key(repeats: Repeats, work: Work) -> None:
    work.go_on.set()
    work.failure = Conflict("not now")
    with pytest.raises(Conflict):
        await repeats.answer(Client(idempotency_key="mine").request, work)
    work.failure = None
    answer = await repeats.answer(Client(b"[]", idempotency_key="mine").request, work)
    assert answer.body == b"answer 2"


async def test_keys_by_http() -> None:
    engine = DoubleEngine()
    app = create_app(cast(EngineInterface, engine), jwt_secret=SECRET, version="9.9")
    headers = bearer()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://server", headers=headers
    ) as client:
        path, key = "/instances/web/snapshots", {"Idempotency-Key": "mine"}
        made = [await client.post(path, json={"kind": "Standby"}, headers=key) for _ in range(3)]
        assert {answer.status_code for answer in made} == {201}
        assert len(engine.snapshots) == 1
        other = await client.post(path, json={"kind": "Stopped"}, headers=key)
        assert (other.status_code, other.json()["code"]) == (422, "Unprocessable Entity")
        long = await client.post(
            path, json={"kind": "Stopped"}, headers={**key, "Idempotency-Key": "k" * 256}
        )
        assert long.status_code == 400


# -- with the official SDK --------------------------------------------------------------------
class SlowEngine(DoubleEngine):
    """Takes until the client has begun to repeat itself."""

    def __init__(self) -> None:
        super().__init__()
        self.repeated = Event()

    async def _until_repeated(self) -> None:
        assert await asyncio.to_thread(self.repeated.wait, 60)

    async def snapshot(self, instance_id: str, **options: Any) -> Snapshot:
        if options["name"] in {one.name for one in self.snapshots if one.name}:
            raise NameConflict("the name is taken")
        made = await super().snapshot(instance_id, **options)
        await self._until_repeated()
        return made

    async def create(self, request: CreateRequest) -> Instance:
        if request.name in {one.name for one in self.instances}:
            raise NameConflict("the name is taken")
        self.instances.append(instance(request.name))
        made = await super().create(request)
        await self._until_repeated()
        return made


def watching(app: ASGIApp, engine: SlowEngine) -> ASGIApp:
    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        if headers.get(b"x-stainless-retry-count", b"0") != b"0":
            engine.repeated.set()
        await app(scope, receive, send)

    return watched


@pytest.fixture
def slow() -> SlowEngine:
    return SlowEngine()


@pytest.fixture
def sdk(slow: SlowEngine) -> Iterator[Hypeman]:
    with (
        served(watching(app_over(slow), slow)) as url,  # type: ignore[arg-type]
        Hypeman(api_key=token(), base_url=url, timeout=2.0, max_retries=5) as sdk,
    ):
        yield sdk


def test_f67_an_unnamed_snapshot_whose_client_grew_impatient_is_made_once(
    sdk: Hypeman, slow: SlowEngine
) -> None:
    made = sdk.instances.snapshots.create("web", kind="Standby")
    assert made.id == slow.snapshots[0].id
    assert len(slow.snapshots) == 1


def test_a_named_snapshot_that_was_made_is_no_conflict(sdk: Hypeman, slow: SlowEngine) -> None:
    made = sdk.instances.snapshots.create("web", kind="Standby", name="ready")
    assert (made.name, len(slow.snapshots)) == ("ready", 1)


def test_an_instance_that_was_made_is_no_bad_request(sdk: Hypeman, slow: SlowEngine) -> None:
    made = sdk.instances.create(name="box", image="alpine")
    assert made.name == "box"
    assert [one.name for one in slow.instances] == ["web", "box"]
