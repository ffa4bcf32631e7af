"""From files to a running guest and back: the steps that several verbs share.

``boot`` and ``load`` start a VMM, ``attach`` makes it one of ours and watches it, ``dial`` talks to
its guest (``greeting`` makes that one itself first), ``end`` ends it. The verbs commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from stillframe.engine.context import Context, LiveInstance, finish
from stillframe.engine.logs import last_bytes
from stillframe.engine.space import look_after
from stillframe.guest.connection import AgentConnection, silent
from stillframe.host.files import create_sparse, storage_errors
from stillframe.images.boot import BootPair, write_config_disk
from stillframe.model.errors import (
    DamagedData,
    NotFound,
    NotSupported,
    StillframeError,
    VmmFailure,
)
from stillframe.model.states import InstanceState
from stillframe.model.values import Hypervisor, Image, Instance
from stillframe.store.paths import InstancePaths
from stillframe.vmm.driver import (
    DEVICE_LAYOUT,
    Disk,
    Driver,
    DriverProbe,
    Machine,
    MachineResources,
    MachineSpec,
)

log = logging.getLogger("stillframe.machines")
_DIAL_AGAIN = 1.0  # seconds until a guest that has not come up is tried again
_NO_KERNEL = BootPair(digest="", kernel=Path("/dev/null"), initrd=Path("/dev/null"), arguments="")
_EXIT_LINE = re.compile(
    rb'STILLFRAME-EXIT nonce=(\w+) code=(-?\d+)(?: message="([^"\n]*)")?', re.MULTILINE
)
# The user-mode network is the same in every VM, so that a fork needs no change inside.
_NETWORK = (("address", "10.0.2.15/24"), ("gateway", "10.0.2.2"), ("dns", "10.0.2.3"))


def machine_id(instance_id: str) -> str:
    """The guest's /etc/machine-id: 32 hex digits, one for each instance."""
    return hashlib.blake2s(instance_id.encode(), digest_size=16).hexdigest()


def spec_of(instance: Instance) -> MachineSpec:
    """The part of the VM that its memory depends on."""
    return MachineSpec(
        memory_bytes=instance.memory_bytes,
        vcpus=instance.vcpus,
        accelerator=instance.accelerator,
        network=instance.network_enabled,
        layout=instance.device_layout,
    )


async def resources_of(
    context: Context, instance: Instance, device_state: Path | None = None
) -> MachineResources:
    """The files and identity this host gives to the instance's VMM. Raises MissingComponent."""
    paths = context.data.instance(instance.id)
    fake = instance.hypervisor is Hypervisor.FAKE
    pair = _NO_KERNEL if fake else await context.boot_pair(instance.boot)
    return MachineResources(
        directory=paths.directory,
        memory_image=paths.memory,
        disks=(
            Disk(context.images.root_disk(instance.image_digest), readonly=True),
            Disk(paths.overlay, readonly=False),
            Disk(paths.config, readonly=True),
        ),
        kernel=pair.kernel,
        initrd=pair.initrd,
        kernel_arguments=pair.arguments,
        generation_id=uuid.uuid4(),
        console_log=paths.log("app"),
        vmm_log=paths.log("vmm"),
        device_state=device_state,
        limits=instance.limits,
    )


def command_of(instance: Instance, image: Image) -> tuple[str, ...]:
    """What an instance runs: its own entrypoint and cmd, and the image's where it has none.

    As in OCI runtimes, an entrypoint of its own discards the image's cmd. Empty is none.
    """
    config = image.config
    entrypoint = instance.entrypoint or config.entrypoint
    return entrypoint + (instance.cmd or (() if instance.entrypoint else config.cmd))


def boot_pairs(instance: Instance, image: Image) -> list[tuple[str, str]]:
    """The boot configuration: what to run, as whom, where."""
    config = image.config
    environment = {**config.env, **instance.env}
    pairs = [("arg", part) for part in command_of(instance, image)]
    pairs += [("env", f"{key}={value}") for key, value in environment.items()]
    pairs += [
        ("cwd", config.working_dir or "/"),
        ("user", config.user),
        ("hostname", instance.name),
        ("machine_id", machine_id(instance.id)),
        ("instance_id", instance.id),
        ("nonce", instance.boot_nonce),
        ("network", "1" if instance.network_enabled else "0"),
        ("seed", secrets.token_hex(64)),
    ]
    pairs += _NETWORK if instance.network_enabled else ()
    return pairs


