"""One request from its first byte to its last: the sentence.

Authenticate by the headers alone, receive the body, choose the route, admit, ask its target, relay,
finish.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from aiproxy import account_objects, auth, errors, headers, routes
from aiproxy.aside import aside
from aiproxy.attempts import Attempts
from aiproxy.body import Buffered, receive
from aiproxy.call import Call
from aiproxy.conversation import Conversation
from aiproxy.dialects import bound_output
from aiproxy.envelope import Envelope
from aiproxy.errors import ProxyError
from aiproxy.exchange import Exchange
from aiproxy.limits import ONE_REQUEST, Demand, Refusal
from aiproxy.listener import LATE
from aiproxy.prompt_size import measure
from aiproxy.recent import LARGEST, Recent
from aiproxy.routes import Order
from aiproxy.watch import Interrupted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.web_request import BaseRequest
    from structlog.typing import FilteringBoundLogger

    from aiproxy.config import Key, Route, Target
    from aiproxy.dialects import Asked, Dialect
    from aiproxy.errors import Outcome, Shape
    from aiproxy.exchange import Endpoint, Recorder
    from aiproxy.limits import LimitStore
    from aiproxy.prompt_size import Size
    from aiproxy.reply import Reply
    from aiproxy.session_gate import SessionGate
    from aiproxy.snapshot import Snapshot
    from aiproxy.standing import Standings
    from aiproxy.tracing import Tracing


class Proxy:
    """All requests of one daemon.

    Attributes:
        snapshot: the configuration in force; a reload puts another.
        standings: how the upstreams are doing.
        live: the requests in flight.
        draining: connections are closed after their answer.
    """

    def __init__(  # noqa: PLR0917 - what a daemon has one of each
        self,
        snapshot: Snapshot,
        limits: LimitStore,
        sessions: SessionGate,
        recorder: Recorder,
        standings: Standings,
        log: FilteringBoundLogger,
        tracing: Tracing,
    ) -> None:
        self.snapshot = snapshot
        self._limits = limits
        self._sessions = sessions
        self._recorder = recorder
        self._log = log
        self._tracing = tracing
        self._buffered = Buffered(snapshot.config.max_buffered)
        self._recent = Recent()
        self.standings = standings
        self.live: set[Call] = set()
        self.draining = False

    def put(self, snapshot: Snapshot) -> None:
        """Requests that begin from now on are under this configuration."""
        self.snapshot = snapshot
        config = snapshot.config
        self._buffered.limit = config.max_buffered
        self.standings.configure(config)
        self._recent.keep(config.keys.keys(), {route.model for route in config.routes})

    @property
    def held(self) -> int:
        """Bytes of request bodies in memory."""
        return self._buffered.held

    def drain(self) -> None:
        """From now on connections are closed after their answers, also after those under way."""
        self.draining = True
        for call in self.live:
            if not call.reply.started:
                call.reply.keep_alive = False

    async def serve(
        self,
        request: BaseRequest,
        endpoint: Endpoint,
        shape: Shape,
        act: Callable[[Call], Awaitable[Outcome]],
    ) -> Reply:
        """Do `act` for a request, and end it properly, whatever happens."""
        call = self._begin(request, endpoint, shape)
        outcome: Outcome = "internal_error"
        try:
            async with call.watch:
                outcome = await act(call)
        except ProxyError as error:
            outcome = call.fail(error)
        except Interrupted as interrupted:
            outcome = call.interrupt(interrupted)
        except asyncio.CancelledError:
            outcome = call.left()
            raise
        except ConnectionError:
            outcome = call.left()
        except Exception as error:  # noqa: BLE001 - a bug of ours must end like everything else
            self._log.error("bug", request_id=call.exchange.request_id, exc_info=error)
            outcome = call.fail(errors.internal_error(call.exchange.request_id))
        finally:
            self._end(call, outcome)
        return call.reply

    def refuse(self, request: BaseRequest, error: ProxyError) -> Reply:
        """Answer what was not even a request."""
        call = self._begin(request, "none", shape_of(request.raw_path.partition("?")[0]))
        self._end(call, call.fail(error))
        return call.reply

    def turn_away(self, error: ProxyError) -> str:
        """Record a connection that is not served; the request id that it is told."""
        exchange = Exchange(
            request_id=headers.new_request_id(),
            endpoint="none",
            recorder=self._recorder,
            clock=time.monotonic,
            started=time.monotonic(),
            status=error.status,
            error_code=error.code or "",
        )
        exchange.finish(error.outcome)
        return exchange.request_id

    def _begin(self, request: BaseRequest, endpoint: Endpoint, shape: Shape) -> Call:
        call = Call(
            request,
            endpoint,
            shape,
            snapshot=self.snapshot,
            recorder=self._recorder,
            buffered=self._buffered,
            recent=self._recent,
            trace=self._tracing.begin(request),
        )
        if self.draining:
            call.reply.keep_alive = False
        self.live.add(call)
        return call

    def _end(self, call: Call, outcome: Outcome) -> None:
        try:
            call.finish(outcome)
        finally:
            self.live.discard(call)

    def authenticate(self, call: Call) -> Key:
        """Who is calling, by the headers alone."""
        if LATE in call.request:
            raise errors.shutting_down()
        received = call.request.headers
        secret = auth.presented(
            received.getall("Authorization", []), received.getall("x-api-key", [])
        )
        key = call.snapshot.keyring.authenticate(secret, datetime.now(UTC))
        call.exchange.key = key.name
        call.limits = self._limits.of(key.name)
        expected = received.get("Expect")
        if expected is not None and expected.strip().lower() != "100-continue":
            raise errors.unknown_expectation()
        return key

    async def relay(self, call: Call, dialect: Dialect) -> Outcome:
        """A POST to one of the relayed APIs."""
        key = self.authenticate(call)
        envelope, call.size = await self.receive(call)
        asked = call.asked = dialect.request(envelope)
        asked.clock = time.time
        if (kept := call.kept) is not None:
            kept.request(dialect.api, envelope)
        route = self.choose(call, asked, key)
        auth.permit(key, envelope)
        await self.restrict(route, envelope)
        conversation = None
        if dialect.api == "responses":
            conversation = call.conversation = Conversation(self._sessions, call, asked)
            await conversation.begin(envelope)
        order = self.order(call, route, dialect)
        attempts = Attempts(call, route, dialect, asked, envelope, order, self.standings)
        try:
            await self._admit(call, await attempts.place(), route, envelope, dialect)
        except BaseException:
            order.give_back()
            raise
        del envelope  # a stream may last for hours; its request's body need not
        return await attempts.run()

    async def receive(self, call: Call) -> tuple[Envelope, Size]:
        """The body, and how much of it reaches a model."""
        config = call.snapshot.config
        began = time.monotonic()
        if not call.request.content.is_eof():  # most bodies came with their head
            call.watch.enter("client_body", config.timeouts.client_body)
        body = await receive(call.request, call.hold, config.max_body)
        call.exchange.waited = time.monotonic() - began
        call.exchange.bytes_in = len(body)
        return await aside(lambda: (Envelope.parse(body), measure(body)), len(body))

    def choose(self, call: Call, asked: Asked, key: Key) -> Route:
        """The route of what is asked, if this key may use it."""
        if not asked.model:
            raise errors.missing_model()
        call.exchange.model = asked.model
        route = call.snapshot.router.choose(asked.model, key)
        call.exchange.route = route.model
        _check_output(route, asked)
        # A key that a reload has removed meanwhile keeps the limits that it began with, alone.
        if call.limits is None or self._limits.of(key.name) is not None:
            call.limits = self._limits.of(key.name, route.model)
        return route

    @staticmethod
    async def restrict(route: Route, envelope: Envelope) -> None:
        """Refuse what a route does not take.

        Raises:
            ProxyError: the body names an object of the upstream's account.
        """
        if route.account_objects == "refuse" and account_objects.marked(body := envelope.encode()):
            await aside(partial(account_objects.refuse, body), len(body))

    def order(self, call: Call, route: Route, dialect: Dialect, *, bridged: bool = True) -> Order:
        """Who is asked, in the order of trying; `bridged`: also over another API.

        Raises:
            ProxyError: nobody speaks what is asked for, or takes requests now.
        """
        conversation, now = call.conversation, time.monotonic()

        def wait(target: Target) -> float:
            return self.standings.of(target.upstream).wait(now)

        serving = routes.speaking(route, dialect.api, bridged=bridged)
        usable = [target for target in serving if wait(target) == 0.0]
        named = () if conversation is None else conversation.named
        holders = {each.upstream for each in named if not each.held}  # nobody else can go on
        waits = [wait(target) for target in serving if target.name in holders]
        if any(waits):
            raise errors.upstream_unavailable(max(waits))
        if not usable:
            raise errors.upstream_unavailable(min(map(wait, serving)))
        prefer = named[-1].upstream if named else None
        return Order(call.snapshot.router.balance, usable, prefer)

    async def _admit(
        self, call: Call, asked: Asked, route: Route, envelope: Envelope, dialect: Dialect
    ) -> None:
        """Take a slot, a request, and the tokens that it may come to."""
        size, limits, most = call.size, call.limits, route.max_output_tokens
        assert size is not None  # noqa: S101 - `relay` has set it
        before = 0
        if call.conversation is not None and call.conversation.goes_on:
            before = call.conversation.tokens(partial(self._recent.density.tokens, route.model))
            call.size = None  # it says nothing about the tokens of all that is sent
        declared = asked.declared
        whole = call.snapshot.config.limiter.reserve == "max"
        if whole and declared is None and limits is not None and limits.counts_tokens:
            each = max(1, (most or LARGEST) // asked.choices)
            bound_output(envelope, dialect.output_fields, each)
            declared = each * asked.choices
        estimate = call.estimate = self._recent.estimate(
            call.exchange.key,
            route.model,
            size,
            before=before,
            declared=declared,
            most=most,
            many=asked.choices,
        )
        if whole:
            demand = Demand(estimate.input, estimate.largest)
        else:
            demand = Demand(estimate.input, estimate.output, estimate.largest)
        await self.admit(call, demand)

    async def admit(self, call: Call, demand: Demand = ONE_REQUEST) -> None:
        """Take what a request needs of all that limits it.

        Raises:
            ProxyError: one of these limits refuses it; nothing was taken.
        """
        if call.limits is None:
            return
        held = await call.limits.admit(demand)
        if not isinstance(held, Refusal):
            call.held = held
        elif held.wait is None:
            raise errors.input_too_large(held.message)
        else:
            raise errors.rate_limit_exceeded(held.kind, held.message, held.wait)


def shape_of(path: str) -> Shape:
    """The shape of errors on a path."""
    messages = path == "/v1/messages" or path.startswith("/v1/messages/")
    return "anthropic" if messages else "openai"


def _check_output(route: Route, asked: Asked) -> None:
    most = route.max_output_tokens
    if most is not None and asked.declared is not None and asked.declared > most:
        raise errors.invalid_value(
            asked.declared_as, f"The largest output of this model here is {most} tokens."
        )
