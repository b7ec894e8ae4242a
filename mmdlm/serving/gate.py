"""What every request passes on its way in and out: keys, sizes, errors, counts and logs."""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import time
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmdlm.serving.errors import ApiError, api_error
from mmdlm.serving.metrics import Metrics
from mmdlm.serving.requests import Request
from mmdlm.serving.settings import ServerSettings

LOG = logging.getLogger("mmdlm.serving")
OPEN = ("/health", "/ready")  # to anybody


def refused(error: ApiError) -> Response:
    """Return the answer that says what is wrong."""
    return JSONResponse(error.body, error.status, headers=error.headers)


def log_failure(error: BaseException) -> None:
    """Keep what only the operator may see."""
    if api_error(error).status >= 500:
        LOG.error(json.dumps({"event": "failure", "error": repr(error)}), exc_info=error)


class Gate:
    """What every request passes: keys, the size of its body, errors, counts and logs.

    Args:
        app: What is behind the gate.
        settings: Keys and limits.
        metrics: Where requests are counted.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request of HTTP."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        number, began, status = secrets.token_hex(8), time.monotonic(), 499
        has_started = False

        async def sent(message: Message) -> None:
            nonlocal status, has_started
            if message["type"] == "http.response.start":
                status, has_started = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, self._limited(receive), sent)
        except Exception as error:
            log_failure(error)
            refusal = api_error(error)
            status = refusal.status
            if not has_started and refusal.status != 499:
                await refused(refusal)(scope, receive, sent)
        finally:
            self._note(scope, number, status, time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        """Refuse a request without a key, or with a body that says that it is too large."""
        headers = dict(scope["headers"])
        if (
            self._keys
            and scope["path"] not in ("/health", "/ready")
            and scope["method"] != "OPTIONS"
        ):
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # All are compared, so that the time tells nothing.
            known = [hmac.compare_digest(key.strip(), one) for one in self._keys]
            if scheme.lower() != b"bearer" or not any(known):
                raise ApiError(
                    401,
                    "the API key is missing or wrong; send Authorization: Bearer KEY",
                    code="invalid_api_key",
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.settings.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self.settings.max_body_bytes:,} bytes; send smaller images",
            code="body_too_large",
        )

    def _limited(self, receive: Receive) -> Receive:
        """Count the bytes that come, whatever was said of them."""
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.settings.max_body_bytes:
                raise self._too_large()
            return message

        return counted

    def _note(self, scope: Scope, number: str, status: int, seconds: float) -> None:
        """Count and log a request that has ended."""
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.latency.labels(route).observe(seconds)
        line: dict[str, Any] = {
            "event": "request",
            "id": number,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
        }
        asked = scope.get("state", {}).get("asked")
        if self.settings.log_prompts and isinstance(asked, Request):
            line["asked"] = asked.model_dump(exclude_none=True)
        LOG.info(json.dumps(line, ensure_ascii=False))
