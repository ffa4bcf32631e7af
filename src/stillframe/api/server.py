"""The server process: one lock, one secret, one engine, one event loop.

``run`` is what ``stillframe serve`` calls. Order matters: the data directory is locked and the
port is bound before the engine recovers anything, and the ready line is printed only when requests
are answered. VMs are never ended here: they outlive the server and are adopted by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import json
import logging
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import uvicorn
from starlette.types import ASGIApp

import stillframe
from stillframe.api.sockets import MAX_MESSAGE_BYTES
from stillframe.engine.interface import EngineInterface
from stillframe.engine.settings import EngineSettings
from stillframe.model.errors import Conflict, HostFailure, InvalidRequest, MissingComponent
from stillframe.model.values import Hypervisor

_LOG = logging.getLogger("stillframe.server")
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Streams (exec, followed logs) may outlast a stop request by at most this many seconds.
_GRACE_SECONDS = 3
# Above the client's keep-alive of 5 s, so that the server never closes first.
_KEEP_ALIVE_SECONDS = 30
# A peer that has said nothing for so long is asked whether it is there, so often, so many times.
_SILENCE_SECONDS, _PROBE_SECONDS, _PROBES = 60, 15, 4


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the server needs beside the engine's settings.

    ``listen`` is ``host:port`` (port 0: any free one); ``metrics_listen`` another one on a loopback
    address, which answers ``/metrics`` without a token (empty: there is none); ``log_format`` is
    ``plain`` or ``json``; ``log_level`` a name of the logging module in lower case.
    """

    listen: str
    metrics_listen: str = ""
    log_format: str = "plain"
    log_level: str = "info"


def run(settings: EngineSettings, options: ServerOptions) -> None:
    """Serve until SIGTERM or SIGINT; VMs run on afterwards.

    Raises Conflict when another server holds the data directory or a port, InvalidRequest for a
    bad address, HostFailure when the directory cannot be used, and whatever the engine's ``open``
    raises.
    """
    started = time.monotonic()
    os.umask(0o077)
    configure_logging(options.log_format, options.log_level)
    _allow_many_files()
    _check_programs(settings)
    data_dir = settings.data_dir
    with contextlib.ExitStack() as stack:
        settings.own_data_dir()
        stack.enter_context(lock_data_dir(data_dir))
        secret = load_or_create_secret(data_dir)
        listeners = [stack.enter_context(bind(options.listen))]
        if options.metrics_listen:
            listeners.append(stack.enter_context(bind_metrics(options.metrics_listen)))
        # A stop signal during recovery cancels the main task; the stack below has undone its work.
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(_main(settings, secret, listeners, started))


