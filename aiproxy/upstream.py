"""Ask an upstream, and name what went wrong.

The one door between aiohttp's client and the rest: beyond it are only answers and ProxyErrors. A
POST goes out once. Redirects, cookies and the environment's proxies are off: each would carry a
client's prompt, or our credential, to somewhere the configuration does not name.
"""

from __future__ import annotations

import asyncio
import io
import ssl
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, NoReturn, Self

import aiohttp
from aiohttp import http_exceptions
from yarl import URL

from aiproxy import errors, headers
from aiproxy.errors import ProxyError
from aiproxy.upstream_errors import classify, passed_on
from aiproxy.upstream_pool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.connector import Connection
    from multidict import CIMultiDictProxy

    from aiproxy.config import Upstream
    from aiproxy.errors import Shape
    from aiproxy.exchange import AttemptResult, Exchange
    from aiproxy.watch import Watch

MAX_ANSWER = 64 * 1024 * 1024  # bytes of a JSON answer
MAX_REFUSAL = 64 * 1024  # bytes of an error body
LARGE = 32 * 1024  # bytes of a request body that is not left to aiohttp's flow control
MAX_FIELD = 32 * 1024  # bytes of an answer's header field
ANTHROPIC_VERSION = "2023-06-01"  # where the client names none (API reference, "Versions")

_EMPTY = frozenset({204, 205})  # successes without content (RFC 9110 section 15.3)
_PASSED_ON = frozenset({400, 404, 409, 413, 422, 429})

_asking: ContextVar[Ask] = ContextVar("asking")


class _Request(aiohttp.ClientRequest):
    """Tells the `Ask` that made it when it is on the wire, and on which connection."""

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        ask = _asking.get()
        ask.connected(conn)
        if conn.protocol is None or conn.protocol.writing_paused:
            raise aiohttp.ClientConnectionError("not ready to be written to")
        response = await super().send(conn)
        if self._body is None and conn.transport is not None:
            # The body goes out with the head, in one write of the event loop. aiohttp would make a
            # payload object and a task for it, which is a tenth of a short request's cost.
            conn.transport.write(ask.body)
            ask.sent()
        return response

    async def write_bytes(
        self, writer: AbstractStreamWriter, conn: Connection, content_length: int | None = None
    ) -> None:
        await super().write_bytes(writer, conn, content_length)
        _asking.get().sent()