def write_config(context: Context, instance: Instance, image: Image) -> None:
    """Write the boot configuration disk. Raises StorageFull, InvalidRequest (too large)."""
    path = context.data.instance(instance.id).config
    with storage_errors("write the boot configuration"):
        path.unlink(missing_ok=True)
        write_config_disk(path, boot_pairs(instance, image))


async def boot(context: Context, instance: Instance, image: Image) -> Machine:
    """Cold-boot an instance whose disks are in place; its guest runs on return.

    ``instance.boot_nonce`` must be fresh. Raises VmmFailure, MissingComponent, StorageFull.
    """
    paths = context.data.instance(instance.id)
    driver, _ = await context.available_driver(instance.hypervisor, instance.limits)
    await end(context, instance.id)  # one that could not be ended when it was to be
    await finish(asyncio.to_thread(write_config, context, instance, image))
    with storage_errors("make the memory image"):
        paths.memory.unlink(missing_ok=True)
        paths.memory_table.unlink(missing_ok=True)  # it is of another image
        paths.unidentified.unlink(missing_ok=True)  # it gets an identity as it boots
        create_sparse(paths.memory, instance.memory_bytes)
    async with context.starting():
        return await _start(driver, instance, await resources_of(context, instance))


async def _start(driver: Driver, instance: Instance, resources: MachineResources) -> Machine:
    """Start a VMM; when cancelled meanwhile, end it before that is passed on."""
    starting = asyncio.ensure_future(driver.start(spec_of(instance), resources))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        await asyncio.wait([starting])
        if not starting.cancelled() and starting.exception() is None:
            await starting.result().kill()
        raise


def foreign_to(instance: Instance, probe: DriverProbe) -> list[str]:
    """Why memory of ``instance`` cannot run under a hypervisor as it is here; empty if it can.

    The host's processor counts only where guests see it, under KVM, and where it was recorded. The
    version does not where the hypervisor seals memory: that alone can tell what it loads.
    """
    hypervisor = instance.hypervisor.value
    facts = [(f"with {hypervisor} accelerator", instance.accelerator, probe.accelerator)]
    if not instance.hypervisor.seals_memory:
        version = (f"with {hypervisor} version", instance.hypervisor_version, probe.version)
        facts.insert(0, version)
    if instance.processor and probe.processor and instance.accelerator == probe.accelerator:
        facts.append(("on the processor", instance.processor, probe.processor))
    return [
        f"its memory was captured {what} {then or 'unknown'}, this host has {here or 'none'}"
        for what, then, here in facts
        if then != here
    ]


async def load(context: Context, instance: Instance, devices: Path) -> Machine:
    """Start a VMM on the instance's memory image with loaded devices; the guest stands still.

    Raises NotSupported when memory made elsewhere cannot run here, VmmFailure.
    """
    driver, probe = await context.available_driver(instance.hypervisor, instance.limits)
    if reasons := foreign_to(instance, probe):
        raise NotSupported(
            reasons[0],
            hint="fork a Stopped snapshot, or use the same hypervisor as at the capture",
        )
    await end(context, instance.id)  # one that could not be ended when it was to be
    async with context.starting():
        resources = await resources_of(context, instance, devices)
        try:
            return await _start(driver, instance, resources)
        except VmmFailure as error:
            # Seen once in some hundred starts side by side: it ends before its first word.
            if not error.facts.get("silent"):
                raise
            log.warning("%s: %s; starting it once more", instance.id, error)
        return await _start(driver, instance, resources)


def attach(context: Context, instance: Instance, machine: Machine) -> LiveInstance:
    """Make a started VMM the live VMM of ``instance`` and watch for its exit."""
    live = LiveInstance(machine)
    context.live[instance.id] = live
    context.spawn(_watch(context, instance.id, live), name=f"watch {instance.id}")
    return live


