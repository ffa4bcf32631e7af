"""The shim's own part: requests, the order of things, the guest's byte streams.

Knows the framework by ``protocol.Framework`` only, so that it runs, and is tested, anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillframe.vmm.vz.protocol import (
    ENDED,
    MAX_LINE,
    Description,
    Framework,
    FrameworkFailure,
    Identity,
    Refusal,
    VirtualMachine,
)

_CHUNK = 1 << 16  # bytes
# Seconds. Apple's header on connectToPort: "does nothing if the guest does not listen".
_CONNECT_DEADLINE = 1.0
_ENTROPY_REFUSED = "no entropy device: with one this VM could not be saved"


class Service:
    """One VM behind one socket. ``run`` returns when the guest has ended."""

    def __init__(self, framework: Framework, say: Callable[[str], None]) -> None:
        """``say`` takes lines for the log."""
        self._framework, self._say = framework, say
        self._vm: VirtualMachine | None = None
        self._facts: dict[str, Any] = {}  # what it takes to restore the VM
        self._one_at_a_time = asyncio.Lock()
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._talking: set[asyncio.Task[None]] = set()
        self._does: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "boot": self._boot,
            "restore": self._restore,
            "status": self._status,
            "pause": self._pause,
            "resume": self._resume,
            "save": self._save,
            "power": self._power,
            "stop": self._stop,
        }

    async def run(self, listener: socket.socket) -> str:
        """Serve until the guest has ended; why it did. Raises OSError."""
        server = await asyncio.start_unix_server(self._accepted, sock=listener, limit=MAX_LINE)
        try:
            reason = await asyncio.shield(self._ended)
        finally:
            server.close()
            for task in self._talking:
                task.cancel()
            await asyncio.gather(*self._talking, return_exceptions=True)
        self._say(f"{ENDED}{reason}")
        return reason

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._talk(reader, writer))
        self._talking.add(task)
        task.add_done_callback(self._talking.discard)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            if line.startswith(b"CONNECT "):
                await self._splice(line, reader, writer)
            elif line:
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError):
            pass  # whoever asked is gone, or sends no line
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            verb = self._does[request["do"]]
        except (ValueError, KeyError, TypeError):
            return _refused(FrameworkFailure("this is no request", Refusal.REQUEST))
        try:
            async with self._one_at_a_time:
                return await verb(request)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{request['do']} is incomplete: {type(error).__name__} {error}"
            return _refused(FrameworkFailure(reason, Refusal.REQUEST))
        except FrameworkFailure as error:
            return _refused(error)

    # -- requests ----------------------------------------------------------------------------------
    async def _boot(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make a VM of a new identity and start it."""
        vm = await self._make(Description.from_json(request["vm"]))
        await vm.start()
        return {}

    async def _restore(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make the VM of a known identity and load the state in ``path``; it stands still."""
        description = Description.from_json(request["vm"])
        if description.machine is None:
            raise FrameworkFailure("a VM to be restored has an identifier", Refusal.REQUEST)
        vm = await self._make(description)
        if vm.machine != description.machine:
            raise FrameworkFailure("the framework changed the machine identifier", Refusal.INVALID)
        await vm.restore(Path(request["path"]))
        state = await vm.state()
        if state != "paused":
            raise FrameworkFailure(f"the restored VM is {state}, not paused")
        return {}

    async def _make(self, description: Description) -> VirtualMachine:
        if self._vm is not None:
            raise FrameworkFailure("there is a VM already", Refusal.REQUEST)
        try:
            vm = await self._framework.create(description, self._guest_ended())
        except FrameworkFailure as error:
            # A restored VM must have the devices that it was saved with.
            if error.kind != Refusal.UNSAVEABLE or description.machine is not None:
                raise
            self._say(f"{_ENTROPY_REFUSED} ({error.message})")
            description = replace(description, entropy=False)
            vm = await self._framework.create(description, self._guest_ended())
        self._vm = vm
        identity = Identity(vm.machine, description.mac, description.entropy)
        self._facts = {
            "vcpus": description.vcpus,
            "memory_bytes": description.memory_bytes,
            "identity": identity.as_json(),
        }
        return vm

    def _guest_ended(self) -> Callable[[str], None]:
        loop = asyncio.get_running_loop()

        def told(reason: str) -> None:
            loop.call_soon_threadsafe(self._end, reason)

        return told

    def _end(self, reason: str) -> None:
        if not self._ended.done():
            self._ended.set_result(reason)

    async def _status(self, request: dict[str, Any]) -> dict[str, Any]:
        """The framework's word for the VM's state."""
        return {"state": "none" if self._vm is None else await self._vm.state()}

    async def _pause(self, request: dict[str, Any]) -> dict[str, Any]:
        vm = self._made()
        if await vm.state() != "paused":
            await vm.pause()
        return {}

    async def _resume(self, request: dict[str, Any]) -> dict[str, Any]:
        vm = self._made()
        if await vm.state() != "running":
            await vm.resume()
        return {}

    async def _save(self, request: dict[str, Any]) -> dict[str, Any]:
        """Save a paused VM to the new file ``path``; what it takes to restore it."""
        vm, path = self._made(), Path(request["path"])
        state = await vm.state()
        if state != "paused":
            raise FrameworkFailure(f"a VM is saved while it is paused; it is {state}")
        if path.exists():
            raise FrameworkFailure(f"{path.name} exists", Refusal.REQUEST)
        try:
            await vm.save(path)
        except FrameworkFailure:
            path.unlink(missing_ok=True)
            raise
        return self._facts

    async def _power(self, request: dict[str, Any]) -> dict[str, Any]:
        await self._made().request_stop()
        return {}

    async def _stop(self, request: dict[str, Any]) -> dict[str, Any]:
        """Switch the VM off; the shim ends then."""
        await self._made().stop()
        self._end("host-stop")
        return {}

    def _made(self) -> VirtualMachine:
        if self._vm is None:
            raise FrameworkFailure("there is no VM yet", Refusal.REQUEST)
        return self._vm

    # -- the guest's byte streams ------------------------------------------------------------------
    async def _splice(
        self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Join the connection with one to the guest's port; hang up if there is none."""
        port = int(line.split()[1])
        if self._vm is None:
            return
        try:
            async with asyncio.timeout(_CONNECT_DEADLINE):
                guest = await self._vm.connect(port)
        except (FrameworkFailure, TimeoutError):
            return  # nobody listens there yet: whoever dials asks again
        try:
            # A descriptor of our own, of whatever family it is: only read and written.
            copy = os.dup(guest.descriptor)
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=copy)
            connection.setblocking(False)
            from_guest, to_guest = await asyncio.open_unix_connection(sock=connection)
            try:
                writer.write(f"OK {port}\n".encode())
                await _until_either_ends(_copy(reader, to_guest), _copy(from_guest, writer))
            finally:
                to_guest.close()
        finally:
            guest.close()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # one side hung up: so does the other
        while data := await source.read(_CHUNK):
            sink.write(data)
            await sink.drain()


async def _until_either_ends(*copies: Awaitable[None]) -> None:
    tasks = [asyncio.ensure_future(copy) for copy in copies]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _refused(error: FrameworkFailure) -> dict[str, Any]:
    return {"error": error.message, "kind": error.kind.value}
