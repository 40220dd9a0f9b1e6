"""Conversations: turns that go on from each other, kept for the key that made them.

A turn is kept as what it adds to its parent, so a conversation is a tree and a path of it is what
a request replays. What a request must know before it is admitted (whose, how deep, how large) is in
a turn's row; content is read afterwards. Where turns are kept is a `SessionStore`'s business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from aiproxy.sessions.share import REMOVALS, Pins, Removal, Share, Shares
from aiproxy.sessions.turn import (
    ITEM,
    NOTHING,
    ROW,
    Content,
    Delta,
    Found,
    Head,
    Item,
    Loaded,
    LoadResult,
    NoRoomError,
    NotErasedError,
    StoreError,
    Turn,
    new_response_id,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "ITEM",
    "NOTHING",
    "REMOVALS",
    "ROW",
    "Content",
    "Delta",
    "Found",
    "Head",
    "Item",
    "LoadResult",
    "Loaded",
    "NoRoomError",
    "NotErasedError",
    "Pins",
    "Removal",
    "SessionStore",
    "Share",
    "Shares",
    "StoreError",
    "Turn",
    "new_response_id",
]


class SessionStore(Protocol):
    """Where turns are kept.

    A turn that `put` has returned from is found by whoever asks next, and after a crash too if the
    store is a durable one. Every method that awaits raises StoreError when the store cannot be read
    or written, within a bounded time.

    Attributes:
        name: the label of its metrics.
        pins: conversations that are in use, by root. They do not expire, and give way last.
    """

    name: str
    pins: Pins

    @property
    def shares(self) -> Shares:
        """What it holds, and what it has removed since it was opened; to be read only."""

    def open(self) -> None:
        """Begin; may block.

        Raises:
            StoreError: it cannot be used; the message names it, and says why.
        """

    def configure(self, *, ttl: float, max_bytes: int) -> None:
        """Other bounds: seconds that an unused conversation is kept (0: for ever), and bytes."""

    def watch(self, told: Callable[[str, BaseException | None], None]) -> None:
        """Have the outcome told of what nobody waits for: the operation, and the error if any."""

    async def load(self, owner: str, response_id: str) -> Loaded:
        """Look for a turn, without its content: one indexed read. For every verb."""

    async def find(self, owner: str, item_ids: Sequence[str]) -> Mapping[str, Found]:
        """Look for items by their ids; of turns with the same item the latest counts."""

    async def path(self, head: Head) -> Sequence[Delta] | None:
        """The turns from the root to this one, in order, and renew their conversation.

        None: one of them has been deleted.
        """

    async def content(self, head: Head) -> Content | None:
        """The content of one turn; None: it has been deleted."""

    async def items(self, owner: str, found: Sequence[Found]) -> Sequence[bytes] | None:
        """The items themselves, and renew their conversations; None: one has been deleted."""

    async def put(self, turn: Turn) -> None:
        """Keep a turn, and renew its conversation.

        Raises:
            NoRoomError: it does not fit, even if all that may be evicted were; or its conversation
                had to give way.
        """

    async def delete(self, head: Head) -> bool:
        """Remove a turn and its content, also from the disk. False: it was gone already.

        Raises:
            NotErasedError: nobody finds it any more, but content is left on the disk. Until it is
                not, and somebody was told so, `load` still finds the turn, without content.
        """

    async def check(self) -> None:
        """Return when a turn could be kept now."""

    def tend(self, *, prove: bool = False) -> None:
        """Do a small step of what is due: expiry, eviction. Called now and then; never blocks.

        `prove`: find out, too, whether a turn could be kept.
        """

    async def close(self) -> None:
        """Write what waits, and release the store."""
