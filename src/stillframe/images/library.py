"""The images of a server: pulled, imported or built in, each a root disk kept by its digest.

    root/<digest hex>/root.squashfs, config.json
    root/.new-<random>/            one being made; renamed into place, removed on failure

Used from the event loop's thread; hashing, merging and building run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import re
import secrets
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter

from stillframe.host.files import (
    fsync_directory,
    fsync_file,
    remove_at_once,
    remove_tree,
    storage_errors,
)
from stillframe.images.base import BASE_CONFIG, find_busybox, write_base_tar
from stillframe.images.disk import build_root_disk
from stillframe.images.layers import MergedLayers
from stillframe.images.layout import LayeredImage, open_source
from stillframe.images.reference import Reference, check_platform, parse_reference
from stillframe.images.registry import RegistryClient
from stillframe.model.errors import (
    Ambiguous,
    Conflict,
    HostFailure,
    InvalidRequest,
    NotFound,
    RateLimited,
    StillframeError,
)
from stillframe.model.values import Image, ImageConfig, ImageStatus
from stillframe.store.records import Intent

T = TypeVar("T")
log = logging.getLogger("stillframe.images")
_HOME = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"(?:sha256:)?[0-9a-f]{6,64}")
_CONFIG: TypeAdapter[ImageConfig] = TypeAdapter(ImageConfig)
_FILES = ("root.squashfs", "config.json")
_MAX_PULLS, _MAX_AT_ONCE = 32, 2
_BUSY = (ImageStatus.PENDING, ImageStatus.PULLING, ImageStatus.CONVERTING)


class ImageRecords(Protocol):
    """What the library remembers images in, by name."""

    def put(self, image: Image, *, fulfils: str | None = None, can_wait: bool = False) -> None:
        """Write an image under its name, durably, removing the intent ``fulfils`` with it.

        With ``can_wait`` it is written later if it cannot be now.
        """

    def get(self, name: str) -> Image | None:
        """The image of that name."""

    def list(self) -> list[Image]:
        """All images, oldest first."""

    def delete(self, name: str, intent: Intent | None = None, *, can_wait: bool = False) -> None:
        """Forget a name, with ``intent`` (to remove its disk) at once. Raises NotFound.

        With ``can_wait`` it is done durably later if it cannot be now.
        """

    def intend(self, intent: Intent) -> None:
        """Record durably that something begins."""

    def fulfil(self, subject: str) -> None:
        """Remove an intent, if there is one of that subject."""

    def need_image(self, digest: str) -> bool:
        """Whether anything but a name refers to the image of that digest, or may."""


@dataclass(slots=True)
class _Pull:
    """Work on one image that several callers may wait for."""

    task: asyncio.Task[Image]
    credentials: Mapping[str, str] = field(repr=False)


class ImageLibrary:
    """Images by name and digest."""

    def __init__(self, root: Path, records: ImageRecords) -> None:
        """Use ``root`` (made if absent), sweeping up what an interrupted server left."""
        self._root, self._records = root, records
        self._pulls: dict[str, _Pull] = {}
        self._slots = asyncio.Semaphore(_MAX_AT_ONCE)
        self._publishing = asyncio.Lock()
        with storage_errors("open the image directory"):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for leftover in root.glob(".new-*"):
                remove_tree(leftover)
        for image in records.list():
            if image.status in _BUSY:
                self._fail(image, "the server was stopped while the image was being made")
            elif image.status is ImageStatus.READY and not self._disk(image.digest).is_file():
                self._fail(image, "its root disk is missing")

    # -- looking up -------------------------------------------------------------------------------
    def find(self, reference: str) -> Image:
        """By name, digest or unique digest prefix. Raises NotFound, Ambiguous, InvalidRequest."""
        if not _DIGEST.fullmatch(reference):
            image = self._records.get(str(parse_reference(reference)))
            if image is not None:
                return image
        else:
            named = None
            if not reference.startswith("sha256:"):
                named = self._records.get(str(parse_reference(reference)))
            if named is not None:
                return named
            found = self._by_prefix(reference.removeprefix("sha256:"))
            if found is not None:
                return found
        raise NotFound(f"no image {reference[:80]!r}", hint="pull it first")

    def _by_prefix(self, prefix: str) -> Image | None:
        found = {
            i.digest: i
            for i in reversed(self._records.list())
            if i.digest.startswith(f"sha256:{prefix}")
        }
        if len(found) > 1:
            raise Ambiguous("multiple resources match, use full ID")
        return next(iter(found.values()), None)

    def by_digest(self, digest: str) -> Image:
        """The ready image with exactly that digest. Raises NotFound."""
        for image in self._records.list():
            if image.digest == digest and image.status is ImageStatus.READY:
                return image
        if self._disk(digest).is_file():  # its name moved on to another digest
            return self._load(digest)
        raise NotFound(f"no image with digest {digest[:80]}", hint="pull it again")

    def list(self, tags: Mapping[str, str] | None = None) -> list[Image]:
        """All images with all of the given tags, oldest first."""
        wanted = (tags or {}).items()
        return [i for i in self._records.list() if wanted <= dict(i.tags).items()]

    def root_disk(self, digest: str) -> Path:
        """The root disk of a ready image. Raises NotFound when it is not there."""
        path = self._disk(digest)
        if not path.is_file():
            raise NotFound(f"the root disk of image {digest[:80]} is missing", hint="pull it again")
        return path

    def _disk(self, digest: str) -> Path:
        return self._home(digest) / "root.squashfs"

    def _home(self, digest: str) -> Path:
        digits = digest.removeprefix("sha256:")
        if len(digits) != 64 or not set(digits) <= set("0123456789abcdef"):
            raise NotFound(f"no image with digest {digest[:80]!r}")
        return self._root / digits

    # -- making -----------------------------------------------------------------------------------
    async def ensure(
        self,
        reference: str,
        platform: str | None = None,
        credentials: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Image:
        """A ready image, pulled if need be; joins a pull that is under way.

        Raises InvalidRequest, NotFound, Conflict (deleted meanwhile), and what pulling and building
        raise.
        """
        check_platform(platform)
        if _DIGEST.fullmatch(reference):
            with contextlib.suppress(NotFound):
                return self.find(reference)
        name = str(parse_reference(reference))
        known = self._records.get(name)
        if known is not None and known.status is ImageStatus.READY:
            return known
        pull = self._under_way(name)
        if pull is None:
            self.begin_pull(reference, platform, credentials, tags)
            pull = self._pulls[name]
        return await _outcome(name, pull.task)

    def _under_way(self, name: str) -> _Pull | None:
        """The work on an image of that name, unless it was called off and is being undone."""
        pull = self._pulls.get(name)
        return None if pull is None or pull.task.cancelling() else pull

    def begin_pull(
        self,
        reference: str,
        platform: str | None = None,
        credentials: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Image:
        """Start to pull (or make the built-in image) in the background; returns at once.

        A ready image stays usable while its tag is looked up again. Raises InvalidRequest,
        NotFound (platform), Conflict (under way with other credentials, or an import), RateLimited.
        """
        wanted, parsed = check_platform(platform), parse_reference(reference)
        name, secret = str(parsed), dict(credentials or {})
        image = self._records.get(name)
        running = self._under_way(name)
        if running is not None:
            if image is None:
                raise Conflict(f"image {name} is being imported")
            if running.credentials != secret:
                raise Conflict(f"image {name} is being pulled with other credentials")
            return image
        if len(self._pulls) >= _MAX_PULLS:
            raise RateLimited(f"{_MAX_PULLS} images are being pulled", hint="try again later")
        if image is None or image.status is not ImageStatus.READY:
            image = Image(name, "", ImageStatus.PENDING, datetime.now(UTC), wanted)
        image = replace(image, tags=dict(image.tags if tags is None else tags))
        self._records.put(image)
        self._start(name, secret, lambda: self._fetch(image, parsed, wanted, secret))
        return image

    async def import_image(
        self, name: str, source: Path, tags: Mapping[str, str] | None = None
    ) -> Image:
        """An image from a root file system tar, an OCI layout (directory or tar).

        Raises InvalidRequest (``invalid_name``, ``invalid_layer``), Conflict (also when it is
        deleted meanwhile), HostFailure.
        """
        reference = parse_reference(name)
        normal = str(reference)
        if reference.is_builtin or normal in self._pulls:
            raise Conflict(f"image {normal} is built in or being made", code="already_exists")
        image = Image(normal, "", ImageStatus.CONVERTING, datetime.now(UTC), tags=dict(tags or {}))
        self._start(normal, {}, lambda: self._take(image, source))
        return await _outcome(normal, self._pulls[normal].task)

    def tag(self, reference: str, target: str) -> Image:
        """Give a ready image another name as well; a name that another image has moves over.

        Raises InvalidRequest, NotFound, Ambiguous, Conflict (not ready, or the name is being made).
        """
        image, wanted = self.find(reference), parse_reference(target)
        if wanted.digest is not None or wanted.is_builtin:
            raise InvalidRequest(
                f"{target[:80]!r} cannot be given to an image",
                code="invalid_name",
                hint="give a name with a tag, for example team/app:1.0",
            )
        if image.status is not ImageStatus.READY:
            raise Conflict(f"image {image.name} is {image.status.value}, not ready")
        name = str(wanted)
        if name == image.name:
            return image
        if name in self._pulls:
            raise Conflict(f"image {name} is being made")
        named = replace(image, name=name, created_at=datetime.now(UTC))
        self._records.put(named)
        return named

    def _start(
        self,
        name: str,
        credentials: Mapping[str, str],
        work: Callable[[], Coroutine[Any, Any, Image]],
    ) -> None:
        task: asyncio.Task[Image] = asyncio.get_running_loop().create_task(work())
        self._pulls[name] = _Pull(task, credentials)
        task.add_done_callback(lambda done: self._ended(name, done))

    def _ended(self, name: str, task: asyncio.Task[Image]) -> None:
        if (pull := self._pulls.get(name)) is not None and pull.task is task:
            del self._pulls[name]  # unless it was deleted, and is being pulled anew
        if not task.cancelled():
            task.exception()  # seen: it is in the record, and raised to whoever waits

    async def _fetch(
        self, image: Image, reference: Reference, platform: str, credentials: Mapping[str, str]
    ) -> Image:
        with self._recording_failure(image):
            async with self._slots:
                with self._staging() as staging:
                    if reference.is_builtin:
                        self._progress(image, ImageStatus.CONVERTING)
                        return await self._commit(image, staging, None)
                    self._progress(image, ImageStatus.PULLING)
                    async with RegistryClient(reference, credentials) as registry:
                        layered = await registry.pull(platform, staging / "blobs")
                    image = replace(image, digest=image.digest or layered.digest or "")
                    if layered.digest and self._disk(layered.digest).is_file():
                        return self._adopt(image, layered.digest)
                    self._progress(image, ImageStatus.CONVERTING)
                    return await self._commit(image, staging, layered)

    async def _take(self, image: Image, source: Path) -> Image:
        async with self._slots:
            with self._staging() as staging:
                scratch = staging / "blobs"
                layered = await _in_thread(lambda: open_source(source, scratch))
                return await self._commit(image, staging, layered)

    async def _commit(self, image: Image, staging: Path, layered: LayeredImage | None) -> Image:
        digest, config = await _in_thread(lambda: _build(staging, layered))
        self._write_config(staging, image, digest, config)
        home, intent = self._home(digest), _intent("make image", digest)
        self._records.intend(intent)
        try:
            async with self._publishing:  # two may have made the same disk
                with storage_errors("keep an image"):
                    await _in_thread(lambda: _publish(staging, home))
                return self._adopt(image, digest, fulfils=intent.subject)
        except BaseException:
            self._records.fulfil(intent.subject)
            self.release(digest)  # it may have lain there already, and be somebody's
            raise

    @staticmethod
    def _write_config(staging: Path, image: Image, digest: str, config: ImageConfig) -> None:
        document = {"digest": digest, "name": image.name, "platform": image.platform}
        with storage_errors("keep an image"):
            (staging / "config.json").write_text(json.dumps(document | {"config": asdict(config)}))

    def _adopt(self, image: Image, digest: str, *, fulfils: str | None = None) -> Image:
        ready = replace(
            self._load(digest),
            name=image.name,
            created_at=image.created_at,
            tags=image.tags,
        )
        before = self._records.get(image.name)
        self._records.put(ready, fulfils=fulfils)
        if before is not None:
            self.release(before.digest)
        return ready

    def _load(self, digest: str) -> Image:
        return _read(self._home(digest), digest)

    @contextlib.contextmanager
    def _recording_failure(self, image: Image) -> Iterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            self._fail(image, "the pull was cancelled")
            raise
        except StillframeError as error:
            self._fail(image, error.message)
            raise
        except OSError as error:
            self._fail(image, str(error))
            raise HostFailure(f"image {image.name} could not be made: {error}") from error

    def _fail(self, image: Image, reason: str) -> None:
        known = self._records.get(image.name)
        if known is None or known.created_at != image.created_at:
            return  # deleted meanwhile, and perhaps made anew
        if known.status in _BUSY or not self._disk_exists(known.digest):
            failed = replace(known, status=ImageStatus.FAILED, error=reason)
            self._records.put(failed, can_wait=True)  # it has happened, also on a full disk

    def _disk_exists(self, digest: str) -> bool:
        return bool(digest) and self._disk(digest).is_file()

    def _progress(self, image: Image, status: ImageStatus) -> None:
        known = self._records.get(image.name)
        if known is not None and known.status is not ImageStatus.READY:
            self._records.put(
                replace(known, status=status, error=None, digest=image.digest or known.digest)
            )

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        staging = self.new_staging()
        try:
            with storage_errors("make an image"):
                staging.mkdir(mode=0o700)
                (staging / "blobs").mkdir(mode=0o700)
            yield staging
        finally:
            remove_tree(staging)

    # -- coming along with a snapshot -------------------------------------------------------------
    def new_staging(self) -> Path:
        """Where an image may be made; what is left there goes at the next start."""
        return self._root / f".new-{secrets.token_hex(8)}"

    def stage(self, directory: Path, names: Iterable[str], staging: Path) -> None:
        """Take an image's files out of ``directory`` into ``staging``, which is made.

        ``adopt`` makes an image of it. Files are durable already; of ``names`` the root disk and
        its configuration are kept. Raises OSError.
        """
        staging.mkdir(mode=0o700)
        for name in names:
            if name in _FILES:
                (directory / name).rename(staging / name)
            else:
                (directory / name).unlink()
        fsync_directory(staging)

    def adopt(self, staging: Path, digest: str) -> Image:
        """Make an image that came along with a snapshot one of ours, durably.

        It gets the name it had, or one by its digest when that is built in or taken. Nobody can
        tell whether the digest is right: the caller answers for the sender. Raises InvalidRequest.
        """
        home = self._home(digest)
        try:
            image = _read(staging, digest)
            reference = parse_reference(image.name)
            check_platform(image.platform)
        except (HostFailure, NotFound) as error:
            raise InvalidRequest("the configuration of the image cannot be read") from error
        name = str(reference)
        if reference.is_builtin or self._records.get(name) is not None or name in self._pulls:
            name = str(parse_reference(f"local/image-{home.name[:12]}"))
        image = replace(image, name=name, created_at=datetime.now(UTC))
        try:
            with storage_errors("keep an image"):
                remove_tree(home)
                staging.rename(home)
                fsync_directory(self._root)
            self._records.put(image)
        except BaseException:
            remove_tree(home)
            raise
        return image

    def sweep(self) -> None:
        """Remove the disks of all images that nobody needs any more, as ``release`` does."""
        for home in list(self._root.iterdir()):
            if _HOME.fullmatch(home.name):
                self.release(f"sha256:{home.name}")

    def release(self, digest: str) -> None:
        """Remove the disk of an image unless a name, or anything else on record, refers to it.

        What cannot be removed goes at the next start.
        """
        if not _HOME.fullmatch(digest.removeprefix("sha256:")):
            return
        if self._named(digest) or self._records.need_image(digest):
            return
        try:
            remove_at_once(self._home(digest), self.new_staging())
        except OSError as error:
            log.warning("the disk of image %s cannot be removed: %s", digest, error)

    def _named(self, digest: str, *, but: str = "") -> bool:
        return any(i.digest == digest and i.name != but for i in self._records.list())

    def disown(self, digest: str) -> None:
        """Take back what ``adopt`` did, or began, when nobody can have used it. Raises OSError."""
        for image in self._records.list():
            if image.digest == digest:
                self._records.delete(image.name, can_wait=True)
        remove_tree(self._home(digest))

    # -- ending -----------------------------------------------------------------------------------
    def delete(self, reference: str) -> None:
        """Forget a name, end its pull, and remove its disk when no other name has it.

        The caller has checked that nothing runs on it. Raises NotFound, InvalidRequest, HostFailure
        when files of it cannot be removed (it is deleted all the same).
        """
        image = self.find(reference)
        pull = self._pulls.get(image.name)
        if pull is not None:
            pull.task.cancel()
        digest = image.digest
        # One that is being made under another name needs the disk too.
        if not digest or self._named(digest, but=image.name) or self._records.need_image(digest):
            self._records.delete(image.name)
            return
        intent = _intent("delete image", image.digest)
        self._records.delete(image.name, intent)
        with storage_errors("remove the files of the image; the next start will"):
            remove_tree(self._home(image.digest))
        self._records.fulfil(intent.subject)

    async def close(self) -> None:
        """Cancel what is under way and wait until it is undone."""
        tasks = [pull.task for pull in self._pulls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _build(staging: Path, layered: LayeredImage | None) -> tuple[str, ImageConfig]:
    disk = staging / "root.squashfs"
    if layered is None:
        busybox = find_busybox()
        digest = build_root_disk(lambda output: write_base_tar(output, busybox), disk)
        return digest, BASE_CONFIG
    merged = MergedLayers(layered.blobs)
    digest = build_root_disk(merged.write, disk, root_mode=merged.root_mode)
    return layered.digest or digest, layered.config


def _read(home: Path, digest: str) -> Image:
    """The image that lies in a directory. Raises HostFailure."""
    try:
        document = json.loads((home / "config.json").read_text())
        config = _CONFIG.validate_python(document["config"])
        status = (home / "root.squashfs").stat()
        name, platform = str(document["name"]), str(document["platform"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise HostFailure(f"image {digest} cannot be read", code="damaged") from error
    made = datetime.fromtimestamp(status.st_mtime, UTC)
    return Image(
        name, digest, ImageStatus.READY, made, platform, size_bytes=status.st_size, config=config
    )


def _intent(verb: str, digest: str) -> Intent:
    """While it lasts, a disk that no name has is removed at the next start."""
    return Intent(f"image {secrets.token_hex(8)}", verb, {"image": digest})


def _publish(staging: Path, home: Path) -> None:
    """Make the new image durable, then visible by one rename."""
    remove_tree(staging / "blobs")
    for name in _FILES:
        fsync_file(staging / name)
    fsync_directory(staging)
    try:
        staging.rename(home)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        if not (home / "root.squashfs").is_file():
            remove_tree(home)
            staging.rename(home)
    fsync_directory(home.parent)


async def _outcome(name: str, task: asyncio.Task[Image]) -> Image:
    """What a pull comes to, for one of perhaps many who wait: it goes on when one is cancelled.

    Raises Conflict when the pull was called off, and what it raises.
    """
    await asyncio.wait([task])
    if task.cancelled():
        raise Conflict(
            f"image {name} is not made any more: it was deleted, or the server stops",
            hint="pull it again",
        )
    return task.result()


async def _in_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread; when cancelled, first wait until it is out of our files."""
    job = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait([job])
        if not job.cancelled():
            job.exception()
        raise
