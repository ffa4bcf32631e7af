"""Every call to Virtualization.framework, through PyObjC. Imported on macOS only.

Objects of the framework are touched on the main thread alone: its main queue is the queue of every
VM made here. The shim's event loop runs in another thread.

How names are written: PyObjC spells the selector ``initWithURL:readOnly:error:`` with underscores,
takes None for an ``error:`` argument and returns it as a second result; a completion handler is a
function. Each name is checked against Apple's headers by ``tests/unit/test_vz_names.py``.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import CoreFoundation
import Foundation
import Virtualization

from stillframe.vmm.vz.protocol import Description, FrameworkFailure, Refusal

# The classes by which the test knows what a parameter is: mypy sees none of them.
NSError: TypeAlias = Any
NSURL: TypeAlias = Any
VZGenericMachineIdentifier: TypeAlias = Any
VZVirtualMachine: TypeAlias = Any
VZVirtualMachineConfiguration: TypeAlias = Any
VZVirtioSocketDevice: TypeAlias = Any
VZVirtioSocketConnection: TypeAlias = Any

_STATES = {
    Virtualization.VZVirtualMachineStateStopped: "stopped",
    Virtualization.VZVirtualMachineStateRunning: "running",
    Virtualization.VZVirtualMachineStatePaused: "paused",
    Virtualization.VZVirtualMachineStateError: "error",
    Virtualization.VZVirtualMachineStateStarting: "starting",
    Virtualization.VZVirtualMachineStatePausing: "pausing",
    Virtualization.VZVirtualMachineStateResuming: "resuming",
    Virtualization.VZVirtualMachineStateStopping: "stopping",
    Virtualization.VZVirtualMachineStateSaving: "saving",
    Virtualization.VZVirtualMachineStateRestoring: "restoring",
}
_KINDS = {
    Virtualization.VZErrorOutOfDiskSpace: Refusal.NO_SPACE,
    Virtualization.VZErrorRestore: Refusal.RESTORE,
    Virtualization.VZErrorVirtualMachineLimitExceeded: Refusal.LIMIT,
    Virtualization.VZErrorInvalidVirtualMachineConfiguration: Refusal.INVALID,
    Virtualization.VZErrorInvalidVirtualMachineState: Refusal.REQUEST,
    Virtualization.VZErrorInvalidVirtualMachineStateTransition: Refusal.REQUEST,
}


def serve_main_queue() -> None:
    """Run what is put on the main queue, on the main thread, for ever."""
    CoreFoundation.CFRunLoopRun()


def unusable() -> str | None:
    """Why no VM can be made here, in the framework's words; None if one can.

    Validates a VM without devices or a kernel worth the name, which needs the entitlement too.
    """
    if not Virtualization.VZVirtualMachine.isSupported():
        return "this Mac does not support virtualization"
    configuration = Virtualization.VZVirtualMachineConfiguration.alloc().init()
    loader = Virtualization.VZLinuxBootLoader.alloc().initWithKernelURL_(_url(os.devnull))
    configuration.setBootLoader_(loader)
    configuration.setCPUCount_(1)
    configuration.setMemorySize_(128 << 20)
    valid, error = configuration.validateWithError_(None)
    return None if valid else _failure(error).message


class _Delegate(Foundation.NSObject):  # type: ignore[misc]
    """Is told by the framework that a guest has ended. Implements VZVirtualMachineDelegate."""

    def guestDidStopVirtualMachine_(self, machine: VZVirtualMachine) -> None:
        """The guest has switched itself off."""
        self.ended("guest-shutdown")

    def virtualMachine_didStopWithError_(self, machine: VZVirtualMachine, error: NSError) -> None:
        """The VM has ended for a reason on the host."""
        print(_failure(error).message, flush=True)
        self.ended("host-error")


class AppleConnection:
    """A vsock connection. Implements ``GuestConnection``."""

    def __init__(self, connection: VZVirtioSocketConnection) -> None:
        """Keeps the framework's object: with it the descriptor would go."""
        self._connection: VZVirtioSocketConnection = connection
        self.descriptor: int = connection.fileDescriptor()

    def close(self) -> None:
        """Hang up."""
        connection: VZVirtioSocketConnection = self._connection
        _on_main(connection.close)


