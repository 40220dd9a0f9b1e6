"""A turn: what was asked and answered once, and what its row says of it.

Items are JSON as it came: what is kept is what was sent, byte for byte.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

ROW = 512  # bytes that a turn counts besides its content: its row, its ids, its place in indexes
ITEM = 128  # the same of an item with an id

LoadResult = Literal["hit", "missing", "foreign", "expired"]


class StoreError(Exception):
    """The store cannot be read or written; the message says why, to the operator."""


class NoRoomError(StoreError):
    """A turn does not fit, even if all that may be evicted for it were."""


class NotErasedError(StoreError):
    """A turn is deleted, but what was written of it is still on the disk; all else works."""


class Item(NamedTuple):
    """An item of a turn that has an id."""

    id: str
    output: bool  # it is of the output, else of the input
    position: int
    size: int  # bytes
    weight: int  # bytes of text, its media as the text of as many tokens


class Content(NamedTuple):
    """What a turn holds: two JSON arrays of items, and the response object around the second."""

    input: bytes
    output: bytes
    before: bytes
    after: bytes

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return len(self.input) + len(self.output) + len(self.before) + len(self.after)

    @property
    def response(self) -> bytes:
        """The response object."""
        return self.before + self.output + self.after


NOTHING = Content(b"[]", b"[]", b"", b"")


class Delta(NamedTuple):
    """What a turn adds to its parent, as it is replayed."""

    upstream: str
    input: bytes
    output: bytes
    reasons: bool = True  # there may be reasoning in it


@dataclass(frozen=True, slots=True)
class Head:
    """A kept turn without its content.

    Attributes:
        key, root, parent: of its row, of its conversation's first, of the one that it goes on from.
        owner: the name of the client key in the configuration.
        depth: turns from the root to it.
        size: bytes of the items of these.
        tokens: that it used in all, its whole input and its output; None: not known.
        created: seconds since the epoch.
        model: as the client wrote it; empty: as the upstream calls it, which holds the turn.
        upstream: that made it.
        held: its content is here; else at the upstream that made it.
        whole: all turns before it are there.
    """

    id: str
    key: int
    root: int
    parent: int | None
    owner: str
    depth: int
    size: int
    tokens: int | None
    created: int
    model: str
    upstream: str
    held: bool
    whole: bool


class Loaded(NamedTuple):
    """What a look-up found."""

    result: LoadResult
    head: Head | None = None  # of a hit


class Found(NamedTuple):
    """Where an item is kept."""

    id: str
    turn: int
    root: int
    output: bool
    position: int
    size: int
    weight: int
    upstream: str
    held: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """A whole turn, to be kept. See `Head` and `Delta` for what the names mean."""

    id: str
    owner: str
    parent: Head | None
    created: int
    model: str
    upstream: str
    tokens: int | None
    held: bool = True
    content: Content = NOTHING
    items: Sequence[Item] = field(default=())
    reasons: bool = True

    @property
    def depth(self) -> int:
        """Turns from the root to it."""
        return 1 if self.parent is None else self.parent.depth + 1

    @property
    def path_size(self) -> int:
        """Bytes of the items of these."""
        before = 0 if self.parent is None else self.parent.size
        return before + len(self.content.input) + len(self.content.output)

    @property
    def size(self) -> int:
        """Bytes that it counts in the store."""
        return ROW + self.content.size + ITEM * len(self.items)


_IDS_AT_ONCE = 64
_RANDOM = 24  # bytes: 192 bits, and 32 characters without padding
_id_block: list[str] = []


def new_response_id() -> str:
    """A fresh id of a response. Randomness is drawn in blocks: a system call for each is felt."""
    if not _id_block:
        block = base64.urlsafe_b64encode(os.urandom(_RANDOM * _IDS_AT_ONCE)).decode("ascii")
        length = _RANDOM * 4 // 3
        _id_block.extend(block[at : at + length] for at in range(0, len(block), length))
    return f"resp_{_id_block.pop()}"
