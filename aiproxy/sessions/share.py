"""Who holds how much, and who must give way: the fair share of a bounded store.

At its bound the owner that holds the most loses its least recently used conversation. So whoever
holds less than the bound divided by the number of owners loses nothing to another: the largest of n
shares of more than the bound is more than an n-th of it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Literal

Removal = Literal["ttl", "size", "deleted"]
REMOVALS: tuple[Removal, ...] = ("ttl", "size", "deleted")


class Pins:
    """Conversations in which a turn is being made, by root: they are in use, and go last."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def __contains__(self, root: int) -> bool:
        return root in self._counts

    def add(self, root: int) -> None:
        """A turn is being made."""
        self._counts[root] = self._counts.get(root, 0) + 1

    def remove(self, root: int) -> None:
        """It has ended."""
        left = self._counts.get(root, 0) - 1
        if left > 0:
            self._counts[root] = left
        else:
            self._counts.pop(root, None)


@dataclass(slots=True)
class Share:
    """What one owner holds."""

    size: int = 0
    turns: int = 0


@dataclass(slots=True)
class Shares:
    """What all owners hold, and what was removed. No question looks at all owners."""

    by_owner: dict[str, Share] = field(default_factory=dict)
    removed: dict[Removal, int] = field(default_factory=lambda: dict.fromkeys(REMOVALS, 0))
    size: int = 0
    turns: int = 0
    _order: list[tuple[int, str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Order the owners: the largest is the last."""
        self._order = sorted((share.size, owner) for owner, share in self.by_owner.items())

    def add(self, owner: str, size: int, turns: int = 1) -> None:
        """Count turns that were put.

        Nobody holds less than nothing: what is removed may have been put by another process, and
        not be counted here yet.
        """
        share = self.by_owner.get(owner)
        if share is None:
            share = self.by_owner[owner] = Share()
        else:
            self._take_out(owner, share)
        size, turns = max(size, -share.size), max(turns, -share.turns)
        share.size += size
        share.turns += turns
        self.size += size
        self.turns += turns
        if share.turns:
            insort(self._order, (share.size, owner))
        else:
            del self.by_owner[owner]

    def remove(self, owner: str, size: int, reason: Removal | None, turns: int = 1) -> None:
        """Count turns that were removed; without a reason they were put once more."""
        self.add(owner, -size, -turns)
        if reason is not None:
            self.removed[reason] += turns

    def restore(self, owner: str, size: int, reason: Removal | None, turns: int = 1) -> None:
        """Take back what `remove` was told."""
        self.add(owner, size, turns)
        if reason is not None:
            self.removed[reason] -= turns

    def _take_out(self, owner: str, share: Share) -> None:
        del self._order[bisect_left(self._order, (share.size, owner))]

    def largest(self) -> str | None:
        """The owner that holds the most."""
        return self._order[-1][1] if self._order else None

    def fits(self, owner: str, size: int, bound: int) -> bool:
        """Whether a conversation that grows to `size` bytes can stay when others have given way.

        Every other one of its owner can go, and of the other owners what they hold above it.
        """
        share = self.by_owner.get(owner)
        over = self.size - (0 if share is None else share.size) + size - bound
        for held, name in reversed(self._order):
            if over <= 0 or held <= size:
                break
            if name != owner:
                over -= held - size
        return over <= 0
