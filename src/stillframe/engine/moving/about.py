"""What an archive tells about its snapshot, believed in nothing.

It becomes a record that the whole server reads, and later a machine. So every value is checked as
if a person had asked for it, and must agree with the manifest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import astuple, replace
from datetime import datetime
from typing import Any

from stillframe.engine.context import Context
from stillframe.engine.keeping.compression import check_policy
from stillframe.engine.keeping.edit import check_description
from stillframe.engine.settings import EngineSettings
from stillframe.engine.verbs.create import (
    MIN_MEMORY,
    MIN_OVERLAY,
    check_command_text,
    check_environment,
)
from stillframe.model.errors import DamagedData, InvalidRequest
from stillframe.model.schedules import INSTANCE_TAG, SCHEDULED_TAG, check_snapshot_tags
from stillframe.model.states import InstanceState
from stillframe.model.units import MAX_RATE, MIB, check_name, check_tags, is_id, to_utc
from stillframe.model.values import CompressionState, Instance, Snapshot, SnapshotKind
from stillframe.store.manifest import FileEntry, file_entries
from stillframe.store.records import from_json

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PAIR = re.compile(r"([0-9a-f]{64})?")
_MAX_TEXT = 512
_HUGE_PAGE = 2 * MIB
_FILES = {
    SnapshotKind.STANDBY: {"memory", "devices", "overlay.raw"},
    SnapshotKind.STOPPED: {"overlay.raw"},
}


def snapshot_told(
    context: Context, about: Mapping[str, Any] | None, manifest: Mapping[str, Any]
) -> Snapshot:
    """The snapshot an archive tells of, without sizes and what belongs to its old server.

    Raises InvalidRequest when the archive tells of none, or of one that cannot be.
    """
    document = (about or {}).get("snapshot")
    if not isinstance(document, dict):
        raise InvalidRequest(
            "the archive does not tell what instance it is a snapshot of",
            hint="it was made by another program",
        )
    try:
        told = from_json(Snapshot, json.dumps(document))
    except DamagedData as error:
        raise _refused("what it tells about the snapshot cannot be read") from error
    _check_words(told)
    template = _template(context, told, manifest)
    tags = {k: v for k, v in told.tags.items() if k not in (SCHEDULED_TAG, INSTANCE_TAG)}
    return replace(
        told,
        created_at=_past(context, told.created_at),
        tags=tags,
        template=template,
        size_bytes=0,
        stored_bytes=0,
        stored_beside=None,
        timings_ms={},
        compression=None,
        compression_state=CompressionState.NONE,
        compression_error=None,
        compressed_size_bytes=None,
        uncompressed_size_bytes=None,
        warm_count=0,
        expires_at=None,
        pinned=False,
        damaged=None,
    )


def _check_words(told: Snapshot) -> None:
    """Names, tags and the like of the snapshot itself."""
    if told.name is not None:
        check_name(told.name, what="snapshot name")
    check_name(told.source_instance_name)
    check_snapshot_tags(told.tags)
    check_description(told.description)
    ids = (told.source_instance_id, told.parent_snapshot_id)
    good = all(identifier is None or is_id(identifier) for identifier in ids)
    if not good:
        raise _refused("it tells an id that cannot be")
    if told.pause_ms is not None and not (math.isfinite(told.pause_ms) and told.pause_ms >= 0):
        raise _refused("it tells a pause that cannot be")


def _template(context: Context, told: Snapshot, manifest: Mapping[str, Any]) -> Instance:
    """The instance that forks start from, checked, and at rest."""
    template = told.template
    check_name(template.name)
    check_tags(template.tags)
    check_environment(template.env)
    check_command_text(template.entrypoint, template.cmd)
    check_policy(template.snapshot_policy)
    texts = (
        template.image, template.platform, template.accelerator, template.hypervisor_version,
        template.boot_nonce, template.processor,
    )  # fmt: skip
    ids = (template.id, template.parent_snapshot_id, template.parent_instance_id)
    good = (
        all(text.isascii() and text.isprintable() and len(text) <= _MAX_TEXT for text in texts)
        and all(identifier is None or is_id(identifier) for identifier in ids)
        and _DIGEST.fullmatch(template.image_digest)
        and _PAIR.fullmatch(template.boot)
        and template.hypervisor is told.source_hypervisor
        and all(0 <= rate <= MAX_RATE for rate in astuple(template.limits))
        and template.device_layout >= 1
    )
    if not good:
        raise _refused("it tells of an instance that cannot be")
    _check_agreement(template, manifest)
    _check_sizes(context.settings, told, file_entries(manifest))
    standby = told.kind is SnapshotKind.STANDBY
    return replace(
        template,
        state=InstanceState.STANDBY if standby else InstanceState.STOPPED,
        created_at=_past(context, template.created_at),
        process=None,
        state_error=None,
        started_at=None,
        stopped_at=None,
        exit_code=None,
        exit_message=None,
        phase_since=None,
        phase_durations_ms={},
        timings_ms={},
        resumed_at=None,
        head_snapshot_id=None,
        standby_compression=None,
        standby_compression_at=None,
        expires_at=None,
    )


def _past(context: Context, moment: datetime) -> datetime:
    """When something was made: before it came here, whatever the clock there said.

    Raises InvalidRequest.
    """
    return min(to_utc(moment, what="created_at"), context.now())


def _check_agreement(template: Instance, manifest: Mapping[str, Any]) -> None:
    told = {
        "hypervisor": template.hypervisor.value,
        "hypervisor_version": template.hypervisor_version,
        "accelerator": template.accelerator,
        "processor": template.processor,
        "memory_bytes": template.memory_bytes,
        "vcpus": template.vcpus,
        "image_digest": template.image_digest,
    }
    for fact, value in told.items():
        if manifest.get(fact, value) != value:
            raise _refused(f"its manifest tells another {fact}")


def _check_sizes(
    settings: EngineSettings, told: Snapshot, entries: Mapping[str, FileEntry]
) -> None:
    template = told.template
    if set(entries) != _FILES[told.kind]:
        raise _refused(f"its files are not those of a {told.kind.value} snapshot")
    if told.kind is SnapshotKind.STANDBY and entries["memory"].size != template.memory_bytes:
        raise _refused("its memory is not that of its instance")
    good = (
        entries["overlay.raw"].size == template.overlay_bytes
        and template.memory_bytes % _HUGE_PAGE == template.overlay_bytes % MIB == 0
        and template.memory_bytes >= MIN_MEMORY
        and template.overlay_bytes >= MIN_OVERLAY
    )
    if not good:
        raise _refused("it tells sizes that cannot be")
    for what, value, limit in (
        ("memory", template.memory_bytes, settings.max_memory_bytes),
        ("overlay", template.overlay_bytes, settings.max_overlay_bytes),
        ("vcpus", template.vcpus, settings.max_vcpus),
    ):
        if not 0 < value <= limit:
            raise InvalidRequest(
                f"the snapshot's instance has {what} {value}, this server allows up to {limit}",
                code="archive_too_large",
                limit=limit,
            )


def _refused(what: str) -> InvalidRequest:
    return InvalidRequest(f"the archive is refused: {what}")
