"""Recovery at start: unfinished intents are undone, living VMs adopted, everything else ended.

To undo an intent takes its subject and its verb. Its facts only name an image that goes too: where
they cannot be read, the image stays, which costs room and nothing else. A verb that cannot be read
tells nothing of what must go and what must stay: the intent and its subject are left as they are.
"""

from __future__ import annotations

import asyncio
import logging

from stillframe.engine import greeting
from stillframe.engine.context import Context
from stillframe.engine.machines import (
    announce_ready,
    attach,
    clear_remains,
    commit_exit,
    resources_of,
)
from stillframe.engine.verbs.restore_snapshot import give_up, put_back
from stillframe.host.files import remove_tree
from stillframe.host.orphans import kill_orphans, processes_naming
from stillframe.images.boot import sweep_boot_pairs
from stillframe.images.disk import sweep_templates
from stillframe.model.errors import StillframeError
from stillframe.model.states import InstanceState
from stillframe.model.units import is_id
from stillframe.model.values import Instance
from stillframe.store.records import Intent
from stillframe.vmm.driver import MachineStatus

log = logging.getLogger("stillframe.recover")
_INSTANCE_VERBS = ("create", "fork", "delete")
_VERBS = (
    *_INSTANCE_VERBS, "snapshot", "import snapshot", "delete snapshot", "restore snapshot",
    "make image", "delete image",
)  # fmt: skip


async def recover(context: Context) -> None:
    """Bring records, files and processes into agreement after any kind of end."""
    for table, identifier in context.records.damaged:
        log.error("record %s in %s cannot be read; it is left alone", identifier, table)
    expected = {
        instance.process.pid
        for instance in context.records.instances.values()
        if instance.process is not None and instance.id not in context.records.intents
    }
    for pid in kill_orphans(context.data.instances, expected | _of_damaged(context)):
        log.warning("ended process %d, a VMM that no record knows", pid)
    await asyncio.to_thread(sweep_templates, context.data.templates)
    await asyncio.to_thread(sweep_boot_pairs, context.data.system)
    for intent in list(context.records.intents.values()):
        if intent.verb not in _VERBS:
            log.error("%r of %s is left alone: no such verb", intent.verb, intent.subject)
            continue
        try:
            await asyncio.to_thread(_undo_files, context, intent)
            _undo_image(context, intent)
        except (OSError, StillframeError) as error:  # the others can be had nevertheless
            log.error("%s of %s cannot be undone yet: %s", intent.verb, intent.subject, error)
            continue
        _undo_records(context, intent)
    if not _tell_strangers(context):
        _sweep(context)
    await asyncio.gather(
        *(
            _settle(context, instance)
            for instance in list(context.records.instances.values())
            if instance.id not in context.records.intents
        )
    )


def _sweep(context: Context) -> None:
    """Remove images and boot pairs that nothing refers to."""
    try:
        context.images.sweep()
        for path in list(context.data.system.iterdir()):
            if path.is_dir():
                context.release_boot_pair(path.name)
    except OSError as error:
        log.error("what nobody needs any more cannot be removed: %s", error)


def _tell_strangers(context: Context) -> bool:
    """Say which directories no record knows, if any.

    They may be somebody's only copy: none is removed, nor an image or boot pair they may need.
    """
    records, data = context.records, context.data
    found = False
    damaged = {identifier for _, identifier in records.damaged}
    for directory, known in (
        (data.instances, records.instances.keys()),
        (data.snapshots, records.snapshots.keys()),
    ):
        for path in directory.iterdir():
            if is_id(path.name) and path.name not in known and path.name not in damaged:
                log.warning("%s is left alone: no record knows it", path)
                found = True
    return found


def _of_damaged(context: Context) -> set[int]:
    """The VMMs of instances whose record cannot be read: it may be mended, their memory not.

    Where not even an id can be read, those are all that belong to nothing begun.
    """
    data, pids = context.data, set[int]()
    damaged = [key for table, key in context.records.damaged if table == "instances"]
    for identifier in filter(is_id, damaged):
        pids.update(processes_naming(data.instance(identifier).directory))
    if not all(map(is_id, damaged)):
        begun = [data.instance(key).directory for key in context.records.intents if is_id(key)]
        known = {pid for directory in begun for pid in processes_naming(directory)}
        pids.update(set(processes_naming(data.instances)) - known)
    return pids


def _undo_files(context: Context, intent: Intent) -> None:
    data, subject = context.data, intent.subject
    match intent.verb:
        case "create" | "fork" | "delete":
            remove_tree(data.instance_staged(subject).directory)
            remove_tree(data.instance(subject).directory)
        case "snapshot" | "import snapshot":
            remove_tree(data.snapshot_new(subject).directory)
            remove_tree(data.snapshot(subject).directory)
        case "delete snapshot":
            remove_tree(data.snapshot(subject).directory)
        case "restore snapshot":
            put_back(data.instance(subject), data.instance_staged(subject))


def _undo_image(context: Context, intent: Intent) -> None:
    """Take back the name of an image that came along with a snapshot, unless it is in use."""
    digest, records = intent.facts.get("image"), context.records
    if digest is None or intent.verb != "import snapshot" or records.damaged:
        return
    templates = [snapshot.template for snapshot in records.snapshots.values()]
    if not any(i.image_digest == digest for i in [*records.instances.values(), *templates]):
        context.images.disown(digest)


def _undo_records(context: Context, intent: Intent) -> None:
    log.warning("%s of %s was interrupted; it has been undone", intent.verb, intent.subject)
    if intent.verb in _INSTANCE_VERBS:
        context.records.drop_instance(intent.subject)
    else:
        context.records.fulfil(intent.subject)


async def _settle(context: Context, instance: Instance) -> None:
    """Adopt the VMM of one instance, or record that it is gone; clear what a crash left."""
    paths = context.data.instance(instance.id)
    leftovers = [paths.standby_new.directory]
    if instance.state is not InstanceState.STANDBY:
        leftovers.append(paths.standby.directory)
    try:
        give_up(paths, context.data.instance_staged(instance.id))
        for leftover in leftovers:
            remove_tree(leftover)
    except OSError as error:  # it takes room, and keeps nobody from running
        log.error("what %s does not need any more cannot be removed: %s", instance.name, error)
    if not instance.state.has_vmm:
        clear_remains(paths)
        return
    try:
        await _adopt(context, instance)
    except StillframeError as error:
        log.info("instance %s is not running any more: %s", instance.name, error)
        if instance.process is not None:
            kill_orphans(paths.directory, ())
        commit_exit(context, instance)


async def _adopt(context: Context, instance: Instance) -> None:
    if instance.process is None:
        raise StillframeError("it has no process")
    # Not only if the hypervisor can start guests here by now: this one runs already.
    driver = context.drivers.get(instance.hypervisor)
    if driver is None:
        raise StillframeError(f"there is no driver for {instance.hypervisor.value}")
    machine = await driver.adopt(instance.process, await resources_of(context, instance))
    live = attach(context, instance, machine)
    if await machine.status() is MachineStatus.PAUSED:  # the server died while it stood still
        await machine.resume()
    if instance.state is InstanceState.INITIALIZING:
        announce_ready(context, instance, live)
    else:
        # Its identity may not have been set before the crash; of a fork that is known.
        live.sibling = context.data.instance(instance.id).unidentified.exists()
        greeting.begin(context, instance, live)
    context.note(instance.id, "adopted by a new server")
