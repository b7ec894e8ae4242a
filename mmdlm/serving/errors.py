"""Say what is wrong with a request, as OpenAI's API does: an object with one clear sentence."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from mmdlm.serving.step_batcher import ClosedError, DeadlineError, GivenUpError

# Of status codes, as OpenAI's clients know them.
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: Of HTTP.
        message: One sentence, with the value and the fix.
        code: For programs.
        param: The field of the request that it is about.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers of HTTP that belong to it."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def api_error(error: BaseException) -> ApiError:
    """Return what a caller is told of an error; of one of ours no more than that it is one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, DeadlineError):
        return ApiError(
            504,
            "the request was not finished in time; ask for fewer tokens, steps or images, or try "
            "again when the server has less to do",
            code="deadline_exceeded",
        )
    if isinstance(error, ClosedError):
        return ApiError(
            503, "the server is stopping; try again", code="server_stopping", retry_after=5
        )
    if isinstance(error, GivenUpError):
        return ApiError(499, "the client has left", code="client_closed_request")
    if isinstance(error, ValueError | TypeError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(
        500,
        "the server failed at this request, and its log says why; try again, or ask for less",
        code="internal_error",
    )


def _invalid(error: ValidationError) -> ApiError:
    """Name the first field that is wrong, and how."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this server does not know the parameter; leave it out"
    text = f"{param}: {message}" if param else message
    return ApiError(400, text, code="invalid_value", param=param)
