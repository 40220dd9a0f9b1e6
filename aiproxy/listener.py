"""The client's side of HTTP: connections, with every bound set.

aiohttp's own runner and C parser do the protocol. What they leave open is closed here: a deadline
for a request's head, a bound of connections, JSON for malformed HTTP. For that a few inner fields
of aiohttp 3.14 are used, each where it says so.
"""

from __future__ import annotations

import socket
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from aiohttp import http_parser, web
from aiohttp.http import HttpRequestParser
from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import ERROR, RequestHandler, _ErrInfo
from multidict import CIMultiDict, CIMultiDictProxy

from aiproxy import errors
from aiproxy.reply import PHRASES

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from aiohttp.http_parser import RawRequestMessage
    from aiohttp.streams import StreamReader
    from aiohttp.web_request import BaseRequest

    from aiproxy.errors import ProxyError
    from aiproxy.reply import Reply

MAX_LINE = 16 * 1024  # bytes of a request line
MAX_FIELD = 32 * 1024  # bytes of a header field
MAX_FIELDS = 128
MAX_HEAD = 128 * 1024  # bytes of a head that is not complete: it is held before a key was seen
SEND_BUFFER = 256 * 1024  # bytes in the kernel per client, so that a slow one slows the upstream
WRITE_HIGH = 64 * 1024  # bytes in the process per client before writing waits
MAX_AHEAD = 64 * 1024  # bytes that a client may send behind the request in flight
MAX_QUEUED = 8  # requests likewise
LATE = web.RequestKey("late", bool)  # marks a request that comes after the time for it
LINGER = 2.0  # seconds of reading on after an answer that came before the request's end

# aiohttp's stand-in for a request that it could not parse, with headers that can be asked.
_UNPARSED = ERROR._replace(headers=CIMultiDictProxy(CIMultiDict()))


def require_c_parser() -> None:
    """Refuse to serve with the parser in Python: it is slow, and accepts other things.

    Raises:
        RuntimeError: aiohttp was built without its C extension, or was told not to use it.
    """
    if HttpRequestParser is http_parser.HttpRequestParserPy:
        raise RuntimeError(
            "aiohttp runs without its C parser; install a binary wheel, unset AIOHTTP_NO_EXTENSIONS"
        )


Serves = Literal["all", "first", "none"]  # requests that come from now on, or a connection's first
Handler: TypeAlias = "Callable[[BaseRequest], Awaitable[Reply]]"


class Listener(web.Server):
    """aiohttp's server with bounds on connections and time, and cancellation of what is left.

    Args:
        handler: answers a request.
        refuse: answers with an error what could not be parsed as a request.
        turn_away: records a connection that is not served, and gives it a request id.
        max_connections: connections over this are answered 503 and closed.
        client_header: seconds from the first byte of a request (from the connection's start for
            its first one) to the end of its head; 0 for none.
        client_write: seconds that a closed connection may take to send what waits; 0 for ever.
        keepalive: seconds that an idle connection is kept.
    """

    def __init__(
        self,
        handler: Handler,
        refuse: Callable[[BaseRequest, ProxyError], Reply],
        turn_away: Callable[[ProxyError], str],
        *,
        max_connections: int,
        client_header: float,
        client_write: float,
        keepalive: float,
    ) -> None:
        super().__init__(
            cast("Any", handler),  # a Reply does what the runner asks of a StreamResponse
            handler_cancellation=True,
            request_factory=self._request,
        )
        self.refuse = refuse
        self.turn_away = turn_away
        self.bound(
            max_connections=max_connections,
            client_header=client_header,
            client_write=client_write,
            keepalive=keepalive,
        )
        self.count = 0
        self.serves: Serves = "all"

    def bound(
        self, *, max_connections: int, client_header: float, client_write: float, keepalive: float
    ) -> None:
        """Other bounds, for connections and heads that come from now on."""
        self.max_connections = max_connections
        self.client_header = client_header
        self.client_write = client_write
        self.keepalive = keepalive

    def _request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        *rest: Any,
    ) -> BaseRequest:
        parsed = _UNPARSED if message is ERROR else message
        request = self._make_request(parsed, payload, protocol, *rest)
        if cast("Connection", protocol).late:
            request[LATE] = True
        return request

    def unread(self) -> bool:
        """Whether any connection has not sent a request yet."""
        return any(cast("Connection", each).unread for each in self.connections)

    def busy(self) -> bool:
        """Whether any connection has sent a request that is not answered yet."""
        return any(cast("Connection", each).busy for each in self.connections)

    def unsent(self) -> int:
        """Bytes that wait in this process for clients to take them."""
        return sum(
            connection.transport.get_write_buffer_size()
            for connection in self.connections
            if connection.transport is not None
        )

    def __call__(self) -> RequestHandler:
        """A protocol for a new connection."""
        return Connection(self, loop=self._loop)


