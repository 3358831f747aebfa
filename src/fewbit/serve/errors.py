# SPDX-License-Identifier: Apache-2.0
"""What a client sees when a request cannot be answered: OpenAI's error object under the right status."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from fewbit.decode.batch import Busy, Stopped
from fewbit.errors import FewbitError, InputError, SpecError, UnsupportedError

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_supported_error",
    503: "server_error",
}
"""Status -> ``type`` of the error; all others are ``invalid_request_error``."""


class ApiError(Exception):
    """An answer that is an error. ``param``: the field at fault. ``code``: for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        self.status, self.code = status, code
        self.message, self.param = _sound(message), None if param is None else _sound(param)
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return JSONResponse(self.body(), self.status, headers)


def _sound(text: str) -> str:
    """``text``, which may quote a request, with halves of surrogate pairs spelt out: no answer could hold them."""
    return text.encode(errors="backslashreplace").decode()


def api_error(error: Exception) -> ApiError:
    """``error`` as a client should see it; what is no FewbitError is a defect, and tells no details."""
    match error:
        case ApiError():
            return error
        case Busy():
            return ApiError(429, str(error), code="queue_full")
        case Stopped():
            return ApiError(503, str(error), code="stopping")
        case SpecError():
            return ApiError(400, str(error), error.asked.split()[0])
        case InputError():
            return ApiError(400, str(error))
        case UnsupportedError():
            return ApiError(501, str(error), code="not_supported")
        case FewbitError():
            return ApiError(500, str(error))
        case _:
            return ApiError(
                500, f"the server failed ({type(error).__name__}); its log says more", code="internal_error"
            )
