"""The attempts of one request: who is asked, and what is tried again after a failure.

One loop for streams and JSON answers. Another target, or the same one again, is tried only while
the client was told nothing of an answer, and a request goes to a second upstream only where the
first cannot have acted on it: it could not be connected to, or said that it is overloaded (429,
503, 529). A failure that an upstream declares before any output counts as such, too. A route may
allow more (`retry_unsafe`): then also after a reset or a silence.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from aiproxy import errors
from aiproxy.aside import aside
from aiproxy.dialects import members_of, value_of
from aiproxy.dialects.spoken import Way, rename, spoken
from aiproxy.errors import ProxyError
from aiproxy.relay import Relay
from aiproxy.upstream import Ask
from aiproxy.watch import Late

if TYPE_CHECKING:
    from aiproxy.call import Call
    from aiproxy.config import Route, Target
    from aiproxy.dialects import Answer, Asked, Dialect
    from aiproxy.envelope import Envelope
    from aiproxy.errors import Outcome
    from aiproxy.routes import Order
    from aiproxy.standing import Standings

BACKOFF, MOST_BACKOFF = 0.1, 2.0  # seconds; doubled each time, and drawn from 0 on (full jitter)
MOST_WAIT = 5.0  # seconds that an upstream may ask to be waited for
_UNSAFE = frozenset({"reset", "timeout"})  # results after which an upstream may have acted


class _Again(Exception):  # noqa: N818 - it is an event: the loop goes on
    """An attempt failed in a way that another one may follow."""

    def __init__(self, error: ProxyError, *, sent: bool, retry_after: float) -> None:
        super().__init__(error)
        self.error = error
        self.sent = sent
        self.retry_after = retry_after


class Attempts:
    """Of one request.

    Args:
        call: the request.
        route: of its model.
        dialect: the client's.
        asked: what it asks for; each attempt has a copy of its own.
        envelope: its body; each attempt has a copy of its own.
        order: the targets of the route, in the order of trying.
        standings: how the upstreams are doing.
    """

    def __init__(  # noqa: PLR0917 - a request has no fewer sides
        self,
        call: Call,
        route: Route,
        dialect: Dialect,
        asked: Asked,
        envelope: Envelope,
        order: Order,
        standings: Standings,
    ) -> None:
        self._call = call
        self._route = route
        self._dialect = dialect
        self._asked = asked
        self._envelope: Envelope | None = envelope
        self._order = order
        self._standings = standings
        self._left = call.snapshot.config.retries
        self._rounds = 0
        self._acted = False  # an attempt before may have made output that is paid for
        self._not_before: dict[int, float] = {}  # by position: what they have asked for
        self._ask: Ask | None = None  # of the attempt that is made
        self._relay: Relay | None = None

    async def place(self) -> Asked:
        """Find the first target that can be asked for this; what it would be asked for.

        Raises:
            ProxyError: none can; why the first cannot.
        """
        first: ProxyError | None = None
        exchange = self._call.exchange
        while self._order.targets:
            target = self._order.reach(0)
            way = self._way(target)
            exchange.upstream = exchange.upstream or target.upstream.name
            try:
                if self._call.conversation is not None:
                    await self._call.conversation.place(way)
                envelope = self._body().copy()
                work = partial(way.spoken.check, envelope, way.asked, self._route, target.upstream)
                await aside(work, envelope.size)
            except ProxyError as error:
                first = first or error
                self._order.leave_out()
                continue
            exchange.upstream = target.upstream.name
            return way.asked
        raise first or errors.upstream_unavailable(0.0)

    async def run(self) -> Outcome:
        """Ask, and relay what comes; the outcome."""
        position = 0
        last: _Again | None = None
        while True:
            try:
                return await self._attempt(self._order.targets[position])
            except _Again as again:
                last = again
            except ProxyError as error:
                if self._ask is not None and self._ask.sent:
                    raise
                if last is None and error.code != "unsupported_parameter":
                    raise
                # This one cannot even be asked for it: what the one before has said stands.
                last = _Again(error if last is None else last.error, sent=False, retry_after=0.0)
            self._left -= last.sent
            following = self._following(position, last)
            if following is None:
                raise last.error
            position, wait = following
            if wait:
                self._call.watch.enter("none", 0)
                await _no_less(wait)

    def _following(self, position: int, again: _Again) -> tuple[int, float] | None:
        """Who is tried next, and after how many seconds; None: nobody."""
        if self._left < 0:
            return None
        now = time.monotonic()
        if again.sent:
            self._not_before[position] = now + again.retry_after
        waits = [
            max(self._standings.of(each.upstream).wait(now), self._not_before.get(at, now) - now)
            for at, each in enumerate(self._order.targets)
        ]
        for ahead in range(position + 1, len(waits)):
            if waits[ahead] == 0.0:
                self._order.reach(ahead, lambda at: waits[at] == 0.0)
                return ahead, 0.0
        # All were tried: once more from the first on, after a while; not for ever, though those
        # that are full cost no attempt.
        ready = [at for at, wait in enumerate(waits) if wait <= MOST_WAIT]
        if not ready or self._rounds >= self._call.snapshot.config.retries:
            return None
        best = min(ready, key=lambda at: waits[at])
        if not again.sent and (best == position or not self._call.exchange.attempts):
            return None  # it is full, and will be
        most = min(MOST_BACKOFF, BACKOFF * 2.0**self._rounds)
        self._rounds += 1
        wait = random.uniform(0.0, most)  # noqa: S311 - so that clients do not come together again
        return best, max(wait, waits[best])

    # -- one attempt

    def _body(self) -> Envelope:
        if self._envelope is None:
            raise RuntimeError("nothing can be tried again any more")
        return self._envelope

    def _way(self, target: Target) -> Way:
        asked = replace(self._asked, own={}, dropped=[])
        return Way(asked, target, spoken(self._dialect, target.upstream))

    async def _attempt(self, target: Target) -> Outcome:
        call = self._call
        way = self._way(target)
        self._ask = self._relay = None
        try:
            envelope = await self._prepared(way)
            ask = await self._send(way, envelope)
            del envelope  # a stream may last for hours; its request's body need not
            with ask as answer:
                if not self._more:
                    self._settle()
                if way.asked.stream:
                    return await self._relay_stream(answer, way)
                return await self._relay_json(answer, way)
        except ProxyError as error:
            failed = self._judged(error)
        if not isinstance(failed, _Again):
            self._release()
        elif way.asked.stream:  # another reader, which has not seen the end of this one
            call.stream = way.spoken.stream(self._way(target).asked)
        raise failed

    def _release(self) -> None:
        """What was held of a stream stands: its end is told after it."""
        if self._relay is not None:
            self._relay.release()

    async def _prepared(self, way: Way) -> Envelope:
        """The body for this target."""
        call, envelope = self._call, self._body().copy()
        if call.conversation is not None:
            await call.conversation.place(way)
        work = partial(way.spoken.adapt, envelope, way.asked, self._route)
        await aside(work, envelope.size)
        rename(way, envelope)
        if way.asked.stream and call.stream is None:  # a heartbeat is owed an end, too
            call.stream = way.spoken.stream(way.asked)
            call.watch.heartbeat(call.snapshot.config.streams.keepalive, call.beat)
        if call.conversation is not None:
            await call.conversation.prepare(way, envelope)
        return envelope

    async def _send_once(self, way: Way, envelope: Envelope) -> Ask:
        call, upstream = self._call, way.target.upstream
        client, standing = call.snapshot.clients[upstream.name], self._standings.of(upstream)
        self._ask = Ask(client, standing, call.exchange, call.watch, shape=call.shape)
        return await send(call, way, envelope, self._ask, again=self._route.retry_unsafe)

    async def _send(self, way: Way, envelope: Envelope) -> Ask:
        """Send the request; once more where it was refused for what we have added."""
        call = self._call
        try:
            return await self._send_once(way, envelope)
        except ProxyError as error:
            conversation = call.conversation
            if conversation is None or not conversation.asks_again(error, envelope):
                raise
        ask = await self._send_once(way, envelope)
        conversation.refused_for_reasoning()
        return ask

    @property
    def _more(self) -> bool:
        """Whether another attempt may follow this one."""
        return self._left > 0

    def _settle(self) -> None:
        """No other attempt follows: what one would need is given back."""
        call = self._call
        self._envelope = self._asked.envelope = None
        self._left = 0
        call.hold.release(0 if call.conversation is None else call.conversation.holding)

    def _judged(self, error: ProxyError) -> ProxyError | _Again:
        """What a failure comes to: the end, or another attempt."""
        ask = self._ask
        if ask is None or self._call.told or self._envelope is None:
            return error
        began = self._relay is not None and self._relay.began
        unsafe = self._route.retry_unsafe and ask.result in _UNSAFE and not began
        if error.declared or not ask.acted or unsafe:
            self._acted = self._acted or ask.acted
            if not self._acted:
                self._call.exchange.asked = 0.0  # nothing was done that could be charged
            return _Again(error, sent=ask.sent, retry_after=ask.retry_after)
        return error

    async def _relay_json(self, answer: Ask, way: Way) -> Outcome:
        call = self._call
        if answer.media_type not in ("application/json", ""):
            raise answer.not_an_answer("The upstream's answer is not JSON.")
        call.exchange.answered = time.monotonic()
        body = await answer.read()
        call.answer = await aside(partial(way.spoken.answer, body, way.asked), len(body))
        if call.answer.outcome == "failed" and self._more and not _made(call.answer):
            raise errors.declared_failure("The upstream's answer has failed.")
        self._settle()
        if call.answer.produced is not None:
            await call.keep(call.answer.produced)
        call.send_json(200, call.answer.body, answer.passed_on())
        if call.kept is not None:
            call.kept.answer(call.answer.body, streamed=False)
        if call.reply.blocked:
            call.await_client()
            await call.reply.drain()
        return call.answer.outcome

    async def _relay_stream(self, answer: Ask, way: Way) -> Outcome:
        call = self._call
        if answer.media_type != "text/event-stream":
            raise answer.not_an_answer("The upstream's answer is not a stream of events.")
        stream = call.stream = way.spoken.stream(way.asked)
        call.exchange.answered = time.monotonic()
        held = self._settle if self._more else None
        if held is None and not call.reply.started:
            call.start_stream(answer.passed_on())
        idle = way.target.upstream.timeouts.idle
        self._relay = Relay(call, stream, answer, idle, held)
        await self._relay.run()
        call.reply.end()
        return stream.outcome


async def _no_less(seconds: float) -> None:
    """Sleep so long: the timers of the event loop are of whole milliseconds, and may be early."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0.0:  # noqa: ASYNC110 - time alone is waited for
        await asyncio.sleep(left)


