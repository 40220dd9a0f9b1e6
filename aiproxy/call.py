"""One request on its way: its record, its answer, its deadlines; and its one end.

Whatever happens to a request, it leaves through `Call.finish`: the tokens, the slot and the bytes
held, the record. An answer or an in-band terminal frame that is still owed is given by `fail` or
`interrupt` just before. There is no second place that does any of these.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from aiproxy import errors, headers, sse
from aiproxy.body import Hold
from aiproxy.exchange import Exchange
from aiproxy.limits import ratelimit_headers
from aiproxy.reply import Reply
from aiproxy.usage import charge, estimate_output
from aiproxy.watch import Interrupted, Watch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiohttp.web_request import BaseRequest

    from aiproxy.body import Buffered
    from aiproxy.conversation import Conversation
    from aiproxy.dialects import Answer, Asked, Stream
    from aiproxy.dialects.responses_object import Produced
    from aiproxy.dialects.spoken import Way
    from aiproxy.errors import Outcome, ProxyError, Shape
    from aiproxy.exchange import Endpoint, Recorder
    from aiproxy.kept import Kept
    from aiproxy.limits import Held, Limits
    from aiproxy.prompt_size import Size
    from aiproxy.recent import Estimate, Recent
    from aiproxy.snapshot import Snapshot
    from aiproxy.trace import Trace
    from aiproxy.usage import Reason, Usage

CLIENT_LEFT = 499  # what the log says of a client that left first, as nginx does


class Call:
    """One request.

    Attributes:
        exchange: its record.
        reply: its answer.
        watch: its deadlines; to be entered around the work.
        snapshot: the configuration it began with.
        limits: what limits it, once it is known who asks.
        held: what it has taken of these.
        asked, size, estimate, stream, answer: of a relayed request, as far as it came.
        conversation: its part in one.
        holding_event: whether the client has got a part of an event that is not complete.
        told: whether it was told anything of an answer: then nothing is tried again.
    """

    def __init__(
        self,
        request: BaseRequest,
        endpoint: Endpoint,
        shape: Shape,
        *,
        snapshot: Snapshot,
        recorder: Recorder,
        buffered: Buffered,
        recent: Recent,
        trace: Trace | None,
    ) -> None:
        given = headers.request_id(request.headers.get(headers.REQUEST_ID))
        self.request = request
        self.shape = shape
        self.snapshot = snapshot
        self.reply = Reply(request)
        self.exchange = Exchange(
            request_id=given or headers.new_request_id(),
            endpoint=endpoint,
            recorder=recorder,
            clock=time.monotonic,
            started=time.monotonic(),
            client=snapshot.client_of(request),
            trace=trace,
        )
        self.watch = Watch(asyncio.get_running_loop(), total=snapshot.config.timeouts.total)
        self.hold = Hold(buffered)
        self.recent = recent
        self.limits: Limits | None = None
        self.held: Held | None = None
        self.asked: Asked | None = None
        self.size: Size | None = None
        self.estimate: Estimate | None = None
        self.stream: Stream | None = None
        self.answer: Answer | None = None
        self.conversation: Conversation | None = None
        self.holding_event = False
        self.told = False

    def begin_attempt(self, way: Way) -> None:
        """Somebody is asked: from now on it is what they say that counts."""
        self.asked = way.asked
        self.answer = None
        self.exchange.upstream = way.target.upstream.name
        self.exchange.answered = 0.0
        self.exchange.upstream_request_id = ""
        if (trace := self.exchange.trace) is not None:
            trace.aim(way.spoken.api, way.target.model or way.asked.model)
        self.watch.bound(way.target.upstream.timeouts.total)

    @property
    def kept(self) -> Kept | None:
        """What is kept of it for its spans, if it has any."""
        trace = self.exchange.trace
        return None if trace is None else trace.kept

    # -- answering

    def own_headers(self) -> list[tuple[str, str]]:
        """What aiproxy sets on every answer."""
        own = [(headers.REQUEST_ID, self.exchange.request_id)]
        if self.exchange.upstream:
            own.append(("x-aiproxy-upstream", self.exchange.upstream))
        if self.asked is not None and self.asked.dropped:
            own.append((headers.DROPPED_TOOLS, headers.listed(self.asked.dropped)))
        if self.limits is not None:
            own += ratelimit_headers(self.limits.levels())
        return own

    def send_json(self, status: int, body: bytes, extra: Iterable[tuple[str, str]] = ()) -> None:
        """A whole JSON answer. `extra` may set its own content type."""
        sent = [*self.own_headers(), *extra]
        if not any(name.lower() == "content-type" for name, _ in sent):
            sent.append(("Content-Type", "application/json"))
        self.exchange.status = status
        self.told = True
        self.reply.send(status, sent, body)

    def start_stream(self, received: Iterable[tuple[str, str]] = ()) -> None:
        """The head of a stream; at a heartbeat there are no upstream's headers yet."""
        passed = list(received) or [("Content-Type", "text/event-stream; charset=utf-8")]
        self.exchange.status = 200
        self.exchange.streaming = True
        self.reply.start(
            200,
            [
                *self.own_headers(),
                *passed,
                ("Cache-Control", "no-cache"),
                ("X-Accel-Buffering", "no"),
            ],
        )

    def beat(self) -> None:
        """A comment, after silence; never within an event, nor to a client that is behind."""
        if self.reply.gone or self.reply.ended or self.reply.blocked or self.holding_event:
            return
        if self.stream is not None and self.stream.over:
            return
        if not self.reply.started:
            self.start_stream()
        self.reply.write(sse.COMMENT)

    def await_client(self) -> None:
        """From now on it is the client who must take what was sent."""
        timeout = self.snapshot.config.timeouts.client_write
        self.watch.enter("client_write", timeout, self.reply.unsent)

    async def keep(self, produced: Produced) -> None:
        """Store the answer's turn; the client is not told its end before.

        Raises:
            ProxyError: it cannot be stored.
        """
        if self.conversation is None:
            return
        self.watch.enter("none", 0)  # neither the upstream nor the client is waited for
        read = self.answer or self.stream
        await self.conversation.keep(produced, None if read is None else read.usage)

    def _refuse(self, error: ProxyError) -> None:
        """Tell the client: by a status if none was sent, else by a terminal frame."""
        self.exchange.error_code = error.code or error.kind
        if error.outcome == "rejected_limit":
            self.exchange.limit = error.kind
        if self.reply.ended or self.reply.gone:
            return
        if not self.reply.started:
            self.reply.keep_alive = self.reply.keep_alive and not error.close
            self.send_json(error.status, error.render(self.shape), error.headers)
        elif self.stream is not None and not self.holding_event and not self.stream.over:
            self.reply.write(self.stream.fail(error, int(time.time())))
            self.reply.end()
            self.reply.keep_alive = False
        else:
            self.reply.abandon()

    # -- ending

    def interruption(self, interrupted: Interrupted) -> ProxyError:
        """What a deadline or the drain means to the client."""
        timeouts = self.snapshot.config.timeouts
        match interrupted.reason:
            case "client_body":
                return errors.request_timeout(timeouts.client_body)
            case "connect":
                return errors.upstream_error("The upstream could not be connected to in time.")
            case "first_byte" | "idle" | "tail" | "total":
                return errors.upstream_timeout(interrupted.reason)
            case "client_write":
                return errors.invalid_http("The client does not read its answer.")
            case "shutting_down" | "ended_at_once":
                return errors.shutting_down()

    def fail(self, error: ProxyError) -> Outcome:
        """End with an error of ours."""
        try:
            self._refuse(error)
        except ConnectionError:
            return self.left()
        return error.outcome

    def interrupt(self, interrupted: Interrupted) -> Outcome:
        """End since a deadline passed, or the drain."""
        if interrupted.reason == "client_write":
            self.reply.abort()
            return "client_disconnected"
        if self.stream is not None and self.stream.whole and self.reply.started:
            # Only the upstream's own end of a whole answer did not come.
            self.reply.end()
            return self.stream.outcome
        declared = self.stream.cut() if self.stream is not None else None
        if declared is not None and interrupted.reason in ("idle", "total"):
            return self.fail(declared)
        return self.fail(self.interruption(interrupted))

    def left(self) -> Outcome:
        """End since the client has left: after its terminal event it missed nothing."""
        if self.stream is not None and self.stream.over and self.reply.started:
            return self.stream.outcome
        return "client_disconnected"

    def finish(self, outcome: Outcome) -> None:
        """The end: settle tokens and slot, give back memory, write the record. Awaits nothing."""
        exchange = self.exchange
        if exchange.outcome is not None:
            return
        try:
            exchange.usage, exchange.estimated = self._charge(outcome)
        finally:  # a bug there must not keep the slot for ever
            if self.held is not None:
                if outcome == "rejected_invalid" and self.estimate and not exchange.asked:
                    self.held.revoke()  # a conversation turned out to hold what cannot be asked
                else:
                    self.held.settle(0 if exchange.usage is None else exchange.usage.total)
        self.hold.release()
        if self.conversation is not None:
            self.conversation.end()
            self.conversation = None  # it knows this call: a cycle to collect
        if outcome == "client_disconnected":
            exchange.status = CLIENT_LEFT
        exchange.bytes_out = self.reply.bytes_out
        exchange.finish(outcome)
        self._observe()

    def _charge(self, outcome: Outcome) -> tuple[Usage | None, Reason | None]:
        exchange, stream, answer = self.exchange, self.stream, self.answer
        estimate = self.estimate
        if not exchange.asked or self.asked is None or estimate is None:
            return None, None
        now = time.monotonic()
        since = exchange.answered if self.asked.stream else exchange.asked
        return charge(
            outcome,
            counted=answer.usage if answer else stream.usage if stream else None,
            reason=answer.reason if answer else stream.reason if stream else None,
            answered=bool(exchange.answered),
            streamed=self.asked.stream,
            given=estimate.input,
            delivered=self._delivered(),
            paced=self.recent.pace.tokens(self._target(), now - since) if since else 0,
            largest=estimate.largest,
            firm=estimate.firm,
        )

    def _delivered(self) -> int:
        if self.answer is not None:
            told = self.answer.delivered
            return estimate_output(0, len(self.answer.body)) if told is None else told
        return self.stream.delivered() if self.stream is not None else 0

    def _target(self) -> tuple[str, str]:
        return self.exchange.route, self.exchange.upstream

    def _observe(self) -> None:
        """Remember what the upstream counted, for the estimates of the next ones."""
        exchange, recent, usage = self.exchange, self.recent, self.exchange.usage
        if usage is None or exchange.estimated is not None or not exchange.answered:
            return
        since = exchange.answered if exchange.streaming else exchange.asked
        recent.pace.observe(self._target(), usage.total_output, exchange.ended - since)
        if self.size is not None and not self.size.media:
            recent.density.observe(exchange.route, self.size.text, usage.total_input)
        if self.estimate is not None and self.estimate.largest:
            recent.outputs.observe(exchange.key, exchange.route, usage.total_output)
