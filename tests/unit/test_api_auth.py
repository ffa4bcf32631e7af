"""Who may do what: tokens, scopes, and that no route forgot to ask."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import cast

import jwt
import pytest
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse

from stillframe.api.app import ROUTERS, create_app
from stillframe.api.auth import RequiredScope, ScopedRoute, required_scope
from stillframe.engine.interface import EngineInterface
from stillframe.model.errors import InvalidRequest
from stillframe.model.scopes import SCOPES
from support.api_double import SECRET, DoubleEngine, app_over, bearer, token

PUBLIC = {"/health"}


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(app_over(DoubleEngine())) as client:
        yield client


def test_every_route_but_health_declares_a_known_scope() -> None:
    routes = [route for router in ROUTERS for route in router.routes]
    assert len(routes) > 20
    for route in routes:
        if isinstance(route, APIWebSocketRoute):
            scopes = [
                dependency.dependency.scope
                for dependency in route.dependencies
                if isinstance(dependency.dependency, RequiredScope)
            ]
            assert scopes, route.path
            assert set(scopes) <= SCOPES
        else:
            assert isinstance(route, ScopedRoute), route
            scope = required_scope(route)
            assert (scope in SCOPES) != (route.path in PUBLIC), route.path


def test_no_route_answers_without_a_token(client: TestClient) -> None:
    for router in ROUTERS:
        for route in router.routes:
            if not isinstance(route, APIRoute) or route.path in PUBLIC:
                continue
            path = re.sub(r"\{.*?\}", "x", route.path)
            for method in route.methods or ():
                answer = client.request(method, path, content=b"{")
                assert answer.status_code == 401, (method, path)
                assert answer.json() == {
                    "code": "Unauthorized",
                    "message": "authorization header required",
                }


def test_health_and_the_documents_are_public(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/openapi.json").status_code == 200
    assert client.get("/docs").status_code == 200


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("Basic abc", "invalid authorization header format"),
        ("Bearer", "invalid authorization header format"),
        ("Bearer a b", "invalid authorization header format"),
        ("Bearer not.a.token", "invalid token"),
        (f"Bearer {token(secret=b'w' * 40)}", "invalid token"),
        (f"Bearer {token(exp=int(time.time()) - 3600)}", "invalid token"),
        (f"Bearer {token(exp=None)}", "invalid token"),
        (f"Bearer {token(permissions='*')}", "invalid token"),
        (f"Bearer {jwt.encode({'exp': 2**40}, None, algorithm='none')}", "invalid token"),
        (f"Bearer {token(repos=[])}", "invalid token type"),
        (f"Bearer {token(scope='push')}", "invalid token type"),
        (f"Bearer {token(build_id='b')}", "invalid token type"),
        (f"Bearer {token(sub='builder-7')}", "invalid token type"),
    ],
)
def test_a_bad_token_is_refused_with_a_constant_message(
    client: TestClient, header: str, message: str
) -> None:
    answer = client.get("/instances", headers={"Authorization": header})
    assert answer.status_code == 401
    assert answer.json() == {"code": "Unauthorized", "message": message}


def test_a_token_without_permissions_may_do_all(client: TestClient) -> None:
    assert client.get("/instances", headers=bearer()).status_code == 200
    assert client.get("/instances", headers=bearer(permissions=["*"])).status_code == 200
    longer = {"Authorization": f"Bearer {token(secret=SECRET, algorithm='HS512')}"}
    assert client.get("/instances", headers=longer).status_code == 200


def test_permissions_limit_a_token_to_their_scopes(client: TestClient) -> None:
    reader = bearer(permissions=["instance:read"])
    assert client.get("/instances/web", headers=reader).status_code == 200
    answer = client.delete("/instances/web", headers=reader)
    assert answer.status_code == 403
    assert answer.json() == {
        "code": "Forbidden",
        "message": "missing required scope: instance:delete",
    }
    assert client.get("/instances", headers=bearer(permissions=[])).status_code == 403


@pytest.mark.parametrize("endpoint", ["exec", "cp"])
def test_websockets_are_refused_before_the_upgrade(client: TestClient, endpoint: str) -> None:
    url = f"/instances/web/{endpoint}"
    with pytest.raises(WebSocketDenialResponse) as none, client.websocket_connect(url):
        pass
    assert none.value.status_code == 401
    reader = bearer(permissions=["instance:read"])
    with (
        pytest.raises(WebSocketDenialResponse) as denied,
        client.websocket_connect(url, headers=reader),
    ):
        pass
    assert denied.value.status_code == 403
    assert denied.value.json()["code"] == "Forbidden"


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        create_app(cast(EngineInterface, DoubleEngine()), jwt_secret=b"short", version="1")