class Client:
    """The connections to one upstream."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.timeouts = upstream.timeouts
        authority = upstream.ca_file
        self._session = aiohttp.ClientSession(
            connector=Pool(
                # True: the system's authorities, in one context that aiohttp shares.
                ssl=ssl.create_default_context(cafile=authority) if authority else True,
                # Kept for this long, or not at all; aiohttp takes one of the two.
                **(
                    {"keepalive_timeout": upstream.idle_connections}
                    if upstream.idle_connections
                    else {"force_close": True}
                ),
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None),  # deadlines are the watch's
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            request_class=_Request,
            max_line_size=MAX_FIELD,
            max_field_size=MAX_FIELD,
        )
        self._base = URL(upstream.url, encoded=True)
        self._fixed: dict[str, tuple[tuple[str, str], ...]] = {}
        self._urls: dict[str, URL] = {}  # by path: there are four
        self._own = frozenset(name.lower() for name in upstream.headers)

    def url(self, path: str) -> URL:
        """The address of an API: `path` after the base, whose query is kept.

        A base without any path is one that the user took for the host: its API is below /v1.
        """
        known = self._urls.get(path)
        if known is not None:
            return known
        base = self._base.raw_path.rstrip("/") or "/v1"
        query = f"?{self._base.raw_query_string}" if self._base.raw_query_string else ""
        url = URL(f"{self._base.origin()}{base}{path}{query}", encoded=True)
        self._urls[path] = url
        return url

    def request_headers(
        self, api: str, received: Iterable[tuple[str, str]], request_id: str
    ) -> list[tuple[str, str]]:
        """What goes upstream: the client's that may, the upstream's own, the credential."""
        fixed = self._fixed.get(api)
        if fixed is None:
            fixed = self._fixed[api] = self._fixed_headers(api)
        crossing = [
            header
            for header in headers.to_upstream(received, self.upstream.header_allow)
            if header[0].lower() not in self._own
        ]
        names = {name.lower() for name, _ in crossing}
        if "content-type" not in names:
            crossing.append(("Content-Type", "application/json"))
        if api == "messages" and not {"anthropic-version"} & (names | self._own):
            crossing.append(("anthropic-version", ANTHROPIC_VERSION))
        return [*crossing, *fixed, (headers.REQUEST_ID, request_id)]

    def _fixed_headers(self, api: str) -> tuple[tuple[str, str], ...]:
        own = list(self.upstream.headers.items())
        secret = self.upstream.credential
        if secret is not None:
            carried = headers.credential(self.upstream.auth, api, secret.get_secret_value())
            if carried is not None:
                own.append(carried)
        own.append(("Accept-Encoding", "identity"))  # a stream that is compressed is not live
        return tuple(own)

    async def post(
        self, url: URL, body: bytes, sent: list[tuple[str, str]]
    ) -> aiohttp.ClientResponse:
        """One POST, one attempt."""
        if len(body) <= LARGE:  # written by `_Request.send`
            sent.append(("Content-Length", str(len(body))))
            return await self._session.post(url, headers=sent, allow_redirects=False)
        # As a file it is written piece by piece, as the upstream takes it.
        file = io.BytesIO(body)
        return await self._session.post(url, data=file, headers=sent, allow_redirects=False)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


class Ask:
    """One attempt at one target: `async with Ask(...) as answer`.

    Entering sends the request and returns once the answer's head is here and is a good one. Leaving
    aborts the connection unless the answer was read to its end: an upstream must not go on
    generating for nobody.
    """

    def __init__(
        self, client: Client, exchange: Exchange, watch: Watch, *, api: str, shape: Shape
    ) -> None:
        self._client = client
        self._exchange = exchange
        self._watch = watch
        self._api = api
        self._shape = shape
        self._transport: asyncio.Transport | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._result: AttemptResult | None = None
        self._url: URL
        self.body = b""
        self._sent: list[tuple[str, str]] = []

    def post(self, url: URL, body: bytes, sent: list[tuple[str, str]]) -> Ask:
        """What to send."""
        self._url, self.body, self._sent = url, body, sent
        return self

    def connected(self, conn: Connection) -> None:
        """The request is about to be written to `conn`."""
        self._transport = conn.transport
        self._watch.enter("first_byte", self._client.timeouts.first_byte)

    def sent(self) -> None:
        """The request's last byte was written."""
        if self._response is None:
            self._watch.enter("first_byte", self._client.timeouts.first_byte)

    async def __aenter__(self) -> Self:
        """Send, and judge the answer's head.

        Raises:
            ProxyError: no answer, or a refusal.
        """
        _asking.set(self)
        self._exchange.asked = time.monotonic()
        self._exchange.attempts += 1
        self._watch.enter("connect", self._client.timeouts.connect)
        try:
            response = await self._client.post(self._url, self.body, self._sent)
        except BaseException as error:  # a cancellation, too, leaves no connection behind
            named = None
            if isinstance(error, (aiohttp.ClientError, OSError)):
                self._result, named = classify(error)
            self._drop(error)
            if named is not None:
                raise named from None
            raise
        self.body = b""
        self._response = response
        self._exchange.upstream_request_id = (
            response.headers.get("x-request-id") or response.headers.get("request-id") or ""
        )
        self._watch.enter("idle", self._client.timeouts.idle)
        if not 200 <= response.status < 300 or response.status in _EMPTY:  # noqa: PLR2004
            try:
                await self._refuse(response)
            except BaseException as error:  # likewise
                self._drop(error)
                raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the connection back, or abort it."""
        self._drop(error)

    def _drop(self, error: BaseException | None) -> None:
        """The end of the attempt: record its result, leave no connection behind."""
        if isinstance(error, asyncio.CancelledError):
            reason = self._watch.reason
            if reason == "connect":
                self._result = "connect"
            elif reason in ("first_byte", "idle", "total"):
                self._result = "timeout"
        elif isinstance(error, ProxyError) and self._result is None:
            self._result = "protocol"  # what came is no answer
        if self._result is not None or self._response is not None:
            self._exchange.results.append(self._result or "ok")
        response = self._response
        if response is not None and response.content.is_eof() and error is None:
            response.release()
            return
        if self._transport is not None:
            self._transport.abort()  # at once; a plain close would first send what waits
        if response is not None:
            response.close()

    @property
    def received(self) -> CIMultiDictProxy[str]:
        """The answer's headers."""
        if self._response is None:
            raise RuntimeError("not entered")
        return self._response.headers

    @property
    def media_type(self) -> str:
        """The answer's media type, lower-case; empty when it names none."""
        return headers.media_type(self.received.get("Content-Type", ""))

    def passed_on(self) -> list[tuple[str, str]]:
        """The answer's headers that go on to the client."""
        return headers.to_client(self.received.items())

    async def chunk(self) -> bytes:
        """The next bytes of the answer; empty at its end.

        Raises:
            ProxyError: the answer broke off. `rest` has what came just before.
        """
        if self._response is None:
            raise RuntimeError("not entered")
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, http_exceptions.HttpProcessingError, OSError) as error:
            self._result, named = classify(error)
            raise named from None

    def rest(self) -> bytes:
        """What came before the answer broke off and was not read yet.

        aiohttp's StreamReader raises a failure before it gives these bytes out (3.14, `readany`).
        """
        if self._response is None:
            return b""
        content = self._response.content
        content._exception = None  # noqa: SLF001
        return content.read_nowait(-1)

    async def read(self, limit: int = MAX_ANSWER) -> bytes:
        """The whole answer.

        Raises:
            ProxyError: it broke off, or is longer than `limit` bytes.
        """
        chunks: list[bytes] = []
        size = 0
        while chunk := await self.chunk():
            self._watch.touch()
            size += len(chunk)
            if size > limit:
                self._result = "protocol"
                raise errors.upstream_error("The upstream's answer is too large.")
            chunks.append(chunk)
            if self._response is not None and self._response.content.at_eof():
                break
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def not_an_answer(self, what: str) -> ProxyError:
        """The answer is not what was asked for."""
        self._result = "protocol"
        return errors.upstream_error(what)

    async def _refuse(self, response: aiohttp.ClientResponse) -> NoReturn:
        """Raise what the client is told of an answer that is no success."""
        status = response.status
        self._result = (
            "status_429" if status == 429  # noqa: PLR2004
            else "status_5xx" if status >= 500  # noqa: PLR2004
            else "status_4xx" if status >= 400  # noqa: PLR2004
            else "protocol"
        )  # fmt: skip
        if status in (401, 403):
            raise errors.upstream_credential()
        back = tuple(h for h in self.passed_on() if h[0].lower() != "content-type")
        if status in (503, 529):
            kept = tuple(h for h in back if h[0].lower() in ("retry-after", "retry-after-ms"))
            raise errors.upstream_overloaded("1", kept)
        if status not in _PASSED_ON:
            raise errors.upstream_error(f"The upstream answered with status {status}.")
        try:
            body = await self.read(MAX_REFUSAL)
        except errors.ProxyError:
            self._result = "status_429" if status == 429 else "status_4xx"  # noqa: PLR2004
            body = b""
        raise passed_on(status, body, back, self._shape)
