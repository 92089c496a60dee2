"""Multipart bodies: a file's bytes, and fields whose text becomes the types of the schema."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from avray.serving.refusals import ApiError
from avray.settings.serve import LimitSettings

FILES = ("file", "audio", "video")


@dataclass(frozen=True)
class Form:
    fields: dict[str, Any]
    file: bytes | None


async def read_form(request: Request, limits: LimitSettings) -> Form:
    """ApiError for a body that is none, too many parts, a field twice, or an address where a file should be."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(415, "Send multipart/form-data: a file, and the other fields beside it.")
    try:
        form = await request.form(max_files=2, max_fields=limits.form_fields,
                                  max_part_size=4 * limits.prompt_characters + 1024)
    except (HTTPException, MultiPartException) as error:
        detail = str(getattr(error, "detail", None) or getattr(error, "message", "") or "It cannot be read")
        raise ApiError(400, f"The form is refused: {detail.rstrip('.')}.") from None
    except (ValueError, AssertionError, KeyError, LookupError):
        raise ApiError(400, "The form cannot be read.") from None
    try:
        fields, file = await _parts(form)
    finally:
        await form.close()
    return Form({name: _typed(value) for name, value in fields.items()}, file)


async def _parts(form: FormData) -> tuple[dict[str, str], bytes | None]:
    fields: dict[str, str] = {}
    file = None
    for name, value in form.multi_items():
        if name in fields or (name in FILES and file is not None):
            raise ApiError(400, f"{name[:80]} is given twice.", name[:80])
        if isinstance(value, UploadFile):
            if name not in FILES:
                raise ApiError(400, f"{name[:80]} must be text, not a file.", name[:80])
            file = await value.read()
            if not file:
                raise ApiError(400, f"{name} is empty.", name)
        elif name in FILES:
            raise ApiError(400, f"{name} must be the recording itself: addresses and paths are not opened.", name)
        else:
            fields[name] = value
    return fields, file


def _typed(value: str) -> Any:
    """Numbers, true and false are sent as text; text that only looks like one is made text again by the schema."""
    if value in ("true", "false") or value.replace(".", "", 1).replace("-", "").replace("e", "", 1).isdigit():
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
