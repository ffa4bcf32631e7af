"""Images: pull, import, look up, delete (the import is Stillframe's own)."""

from __future__ import annotations

import asyncio
import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from stillframe.api.auth import ScopedRoute, needs
from stillframe.api.border import TAGS_QUERY, Engine, TagFilter
from stillframe.api.errors import problems
from stillframe.api.schemas.base import Text, respond_list
from stillframe.api.schemas.images import ImageAnswer, ImageCreateBody, ImageTagBody
from stillframe.api.schemas.instances import check_platform
from stillframe.model.errors import HostFailure, StorageFull
from stillframe.model.units import check_tags

router = APIRouter(route_class=ScopedRoute, tags=["images"])

_LISTING: dict[str, Any] = {**needs("image:read"), "parameters": [TAGS_QUERY]}
_WRITE_BYTES = 1024 * 1024
_UPLOAD_PREFIX = "upload-"
_UPLOAD: dict[str, Any] = {
    **needs("image:write"),
    "requestBody": {
        "required": True,
        "description": "A tar of a root file system or of an OCI layout, plain or compressed",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
}


@router.get(
    "/images", response_model=list[ImageAnswer], responses=problems(), openapi_extra=_LISTING
)
async def list_images(engine: Engine, tags: TagFilter) -> JSONResponse:
    """List images, oldest first."""
    return respond_list([ImageAnswer.of(image) for image in engine.list_images(tags=tags or None)])


@router.post(
    "/images",
    status_code=202,
    response_model=ImageAnswer,
    responses=problems(404, 409, 429, 501),
    openapi_extra=needs("image:write"),
)
async def pull_image(engine: Engine, body: ImageCreateBody) -> JSONResponse:
    """Begin to pull an image; its status tells the progress."""
    check_platform(body.platform)
    # Asking again for an image that is here leaves its tags alone, unless it names others.
    tags = None if body.tags is None else check_tags(body.tags)
    credentials = body.credentials.model_dump(exclude_none=True) if body.credentials else None
    image = await engine.pull_image(
        body.name, platform=body.platform or None, tags=tags, credentials=credentials or None
    )
    return ImageAnswer.of(image).response(202)


@router.post(
    "/images/import",
    status_code=201,
    response_model=ImageAnswer,
    responses=problems(409, 413),
    openapi_extra=_UPLOAD,
)
async def import_image(
    request: Request,
    engine: Engine,
    tags: TagFilter,
    name: Annotated[Text, Query(min_length=1, description="The reference to store it under")],
) -> JSONResponse:
    """Make an image from an uploaded tar."""
    tags = check_tags(tags)
    options = request.app.state.options
    with _upload_file(options.upload_dir) as (path, file):
        await _receive(request, file, options.max_upload_bytes)
        image = await engine.import_image(name, path, tags=tags)
    return ImageAnswer.of(image).response(201)


@router.get(
    "/images/{name:path}",
    response_model=ImageAnswer,
    responses=problems(404, 409),
    openapi_extra=needs("image:read"),
)
async def get_image(engine: Engine, name: str) -> JSONResponse:
    """Get an image by name or digest (percent-encoded as one segment)."""
    return ImageAnswer.of(engine.find_image(name)).response()


@router.post(
    "/images/{name:path}/tag",
    status_code=201,
    response_model=ImageAnswer,
    responses=problems(404, 409),
    openapi_extra=needs("image:write"),
)
async def tag_image(engine: Engine, name: str, body: ImageTagBody) -> JSONResponse:
    """Give a ready image another name as well."""
    return ImageAnswer.of(engine.tag_image(name, body.target)).response(201)


@router.delete(
    "/images/{name:path}",
    status_code=204,
    responses=problems(404, 409),
    openapi_extra=needs("image:delete"),
)
async def delete_image(engine: Engine, name: str) -> Response:
    """Forget an image name; refused while an instance or snapshot needs it."""
    await engine.delete_image(name)
    return Response(status_code=204)


def sweep_uploads(directory: Path) -> None:
    """Remove what a killed server had received of images."""
    for holder in directory.glob(f"{_UPLOAD_PREFIX}*"):
        _remove(holder)


@contextmanager
def _upload_file(directory: Path | None) -> Iterator[tuple[Path, IO[bytes]]]:
    holder = Path(tempfile.mkdtemp(prefix=_UPLOAD_PREFIX, dir=directory))
    try:
        path = holder / "image.tar"
        with path.open("xb") as file:
            yield path, file
    finally:
        _remove(holder)


def _remove(holder: Path) -> None:
    """Remove a directory, if need be at the second attempt; else the next start does it."""
    for _ in range(2):
        shutil.rmtree(holder, ignore_errors=True)


async def _receive(request: Request, file: IO[bytes], limit: int) -> None:
    received, pending = 0, bytearray()
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise HTTPException(413, f"the archive exceeds {limit} bytes")
        pending += chunk
        if len(pending) >= _WRITE_BYTES:
            await _write(file, bytes(pending))
            pending.clear()
    await _write(file, bytes(pending))


async def _write(file: IO[bytes], data: bytes) -> None:
    def write() -> None:
        file.write(data)
        file.flush()

    try:
        await asyncio.to_thread(write)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("no space for the uploaded archive") from error
        raise HostFailure("cannot store the uploaded archive") from error
