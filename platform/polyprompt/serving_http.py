"""What stands around every route: request ids, the limit on a body, the clock, and an answer whatever happens."""

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyprompt.serving_limits import Limits, Refusal
from polyprompt.serving_metrics import Metrics
from polyprompt.serving_schema import Fault, Problem

PREDICT = "/predict"
REQUEST_ID = "X-Request-Id"
#: In the metrics, of a caller that went away before its answer.
GONE = 499
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
log = logging.getLogger(__name__)


class Json(JSONResponse):
    """JSON in ASCII: what a caller sent comes back in an error even where it is no valid text."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def problem(refusal: Refusal, request_id: str) -> Json:
    """Return the answer that is none."""
    fault = Fault(code=refusal.code, message=refusal.message, limit=refusal.limit)
    body = Problem(request_id=request_id, error=fault).model_dump(exclude_none=True)
    return Json(body, refusal.status, headers=refusal.headers)


class Frame:
    """ASGI middleware. The request's id is scope["state"]["request_id"]."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, admit: Callable[[str], None]) -> None:
        """admit: is given a request's path before its body is read; raises Refusal."""
        self._app, self._limits, self._metrics, self._admit = app, limits, metrics, admit
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, body = time.monotonic(), 0, bytearray()
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            self._admit(scope["path"])
            await self._read(scope, receive, body)
            await self._run(scope, bytes(body), receive, send_with_id)
        except Refusal as refusal:
            self._metrics.refused.labels(refusal.code).inc()
            await problem(refusal, request_id)(scope, receive, send_with_id)
        except ClientDisconnect:
            status = GONE
        except Exception:
            log.exception("request %s to %s broke", request_id, scope["path"])
            if status:  # the answer has begun: the connection can only be closed
                raise
            broken = Refusal(500, "broken", "the server failed; its log says why under this request id")
            await problem(broken, request_id)(scope, receive, send_with_id)
        finally:
            self._held_bytes -= len(body)
            # What is refused at once has not got as far as its route.
            path = getattr(scope.get("route"), "path", PREDICT if scope["path"] == PREDICT else "other")
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - began)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        """Read the body. Raises Refusal: 413 where it is too large, by its head or in truth, 503 where all in hand are,
        408 where it does not come."""
        limit = self._limits.body_bytes
        told = Headers(scope=scope).get("content-length", "")
        too_large = Refusal(
            413, "body_too_large", f"the body exceeds {limit:,} bytes; send fewer rows at a time", limit=limit
        )
        if told.isdecimal() and int(told[:20]) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.timeout_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    part = message.get("body", b"")
                    body += part
                    self._held_bytes += len(part)
                    if len(body) > limit:
                        raise too_large
                    if self._held_bytes > self._limits.held_bytes:
                        full = "too much is being read and answered; try again later"
                        raise Refusal(503, "overloaded", full, limit=self._limits.held_bytes, retry_seconds=1)
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            late = f"the body did not come within {self._limits.timeout_seconds:g} seconds; send it again"
            raise Refusal(408, "body_too_slow", late) from None

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the app, as long as the caller waits for it. Raises ClientDisconnect where it went away."""
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        answering = asyncio.ensure_future(self._app(scope, replay, send))
        leaving = asyncio.create_task(gone())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ClientDisconnect
            await answering
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
