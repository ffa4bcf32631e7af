"""The HTTP client behind every command.

Finds the server and a token, sends requests, turns error answers into our errors, and resolves
snapshot references (the contract addresses snapshots by id only; people use names and prefixes).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from stillframe.cli.commands.tokens import mint_token, read_secret
from stillframe.cli.settings import DEFAULT_LISTEN, Settings, load_settings
from stillframe.model.errors import (
    Ambiguous,
    Conflict,
    Forbidden,
    GuestFailure,
    HostFailure,
    InvalidRequest,
    NotFound,
    NotSupported,
    RateLimited,
    StillframeError,
    StorageFull,
    Timeout,
    Unauthorized,
)

if TYPE_CHECKING:
    import httpx2
    from websockets.sync.client import ClientConnection

Json = Any
_ERRORS: dict[int, type[StillframeError]] = {
    kind.status: kind
    for kind in (
        InvalidRequest, Unauthorized, Forbidden, NotFound, Conflict, RateLimited, NotSupported,
        HostFailure, StorageFull, Timeout,
    )
}  # fmt: skip
_CONNECT_SECONDS = 5.0
# Long verbs (a snapshot of a large VM, a cold boot under emulation) answer when they are done.
_READ_SECONDS = 900.0
_LOCAL_TOKEN_LIFETIME = timedelta(minutes=10)


class Unreachable(HostFailure):
    """The server cannot be reached, or the connection to it broke."""


@dataclass
class Client:
    """A connection to one server, made when first used.

    ``url`` and ``token`` are what the command line said (None: look around). Every method raises
    the StillframeError that the server's answer stands for, or HostFailure when it is unreachable.
    """

    url: str | None = None
    token: str | None = None
    config: Path | None = None
    data_dir: Path | None = None
    _http: httpx2.Client | None = field(default=None, repr=False)

    @cached_property
    def settings(self) -> Settings:
        """The settings of this machine, for finding a server that runs here."""
        return load_settings(config=self.config, flags={"data_dir": self.data_dir})

    @cached_property
    def base_url(self) -> str:
        """--url, else STILLFRAME_URL, HYPEMAN_BASE_URL, the local server's record, the default."""
        if self._named_url is not None:
            return _checked_url(self._named_url)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads((self.settings.data_dir / "server.json").read_bytes())
            return str(record["url"])
        listen = self.settings.listen
        return f"http://{DEFAULT_LISTEN if listen.endswith(':0') else listen}"

    @property
    def _named_url(self) -> str | None:
        """The server that somebody named; None if it is to be found."""
        variables = os.environ
        named = self.url or variables.get("STILLFRAME_URL") or variables.get("HYPEMAN_BASE_URL")
        return named or None

    @cached_property
    def bearer(self) -> str:
        """--token, else STILLFRAME_TOKEN, HYPEMAN_API_KEY, else one made with the local secret."""
        given = (
            self.token or os.environ.get("STILLFRAME_TOKEN") or os.environ.get("HYPEMAN_API_KEY")
        )
        if given:
            return _checked_token(given)
        if self._named_url is not None and not (self.settings.data_dir / "jwt-secret").exists():
            raise Unauthorized(
                f"there is no token for {self.base_url}",
                hint="set STILLFRAME_TOKEN to one that `stillframe token` printed over there",
            )
        return mint_token(
            read_secret(self.settings.data_dir), subject="cli", lifetime=_LOCAL_TOKEN_LIFETIME
        )

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json = None,
        content: Iterator[bytes] | None = None,
    ) -> Json:
        """Send one request and return the decoded answer (None for 204)."""
        import httpx2

        try:
            response = self.http.request(
                method, path, params=dict(query or {}), json=body, content=content
            )
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error
        if response.is_error:
            raise error_from_answer(response.status_code, response.content, path)
        if response.status_code == 204 or not response.content:
            return None
        try:
            return response.json()
        except ValueError as error:
            raise HostFailure(f"{self.base_url} does not answer in JSON") from error

    @contextlib.contextmanager
    def download(
        self, path: str, query: Mapping[str, str], headers: Mapping[str, str]
    ) -> Iterator[httpx2.Response]:
        """An answer whose body is read as it comes; HostFailure when it breaks off."""
        import httpx2

        try:
            with self.http.stream(
                "GET", path, params=dict(query), headers=dict(headers)
            ) as response:
                if response.is_error:
                    raise error_from_answer(response.status_code, response.read(), path)
                yield response
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error

    def events(self, path: str, query: Mapping[str, str]) -> Iterator[Json]:
        """The ``data:`` values of a server-sent event stream, decoded, as they come."""
        import httpx2

        try:
            with self.http.stream("GET", path, params=dict(query), timeout=None) as response:
                if response.is_error:
                    raise error_from_answer(response.status_code, response.read(), path)
                for line in response.iter_lines():
                    if line.startswith("data:"):
                        yield json.loads(line[5:])
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error

    @contextlib.contextmanager
    def websocket(self, path: str) -> Iterator[ClientConnection]:
        """An open WebSocket; a refusal before the upgrade becomes the error it carries."""
        from websockets.exceptions import InvalidHandshake, InvalidStatus
        from websockets.sync.client import connect

        try:
            connection = connect(
                "ws" + self.base_url.removeprefix("http") + path,
                additional_headers={"Authorization": f"Bearer {self.bearer}"},
                open_timeout=60,
                max_size=2**20,
                compression=None,
                proxy=None,
                # Pings keep proxies from ending an idle session. Their answers may take any time:
                # they wait behind stdin that is not taken, or output that is not read yet.
                ping_timeout=None,
            )
        except InvalidStatus as error:
            body = error.response.body or b""
            raise error_from_answer(error.response.status_code, bytes(body), path) from error
        except (InvalidHandshake, OSError) as error:
            raise self._unreachable(error) from error
        with connection:
            yield connection

    def find_snapshot(self, reference: str) -> Json:
        """The snapshot with that id, else that name, else the unique id prefix.

        Raises NotFound, or Ambiguous naming the candidates (names are unique only per source).
        """
        snapshots: list[dict[str, Json]] = self.request("GET", "/snapshots")
        for matches in (
            [s for s in snapshots if s["id"] == reference],
            [s for s in snapshots if s.get("name") == reference],
            [s for s in snapshots if reference and s["id"].startswith(reference)],
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                ids = ", ".join(s["id"] for s in matches)
                raise Ambiguous(
                    f"{reference!r} matches {len(matches)} snapshots", hint=f"say which: {ids}"
                )
        raise NotFound(f"no snapshot {reference!r}", hint="`stillframe snapshot list` shows all")

    def close(self) -> None:
        """Close the connection. Idempotent."""
        if self._http is not None:
            self._http.close()

    @property
    def http(self) -> httpx2.Client:
        """The HTTP session, with base URL, token and time limits set."""
        import httpx2

        if self._http is None:
            self._http = httpx2.Client(
                base_url=self.base_url,
                headers={"Authorization": f"Bearer {self.bearer}"},
                timeout=httpx2.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
                # Preparing TLS costs 30 ms; a plain http server needs none.
                verify=self.base_url.startswith("https"),
                trust_env=False,
            )
        return self._http

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(
            f"cannot talk to {self.base_url}: {str(error) or type(error).__name__}",
            hint="is `stillframe serve` running there? set --url or STILLFRAME_URL",
        )


def error_from_answer(status: int, content: bytes, path: str = "") -> StillframeError:
    """The error an answer stands for: its class by status, code, message and hint by the body.

    The body's ``details`` are kept as a fact of that name. The contract's message for an unknown
    instance does not name it; the request's path does.
    """
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        body = {"message": content.decode("utf-8", "replace").strip()[:200]}
    details = [d for d in body.get("details") or [] if isinstance(d, dict)]
    hints = [str(d.get("message")) for d in details if d.get("code") == "hint"]
    kind = _ERRORS.get(status, HostFailure if status >= 500 else InvalidRequest)
    message = str(body.get("message") or f"the server answered {status}")
    hint = hints[0] if hints else None
    if kind is Unauthorized:
        hint = hint or "`stillframe token` prints one on the server's machine"
    if message == "resource not found" and path.startswith("/instances/"):
        message = f"no instance {unquote(path.split('/')[2])!r}"
        hint = "`stillframe ps` lists them"
    return kind(message, code=body.get("code"), hint=hint, details=details)


def _checked_url(text: str) -> str:
    """The address of a server. Raises InvalidRequest for what cannot be one."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise InvalidRequest(
            f"{text[:200]!r} is not the address of a server",
            hint="write for example http://127.0.0.1:4973",
        )
    return text.rstrip("/")


def _checked_token(text: str) -> str:
    """A token that can be sent. Raises InvalidRequest, without repeating it."""
    text = text.strip()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise InvalidRequest(
            "the token has characters that no token has", hint="`stillframe token` prints one"
        )
    return text


def instance_path(reference: str, *more: str) -> str:
    """The route of an instance (by id, name or prefix), every part percent-encoded."""
    if not reference:
        raise InvalidRequest("an instance needs a name or an id")
    return "/".join(["/instances", *(quote(part, safe="") for part in (reference, *more))])


def image_path(name: str) -> str:
    """The route of an image; its name is one percent-encoded segment."""
    return "/images/" + quote(name, safe="")


def parse_pairs(pairs: Sequence[str] | None, what: str) -> dict[str, str]:
    """``KEY=VALUE`` arguments as a dict. Raises InvalidRequest for one without ``=``."""
    result: dict[str, str] = {}
    for pair in pairs or ():
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise InvalidRequest(f"{what} {pair!r} is not KEY=VALUE")
        result[key] = value
    return result


def guest_command(words: Sequence[str] | None) -> list[str]:
    """The words of a command for the guest, without the ``--`` that people put before it."""
    words = list(words or ())
    return words[1:] if words[:1] == ["--"] else words


def broken_stream(reason: str) -> GuestFailure:
    """The error for a WebSocket that ended before its last frame."""
    return GuestFailure(
        f"the connection ended early: {reason}", hint="`stillframe ps` tells whether it still runs"
    )
