"""The admin listener: metrics, health, reload, status. Never on the client listener.

Whoever reaches it from another machine sees metrics and health alone. A reload is refused to
browsers that another site sent (their `Origin`), and under a name that is not ours (DNS that was
made to point here).
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

import msgspec

from aiproxy import errors, headers
from aiproxy.config import ConfigError
from aiproxy.errors import ProxyError
from aiproxy.exposition import CONTENT_TYPES, negotiate
from aiproxy.head import check_head
from aiproxy.page import PAGE, POLICY
from aiproxy.reply import Reply

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.web_request import BaseRequest
    from structlog.typing import FilteringBoundLogger

    from aiproxy.metrics import Metrics
    from aiproxy.proxy import Proxy
    from aiproxy.reload import Reloader
    from aiproxy.session_gate import SessionGate
    from aiproxy.status import Status

_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_HTML = "text/html; charset=utf-8"
# The page loads nothing and runs nothing but its own, and is shown in no other page.
_ALONE = (
    ("Content-Security-Policy", POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Cache-Control", "no-store"),
)

Answer = tuple[int, str, bytes | list[bytes]]  # status, type, and the body, or parts of a long one


@dataclass(frozen=True, slots=True)
class _Place:
    """What is at a path, and whether other machines may have it."""

    answer: Callable[[BaseRequest], Awaitable[Answer]]
    method: str = "GET"
    public: bool = False


class Admin:
    """Answers the requests of the admin listener, which are no exchanges: they are not counted."""

    def __init__(
        self,
        *,
        metrics: Metrics,
        proxy: Proxy,
        sessions: SessionGate,
        reloader: Reloader,
        status: Status,
        host: str,
        log: FilteringBoundLogger,
    ) -> None:
        self._metrics = metrics
        self._proxy = proxy
        self._sessions = sessions
        self._reloader = reloader
        self._status = status
        self._host = host
        self._log = log
        self._places = {
            "/metrics": _Place(self._scrape, public=True),
            "/-/healthy": _Place(self._healthy, public=True),
            "/-/ready": _Place(self._ready, public=True),
            "/-/reload": _Place(self._reload, "POST"),
            "/-/config": _Place(self._config),
            "/-/status": _Place(self._report),
            "/": _Place(self._page),
        }

    async def __call__(self, request: BaseRequest) -> Reply:
        """Answer one request."""
        try:
            status, content_type, body = await self._find(request).answer(request)
        except ProxyError as error:
            return self.refuse(request, error)
        except Exception as error:  # noqa: BLE001 - a bug of ours is no request of a client's
            request_id = headers.new_request_id()
            self._log.error("bug", request_id=request_id, exc_info=error)
            return self.refuse(request, errors.internal_error(request_id))
        reply, fields = Reply(request), [*_own_headers(content_type), *_ALONE]
        if isinstance(body, bytes):
            reply.send(status, fields, body)
            return reply
        try:
            reply.start(status, fields)
            for part in body:
                reply.write(part)
                await asyncio.sleep(0)  # all at once would stop the event loop for too long
            reply.end()
        except ConnectionError:
            reply.abandon()
        return reply

    def refuse(self, request: BaseRequest, error: ProxyError) -> Reply:
        """Answer with an error."""
        reply = Reply(request)
        reply.keep_alive = reply.keep_alive and not error.close
        reply.send(error.status, [*_own_headers(_JSON), *error.headers], error.render("openai"))
        return reply

    def turn_away(self, error: ProxyError) -> str:
        """A connection that is not served; the request id that it is told."""
        del error
        return headers.new_request_id()

    def _find(self, request: BaseRequest) -> _Place:
        path = check_head(request)
        place = self._places.get(path)
        if (place is None or not place.public) and not _is_local(request):
            raise errors.forbidden("From another machine only metrics and health can be asked for.")
        if place is None:
            raise errors.unknown_url(request.method, path)
        methods = ("GET", "HEAD") if place.method == "GET" else (place.method,)
        if request.method not in methods:
            raise errors.method_not_allowed(request.method, ", ".join(methods))
        return place

    async def _scrape(self, request: BaseRequest) -> Answer:
        form = negotiate(request.headers.getall("Accept", []))
        return 200, CONTENT_TYPES[form], await self._metrics.scrape(form)

    async def _healthy(self, _request: BaseRequest) -> Answer:
        return 200, _TEXT, b"ok\n"

    async def _ready(self, _request: BaseRequest) -> Answer:
        if self._proxy.draining:
            return 503, _TEXT, b"draining\n"
        if self._sessions.away:
            return 503, _TEXT, b"the store of sessions is not available\n"
        return 200, _TEXT, b"ready\n"

    async def _reload(self, request: BaseRequest) -> Answer:
        if "Origin" in request.headers:
            raise errors.forbidden("A reload cannot be asked for by a web page.")
        if not self._is_ours(request.headers.getall("Host", [])):
            raise errors.forbidden("A reload must be asked for by address, or as localhost.")
        if self._proxy.draining:
            raise errors.shutting_down()
        try:
            reloaded = await self._reloader.reload()
        except ConfigError as error:
            raise errors.invalid_configuration(self._reloader.sentences(error.mistakes)) from None
        done = {
            "status": "reloaded",
            "changes": reloaded.changes.document(),
            "warnings": self._reloader.sentences(reloaded.warnings),
        }
        return 200, _JSON, _json(done)

    def _is_ours(self, hosts: list[str]) -> bool:
        """Whether the Host field is an address, localhost, or the host that was configured."""
        if len(hosts) != 1:
            return False
        name = hosts[0].strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        return name in ("localhost", self._host.lower()) or _address(name) is not None

    async def _config(self, _request: BaseRequest) -> Answer:
        config = self._proxy.snapshot.config
        return 200, _JSON, _json(config.model_dump(mode="json", by_alias=True))

    async def _report(self, _request: BaseRequest) -> Answer:
        return 200, _JSON, _json(await self._status.report())

    async def _page(self, _request: BaseRequest) -> Answer:
        return 200, _HTML, PAGE


def _own_headers(content_type: str) -> list[tuple[str, str]]:
    return [(headers.REQUEST_ID, headers.new_request_id()), ("Content-Type", content_type)]


def _json(document: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def _is_local(request: BaseRequest) -> bool:
    """Whether the peer is on this machine: loopback, or a unix socket."""
    peer = request._transport_peername  # noqa: SLF001 - `remote` loses the unix case
    if peer is None:
        # Of one that left before it was accepted there is no name, wherever it was.
        sock = None if request.transport is None else request.transport.get_extra_info("socket")
        return sock is not None and sock.family == socket.AF_UNIX
    if not isinstance(peer, (list, tuple)):
        return True
    address = _address(str(peer[0]).partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address is not None and address.is_loopback


def _address(text: str) -> Any:
    try:
        return ip_address(text)
    except ValueError:
        return None
