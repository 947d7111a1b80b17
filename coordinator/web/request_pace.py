"""What all HTTP requests of one origin may cost, whatever their route: requests per second, and bytes of pictures."""

from __future__ import annotations

import asyncio
import time

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lutetia.coordinator.web.api.answers import RequestLimit
from lutetia.coordinator.web.connections import origin_of_host
from lutetia.protocol.blobs.upload_limit import RateLimit

REQUESTS_PER_SECOND, BURST = 100.0, 1000
REFUSAL_SECONDS = 1.0
"""A request beyond the limit is refused only after so long, so that asking again at once gains nothing."""


class RequestPace:
    """Refuses requests beyond `limit`, and sends pictures within `rate`, which other uploads share."""

    def __init__(
        self, app: ASGIApp, rate: RateLimit, limit: RequestLimit | None = None, refusal: float = REFUSAL_SECONDS
    ) -> None:
        self._app, self._rate, self._refusal = app, rate, refusal
        self._limit = limit or RequestLimit(time.monotonic, REQUESTS_PER_SECOND, BURST)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._limit.take(origin_of_host((scope.get("client") or ("",))[0])):
            await self._app(scope, receive, self._paced(send))
        else:
            await asyncio.sleep(self._refusal)
            text = "too many requests of this address; slow down"
            await PlainTextResponse(text, 429, {"Retry-After": "1"})(scope, receive, send)

    def _paced(self, send: Send) -> Send:
        picture = False

        async def paced(message: Message) -> None:
            nonlocal picture
            if message["type"] == "http.response.start":
                picture = any(name == b"content-type" and value.startswith(b"image/") for name, value in message["headers"])
            elif picture and (body := message.get("body")):
                await self._rate.take(len(body))
            await send(message)

        return paced
