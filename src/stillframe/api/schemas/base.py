"""Common ground of all schemas: strict scalars, text without NUL, timestamps, error bodies."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar

from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

NAME_PATTERN = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"


def _plain(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain NUL")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("must not contain half a surrogate pair")
    return text


def _env_key(text: str) -> str:
    if not text or "=" in text:
        raise ValueError("must be a variable name without '='")
    return _plain(text)


# NUL separates values in the guest protocol and ends C strings; it never belongs into a text.
# Half a surrogate pair, which JSON can spell, is no character: nothing could store or send it.
Text = Annotated[StrictStr, AfterValidator(_plain)]
Flag = StrictBool
Int = StrictInt
Env = dict[Annotated[StrictStr, AfterValidator(_env_key)], Text]
Tags = dict[Text, Text]
# The pattern is documentation: check_name refuses with the contract's handler code.
Name = Annotated[
    Text, Field(json_schema_extra={"pattern": NAME_PATTERN, "minLength": 1, "maxLength": 63})
]


class Body(BaseModel):
    """A request body. Unknown fields are ignored, as the contract says."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Answer(BaseModel):
    """A response body. Absent values are left out, save the keys named in ``always``."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    always: ClassVar[tuple[str, ...]] = ()

    def plain(self) -> dict[str, Any]:
        """The body as JSON-ready values."""
        body = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        for key in self.always:
            body.setdefault(key, None)
        return body

    def response(self, status: int = 200) -> JSONResponse:
        """The whole HTTP answer."""
        return JSONResponse(self.plain(), status)


def respond_list(answers: list[Any]) -> JSONResponse:
    """A bare JSON array of answers: the contract has no pagination."""
    return JSONResponse([answer.plain() for answer in answers])


def utc(moment: datetime | None) -> datetime | None:
    """The moment in UTC, so that it prints as RFC3339 with ``Z``.

    One that has no UTC (an older server took such in) stays as it is: no list must fail for it.
    """
    try:
        return None if moment is None else moment.astimezone(UTC)
    except OverflowError:
        return moment


class ErrorDetail(Answer):
    """One particular of an error: ``code`` names the fact, ``message`` gives its value."""

    code: str | None = None
    message: str | None = None


class Error(Answer):
    """The error body of every refusal."""

    code: str
    message: str
    details: list[ErrorDetail] | None = None
    inner_error: ErrorDetail | None = None