async def dial(live: LiveInstance, timeout: float) -> AgentConnection:
    """The connection to the guest agent, made if there is none.

    Raises GuestFailure when that takes more than ``timeout`` seconds, VmmFailure.
    """
    try:
        async with asyncio.timeout(timeout), live.dialling:
            if live.connection is None or not live.connection.alive:
                stream = await live.machine.dial_agent()
                live.connection = await AgentConnection.open(
                    stream,
                    deadline=timeout,
                    on_event=lambda _: live.news.set(),
                    on_loss=live.news.set,
                )
            return live.connection
    except TimeoutError as error:
        raise silent(timeout) from error


@contextlib.contextmanager
def ending(live: LiveInstance) -> Iterator[None]:
    """Mark a VMM as one that is being ended on purpose, unless that fails."""
    before, live.ending = live.ending, True
    try:
        yield
    except BaseException:
        live.ending = before
        raise


async def end(context: Context, instance_id: str) -> None:
    """Kill the live VMM of an instance, if any, and forget it. Raises VmmFailure."""
    live = context.live.get(instance_id)
    if live is None:
        return
    with ending(live):
        if live.connection is not None:
            await live.connection.close()
        await live.machine.kill()
    if context.live.get(instance_id) is live:
        del context.live[instance_id]


def announce_ready(context: Context, instance: Instance, live: LiveInstance) -> None:
    """In the background, wait for the guest's agent and workload, then commit Running."""
    context.spawn(_await_ready(context, instance.id, live), name=f"boot {instance.id}")


async def _await_ready(context: Context, instance_id: str, live: LiveInstance) -> None:
    gone = asyncio.ensure_future(live.machine.wait_exit())
    try:
        while not gone.done() and (instance := _booting(context, instance_id, live)) is not None:
            try:
                await _workload_begun(context, live)
                reason = None
            except StillframeError as error:
                reason = f"the guest has not come up yet: {error.message}"
            instance = _booting(context, instance_id, live)
            if instance is not None and reason is None and not live.ending:
                running = context.moved(instance, InstanceState.RUNNING)
                context.witness(running, note="state is Running")
                return
            silent_for_space = live.machine.lacks_space.is_set()  # which is said already
            if instance and not silent_for_space and reason not in (None, instance.state_error):
                context.witness(replace(instance, state_error=reason), note=str(reason))
            await asyncio.wait([gone], timeout=_DIAL_AGAIN)
    finally:
        gone.cancel()
        await asyncio.wait([gone])


def _booting(context: Context, instance_id: str, live: LiveInstance) -> Instance | None:
    """The record of an instance that this VMM still boots."""
    instance = context.records.instances.get(instance_id)
    if instance is None or instance.state is not InstanceState.INITIALIZING:
        return None
    return instance if context.live.get(instance_id) is live else None


async def _workload_begun(context: Context, live: LiveInstance) -> None:
    """Return when the agent says, on a connection that holds, that its workload has begun.

    Raises GuestFailure, VmmFailure.
    """
    connection = await dial(live, context.settings.boot_timeout)
    while connection.alive and connection.hello.workload == "starting":
        await live.news.wait()
        live.news.clear()
    if not connection.alive:
        raise connection.failure()


async def _watch(context: Context, instance_id: str, live: LiveInstance) -> None:
    """Record the end of a VMM that nobody asked to end; boot it again after a guest reboot.

    A verb that ends it holds the instance meanwhile, and has it forgotten when it succeeds.
    """
    about_space = context.spawn(look_after(context, instance_id, live), name="look after space")
    try:
        await live.machine.wait_exit()
    finally:
        about_space.cancel()
    if context.closing or context.live.get(instance_id) is not live:
        return
    with contextlib.suppress(NotFound):  # deleted meanwhile
        async with context.exclusive(instance_id, "VMM exit") as instance:
            if context.live.get(instance_id) is live:
                await _ended(context, instance, live)


async def _ended(context: Context, instance: Instance, live: LiveInstance) -> None:
    del context.live[instance.id]
    if live.connection is not None:
        await live.connection.close()
    await live.machine.close()
    if not instance.state.has_vmm:  # one that could not be ended in time
        clear_remains(context.data.instance(instance.id))
    elif live.machine.shutdown_reason == "guest-reset":
        await _reboot(context, instance)
    else:
        commit_exit(context, instance)


