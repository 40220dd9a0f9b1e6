"""What answers lately showed, for those whose tokens are not known yet, or never will be.

Nothing here is exact, and nothing need be: what is estimated is said to be, and what was set aside
is settled with the real count.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from aiproxy.usage import BYTES_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Collection

    from aiproxy.prompt_size import Size

LARGEST = 16384  # output tokens at most, where neither the request nor its route says


class Estimate(NamedTuple):
    """The tokens of a request, before its answer."""

    input: int  # at least 1
    output: int  # what this key and route used lately, at most `largest`
    largest: int  # the largest possible output
    firm: bool  # whether that was declared, or is the route's maximum


class Pace:
    """Recent output tokens per second of each target, for answers whose end was not seen.

    An exponential average over answers: quick enough to follow a model's load, steady enough that
    one odd answer does not decide what the next caller is charged.
    """

    UNKNOWN = 30.0  # tokens per second of a target that has not answered yet
    _WEIGHT = 0.2
    _SHORTEST = 0.05  # seconds; a shorter answer says nothing about pace

    def __init__(self) -> None:
        self._rates: dict[tuple[str, str], float] = {}

    def observe(self, target: tuple[str, str], tokens: int, seconds: float) -> None:
        """One whole answer of `tokens` output tokens, `seconds` after its headers."""
        if tokens <= 0 or seconds < self._SHORTEST:
            return
        rate = tokens / seconds
        known = self._rates.get(target)
        self._rates[target] = rate if known is None else known + self._WEIGHT * (rate - known)

    def tokens(self, target: tuple[str, str], seconds: float) -> int:
        """What `target` makes in `seconds`."""
        return int(self._rates.get(target, self.UNKNOWN) * max(0.0, seconds))

    def keep(self, routes: Collection[str]) -> None:
        """Forget the targets of all other routes."""
        self._rates = {target: rate for target, rate in self._rates.items() if target[0] in routes}


class Density:
    """Recent input tokens per byte of each route's requests.

    One request moves it by a tenth at most, a small one by less: its names and punctuation say
    little about text. It stays within bounds, so that no client makes others' requests look free.
    """

    START = 1 / BYTES_PER_TOKEN
    LEAST, MOST = 1 / 16, 1.0
    _WEIGHT = 0.1
    _WHOLE = 4096  # bytes from which on a request has its full weight

    def __init__(self) -> None:
        self._ratios: dict[str, float] = {}

    def observe(self, route: str, size: int, tokens: int) -> None:
        """A request of `size` bytes of text had `tokens` tokens."""
        if size <= 0 or tokens <= 0:
            return
        ratio = min(max(tokens / size, self.LEAST), self.MOST)
        known = self._ratios.get(route, self.START)
        weight = self._WEIGHT * min(1.0, size / self._WHOLE)
        self._ratios[route] = known + weight * (ratio - known)

    def tokens(self, route: str, size: Size) -> int:
        """Input tokens of a request; at least 1."""
        return max(1, int(self._ratios.get(route, self.START) * size.text) + size.media)

    def keep(self, routes: Collection[str]) -> None:
        """Forget all other routes."""
        self._ratios = {route: ratio for route, ratio in self._ratios.items() if route in routes}


class Outputs:
    """Recent outputs of each key on each route: nine of ten were not larger than their p90."""

    MANY = 64  # answers that are remembered

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[deque[int], list[int]]] = {}

    def observe(self, key: str, route: str, tokens: int) -> None:
        """One answer of `tokens` output tokens."""
        known = self._known.get((key, route))
        if known is None:
            known = self._known[key, route] = deque(), []
        in_turn, in_order = known
        if len(in_turn) == self.MANY:
            del in_order[bisect_left(in_order, in_turn.popleft())]
        in_turn.append(tokens)
        insort(in_order, tokens)

    def p90(self, key: str, route: str) -> int | None:
        """The smallest output that nine of ten did not exceed; None before the first answer."""
        known = self._known.get((key, route))
        return None if known is None else known[1][-(-len(known[1]) * 9 // 10) - 1]

    def keep(self, keys: Collection[str], routes: Collection[str]) -> None:
        """Forget all other keys and routes."""
        self._known = {
            (key, route): known
            for (key, route), known in self._known.items()
            if key in keys and route in routes
        }


class NotReasoning:
    """Targets, by upstream and model, that have refused to encrypt reasoning: they have none."""

    MANY = 1024  # of a glob's models there may be any number: the oldest is forgotten

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], None] = {}

    def __contains__(self, target: tuple[str, str]) -> bool:
        return target in self._known

    def add(self, target: tuple[str, str]) -> None:
        """Remember one."""
        self._known[target] = None
        if len(self._known) > self.MANY:
            del self._known[next(iter(self._known))]

    def forget(self) -> None:
        """Another configuration: behind a name may be another server."""
        self._known.clear()


class Recent:
    """All of it. It lasts as long as the daemon; a reload forgets what is configured no more."""

    def __init__(self) -> None:
        self.pace = Pace()
        self.density = Density()
        self.outputs = Outputs()
        self.not_reasoning = NotReasoning()

    def keep(self, keys: Collection[str], routes: Collection[str]) -> None:
        """Forget all other keys and routes."""
        self.pace.keep(routes)
        self.density.keep(routes)
        self.not_reasoning.forget()
        self.outputs.keep(keys, routes)

    def estimate(
        self,
        key: str,
        route: str,
        size: Size,
        *,
        before: int = 0,
        declared: int | None,
        most: int | None,
        many: int,
    ) -> Estimate:
        """The tokens of a request.

        Args:
            key: whose it is.
            route: where it goes.
            size: of what reaches the model.
            before: tokens of the turns that it goes on from, if these are known.
            declared: the largest output that the client declared, all of its answers together.
            most: the route's.
            many: how many answers it asks for at once.
        """
        given = before + self.density.tokens(route, size)
        if declared is not None:
            largest, firm = declared, True
        else:
            largest, firm = (LARGEST if most is None else most) * many, most is not None
        usual = self.outputs.p90(key, route)
        return Estimate(given, largest if usual is None else min(usual, largest), largest, firm)