@contextlib.contextmanager
def lock_data_dir(data_dir: Path) -> Iterator[None]:
    """Make the data directory (mode 0700) and hold its lock while the context lasts.

    Raises Conflict when another process holds it, HostFailure when the directory is unusable.
    """
    lock = data_dir / "lock"
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        data_dir.chmod(0o700)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostFailure(
            f"cannot use the data directory: {error.strerror}",
            hint="choose a writable one with --data-dir or STILLFRAME_DATA_DIR",
            data_dir=str(data_dir),
        ) from error
    with os.fdopen(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = file.read().strip() or "unknown"
            raise Conflict(
                f"another server uses the data directory {data_dir} (pid {holder})",
                hint="stop it first, or give this one its own --data-dir",
                pid=holder,
            ) from error
        with contextlib.suppress(OSError):  # a full disk: who holds it is told for convenience
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield


def load_or_create_secret(data_dir: Path) -> bytes:
    """The key that signs tokens, made at the first start (``DATA/jwt-secret``, mode 0600).

    Raises HostFailure when an existing file is too short to be a key.
    """
    path = data_dir / "jwt-secret"
    if not path.exists():
        _write_private(path, secrets.token_hex(32) + "\n")
    path.chmod(0o600)
    secret = path.read_text(encoding="ascii", errors="replace").strip().encode()
    if len(secret) < 32:
        raise HostFailure(
            f"{path} is too short to be a signing key",
            hint="remove the file; a new key is made at the next start and old tokens end",
        )
    return secret


def bind(listen: str, setting: str = "listen") -> socket.socket:
    """A listening TCP socket on ``host:port`` (``[v6]:port`` too), the value of ``setting``.

    Raises InvalidRequest for a malformed address, Conflict when it is taken.
    """
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(f"invalid {setting} address {listen!r}", hint="write 127.0.0.1:4973")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, or asyncio would not know to send small answers at once (TCP_NODELAY).
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_dead_peers(listener)
        listener.bind((host, int(port)))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise Conflict(
            f"cannot listen on {listen}: {error.strerror or error}",
            hint=f"choose another address with --{setting.replace('_', '-')} "
            f"or STILLFRAME_{setting.upper()}",
        ) from error
    return listener


def _notice_dead_peers(listener: socket.socket) -> None:
    """Have the kernel end connections whose peer has vanished (tcp(7)); accepted ones inherit it.

    WebSocket pings cannot: their answer waits behind data that one side does not read yet.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for names, value in (
        (("TCP_KEEPIDLE", "TCP_KEEPALIVE"), _SILENCE_SECONDS),  # on Linux; on Darwin
        (("TCP_KEEPINTVL",), _PROBE_SECONDS),
        (("TCP_KEEPCNT",), _PROBES),
    ):
        option = next((getattr(socket, name) for name in names if hasattr(socket, name)), None)
        if option is not None:
            listener.setsockopt(socket.IPPROTO_TCP, option, value)


def bind_metrics(listen: str) -> socket.socket:
    """A listening socket for ``/metrics`` without a token, on a loopback address.

    Raises InvalidRequest for any other address, and what ``bind`` raises.
    """
    listener = bind(listen, "metrics_listen")
    if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        listener.close()
        raise InvalidRequest(
            f"metrics_listen asks for no token, so {listen} must be a loopback address",
            hint="use 127.0.0.1:9464; from elsewhere read /metrics of the API, with a token",
        )
    return listener


def configure_logging(log_format: str, level: str, stream: IO[str] | None = None) -> None:
    """Send all logs to ``stream`` (stderr), one line each, plain or as JSON objects."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        JsonFormatter()
        if log_format == "json"
        else logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # It calls every WebSocket an event worth telling.
    logging.getLogger("uvicorn.error").setLevel(max(root.level, logging.WARNING))
    # Each end of a conversation with a QEMU is one too, also one that was meant.
    logging.getLogger("stillframe.qmp").setLevel(max(root.level, logging.WARNING))


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (RFC3339 UTC), level, logger, message and extras."""

    _STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON; an exception's traceback is under ``exception``."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update((k, v) for k, v in vars(record).items() if k not in self._STANDARD)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class _Server(uvicorn.Server):
    """uvicorn, told to stop by our signal handlers and telling us when it answers."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn would raise them again after its shutdown."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start accepting, then announce it."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()


async def _main(
    settings: EngineSettings, secret: bytes, listeners: list[socket.socket], started: float
) -> None:
    from stillframe.engine.engine import Engine
    from stillframe.vmm.drivers import make_drivers

    cache_dir = settings.data_dir / "cache"
    fake = settings.default_hypervisor is Hypervisor.FAKE
    drivers = make_drivers(
        settings.qemu_binary, settings.accelerator, cache_dir,
        firecracker_binary=settings.firecracker_binary,
        cloud_hypervisor_binary=settings.cloud_hypervisor_binary,
        programs_dir=settings.programs_dir, tracker=settings.tracker_library,
        capture_buffer_bytes=settings.capture_buffer_bytes, fake=fake,
    )  # fmt: skip
    engine: EngineInterface = Engine(settings, drivers)
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    server: _Server | None = None

    def stop() -> None:
        if server is None and task is not None:
            task.cancel()
        elif server is not None:
            # A second signal does not wait for open streams.
            server.force_exit, server.should_exit = server.should_exit, True

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        await engine.open()
        config = serving(_application(settings, engine, secret, listeners[1:]))
        urls = [_url(listener) for listener in listeners]
        stack.callback((settings.data_dir / "server.json").unlink, missing_ok=True)
        server = _Server(config, lambda: _announce(settings, engine, urls, started))
        await server.serve(sockets=listeners)
        for request in server.server_state.tasks:  # a second signal has left them at work
            request.cancel()
        _LOG.info("stopping; instances run on")


def serving(app: ASGIApp) -> uvicorn.Config:
    """How the server serves ``app``, on sockets that ``bind`` made."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=logging.getLogger().isEnabledFor(logging.DEBUG),
        timeout_graceful_shutdown=_GRACE_SECONDS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        server_header=False,
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE_BYTES,
        # A client that does not take output, or a command that does not take stdin, is only slow:
        # the answer to a ping would wait behind what is not read. ``bind`` finds dead peers.
        ws_ping_interval=None,
        ws_ping_timeout=None,
    )


def _application(
    settings: EngineSettings,
    engine: EngineInterface,
    secret: bytes,
    for_metrics: Sequence[socket.socket],
) -> ASGIApp:
    """The API, behind what answers at the listener for metrics if there is one."""
    from stillframe.api.app import create_app
    from stillframe.api.border import MetricsListener
    from stillframe.api.routes.images import sweep_uploads

    sweep_uploads(settings.data_dir)
    app: ASGIApp = create_app(
        engine,
        jwt_secret=secret,
        version=stillframe.__version__,
        default_hypervisor=settings.default_hypervisor,
        upload_dir=settings.data_dir,
        private_paths=(settings.data_dir,),
    )
    for listener in for_metrics:
        host, port = listener.getsockname()[:2]
        app = MetricsListener(app, engine, (host, port))
    return app


def _announce(
    settings: EngineSettings, engine: EngineInterface, urls: Sequence[str], started: float
) -> None:
    url, *for_metrics = urls
    record = {"url": url, "pid": os.getpid(), "version": stillframe.__version__}
    for metrics_url in for_metrics:
        record["metrics_url"] = f"{metrics_url}/metrics"
        _LOG.info("metrics on %s/metrics", metrics_url)
    path = settings.data_dir / "server.json"
    try:
        _write_private(path, json.dumps(record) + "\n")
    except OSError as error:  # on a full disk somebody must be able to delete what fills it
        path.unlink(missing_ok=True)  # it tells of an earlier server
        _LOG.warning("clients must be told the URL, %s: %s", path, error.strerror)
    instances = len(engine.list_instances())
    took = (time.monotonic() - started) * 1000
    print(
        f"stillframe ready on {url} (data {settings.data_dir}, {settings.default_hypervisor}, "
        f"{instances} instances, {took:.0f} ms)",
        flush=True,
    )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    # A wildcard address is for listening; people and clients on this machine need a real one.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _check_programs(settings: EngineSettings) -> None:
    if settings.accelerator not in ("auto", "kvm", "tcg"):
        raise InvalidRequest(
            f"invalid accelerator {settings.accelerator!r}", hint="use auto, kvm or tcg"
        )
    if sys.platform != "linux":
        raise MissingComponent("the server needs Linux", hint="use the client against a server")


def _allow_many_files() -> None:
    """Raise the soft limit of open files to the hard one: each VM takes several (getrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # Darwin's hard limit is one that it refuses
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _write_private(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
