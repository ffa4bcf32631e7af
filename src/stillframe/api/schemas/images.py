"""Images on the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field

from stillframe.api.schemas.base import Answer, Body, Tags, Text, utc
from stillframe.model.values import Image, ImageStatus


class CredentialsBody(Body):
    """What a registry wants to see; kept in memory only."""

    username: Text | None = None
    password: Text | None = None
    registry_token: Text | None = None


class ImageCreateBody(Body):
    """A wish for an image from a registry."""

    name: Annotated[Text, Field(min_length=1)]
    platform: Text | None = None
    tags: Tags | None = None
    credentials: CredentialsBody | None = None


class ImageTagBody(Body):
    """Another name for an image: a reference with a tag, not with a digest."""

    target: Annotated[Text, Field(min_length=1)]


class ImageAnswer(Answer):
    """An image. ``size_bytes`` is null until it is ready."""

    name: str
    digest: str
    status: ImageStatus
    created_at: datetime
    platform: str | None = None
    size_bytes: int | None = None
    queue_position: int | None = None
    error: str | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: dict[str, str] | None = None
    working_dir: str | None = None
    tags: dict[str, str] | None = None

    @classmethod
    def of(cls, image: Image) -> ImageAnswer:
        """The wire form of an image."""
        return cls(
            name=image.name,
            digest=image.digest,
            status=image.status,
            created_at=utc(image.created_at) or image.created_at,
            platform=image.platform,
            size_bytes=image.size_bytes,
            error=image.error,
            entrypoint=list(image.config.entrypoint),
            cmd=list(image.config.cmd),
            env=dict(image.config.env),
            working_dir=image.config.working_dir,
            tags=dict(image.tags),
        )