class Connection(RequestHandler):
    """One client connection.

    Attributes:
        unread: no request has come yet.
        late: what comes next comes after the time in which requests are served.
    """

    __slots__ = (
        "_ahead", "_body", "_broken", "_client", "_counted", "_head_deadline", "_head_size",
        "_listener", "late", "unread",
    )  # fmt: skip

    def __init__(self, listener: Listener, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            listener,
            loop=loop,
            access_log=cast("Any", None),
            keepalive_timeout=listener.keepalive,
            max_line_size=MAX_LINE,
            max_field_size=MAX_FIELD,
            max_headers=MAX_FIELDS,
            lingering_time=LINGER,
            auto_decompress=False,
        )
        self._listener = listener
        self._ahead = 0  # bytes that came behind the request in flight
        self._body: StreamReader | None = None  # of the request that came last
        self._head_size = 0  # bytes of a head that is not complete
        self._broken = False  # what came is not HTTP: nothing more is read
        self._client: asyncio.Transport | None = None
        self._counted = False
        self._head_deadline: asyncio.TimerHandle | None = None
        self.unread = True
        self.late = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection, bound its buffers, start the clock for its first head."""
        client = self._client = cast("asyncio.Transport", transport)
        if self._listener.count >= self._listener.max_connections:
            error = errors.overloaded("too many connections")
            client.write(_plain(error, self._listener.turn_away(error)))
            self._force_close = True  # whatever it sends is not read
            super().connection_made(transport)
            client.close()
            return
        self._counted = True
        self._listener.count += 1
        client.set_write_buffer_limits(high=WRITE_HIGH)
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            if self._listener.client_write and sock.family != socket.AF_UNIX:
                # Else a peer that is gone without a word would be sent to until its stream ends:
                # what the kernel holds for it counts as sent.
                patience = int(self._listener.client_write * 1000)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Free its place; aiohttp cancels the handler."""
        if self._counted:
            self._counted = False
            self._listener.count -= 1
        self._stop_clock()
        super().connection_lost(exc)
        self._body = None  # it knows this object: a cycle

    def data_received(self, data: bytes) -> None:
        """Parse; a head that is begun must be complete in time, and within its bound."""
        if self._broken:
            return
        if not self.busy:
            self._ahead = 0
        elif self._is_ahead(len(data)):
            return
        before = len(self._messages)
        super().data_received(data)
        if len(self._messages) > before:
            serves = self._listener.serves
            self.late = serves == "none" or (serves == "first" and not self.unread)
            self.unread = False
            message, body = self._messages[-1]
            if isinstance(message, _ErrInfo):
                self._break()
            else:
                self._body = body
        if len(self._messages) > MAX_QUEUED:  # all in one piece
            self._give_up()
        if self.busy or self._in_body:
            self._head_size = 0
            self._stop_clock()
            return
        self._head_size += len(data)
        if self._head_size > MAX_HEAD:
            self._refuse_head()
        elif self._head_deadline is None:
            self._expect_head()

    @property
    def _in_body(self) -> bool:
        """Whether the next bytes belong to the body of the request that came last."""
        return self._body is not None and not self._body.is_eof()

    def _break(self) -> None:
        """What came last is not HTTP: say so to who reads the body that it was part of, if any.

        aiohttp would only queue the error behind the request that waits for its body (3.14).
        """
        self._broken = True
        if self._body is not None and self._in_body:
            error, _ = self._messages.pop()
            self._body.set_exception(_malformed(cast("_ErrInfo", error).exc))
            self._body.feed_eof()  # else aiohttp would linger for it, and stumble over the error

    def _refuse_head(self) -> None:
        """Answer a head that grows beyond its bound, as if the parser had refused it."""
        self._broken = True
        error = LineTooLong(b"", MAX_HEAD)
        self._messages.append((_ErrInfo(status=400, exc=error, message=""), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._stop_clock()

    @property
    def busy(self) -> bool:
        """Whether a request has come that is not answered yet."""
        return bool(self._messages) or self._request_in_progress

    def _is_ahead(self, size: int) -> bool:
        """Whether the client sends too much behind the request in flight; then it is gone.

        Otherwise reading would have to pause, and its going would not be seen while it pauses.
        """
        request = self._current_request
        if request is not None and not request.content.is_eof():
            self._ahead = 0  # it is this request's own body
            return False
        self._ahead += size
        if self._ahead <= MAX_AHEAD and len(self._messages) <= MAX_QUEUED:
            return False
        self._give_up()
        return True

    def _give_up(self) -> None:
        if self._client is not None:
            self._client.abort()

    def eof_received(self) -> None:
        """A client that closes its sending side while it is served counts as gone."""
        if self.busy:
            self._give_up()

    async def start(self) -> None:
        """Serve the connection; what waits when it ends is bounded in time."""
        try:
            await super().start()
        finally:
            self._bound_flush()

    def _expect_head(self) -> None:
        if self._listener.client_header:
            self._head_deadline = self._loop.call_later(
                self._listener.client_header, self._head_late
            )

    def _stop_clock(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _head_late(self) -> None:
        self._head_deadline = None
        if not self.busy:
            self.force_close()

    def force_close(self) -> None:
        """Close; what waits to be sent may take `client_write`, not for ever."""
        super().force_close()
        self._bound_flush()

    def _bound_flush(self) -> None:
        patience, client = self._listener.client_write, self._client
        if patience and client is not None and client.get_write_buffer_size():
            self._loop.call_later(patience, client.abort)

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What the parser refused, in the error shape of the API."""
        del message
        if status == HTTPStatus.BAD_REQUEST:
            error = _malformed(exc)
        else:  # a handler raised: its own error path is at fault
            self.logger.error("unhandled error of a handler", exc_info=exc)
            error = errors.internal_error("none")
        return cast("web.StreamResponse", self._listener.refuse(request, error))


def _malformed(exc: BaseException | None) -> ProxyError:
    if isinstance(exc, LineTooLong):
        return errors.invalid_http("The request line, a header field or the head is too long.", 431)
    if "Too many headers" in str(exc):
        return errors.invalid_http(f"More than {MAX_FIELDS} header fields.", 431)
    return errors.invalid_http("The request is not well-formed HTTP/1.1.")


def _plain(error: ProxyError, request_id: str) -> bytes:
    """An answer to a connection that is not served at all."""
    body = error.render("openai")
    lines = [
        f"HTTP/1.1 {error.status} {PHRASES[error.status]}",
        f"x-request-id: {request_id}",
        "Content-Type: application/json",
        *(f"{name}: {value}" for name, value in error.headers),
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body
