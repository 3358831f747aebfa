# SPDX-License-Identifier: Apache-2.0
"""The body of a request: bounded, in time as well, and JSON that JSON allows."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from fewbit.serve.errors import ApiError

SECONDS = 30.0
"""A body must have arrived by then."""


async def read_object(request: Request, most: int) -> dict[str, Any]:
    """The JSON object in the body of ``request``.

    Raises:
        ApiError: it is longer than ``most`` bytes (413), slow (408), of another type or encoded (415), or no JSON
            object (400).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also: a page of another origin must ask first before it may send this type
        raise ApiError(415, f"the body is of type {kind or 'nothing'!r}; application/json would work")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(415, f"the body is encoded as {encoding[:100]!r}; as it is, it would work")
    try:
        raw = await asyncio.wait_for(_read(request, most), SECONDS)
    except (asyncio.TimeoutError, TimeoutError):  # two classes before Python 3.11
        raise ApiError(408, f"the body did not arrive within {SECONDS:g} seconds") from None
    try:
        found = json.loads(raw, parse_constant=_refuse, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}"[:300]) from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body is no JSON object")
    return found


def _number(text: str) -> int | float:
    """JSON has one kind of number: 4.0 and 4e0 are the whole number 4, and some clients write it so."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 1 << 53 else value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


async def _read(request: Request, most: int) -> bytes:
    too_long = ApiError(413, f"the body is longer than {most} bytes", code="body_too_long")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > most:
        raise too_long
    parts = bytearray()
    try:
        async for part in request.stream():
            parts += part
            if len(parts) > most:
                raise too_long
    except ClientDisconnect:
        raise ApiError(400, "the client left before its body had arrived") from None
    return bytes(parts)
