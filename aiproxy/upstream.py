"""Ask an upstream, and name what went wrong.

The one door between the connections to upstreams and the rest: beyond it are only answers and
ProxyErrors. A POST goes out once. There are no redirects, no cookies and no proxies of the
environment: each would carry a client's prompt, or our credential, to somewhere the configuration
does not name.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NoReturn, Self

from aiproxy import errors, headers
from aiproxy.coding import CODINGS, Decoder, UndecodableError
from aiproxy.errors import ProxyError
from aiproxy.upstream_errors import UNDECODABLE, Failure, asked_for, passed_on, whole_seconds

if TYPE_CHECKING:
    from types import TracebackType

    from aiproxy.errors import Shape
    from aiproxy.exchange import AttemptResult, Exchange
    from aiproxy.standing import Standing
    from aiproxy.trace import Attempt
    from aiproxy.upstream_answer import Head
    from aiproxy.upstream_client import Client
    from aiproxy.upstream_connection import Connection
    from aiproxy.watch import Watch

MAX_ANSWER = 64 * 1024 * 1024  # bytes of a JSON answer
MAX_REFUSAL = 64 * 1024  # bytes of an error body
REFUSAL = 2.0  # seconds for the body of a refusal, which says enough by its status
MAX_PIECE = 256 * 1024  # bytes of an answer that are decoded at a time

_EMPTY = frozenset({204, 205})  # successes without content (RFC 9110 section 15.3)
_NO_CREDENTIAL = (401, 403)
_NOT_ACTED = (429, 503, 529)  # who says this has not done what it was asked for
_PASSED_ON = frozenset({400, 404, 409, 413, 422, 429})


class Ask:
    """One attempt at one target: `with await Ask(...).send(head, body) as answer`.

    Sending returns once the answer's head is here and is a good one. Leaving aborts the connection
    unless the answer was read to its end: an upstream must not go on generating for nobody.

    Attributes:
        result: how the attempt failed, if it did.
        sent: whether there was an attempt at all: none is made at an upstream that takes none.
        acted: whether the upstream may have done what it was asked for.
        retry_after: seconds that it asks to be left alone, where it refused.
    """

    def __init__(
        self, client: Client, standing: Standing, exchange: Exchange, watch: Watch, *, shape: Shape
    ) -> None:
        self.acted = True
        self.retry_after = 0.0
        self._client = client
        self._standing = standing
        self._entered = self.sent = self._probe = False
        self._exchange = exchange
        self._watch = watch
        self._shape = shape
        self._connection: Connection | None = None
        self._answer: Head | None = None
        self.result: AttemptResult | None = None
        self._decoder: Decoder | None = None
        self._head = b""
        self._body = b""
        self._attempt: Attempt | None = None  # for its span

    async def send(self, head: bytes, body: bytes) -> Self:
        """Send a request, and judge the answer's head.

        Raises:
            ProxyError: no answer, or a refusal; no connection is left behind.
        """
        now = time.monotonic()
        if not self._standing.enter(now):
            self.acted = False
            raise errors.upstream_unavailable(self._standing.wait(now))
        self._entered = self.sent = True
        self._probe = self._standing.breaker.state == "half-open"
        self._head, self._body = head, body
        try:
            await self._ask()
        except BaseException as error:  # a cancellation, too, leaves no connection behind
            self._drop(error)
            raise
        return self

    async def _ask(self) -> None:
        exchange, watch, timeouts = self._exchange, self._watch, self._client.timeouts
        exchange.asked = time.monotonic()
        exchange.first_asked = exchange.first_asked or exchange.asked
        exchange.attempts += 1
        if exchange.trace is not None:
            name, origin = self._client.upstream.name, self._client.origin
            self._attempt = exchange.trace.begin(name, origin, exchange.asked)
        watch.enter("connect", timeouts.connect)
        try:
            self._connection = connection = await self._client.pool.acquire()
            if connection.send(self._head, self._body, self._sent):
                self._sent()
            else:  # while the upstream takes the body it is not late
                watch.enter("first_byte", timeouts.first_byte, connection.unsent)
            answer = await connection.head()
        except Failure as failure:
            raise self._failed(failure) from None
        self._head = self._body = b""
        self._answer = answer
        exchange.upstream_request_id = answer.get("x-request-id") or answer.get("request-id")
        watch.enter("idle", timeouts.idle)
        coding = answer.listed("content-encoding").strip().lower()
        if coding in CODINGS:  # though identity was asked for
            self._decoder = Decoder(coding)
        if not 200 <= answer.status < 300 or answer.status in _EMPTY:  # noqa: PLR2004 - successes
            await self._refuse(answer)
        if coding not in CODINGS and coding not in ("", "identity"):
            raise self.not_an_answer(UNDECODABLE)
        self._standing.breaker.answered(probe=self._probe)
        self._probe = False  # it is known how it went: from now on it is one of many

    def _sent(self) -> None:
        """The request's last byte is with the kernel."""
        if self._answer is None and self._watch.phase in ("connect", "first_byte"):
            self._watch.enter("first_byte", self._client.timeouts.first_byte)

    def __enter__(self) -> Self:
        """Read the answer within."""
        return self

    def __exit__(
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
            reason = self._watch.missed
            if reason == "connect" and self._connection is None:
                self.result = "connect"
            elif reason in ("connect", "first_byte", "idle", "total"):
                self.result = "timeout"  # a connection that came just too late was sent something
        elif (
            isinstance(error, ProxyError)
            and self.result is None
            and error.outcome == "upstream_error"
        ):
            self.result = "protocol"  # what came is no answer
        if self.result is not None or self._answer is not None:
            self._exchange.results.append((self._client.upstream.name, self.result or "ok"))
        if self._attempt is not None:
            self._end_span(self._attempt)
        self._leave()
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if error is None and connection.taken:
            self._client.pool.release(connection)
        else:
            connection.abort()

    def _end_span(self, attempt: Attempt) -> None:
        answer, self._attempt = self._answer, None
        attempt.ended = time.monotonic()
        attempt.result = self.result or ("" if answer is None else "ok")
        if answer is not None:
            attempt.status = answer.status
            attempt.request_id = self._exchange.upstream_request_id

    def _leave(self) -> None:
        """The end of the attempt, and what it says of the upstream; a good head was told before."""
        if not self._entered:
            return
        self._entered = False
        self._standing.leave()
        breaker, now = self._standing.breaker, time.monotonic()
        self.acted = self.acted and self.result != "connect"
        if self._answer is not None and self._answer.status in _NO_CREDENTIAL:
            breaker.refused(now)
        elif self.result is None and self._answer is None:
            breaker.unknown(probe=self._probe)
        elif self.result in (None, "status_4xx"):
            breaker.succeeded(probe=self._probe)
        else:
            breaker.failed(now, self.retry_after, probe=self._probe)

    @property
    def media_type(self) -> str:
        """The answer's media type, lower-case; empty when it names none."""
        return headers.media_type(self._received.get("content-type"))

    def passed_on(self) -> list[tuple[str, str]]:
        """The answer's headers that go on to the client."""
        return headers.to_client(self._received.headers)

    @property
    def _received(self) -> Head:
        if self._answer is None:
            raise RuntimeError("not entered")
        return self._answer

    async def chunk(self) -> bytes:
        """The next bytes of the answer; empty at its end.

        Raises:
            ProxyError: the answer broke off; all that came before it was given out.
        """
        if self._connection is None:
            raise RuntimeError("not entered")
        try:
            if self._decoder is None:
                return await self._connection.read()
            return await self._decoded(self._connection, self._decoder)
        except Failure as failure:
            raise self._failed(failure) from None

    async def _decoded(self, connection: Connection, decoder: Decoder) -> bytes:
        try:
            while not (piece := decoder.take(MAX_PIECE)):
                coded = await connection.read()
                if not coded:
                    if not decoder.complete:
                        raise Failure("protocol", UNDECODABLE)
                    return b""
                decoder.feed(coded)
        except UndecodableError:
            raise Failure("protocol", UNDECODABLE) from None
        await asyncio.sleep(0)  # a small answer may grow to a large one: others take their turn
        return piece

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
                self.result = "protocol"
                raise errors.upstream_error("The upstream's answer is too large.")
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _failed(self, failure: Failure) -> ProxyError:
        self.result = failure.result
        return errors.upstream_error(failure.message)

    def not_an_answer(self, what: str) -> ProxyError:
        """The answer is not what was asked for."""
        self.result = "protocol"
        return errors.upstream_error(what)

    async def _refuse(self, answer: Head) -> NoReturn:
        """Raise what the client is told of an answer that is no success."""
        status = answer.status
        self.result = (
            "status_429" if status == 429  # noqa: PLR2004 - HTTP's own numbers are their names
            else "status_5xx" if status >= 500  # noqa: PLR2004 - as above
            else "status_4xx" if status >= 400  # noqa: PLR2004 - as above
            else "protocol"
        )  # fmt: skip
        self.acted = status not in _NOT_ACTED
        self.retry_after = asked_for(answer.get)
        if status in _NO_CREDENTIAL:
            raise errors.upstream_credential()
        back = tuple(h for h in self.passed_on() if h[0].lower() != "content-type")
        if status in (503, 529):
            kept = tuple(h for h in back if h[0].lower() in ("retry-after", "retry-after-ms"))
            raise errors.upstream_overloaded(whole_seconds(answer.get("retry-after-ms")), kept)
        if status not in _PASSED_ON:
            raise errors.upstream_error(f"The upstream answered with status {status}.")
        result = self.result
        self._watch.enter("none", 0)  # its body has a bound of its own
        try:
            async with asyncio.timeout(REFUSAL):
                body = await self.read(MAX_REFUSAL)
        except (errors.ProxyError, TimeoutError):
            self.result = result
            body = b""
        raise passed_on(status, body, back, self._shape)
