"""How the upstreams are doing: who takes requests, who is full, who is left alone.

It outlasts the configurations: a reload changes the bounds, not what happened so far. Pure: the
caller brings the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiproxy.breaker import Breaker

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiproxy.breaker import Reason, State
    from aiproxy.config import Config, Upstream

    Told = Callable[[str, State, Reason, float], None]

FULL = 1.0  # seconds after which an upstream that is full may be worth another try


class Standing:
    """Of one upstream.

    Attributes:
        breaker: whether it is left alone.
        in_flight: attempts that are open.
    """

    def __init__(self, breaker: Breaker, most: int | None) -> None:
        self.breaker = breaker
        self.in_flight = 0
        self.most = most

    def wait(self, now: float) -> float:
        """Seconds until an attempt is worth it, as far as is known; 0: now."""
        if self.breaker.state == "half-open":  # its one probe is under way
            return max(FULL, self.breaker.wait(now))
        if (left := self.breaker.wait(now)) > 0:
            return left
        return FULL if self._full else 0.0

    @property
    def _full(self) -> bool:
        return self.most is not None and self.in_flight >= self.most

    def enter(self, now: float) -> bool:
        """An attempt begins, if one may; `leave` ends it."""
        if self._full or not self.breaker.admits(now):
            return False
        self.in_flight += 1
        return True

    def leave(self) -> None:
        """An attempt has ended; how, the breaker is told."""
        self.in_flight -= 1


class Standings:
    """Of all upstreams of a daemon.

    Args:
        told: called when a breaker changes: upstream, state, why, seconds until the next probe.
    """

    def __init__(self, config: Config, told: Told) -> None:
        self._told = told
        self._known: dict[str, tuple[str, Standing]] = {}
        self.configure(config)

    def of(self, upstream: Upstream) -> Standing:
        """How an upstream is doing.

        One that a reload has removed, or put elsewhere, is judged by nobody any more: a request
        that began before goes there all the same.
        """
        url, standing = self._known.get(upstream.name, ("", None))
        if standing is not None and url == upstream.url:
            return standing
        return Standing(Breaker(1, 0.0, 0.0, lambda *_: None), upstream.max_concurrent)

    def configure(self, config: Config) -> None:
        """Take another configuration. An upstream at another address begins anew."""
        bounds = config.breaker
        found = {}
        for name, upstream in config.upstreams.items():
            url, standing = self._known.get(name, ("", None))
            if standing is None or url != upstream.url:
                if standing is not None and standing.breaker.state != "closed":
                    self._told(name, "closed", "", 0.0)
                standing = self._new(name, config)
            standing.most = upstream.max_concurrent
            standing.breaker.configure(bounds.failures, bounds.cooldown, bounds.max_cooldown)
            found[name] = (upstream.url, standing)
        self._known = found

    def _new(self, name: str, config: Config) -> Standing:
        bounds = config.breaker

        def told(state: State, reason: Reason, seconds: float) -> None:
            # Requests that began before a reload may end after it: of whom that one has put
            # another in the place nothing is told any more.
            if self._known.get(name, ("", None))[1] is standing:
                self._told(name, state, reason, seconds)

        breaker = Breaker(bounds.failures, bounds.cooldown, bounds.max_cooldown, told)
        standing = Standing(breaker, config.upstreams[name].max_concurrent)
        return standing
