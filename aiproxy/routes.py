"""Model name -> route -> targets in order of trying.

The first route that matches wins, in the order of the file. A glob knows `*` and `?`, over the
whole name, case-sensitive.
"""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING

from aiproxy import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aiproxy.config import Key, Route, Target


def glob(pattern: str) -> re.Pattern[str]:
    """A glob as a pattern for `fullmatch`.

    fnmatch makes one that never backtracks over an earlier `*`: the name is a caller's, and may be
    long. It knows `[` as well, which is an ordinary character here.
    """
    return re.compile(fnmatch.translate(pattern.replace("[", "[[]")))


def is_glob(pattern: str) -> bool:
    """Whether a model name is a glob."""
    return "*" in pattern or "?" in pattern


class _Names:
    """Names and globs that a model is looked up in."""

    def __init__(self, patterns: Iterable[str]) -> None:
        patterns = tuple(patterns)
        self._exact = frozenset(p for p in patterns if not is_glob(p))
        self._globs = tuple(glob(p) for p in patterns if is_glob(p))

    def match(self, name: str) -> bool:
        return name in self._exact or any(g.fullmatch(name) for g in self._globs)


class Router:
    """All routes of one configuration.

    Attributes:
        balance: whose turn it is among their targets.
    """

    def __init__(self, routes: Sequence[Route], keys: Iterable[Key]) -> None:
        self._exact: dict[str, tuple[int, Route]] = {}
        globs: list[tuple[int, re.Pattern[str], Route]] = []
        self._listed: list[tuple[str, Route]] = []
        for position, route in enumerate(routes):
            if is_glob(route.model):
                globs.append((position, glob(route.model), route))
                self._listed.extend((name, route) for name in route.listed)
            else:
                self._exact.setdefault(route.model, (position, route))
                self._listed.append((route.model, route))
        self._globs = tuple(globs)
        self.balance = Balance()
        self._allowed = {key.name: _Names(key.models) for key in keys if key.models is not None}

    def choose(self, model: str, key: Key) -> Route:
        """The route of a model name as the client wrote it.

        Raises:
            ProxyError: no route, or none that this key may use.
        """
        allowed = self._allowed.get(key.name)
        route = self._find(model)
        if route is None or (allowed is not None and not allowed.match(model)):
            raise errors.model_not_found(model)
        return route

    def _find(self, model: str) -> Route | None:
        exact = self._exact.get(model)
        for position, pattern, route in self._globs:
            if exact is not None and exact[0] < position:
                break
            if pattern.fullmatch(model):
                return route
        return None if exact is None else exact[1]

    def listed(self, key: Key) -> list[str]:
        """The names to show to this key: exact routes, and what globs list; each once."""
        allowed = self._allowed.get(key.name)
        names = dict.fromkeys(
            name
            for name, route in self._listed
            if (allowed is None or allowed.match(name)) and self._find(name) is route
        )
        return list(names)


_BRIDGED = frozenset({"responses", "chat", "messages"})  # what /v1/responses can be served by


class Balance:
    """Whose turn it is among the targets of a tier: smooth weighted round robin, as in nginx.

    Each target gains its weight at every choice, and the one that is chosen loses all that was
    gained: so each gets its share, spread as evenly as it can be.
    """

    def __init__(self) -> None:
        self._gained: dict[int, int] = {}  # by the target's identity: routes may name alike

    def in_turn(self, tier: Sequence[Target]) -> list[Target]:
        """Those of a tier, the one whose turn it is first, then who waits longest."""
        if len(tier) == 1:
            return list(tier)
        gained = self._gained
        for target in tier:
            gained[id(target)] = gained.get(id(target), 0) + target.weight
        in_order = sorted(tier, key=lambda target: -gained[id(target)])
        gained[id(in_order[0])] -= sum(target.weight for target in tier)
        return in_order

    def give_back(self, in_order: Sequence[Target]) -> None:
        """The turn that was taken with this order is taken back."""
        if len(in_order) <= 1:
            return
        for target in in_order:
            self._gained[id(target)] -= target.weight
        self._gained[id(in_order[0])] += sum(target.weight for target in in_order)


class Order:
    """The targets of one request, in the order in which they are tried.

    Whose turn it is in a tier is decided when the request comes to that tier, so that nobody's is
    used up unasked; and a request that stays with its conversation takes no turn.

    Args:
        balance: whose turn it is.
        usable: the targets that take requests now.
        prefer: the upstream that a conversation is with, where the route has it.
    """

    def __init__(self, balance: Balance, usable: Iterable[Target], prefer: str | None) -> None:
        self._balance = balance
        self._prefer = prefer
        self._reached: dict[int, list[Target]] = {}  # tiers, each in the order of its turn
        # Stable: all else stays as it is in the file.
        self.targets = sorted(usable, key=lambda target: (target.name != prefer, target.tier))

    def reach(self, position: int, ready: Callable[[int], bool] = lambda _: True) -> Target:
        """Who is tried at a position; `ready`: whether those after it, by position, could be."""
        first = self.targets[position]
        if first.tier not in self._reached and first.name != self._prefer:
            places = [
                place
                for place in range(position, len(self.targets))
                if self.targets[place].tier == first.tier and ready(place)
            ]
            turn = self._balance.in_turn([self.targets[place] for place in places])
            self._reached[first.tier] = turn
            for place, target in zip(places, turn, strict=True):
                self.targets[place] = target
        return self.targets[position]

    def leave_out(self) -> None:
        """The first of them cannot be asked for this: the turn is another's."""
        tier = self.targets.pop(0).tier
        self._balance.give_back(self._reached.pop(tier, ()))

    def give_back(self) -> None:
        """Nobody was asked: the turns that were taken are others'."""
        for turn in self._reached.values():
            self._balance.give_back(turn)
        self._reached.clear()


def speaking(route: Route, api: str, *, bridged: bool = True) -> list[Target]:
    """The targets that serve what is asked for; `bridged`: also over another API.

    Raises:
        ProxyError: none of them speaks it, or what it can be bridged to.
    """
    served_by = _BRIDGED if api == "responses" and bridged else {api}
    found = [target for target in route.targets if served_by & target.upstream.apis]
    if not found:
        raise errors.unsupported_parameter(
            "model", f"The model `{errors.shown(route.model)}` is not served on this endpoint."
        )
    return found