class AppleMachine:
    """One VM. Implements ``VirtualMachine``."""

    def __init__(self, vm: VZVirtualMachine, machine: bytes, delegate: object) -> None:
        """``delegate`` is kept here: the framework refers to it weakly."""
        self._vm: VZVirtualMachine = vm
        self._delegate = delegate
        self.machine = machine

    async def state(self) -> str:
        """The framework's word for it."""
        return _STATES.get(await _called(self._vm.state), "unknown")

    async def start(self) -> None:
        """Boot a stopped VM."""
        await _completed(self._vm.startWithCompletionHandler_)

    async def pause(self) -> None:
        """Stop all vCPUs."""
        await _completed(self._vm.pauseWithCompletionHandler_)

    async def resume(self) -> None:
        """Let the vCPUs of a paused VM run."""
        await _completed(self._vm.resumeWithCompletionHandler_)

    async def stop(self) -> None:
        """Switch the VM off without asking its guest."""
        await _completed(self._vm.stopWithCompletionHandler_)

    async def save(self, path: Path) -> None:
        """Write memory and devices of a paused VM to a new file."""
        url = _url(path)
        await _completed(lambda done: self._vm.saveMachineStateToURL_completionHandler_(url, done))

    async def restore(self, path: Path) -> None:
        """Load them into a stopped VM of the same configuration, which is paused then."""
        url = _url(path)
        await _completed(
            lambda done: self._vm.restoreMachineStateFromURL_completionHandler_(url, done)
        )

    async def request_stop(self) -> None:
        """Ask the guest to shut down."""
        asked, error = await _called(lambda: self._vm.requestStopWithError_(None))
        if not asked:
            raise _failure(error)

    async def connect(self, port: int) -> AppleConnection:
        """Connect to a vsock port of the guest."""
        loop = asyncio.get_running_loop()
        made: asyncio.Future[AppleConnection] = loop.create_future()

        def begin() -> None:
            device: VZVirtioSocketDevice = self._vm.socketDevices()[0]
            device.connectToPort_completionHandler_(port, connected)

        def connected(connection: VZVirtioSocketConnection, error: NSError) -> None:
            if error is not None:
                _settle(loop, made, _failure(error))
            else:
                _settle(loop, made, AppleConnection(connection))

        _on_main(_guarded(begin, loop, made))
        return await made


class AppleFramework:
    """Makes VMs. Implements ``Framework``."""

    async def create(self, description: Description, ended: Callable[[str], None]) -> AppleMachine:
        """Make a VM and validate it, that it can be saved too."""
        made: AppleMachine = await _called(lambda: _create(description, ended))
        return made


def _create(description: Description, ended: Callable[[str], None]) -> AppleMachine:
    configuration: VZVirtualMachineConfiguration
    configuration, machine = _configuration(description)
    valid, error = configuration.validateWithError_(None)
    if not valid:
        raise _failure(error)
    saveable, error = configuration.validateSaveRestoreSupportWithError_(None)
    if not saveable:
        raise FrameworkFailure(_failure(error).message, Refusal.UNSAVEABLE)
    vm = Virtualization.VZVirtualMachine.alloc().initWithConfiguration_(configuration)
    delegate = _Delegate.alloc().init()
    delegate.ended = ended
    vm.setDelegate_(delegate)
    return AppleMachine(vm, machine, delegate)


def _configuration(description: Description) -> tuple[VZVirtualMachineConfiguration, bytes]:
    """The VM's configuration, and its machine identifier."""
    loader = Virtualization.VZLinuxBootLoader.alloc().initWithKernelURL_(_url(description.kernel))
    loader.setCommandLine_(description.arguments)
    if description.initrd is not None:
        loader.setInitialRamdiskURL_(_url(description.initrd))
    platform = Virtualization.VZGenericPlatformConfiguration.alloc().init()
    identifier = _identifier(description.machine)
    platform.setMachineIdentifier_(identifier)
    configuration = Virtualization.VZVirtualMachineConfiguration.alloc().init()
    configuration.setBootLoader_(loader)
    configuration.setPlatform_(platform)
    configuration.setCPUCount_(description.vcpus)
    configuration.setMemorySize_(description.memory_bytes)
    disks = [_disk(number, path, ro) for number, (path, ro) in enumerate(description.disks)]
    configuration.setStorageDevices_(disks)
    configuration.setSerialPorts_([_console(description.console)])
    socket = Virtualization.VZVirtioSocketDeviceConfiguration.alloc().init()
    configuration.setSocketDevices_([socket])
    if description.entropy:
        entropy = Virtualization.VZVirtioEntropyDeviceConfiguration.alloc().init()
        configuration.setEntropyDevices_([entropy])
    if description.mac is not None:
        configuration.setNetworkDevices_([_network(description.mac)])
    return configuration, bytes(identifier.dataRepresentation())


