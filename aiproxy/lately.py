"""What the status page remembers: counts by name, first tokens, today's tokens, the last failures.

Names are those of the configuration, so that what is kept is bounded by it, whatever callers send.
All else (no valid key, no such route, a name that a reload has removed) is counted as one.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from aiproxy.errors import SHOWN, shown
from aiproxy.tallies import FAILED, OURS, KeyTally, RouteTally, UpstreamTally, tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiproxy.config import Config
    from aiproxy.exchange import Exchange

FAILURES = 20  # that are shown
_PROVOKED_PLACES = 5  # of these, where callers provoke failures beside others

_DAY = 86400  # seconds


class Failure(NamedTuple):
    """A request that failed; its strings are safe to show."""

    at: float  # when it ended, seconds since the epoch
    request_id: str
    endpoint: str
    key: str
    route: str
    upstream: str
    outcome: str
    error_code: str
    status: int
    duration: float  # seconds


class Lately:
    """A recorder, see `exchange.Recorder`. It lasts as long as the daemon.

    Args:
        wall: a clock of seconds since the epoch; days are those of UTC.
        monotonic: the clock of exchanges, seconds.

    Attributes:
        upstreams, routes, keys: what is counted, by their names.
        since: from when on today is counted: midnight, or the start.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall, self._monotonic = wall, monotonic
        self.upstreams: dict[str, UpstreamTally] = {}
        self.routes: dict[str, RouteTally] = {}
        self.keys: dict[str, KeyTally] = {}
        # Of all whose name is not known.
        self._no_upstream, self._no_route, self._no_key = (
            UpstreamTally(""),
            RouteTally(),
            KeyTally(),
        )
        self._before: Counter[str] = Counter()  # tokens that are in no tally any more
        # The fields of failures, after the moment by which they are put in order.
        self._ours: deque[tuple[Any, ...]] = deque(maxlen=FAILURES)
        self._provoked: deque[tuple[Any, ...]] = deque(maxlen=FAILURES)
        self._day = -1.0  # its begin, on the wall clock
        self._turns = 0.0  # its end, on the monotonic one, as far as is known
        self.turn()
        self.since = wall()

    def configure(self, config: Config) -> None:
        """Other names: what is not configured is forgotten; an upstream elsewhere is another."""
        upstreams = {}
        for name, upstream in config.upstreams.items():
            known = self.upstreams.get(name)
            if known is None or known.url != upstream.url:
                known = UpstreamTally(upstream.url)
            upstreams[name] = known
        self.upstreams = upstreams
        routes = {each.model: self.routes.get(each.model) or RouteTally() for each in config.routes}
        for name in self.routes.keys() - routes.keys():  # yet the totals never go back
            gone = self.routes[name]
            self._before.update(tokens(gone))
            for outcome, count in gone.outcomes.items():
                self._no_route.outcomes[outcome] += count
        self.routes = routes
        self.keys = {name: self.keys.get(name) or KeyTally() for name in config.keys}

    # -- what happens

    def begin(self, exchange: Exchange) -> None:
        """See `Recorder`: what is in flight is seen elsewhere."""

    def record(self, exchange: Exchange) -> None:  # noqa: C901 - a call costs more than a branch
        """See `Recorder`. On the way of every request, hence written for speed."""
        if exchange.ended >= self._turns:
            self.turn()
        outcome = exchange.outcome or "internal_error"
        route = self.routes.get(exchange.route, self._no_route)
        key = self.keys.get(exchange.key, self._no_key)
        route.outcomes[outcome] += 1
        key.requests += 1
        usage = exchange.usage
        if usage is not None:
            count = usage.input
            route.input += count
            key.input += count
            count = usage.output
            route.output += count
            key.output += count
            if count := usage.input_cached:
                route.input_cached += count
                key.input_cached += count
            if count := usage.output_reasoning:
                route.output_reasoning += count
                key.output_reasoning += count
        if exchange.results:
            upstreams, upstream = self.upstreams, self._no_upstream
            for asked, result in exchange.results:
                upstream = upstreams.get(asked, self._no_upstream)
                upstream.results[result] += 1
            if exchange.first_token:  # of the last one, which answered
                first = exchange.first_token - exchange.started
                route.firsts.append(first)
                upstream.firsts.append(first)
        if outcome != "completed":
            if exchange.limit:
                key.refused += 1
            elif outcome in FAILED:
                self._note(exchange, outcome)

    def _note(self, exchange: Exchange, outcome: str) -> None:
        kind = self._ours if outcome in OURS else self._provoked
        kind.append(
            (
                exchange.ended,
                self._wall(),
                exchange.request_id[:SHOWN],
                exchange.endpoint,
                exchange.key,
                exchange.route,
                exchange.upstream,
                outcome,
                exchange.error_code[:SHOWN],
                exchange.status,
                exchange.ended - exchange.started,
            )
        )

    def turn(self) -> None:
        """Begin another day, if it has come; the wall clock may also have been set."""
        now = self._wall()
        day = now // _DAY * _DAY
        self._turns = self._monotonic() + day + _DAY - now
        if day == self._day:
            return
        self._day = self.since = day
        for route in self._all_routes():
            self._before.update(tokens(route))
            route.clear()
        for key in (*self.keys.values(), self._no_key):
            key.clear()

    def _all_routes(self) -> Iterable[RouteTally]:
        return (*self.routes.values(), self._no_route)

    # -- what is known

    def requests(self) -> dict[str, int]:
        """Requests that ended since the start, by outcome."""
        found: dict[str, int] = defaultdict(int)
        for route in self._all_routes():
            for outcome, count in route.outcomes.items():
                found[outcome] += count
        return dict(sorted(found.items()))

    def tokens(self) -> dict[str, int]:
        """Tokens since the start, by type."""
        found = Counter(self._before)
        for route in self._all_routes():
            found.update(tokens(route))
        return dict(sorted(found.items()))

    def failures(self) -> list[Failure]:
        """The last ones, newest first."""
        provoked = min(len(self._provoked), max(_PROVOKED_PLACES, FAILURES - len(self._ours)))
        found = sorted(
            (
                *islice(reversed(self._ours), FAILURES - provoked),
                *islice(reversed(self._provoked), provoked),
            ),
            reverse=True,
        )
        failures = [Failure(*fields[1:]) for fields in found]
        return [
            each._replace(request_id=shown(each.request_id), error_code=shown(each.error_code))
            for each in failures
        ]
