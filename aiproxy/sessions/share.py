"""Who holds how much, and who must give way: the fair share of a bounded store.

At its bound the owner that holds the most loses its least recently used conversation. So whoever
holds less than the bound divided by the number of owners loses nothing to another: the largest of n
shares of more than the bound is more than an n-th of it.
"""

from __future__ import annotations

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
    """What all owners hold, and what was removed."""

    by_owner: dict[str, Share] = field(default_factory=dict)
    removed: dict[Removal, int] = field(default_factory=lambda: dict.fromkeys(REMOVALS, 0))
    size: int = 0
    turns: int = 0

    def add(self, owner: str, size: int, turns: int = 1) -> None:
        """Count turns that were put."""
        share = self.by_owner.get(owner)
        if share is None:
            share = self.by_owner[owner] = Share()
        share.size += size
        share.turns += turns
        self.size += size
        self.turns += turns

    def remove(self, owner: str, size: int, reason: Removal | None, turns: int = 1) -> None:
        """Count turns that were removed; without a reason they were put once more."""
        self.add(owner, -size, -turns)
        if self.by_owner[owner].turns == 0:
            del self.by_owner[owner]
        if reason is not None:
            self.removed[reason] += turns

    def largest(self) -> str | None:
        """The owner that holds the most."""
        by_owner = self.by_owner
        return max(by_owner, key=lambda owner: by_owner[owner].size, default=None)

    def fits(self, owner: str, size: int, bound: int) -> bool:
        """Whether a conversation that grows to `size` bytes can stay when others have given way.

        Every other one of its owner can go, and of the other owners what they hold above it.
        """
        every = list(self.by_owner.items())  # at once: a thread may change them
        others = sum(min(share.size, size) for name, share in every if name != owner)
        return others + size <= bound

    def copy(self) -> Shares:
        """A copy that changes on its own."""
        return Shares(
            {name: Share(share.size, share.turns) for name, share in self.by_owner.items()},
            dict(self.removed),
            self.size,
            self.turns,
        )