def _identifier(machine: bytes | None) -> VZGenericMachineIdentifier:
    if machine is None:
        return Virtualization.VZGenericMachineIdentifier.alloc().init()
    data = Foundation.NSData.dataWithBytes_length_(machine, len(machine))
    known = Virtualization.VZGenericMachineIdentifier.alloc().initWithDataRepresentation_(data)
    if known is None:
        raise FrameworkFailure("the saved machine identifier is not valid", Refusal.INVALID)
    return known


def _disk(number: int, path: str, readonly: bool) -> Any:
    """A disk; the guest's agent finds it by its serial number."""
    attachment, error = (
        Virtualization.VZDiskImageStorageDeviceAttachment.alloc()
        .initWithURL_readOnly_cachingMode_synchronizationMode_error_(
            _url(path),
            readonly,
            # Pages are shared between VMs and with our own copies of the file.
            Virtualization.VZDiskImageCachingModeCached,
            Virtualization.VZDiskImageSynchronizationModeFsync,
            None,
        )
    )  # fmt: skip
    if attachment is None:
        raise _failure(error)
    disk = Virtualization.VZVirtioBlockDeviceConfiguration.alloc().initWithAttachment_(attachment)
    disk.setBlockDeviceIdentifier_(f"stillframe{number}")
    return disk


def _console(path: str) -> Any:
    attachment, error = Virtualization.VZFileSerialPortAttachment.alloc().initWithURL_append_error_(
        _url(path), True, None
    )
    if attachment is None:
        raise _failure(error)
    port = Virtualization.VZVirtioConsoleDeviceSerialPortConfiguration.alloc().init()
    port.setAttachment_(attachment)
    return port


def _network(mac: str) -> Any:
    address = Virtualization.VZMACAddress.alloc().initWithString_(mac)
    if address is None:
        raise FrameworkFailure(f"{mac} is no address of a network card", Refusal.INVALID)
    card = Virtualization.VZVirtioNetworkDeviceConfiguration.alloc().init()
    card.setAttachment_(Virtualization.VZNATNetworkDeviceAttachment.alloc().init())
    card.setMACAddress_(address)
    return card


def _url(path: str | Path) -> NSURL:
    return Foundation.NSURL.fileURLWithPath_(str(path))


def _failure(error: NSError) -> FrameworkFailure:
    """The same error for the shim."""
    message = str(error.localizedDescription())
    reason = error.localizedFailureReason()
    if reason and str(reason) not in message:
        message = f"{message} {reason}"
    ours = error.domain() == Virtualization.VZErrorDomain
    kind = _KINDS.get(error.code(), Refusal.OTHER) if ours else Refusal.OTHER
    return FrameworkFailure(f"{message} ({error.domain()} {error.code()})", kind)


def _on_main(work: Callable[[], object]) -> None:
    """Have the main thread do it, now or soon."""
    if threading.current_thread() is threading.main_thread():
        work()
        return
    queue = Foundation.NSOperationQueue.mainQueue()
    queue.addOperationWithBlock_(lambda: _without_result(work))


def _without_result(work: Callable[[], object]) -> None:
    work()


async def _called(work: Callable[[], Any]) -> Any:
    """The result of ``work``, done on the main thread."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    _on_main(_guarded(lambda: _settle(loop, future, work()), loop, future))
    return await future


async def _completed(begin: Callable[[Callable[[NSError], None]], object]) -> None:
    """Begin something on the main thread; return when its completion handler was called."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def done(error: NSError) -> None:
        _settle(loop, future, None if error is None else _failure(error))

    _on_main(_guarded(lambda: begin(done), loop, future))
    await future


def _guarded(
    work: Callable[[], object], loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any]
) -> Callable[[], None]:
    """``work``, whose exceptions (those of Objective-C too) end the wait instead of the thread."""

    def guarded() -> None:
        try:
            work()
        except FrameworkFailure as error:
            _settle(loop, future, error)
        except Exception as error:
            _settle(loop, future, FrameworkFailure(f"{type(error).__name__}: {error}"))

    return guarded


def _settle(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], outcome: object) -> None:
    """From the main thread: end the wait with a result or with a failure."""

    def settle() -> None:
        if future.done():  # given up meanwhile
            if isinstance(outcome, AppleConnection):
                AppleConnection.close(outcome)
            return
        if isinstance(outcome, FrameworkFailure):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    loop.call_soon_threadsafe(settle)
