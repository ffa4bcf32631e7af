"""Create and start: from an image to a booting instance."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from stillframe.engine.context import Context, Phases, finish
from stillframe.engine.interface import CreateRequest
from stillframe.engine.keeping.compression import check_policy
from stillframe.engine.keeping.expiry import deadline
from stillframe.engine.machines import boot_and_commit, clear_remains, command_of
from stillframe.engine.telemetry import Operation
from stillframe.host.files import available_bytes, remove_tree, storage_errors
from stillframe.images.disk import make_overlay_disk
from stillframe.model.errors import (
    InsufficientResources,
    InvalidRequest,
    InvalidState,
    NameConflict,
    StillframeError,
)
from stillframe.model.states import InstanceState, Permission, Verb, permission
from stillframe.model.units import KIB, MIB, check_encodable, check_name, check_tags, format_size
from stillframe.model.values import Hypervisor, Image, Instance
from stillframe.store.records import Intent

_HUGE_PAGE = 2 * MIB
MIN_MEMORY = 64 * MIB
MIN_OVERLAY = 16 * MIB
# It goes with every command that is run in the guest, in one frame of 64 KiB with the command.
_MAX_ENVIRONMENT = 48 * KIB


async def create(context: Context, request: CreateRequest) -> Instance:
    """Boot a new instance; it is Initializing on return.

    It is there, and can be deleted, while its image is still being pulled. Raises InvalidRequest,
    NotFound (image), InsufficientResources, NotSupported, MissingComponent, StorageFull,
    VmmFailure, Conflict (deleted meanwhile); then nothing of it is left.
    """
    wanted = _checked(context, request)
    await context.available_driver(context.offered(wanted.hypervisor), wanted.limits)
    async with context.making(wanted.id):
        with contextlib.ExitStack() as undo:
            try:
                context.records.reserve_instance(wanted, Intent(wanted.id, "create", {}))
            except NameConflict as error:
                raise _name_taken(request.name) from error
            undo.callback(context.forget, wanted.id)
            image = await context.images.ensure(request.image, platform=request.platform)
            expires_at = deadline(context, request.expires_at, request.lifetime)  # after the pull
            instance = replace(
                wanted, image_digest=image.digest, platform=image.platform, expires_at=expires_at
            )
            # From now on the image is in use. It need not be written: a crash ends the creation.
            context.records.instances[instance.id] = instance
            _check_command(instance, image)
            instance = await _make(context, instance, undo)
            undo.pop_all()
    return instance


async def _make(context: Context, instance: Instance, undo: contextlib.ExitStack) -> Instance:
    phases = Phases()
    with phases.measure("disk"):
        await finish(asyncio.to_thread(_make_disks, context, instance, undo))
    with phases.measure("start"):
        booting = await boot_and_commit(context, instance, fulfils=instance.id, note="created")
    context.telemetry.observe(Operation.CREATE, phases.total())
    return booting


def _checked(context: Context, request: CreateRequest) -> Instance:
    """The instance that was asked for, every value checked before anything is touched."""
    settings = context.settings
    check_name(request.name)
    if context.records.instance_by_name(request.name) is not None:
        raise _name_taken(request.name)
    memory = _default(request.memory_bytes, settings.default_memory_bytes)
    overlay = _default(request.overlay_bytes, settings.default_overlay_bytes)
    vcpus = _default(request.vcpus, settings.default_vcpus)
    _check_range("size", memory, MIN_MEMORY, settings.max_memory_bytes, "invalid_size")
    _check_range(
        "overlay_size", overlay, MIN_OVERLAY, settings.max_overlay_bytes, "invalid_overlay_size"
    )
    if not 1 <= vcpus <= settings.max_vcpus:
        raise InvalidRequest(
            f"vcpus must be 1 to {settings.max_vcpus}, not {vcpus}", limit=settings.max_vcpus
        )
    deadline(context, request.expires_at, request.lifetime)
    check_environment(request.env)
    check_command_text(request.entrypoint, request.cmd)
    check_policy(request.snapshot_policy)
    if memory > _host_memory():
        raise InsufficientResources(
            f"the guest wants {format_size(memory)}, this host has {format_size(_host_memory())}",
            hint="ask for a smaller size",
        )
    return Instance(
        id=context.new_id(),
        name=request.name,
        image=request.image,
        image_digest="",
        state=InstanceState.CREATED,
        created_at=context.now(),
        phase_since=context.now(),
        hypervisor=request.hypervisor or settings.default_hypervisor,
        memory_bytes=-(-memory // _HUGE_PAGE) * _HUGE_PAGE,
        overlay_bytes=-(-overlay // MIB) * MIB,
        vcpus=vcpus,
        env=dict(request.env or {}),
        tags=check_tags(request.tags),
        entrypoint=tuple(request.entrypoint or ()) or None,
        cmd=tuple(request.cmd or ()) or None,
        network_enabled=request.network_enabled,
        snapshot_policy=request.snapshot_policy,
        limits=request.limits,
    )


def _default(value: int | None, default: int) -> int:
    return default if value is None else value


def _check_range(what: str, value: int, low: int, high: int, code: str) -> None:
    if not low <= value <= high:
        raise InvalidRequest(
            f"{what} must be between {format_size(low)} and {format_size(high)}, "
            f"not {format_size(value)}",
            code=code,
            minimum_bytes=low,
            maximum_bytes=high,
        )


def check_environment(env: Mapping[str, str] | None) -> None:
    """Raises InvalidRequest for variables that no process in a guest could be given."""
    size = 0
    for key, value in (env or {}).items():
        check_encodable(key + value, what="an environment variable")
        if not key or "=" in key or "\0" in key + value:
            raise InvalidRequest(f"invalid environment variable {key[:40]!r}")
        size += len(f"env {key}={value} ".encode(errors="replace"))
    if size > _MAX_ENVIRONMENT:
        raise InvalidRequest(
            f"the environment has {size} bytes, at most {_MAX_ENVIRONMENT} are possible",
            size=size,
            limit=_MAX_ENVIRONMENT,
        )


def check_command_text(entrypoint: Sequence[str] | None, cmd: Sequence[str] | None) -> None:
    """Raises InvalidRequest for a command that no process could be given."""
    parts = [*(entrypoint or ()), *(cmd or ())]
    check_encodable("".join(parts), what="the command")
    if any("\0" in part for part in parts):
        raise InvalidRequest("a command cannot contain NUL")


def _check_command(instance: Instance, image: Image) -> None:
    if not command_of(instance, image) and instance.hypervisor is not Hypervisor.FAKE:
        raise InvalidRequest(
            f"image {instance.image} names no command to run", hint="give cmd or entrypoint"
        )


def _host_memory() -> int:
    import os

    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _name_taken(name: str) -> InvalidRequest:
    # The contract answers 400 here, and 409 for the same mistake in a fork.
    return InvalidRequest(
        f"an instance named {name!r} already exists",
        code="already_exists",
        hint="choose another name or delete that instance",
        name=name,
    )


def make_directory(directory: Path, undo: contextlib.ExitStack) -> None:
    """Make the directory of an instance with its logs; ``undo`` removes it."""
    undo.callback(remove_tree, directory)
    directory.mkdir(mode=0o700)
    (directory / "logs").mkdir(mode=0o700)


def _make_disks(context: Context, instance: Instance, undo: contextlib.ExitStack) -> None:
    paths = context.data.instance(instance.id)
    with storage_errors("make the disks of the instance"):
        if available_bytes(context.data.root) < 64 * MIB:
            raise OSError(28, "No space left on device")
        make_directory(paths.directory, undo)
        make_overlay_disk(paths.overlay, instance.overlay_bytes, context.data.templates)


async def start(
    context: Context,
    instance_id: str,
    *,
    entrypoint: Sequence[str] | None = None,
    cmd: Sequence[str] | None = None,
) -> Instance:
    """Boot a Stopped instance on its disks; overrides of entrypoint and cmd persist.

    Empty ones override nothing. Raises NotFound, InvalidState, InvalidRequest, and what booting
    raises (then it is Stopped as before).
    """
    check_command_text(entrypoint, cmd)
    async with context.exclusive(instance_id, "start") as instance:
        if permission(Verb.START, instance.state) is Permission.NOTHING:
            if entrypoint or cmd:
                raise InvalidState(
                    f"cannot change the command: instance is {instance.state.value}",
                    hint="stop the instance first",
                )
            return instance
        wanted = replace(
            instance,
            entrypoint=tuple(entrypoint or ()) or instance.entrypoint,
            cmd=tuple(cmd or ()) or instance.cmd,
        )
        _check_command(wanted, context.images.by_digest(wanted.image_digest))
        try:
            return await boot_and_commit(context, wanted, note="started")
        except StillframeError:
            clear_remains(context.data.instance(instance_id))
            raise
