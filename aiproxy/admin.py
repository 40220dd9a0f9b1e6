"""The admin listener: metrics and health. Never on the client listener."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiproxy import errors, headers
from aiproxy.errors import ProxyError
from aiproxy.listener import check_head
from aiproxy.metrics import CONTENT_TYPE
from aiproxy.reply import Reply

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.web_request import BaseRequest

    from aiproxy.metrics import Metrics
    from aiproxy.proxy import Proxy

_TEXT = "text/plain; charset=utf-8"


class Admin:
    """Answers the requests of the admin listener, which are no exchanges: they are not counted."""

    def __init__(self, metrics: Metrics, proxy: Proxy) -> None:
        self._metrics = metrics
        self._proxy = proxy
        self._paths: dict[str, Callable[[], Awaitable[tuple[int, str, bytes]]]] = {
            "/metrics": self._scrape,
            "/-/healthy": self._healthy,
            "/-/ready": self._ready,
        }

    async def __call__(self, request: BaseRequest) -> Reply:
        """Answer one request."""
        reply = Reply(request)
        try:
            status, content_type, body = await self._find(request)()
            extra: tuple[tuple[str, str], ...] = ()
        except ProxyError as error:
            status, content_type, body = error.status, "application/json", error.render("openai")
            extra = error.headers
            reply.keep_alive = reply.keep_alive and not error.close
        reply.send(
            status,
            [
                (headers.REQUEST_ID, headers.new_request_id()),
                ("Content-Type", content_type),
                *extra,
            ],
            body,
        )
        return reply

    def _find(self, request: BaseRequest) -> Callable[[], Awaitable[tuple[int, str, bytes]]]:
        path = check_head(request)
        answer = self._paths.get(path)
        if answer is None:
            raise errors.unknown_url(request.method, path)
        if request.method not in ("GET", "HEAD"):
            raise errors.method_not_allowed(request.method, "GET, HEAD")
        return answer

    async def _scrape(self) -> tuple[int, str, bytes]:
        # In a thread: with many series this takes longer than the event loop may stop.
        loop = asyncio.get_running_loop()
        return 200, CONTENT_TYPE, await loop.run_in_executor(None, self._metrics.exposition)

    async def _healthy(self) -> tuple[int, str, bytes]:
        return 200, _TEXT, b"ok\n"

    async def _ready(self) -> tuple[int, str, bytes]:
        if self._proxy.draining:
            return 503, _TEXT, b"draining\n"
        return 200, _TEXT, b"ready\n"