def _made(answer: Answer) -> bool:
    """Whether there is any output, which would be paid for."""
    if answer.usage is not None and answer.usage.total_output > 0:
        return True
    return bool(value_of((members_of(answer.body) or {}).get("output")))


async def send(call: Call, way: Way, envelope: Envelope, ask: Ask, *, again: bool = False) -> Ask:
    """Send a request to its target.

    Args:
        call: the request.
        way: to the target.
        envelope: what is sent.
        ask: the attempt.
        again: whether the client may try again after a silence.

    Raises:
        ProxyError: no answer, or a refusal.
    """
    asked, target, dialect = way
    client = call.snapshot.clients[target.upstream.name]
    recalled = 0 if call.conversation is None else call.conversation.recalled
    body = await aside(
        partial(dialect.encode, envelope, asked, target.upstream),
        envelope.size + recalled if dialect.translates else 0,
    )
    call.begin_attempt(way)  # not before: one that cannot be asked for it says nothing
    beta = call.request.query.get("beta") if call.shape == "anthropic" else None
    head = client.request_head(
        dialect.api,
        client.target(dialect.path, () if beta is None else (("beta", beta),)),
        call.request.headers.items(),
        request_id=call.exchange.request_id,
        size=len(body),
        trace=call.exchange.trace,
    )
    try:
        return await call.watch.attempt(ask.send(head, body))
    except Late as late:
        if ask.result == "connect":
            raise errors.upstream_error("The upstream could not be connected to in time.") from None
        raise errors.upstream_timeout(late.phase, again=again) from None
