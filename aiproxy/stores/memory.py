"""Levels of limits in this process; a reload and a restart keep them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aiproxy.errors import shown
from aiproxy.limits import Account, Clock, Combined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from aiproxy.config import Config
    from aiproxy.config import Limits as Configured
    from aiproxy.limits import Demand, Level, Refusal, Reservation, Saved

    Book = dict[str, Account]
    Levels = dict[str, dict[str, Saved]]  # keys or routes, then by name


class MemoryLimits:
    """See `LimitStore`.

    Args:
        read: a monotonic clock, ns.
    """

    def __init__(self, read: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = Clock(read)
        self._books: dict[str, Book] = {"keys": {}, "routes": {}}
        self._known: dict[tuple[str, str | None], _Limits | None] = {}

    def of(self, key: str, route: str | None = None) -> _Limits | None:
        """See `LimitStore`."""
        try:
            return self._known[key, route]
        except KeyError:
            pass
        accounts = [self._books["keys"].get(key)]
        if route is not None:
            accounts.append(self._books["routes"].get(route))
        found = [account for account in accounts if account is not None]
        limits = _Limits(Combined(found, self._clock)) if found else None
        self._known[key, route] = limits
        return limits

    def configure(self, config: Config) -> None:
        """Other limits. Levels stay; what has no limit any more is forgotten."""
        now = self._clock.now()
        default = config.keys_default.limits
        self._known = {}
        self._books = {
            "keys": _accounts(
                self._books["keys"],
                "key",
                {name: key.limits or default for name, key in config.keys.items()},
                now,
            ),
            "routes": _accounts(
                self._books["routes"],
                "route",
                # Of two routes of one name the first is the one in use.
                {route.model: route.limits for route in reversed(config.routes)},
                now,
            ),
        }

    def levels(self, book: str) -> dict[str, list[Level]]:
        """How each limit stands, of all `keys` or all `routes`, by name."""
        return dict(self.each(book))

    def each(self, book: str) -> Iterator[tuple[str, list[Level]]]:
        """The same, one by one, each as it is when it is asked for."""
        for name, account in self._books[book].items():
            yield name, account.levels(self._clock.now())

    def levels_of(self, book: str, name: str) -> list[Level]:
        """How the limits of one key or route stand; none if it has none."""
        account = self._books[book].get(name)
        return [] if account is None else account.levels(self._clock.now())

    def save(self) -> Levels:
        """All levels, at rest."""
        now = self._clock.now()
        return {
            book: {name: account.save(now) for name, account in accounts.items()}
            for book, accounts in self._books.items()
        }

    def restore(self, levels: Levels, age: int) -> None:
        """Take over levels that were saved `age` ns ago; to be followed by `configure`."""
        then = self._clock.now() - max(0, age)
        for book, kind in (("keys", "key"), ("routes", "route")):
            for name, saved in levels.get(book, {}).items():
                account = self._books[book][name] = Account(_owner(kind, name))
                account.restore(saved, then)

    @property
    def any(self) -> bool:
        """Whether there is a bucket at all."""
        return any(
            account.requests or account.tokens
            for accounts in self._books.values()
            for account in accounts.values()
        )

    @property
    def held(self) -> int:
        """Slots that are taken, of all keys and routes."""
        return sum(
            account.slots.held for accounts in self._books.values() for account in accounts.values()
        )


class _Limits:
    """See `limits.Limits`."""

    __slots__ = ("_combined", "counts_tokens", "levels")

    def __init__(self, combined: Combined) -> None:
        self._combined = combined
        self.counts_tokens = bool(combined.tokens)
        self.levels: Callable[[], Sequence[Level]] = combined.levels

    async def admit(self, demand: Demand) -> Reservation | Refusal:
        return self._combined.admit(demand)


def _owner(kind: str, name: str) -> str:
    return f"{kind} '{shown(name)}'"


def _accounts(
    known: Book, kind: str, configured: Mapping[str, Configured | None], now: int
) -> Book:
    accounts = {}
    for name, limits in configured.items():
        if limits is None or not (limits.concurrent or limits.requests or limits.tokens):
            continue
        account = known.get(name) or Account(_owner(kind, name))
        account.resize(limits, now)
        accounts[name] = account
    return accounts
