"""The admin listener: metrics and health. Never on the client listener."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web

from aiproxy.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from aiproxy.metrics import Metrics
    from aiproxy.proxy import Proxy


def application(metrics: Metrics, proxy: Proxy) -> web.Application:
    """The admin listener's paths."""

    async def scrape(_request: web.Request) -> web.Response:
        # In a thread: with many series this takes longer than the event loop may stop.
        text = await asyncio.get_running_loop().run_in_executor(None, metrics.exposition)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})

    async def healthy(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def ready(_request: web.Request) -> web.Response:
        if proxy.draining:
            return web.Response(status=503, text="draining\n")
        return web.Response(text="ready\n")

    async def without_server(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers.pop("Server", None)

    app = web.Application()
    app.router.add_get("/metrics", scrape)
    app.router.add_get("/-/healthy", healthy)
    app.router.add_get("/-/ready", ready)
    app.on_response_prepare.append(without_server)
    return app