def commit_exit(context: Context, instance: Instance) -> Instance:
    """Commit Stopped for an instance whose VMM is gone, with the workload's exit code if known."""
    code, message = exit_of(context, instance)
    stopped = context.moved(
        instance, InstanceState.STOPPED, process=None, stopped_at=context.now(),
        exit_code=code, exit_message=message,
    )  # fmt: skip
    context.witness(stopped, note=f"the VMM ended; exit code {code}")
    clear_remains(context.data.instance(instance.id))
    return stopped


async def end_because(context: Context, instance_id: str, reason: str) -> None:
    """End a VMM that cannot go on and record Stopped, for that ``reason``. Its lock is held.

    Raises what ``end`` raises; then nothing is recorded.
    """
    await end(context, instance_id)
    stopped = context.moved(
        context.instance(instance_id), InstanceState.STOPPED, process=None,
        stopped_at=context.now(), state_error=reason,
    )  # fmt: skip
    context.witness(stopped, note=reason)
    clear_remains(context.data.instance(instance_id))


def clear_remains(paths: InstancePaths) -> None:
    """Remove what only a running VMM needs: its memory image, sockets, and half-made files.

    A guest in standby without an identity of its own stays marked as such. What cannot be removed
    is tried once more, and then when the next server starts.
    """
    unneeded = {paths.memory, paths.memory_table}
    if not paths.standby.directory.exists():
        unneeded.add(paths.unidentified)
    for _ in range(2):
        with contextlib.suppress(OSError):
            for path in list(paths.directory.iterdir()):
                half_made = path.suffix == ".new" and path.is_file()
                if half_made or path in unneeded or path.is_socket():
                    with contextlib.suppress(OSError):
                        path.unlink()


async def _reboot(context: Context, instance: Instance) -> None:
    """Boot cold on the same disks: after a reset of the guest its memory is worthless."""
    try:
        await boot_and_commit(context, instance, note="the guest rebooted")
    except StillframeError as error:
        context.note(instance.id, f"could not boot again: {error}")
        commit_exit(context, instance)


async def boot_and_commit(
    context: Context, instance: Instance, *, fulfils: str | None = None, note: str = ""
) -> Instance:
    """Boot with a fresh nonce, commit Initializing, and wait for Running in the background.

    On failure the VMM is gone and nothing is committed. Raises what ``boot`` raises.
    """
    image = context.images.by_digest(instance.image_digest)
    _, probe = await context.available_driver(instance.hypervisor)
    pair = "" if instance.hypervisor is Hypervisor.FAKE else (await context.boot_pair()).digest
    instance = context.moved(
        instance, InstanceState.INITIALIZING,
        boot_nonce=secrets.token_hex(8), boot=pair,
        hypervisor_version=probe.version, accelerator=probe.accelerator,
        processor=probe.processor,
        device_layout=DEVICE_LAYOUT,
        started_at=context.now(), stopped_at=None, exit_code=None, exit_message=None,
    )  # fmt: skip
    machine = await boot(context, instance, image)
    try:
        instance = context.moved(instance, InstanceState.INITIALIZING, process=machine.process)
        context.commit(instance, fulfils=fulfils, note=note)
    except BaseException:
        await machine.kill()
        raise
    live = attach(context, instance, machine)
    announce_ready(context, instance, live)
    return instance


def exit_of(context: Context, instance: Instance) -> tuple[int | None, str | None]:
    """Exit code and message of the workload, from the console line that bears the boot's nonce."""
    tail = last_bytes(context.data.instance(instance.id).log("app"), 65536)
    for nonce, code, message in reversed(_EXIT_LINE.findall(tail)):
        if nonce.decode() == instance.boot_nonce:
            return int(code), message.decode(errors="replace") or None
    return None, None


def check_loadable(devices: Path, memory: Path, instance: Instance) -> None:
    """Refuse a memory image that cannot be this instance's. Raises DamagedData, OSError."""
    try:
        devices.stat()
        size = memory.stat().st_size
    except FileNotFoundError as error:
        raise DamagedData("the memory image or device state is missing") from error
    if size != instance.memory_bytes:
        raise DamagedData("the memory image has the wrong size")
