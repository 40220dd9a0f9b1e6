"""Conversations in this process; a restart forgets them. What is stored never exceeds its bound.

A bound that is lowered is come to step by step, while turns are put and nothing grows.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

from aiproxy.aside import aside
from aiproxy.sessions import Delta, Found, Head, Loaded, NoRoomError, Pins, Shares
from aiproxy.sessions.items import picked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiproxy.sessions import Content, Item, Removal, Turn

STEP = 256  # turns that go at a time: the event loop waits for them
PAUSE = 0.002  # seconds between such steps while there are more


class _Record:
    """A turn, and where it stands."""

    __slots__ = ("content", "conversation", "head", "items", "parent", "reasons", "size")

    def __init__(
        self, turn: Turn, head: Head, parent: _Record | None, conversation: _Conversation
    ) -> None:
        self.head = head
        self.parent = parent
        self.conversation = conversation
        self.content: Content = turn.content
        self.items: Sequence[Item] = turn.items
        self.size = turn.size
        self.reasons = turn.reasons


class _Conversation:
    """All turns with one root."""

    __slots__ = ("owner", "root", "size", "turns", "used")

    def __init__(self, owner: str, root: int) -> None:
        self.owner = owner
        self.root = root
        self.size = 0
        self.used = 0.0
        self.turns: dict[int, _Record] = {}


class MemorySessions:
    """See `SessionStore`.

    Args:
        read: a clock, seconds.
    """

    name = "memory"

    def __init__(self, read: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._ttl = 0.0
        self._max_bytes = 0
        self.shares = Shares()
        self.pins = Pins()
        self._last_key = 0
        self._emptied: list[_Conversation] = []  # in use without a turn
        self._ids: dict[str, dict[str, _Record]] = {}  # response id, owner
        # By owner and item id, of each turn by its key, in the order in which they were put.
        self._items: dict[tuple[str, str], dict[int, tuple[_Record, Item]]] = {}
        # Of each owner by root, the least recently used first.
        self._conversations: dict[str, OrderedDict[int, _Conversation]] = {}
        self._by_use: OrderedDict[int, _Conversation] = OrderedDict()  # of all, by root
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """See `SessionStore`."""

    def configure(self, *, ttl: float, max_bytes: int) -> None:
        """See `SessionStore`."""
        self._ttl, self._max_bytes = ttl, max_bytes
        if self.shares.size > max_bytes:
            self._step()

    def watch(self, told: Callable[[str, BaseException | None], None]) -> None:
        """See `SessionStore`. Nothing fails here."""

    async def load(self, owner: str, response_id: str) -> Loaded:
        """See `SessionStore`."""
        owners = self._ids.get(response_id)
        if owners is None:
            return Loaded("missing")
        record = owners.get(owner)
        if record is None:
            return Loaded("foreign")
        if self._expired(record.conversation):
            return Loaded("expired")
        return Loaded("hit", record.head)

    async def find(self, owner: str, item_ids: Sequence[str]) -> dict[str, Found]:
        """See `SessionStore`."""
        found = {}
        for item_id in item_ids:
            for record, item in reversed(self._items.get((owner, item_id), {}).values()):
                if not self._expired(record.conversation):
                    head = record.head
                    found[item_id] = Found(
                        item_id, head.key, head.root, item.output, item.position, item.size,
                        item.weight, head.upstream, head.held,
                    )  # fmt: skip
                    break
        return found

    async def path(self, head: Head) -> list[Delta] | None:
        """See `SessionStore`."""
        record = self._record(head.owner, head.root, head.key)
        if record is None or not record.head.whole:
            return None
        self._renew(record.conversation)
        found = []
        while record is not None:
            content = record.content
            found.append(Delta(record.head.upstream, content.input, content.output, record.reasons))
            record = record.parent
        found.reverse()
        return found

    async def content(self, head: Head) -> Content | None:
        """See `SessionStore`."""
        record = self._record(head.owner, head.root, head.key)
        return None if record is None else record.content

    async def items(self, owner: str, found: Sequence[Found]) -> list[bytes] | None:
        """See `SessionStore`."""
        arrays: dict[tuple[int, bool], bytes] = {}
        for each in found:
            record = self._record(owner, each.root, each.turn)
            if record is None:
                return None
            self._renew(record.conversation)
            content = record.content
            arrays[each.turn, each.output] = content.output if each.output else content.input
        return await aside(lambda: picked(arrays, found), sum(map(len, arrays.values())))

    async def put(self, turn: Turn) -> None:
        """See `SessionStore`."""
        parent, pins = turn.parent, self.pins
        self._check_room(turn)
        if parent is None:
            await self._clear(turn)
        else:
            pins.add(parent.root)
            try:
                await self._clear(turn)
            finally:
                pins.remove(parent.root)
        self._last_key += 1
        key = self._last_key
        root = key if parent is None else parent.root
        before = None if parent is None else self._record(turn.owner, root, parent.key)
        conversations = self._conversations.setdefault(turn.owner, OrderedDict())
        conversation = conversations.get(root)
        if conversation is None:
            conversation = conversations[root] = _Conversation(turn.owner, root)
            self._by_use[root] = conversation
        head = Head(
            turn.id, key, root, None if parent is None else parent.key, turn.owner, turn.depth,
            turn.path_size, turn.tokens, turn.created, turn.model, turn.upstream, turn.held,
            whole=parent is None or (before is not None and before.head.whole),
        )  # fmt: skip
        record = _Record(turn, head, before, conversation)
        self._renew(conversation)
        conversation.turns[key] = record
        conversation.size += record.size
        self.shares.add(turn.owner, record.size)
        self._ids.setdefault(turn.id, {})[turn.owner] = record
        for item in turn.items:
            self._items.setdefault((turn.owner, item.id), {})[key] = record, item

    async def _clear(self, turn: Turn) -> None:
        """Remove the turn that this one takes the place of, and what has to give way to it."""
        if (known := self._ids.get(turn.id, {}).get(turn.owner)) is not None:
            self._remove(known, None)
        before = self.shares.size
        while not self._make_room(max(self._max_bytes, before), turn):
            await asyncio.sleep(0)
            self._check_room(turn)

    def _check_room(self, turn: Turn) -> None:
        """Refuse a turn that cannot stay. Changes nothing."""
        size = turn.size
        if turn.parent is not None:
            conversations = self._conversations.get(turn.owner)
            conversation = None if conversations is None else conversations.get(turn.parent.root)
            if conversation is None:
                raise NoRoomError("its conversation had to give way")
            size += conversation.size
        shares, bound = self.shares, self._max_bytes
        if shares.size + turn.size > bound and not shares.fits(turn.owner, size, bound):
            raise NoRoomError("the conversation does not fit in sessions.max_bytes")

    async def delete(self, head: Head) -> bool:
        """See `SessionStore`."""
        record = self._record(head.owner, head.root, head.key)
        if record is None:
            return False
        self._remove(record, "deleted")
        return True

    async def check(self) -> None:
        """See `SessionStore`."""

    def tend(self, *, prove: bool = False) -> None:  # noqa: ARG002 - it always can
        """See `SessionStore`."""
        waiting, self._emptied = self._emptied, []
        for conversation in waiting:
            if conversation.root in self.pins:
                self._emptied.append(conversation)
            elif not conversation.turns:
                self._close_conversation(conversation)
        self._step()

    def _step(self) -> None:
        """Remove some of what has expired or must give way, and go on with the rest soon."""
        self._stop()
        due, left = [], STEP
        for conversation in self._by_use.values():
            if conversation.root in self.pins:
                continue
            if left <= 0 or not self._expired(conversation):
                break
            due.append(conversation)
            left -= max(1, len(conversation.turns))
        for conversation in due:
            self._drop(conversation, "ttl")
        if left > 0 and self._make_room(self._max_bytes, None, left):
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # `tend` will go on
            return
        self._timer = loop.call_later(PAUSE, self._step)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def close(self) -> None:
        """See `SessionStore`."""
        self._stop()

    # -- within

    def _record(self, owner: str, root: int, key: int) -> _Record | None:
        conversations = self._conversations.get(owner)
        conversation = None if conversations is None else conversations.get(root)
        return None if conversation is None else conversation.turns.get(key)

    def _expired(self, conversation: _Conversation) -> bool:
        if not self._ttl or conversation.root in self.pins:
            return False
        return conversation.used + self._ttl <= self._read()

    def _renew(self, conversation: _Conversation) -> None:
        conversation.used = max(conversation.used, self._read())
        self._conversations[conversation.owner].move_to_end(conversation.root)
        self._by_use.move_to_end(conversation.root)

    def _make_room(self, bound: int, turn: Turn | None, most: int = STEP) -> bool:
        """Evict until a turn fits, but not its conversation, and little more than `most` turns.

        False: there is more to evict.
        """
        shares = self.shares
        if turn is not None:
            shares.add(turn.owner, turn.size)
        try:
            while shares.size > bound:
                if most <= 0:
                    return False
                victim = self._victim(shares.largest() or "", turn)
                if victim is None:
                    break
                most -= max(1, len(victim.turns))
                self._drop(victim, "size")
        finally:
            if turn is not None:
                shares.remove(turn.owner, turn.size, None)
        return True

    def _victim(self, owner: str, turn: Turn | None) -> _Conversation | None:
        """The least recently used one; those in use come after all others."""
        kept = None if turn is None or turn.parent is None else turn.parent.root
        last = None
        for root, each in self._conversations.get(owner, {}).items():
            if root == kept:
                continue
            if root not in self.pins:
                return each
            last = last or each
        return last

    def _drop(self, conversation: _Conversation, reason: Removal) -> None:
        for record in list(conversation.turns.values()):
            self._forget(record, reason)
        self._close_conversation(conversation)

    def _remove(self, record: _Record, reason: Removal | None) -> None:
        """Remove one turn; those that go on from it stay, but cannot be continued."""
        conversation = record.conversation
        self._forget(record, reason)
        lost = {record.head.key}
        for key, other in conversation.turns.items():  # in the order in which they were made
            if other.head.parent in lost:
                lost.add(key)
                other.head = replace(other.head, whole=False)
                other.parent = None
        if conversation.turns:
            return
        if conversation.root in self.pins:
            self._emptied.append(conversation)
        else:
            self._close_conversation(conversation)

    def _forget(self, record: _Record, reason: Removal | None) -> None:
        head, conversation = record.head, record.conversation
        del conversation.turns[head.key]
        conversation.size -= record.size
        self.shares.remove(head.owner, record.size, reason)
        owners = self._ids[head.id]
        del owners[head.owner]
        if not owners:
            del self._ids[head.id]
        for item in record.items:
            known = self._items.get((head.owner, item.id), {})
            known.pop(head.key, None)  # a turn may have an id twice
            if not known:
                self._items.pop((head.owner, item.id), None)

    def _close_conversation(self, conversation: _Conversation) -> None:
        conversations = self._conversations[conversation.owner]
        del conversations[conversation.root], self._by_use[conversation.root]
        if not conversations:
            del self._conversations[conversation.owner]
