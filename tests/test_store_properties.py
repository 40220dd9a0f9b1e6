"""Stores of conversations, whatever happens in which order: memory, SQLite and a model agree."""

import asyncio
import tempfile
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from aiproxy.sessions import (
    ROW,
    Content,
    Delta,
    Head,
    NoRoomError,
    Removal,
    SessionStore,
    Share,
    Shares,
    Turn,
)
from aiproxy.stores import sqlite_book
from aiproxy.stores.memory_sessions import MemorySessions
from turns import ALICE, BOB, CAROL, KINDS, TTL, Clock, sqlite_store, turn, world

T = TypeVar("T")

OWNERS = (ALICE, BOB, CAROL)
WHO = st.sampled_from(OWNERS)
WHICH = st.integers(0, 99)
SIZES = st.integers(ROW + 100, 6 * ROW)


@dataclass(eq=False)
class Node:
    """A turn as it is promised."""

    name: str
    owner: str
    parent: "Node | None"
    size: int
    there: bool = True
    heads: list[Head] = field(default_factory=list)  # of each store

    @property
    def path(self) -> list["Node"]:
        """All turns from the root to it."""
        return [*(self.parent.path if self.parent else []), self]

    @property
    def root(self) -> "Node":
        """The first of them."""
        return self.path[0]

    @property
    def whole(self) -> bool:
        """Whether all turns before it are there."""
        return all(node.there for node in self.path[:-1])

    @property
    def content(self) -> Content:
        """Return content that no other turn has; it pads the turn to its size."""
        given = f'["{self.name} of {self.owner}"]'.encode()
        return Content(given, b"[]", b"." * (self.size - ROW - len(given) - 2), b"")


class TieError(Exception):
    """Several owners hold the most: either may give way."""


@dataclass
class Model:
    """All conversations, in the order of their last use."""

    bound: int
    used: dict[Node, float] = field(default_factory=dict)  # by root
    nodes: list[Node] = field(default_factory=list)  # that are there
    removed: dict[Removal, int] = field(default_factory=lambda: {"ttl": 0, "size": 0, "deleted": 0})

    def shares(self) -> Shares:
        """What each owner holds."""
        shares = Shares(removed=dict(self.removed))
        for node in self.nodes:
            shares.add(node.owner, node.size)
        return shares

    def remove(self, nodes: list[Node], reason: Removal | None) -> None:
        """Remove some turns."""
        for node in nodes:
            node.there = False
            self.nodes.remove(node)
        if reason is not None:
            self.removed[reason] += len(nodes)
        left = {node.root for node in self.nodes}
        self.used = {root: used for root, used in self.used.items() if root in left}

    def conversation(self, root: Node) -> list[Node]:
        """The turns with one root that are there."""
        return [node for node in self.nodes if node.root is root]

    def use(self, root: Node, now: float) -> None:
        """Renew a conversation: it is the last to go."""
        self.used.pop(root, None)
        self.used[root] = now

    def expired(self, now: float) -> list[Node]:
        """The roots of what has expired."""
        return [root for root, used in self.used.items() if used + TTL <= now]

    def tend(self, now: float) -> None:
        """Remove what has expired."""
        for root in self.expired(now):
            self.remove(self.conversation(root), "ttl")

    def victims(
        self, bound: int, new: Node | None = None, same: Sequence[Node] = ()
    ) -> list[Node] | None:
        """The roots of what must give way to a turn; None: it does not fit.

        `same` are the turns that it takes the place of, if it fits.

        Raises:
            TieError: it cannot be told.
        """
        sizes = {owner: share.size for owner, share in self.shares().by_owner.items()}
        if new is not None:
            owner = new.owner
            kept = new.size + sum(node.size for node in self.conversation(new.root))
            above = sum(min(size, kept) for name, size in sizes.items() if name != owner)
            if sum(sizes.values()) + new.size > bound and above + kept > bound:
                return None
            sizes[owner] = sizes.get(owner, 0) + new.size - sum(node.size for node in same)
        victims: list[Node] = []
        while sum(sizes.values()) > bound:
            first, *others = sorted(sizes, key=lambda name: -sizes[name])
            if others and sizes[others[0]] == sizes[first]:
                raise TieError
            victim = next(
                root
                for root in self.used
                if root.owner == first
                and root not in victims
                and not (new is not None and root is new.root)
                and any(node not in same for node in self.conversation(root))
            )
            victims.append(victim)
            left = [node for node in self.conversation(victim) if node not in same]
            sizes[first] -= sum(node.size for node in left)
        return victims


class Stores(RuleBasedStateMachine):
    """Three keys put, continue and delete turns while time passes."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something in the event loop."""
        return self.runner.run(work)

    @initialize(bound=st.integers(4 * ROW, 40 * ROW))
    def begin(self, bound: int) -> None:
        """Begin with empty stores."""
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.memory = MemorySessions(self.clock)
        self.sqlite = sqlite_store(Path(self.folder.name) / "sessions.db", self.clock)
        self.sqlite._connection.execute("PRAGMA synchronous = OFF")  # no crash is to be survived
        self.stores: list[SessionStore] = [self.memory, self.sqlite]
        self.model = Model(bound)
        self.all: list[Node] = []  # that ever were
        self.configure()

    def configure(self) -> None:
        """Tell the stores their bounds."""
        for store in self.stores:
            store.configure(ttl=TTL, max_bytes=self.model.bound)

    def teardown(self) -> None:
        """Leave nothing behind."""
        if hasattr(self, "stores"):
            for store in self.stores:
                self.run(store.close())
            self.runner.close()
            self.folder.cleanup()

    async def tend_all(self) -> None:
        """Let all do what is due."""
        for store in self.stores:
            store.tend()
            await store.check()
        self.model.tend(self.clock.now)

    async def put(self, node: Node, *, held: bool = True) -> None:
        """Put a turn, and check who gives way."""
        model = self.model
        self.clock.now += 0.001
        if model.shares().size + node.size > model.bound:
            await self.tend_all()  # which of two goes first, expired or not, is a store's choice
        same = [n for n in model.nodes if (n.name, n.owner) == (node.name, node.owner)]
        before = model.shares()
        while True:
            try:
                victims = model.victims(model.bound, node, same)
                break
            except TieError:
                node.size += 1
        if node.parent is not None and node.root not in model.used:
            victims = None  # its conversation had to give way
        for at, store in enumerate(self.stores):
            parent = None if node.parent is None else node.parent.heads[at]
            made = Turn(node.name, node.owner, parent, 1, "m", "one", 7, held, node.content)
            if victims is None:
                with pytest.raises(NoRoomError):
                    await store.put(made)
                continue
            await store.put(made)
            loaded = await store.load(node.owner, node.name)
            assert loaded.head is not None
            assert loaded.head.size == sum(len(n.content.input) + 2 for n in node.path)
            node.heads.append(loaded.head)
        if victims is None:
            return
        model.remove(same, None)
        for root in victims:
            model.remove(model.conversation(root), "size")
        model.nodes.append(node)
        model.use(node.root, self.clock.now)
        self.all.append(node)
        self.fair(before, node, {root.owner for root in victims})

    def fair(self, before: Shares, new: Node, losers: set[str]) -> None:
        """Who held less than its share, the new turn included, has lost nothing by size."""
        before.add(new.owner, new.size)
        for owner, share in before.by_owner.items():
            assert owner not in losers or share.size * len(before.by_owner) >= self.model.bound

    # What happens

    @rule(owner=WHO, size=SIZES)
    def put_root(self, owner: str, size: int) -> None:
        """Begin a conversation."""
        self.run(self.put(Node(f"turn {len(self.all)}", owner, None, size)))

    @precondition(lambda self: self.all)
    @rule(which=WHICH, size=SIZES)
    def put_child(self, which: int, size: int) -> None:
        """Continue any turn that ever was, as by a request that was under way when it went."""
        parent = self.all[which % len(self.all)]
        self.run(self.put(Node(f"turn {len(self.all)}", parent.owner, parent, size)))

    @precondition(lambda self: self.model.nodes)
    @rule(which=WHICH, size=SIZES)
    def put_latest(self, which: int, size: int) -> None:
        """Continue one of the latest turns, so that paths get long."""
        parent = self.model.nodes[-1 - which % min(2, len(self.model.nodes))]
        self.run(self.put(Node(f"turn {len(self.all)}", parent.owner, parent, size)))

    @rule(owner=WHO, number=st.integers(0, 2), size=SIZES, which=st.none() | WHICH)
    def put_unheld(self, owner: str, number: int, size: int, which: int | None) -> None:
        """Put a turn with an id of its upstream, which may be there, of this key or of another."""
        own = [node for node in self.model.nodes if node.owner == owner]
        parent = None if which is None or not own else own[which % len(own)]
        if parent is None or f"up {number}" not in {node.name for node in parent.path}:
            self.run(self.put(Node(f"up {number}", owner, parent, size), held=False))

    @precondition(lambda self: self.all)
    @rule(which=WHICH)
    def delete(self, which: int) -> None:
        """Delete any turn that ever was."""
        node = self.all[which % len(self.all)]
        for store, head in zip(self.stores, node.heads, strict=True):
            assert self.run(store.delete(head)) == node.there
        if node.there:
            self.model.remove([node], "deleted")

    @rule(seconds=st.sampled_from([1.0, TTL / 3, TTL * 0.9]))
    def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.now += seconds

    @rule()
    def tend(self) -> None:
        """Let the stores do what is due."""
        self.run(self.tend_all())

    @rule(bound=st.integers(4 * ROW, 40 * ROW))
    def resize(self, bound: int) -> None:
        """Set another bound."""
        self.run(self.tend_all())
        while True:
            try:
                victims = self.model.victims(bound)
                break
            except TieError:
                bound += 1
        self.model.bound = bound
        self.configure()
        for root in victims or ():
            self.model.remove(self.model.conversation(root), "size")
        self.run(self.tend_all())

    # What is seen

    @precondition(lambda self: self.all)
    @rule(which=WHICH, owner=WHO)
    def look(self, which: int, owner: str) -> None:
        """Look for any turn that ever was, as any key."""
        node = self.all[which % len(self.all)]
        named = [n for n in self.model.nodes if n.name == node.name]
        mine = next((n for n in named if n.owner == owner), None)
        expected = "foreign" if named else "missing"
        if mine is not None:
            expected = "expired" if mine.root in self.model.expired(self.clock.now) else "hit"
        for index, store in enumerate(self.stores):
            loaded = self.run(store.load(owner, node.name))
            assert loaded.result == expected
            if loaded.head is not None:
                assert mine is not None
                assert loaded.head.whole == mine.whole
                assert loaded.head.depth == len(mine.path)
                assert loaded.head.key == mine.heads[index].key

    @precondition(lambda self: self.all)
    @rule(which=WHICH)
    def replay(self, which: int) -> None:
        """Continue any turn that ever was: it is replayed from its root, and renewed, or gone."""
        node = self.all[which % len(self.all)]
        self.clock.now += 0.001
        kept = node.there and node.whole
        expected = [Delta("one", each.content.input, b"[]") for each in node.path]
        for store, head in zip(self.stores, node.heads, strict=True):
            assert self.run(store.path(head)) == (expected if kept else None)
            assert self.run(store.content(head)) == (node.content if node.there else None)
            self.run(store.check())
        if kept:
            self.model.use(node.root, self.clock.now)

    @invariant()
    def shares_agree(self) -> None:
        """What is held and what was removed is the same everywhere."""
        if hasattr(self, "stores"):
            expected = self.model.shares()
            assert self.memory.shares == expected
            assert self.sqlite.shares == expected

    @invariant()
    def memory_is_bounded(self) -> None:
        """The turns in memory never take more bytes than allowed, counted anew."""
        if hasattr(self, "stores"):
            records = [
                record
                for conversations in self.memory._conversations.values()
                for conversation in conversations.values()
                for record in conversation.turns.values()
            ]
            counted = sum(ROW + record.content.size for record in records)
            assert counted == self.memory.shares.size <= self.model.bound
            known = sum(map(len, self.memory._ids.values()))
            assert known == len(records) == len(self.model.nodes)


def test_stores_agree_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and SQLite find, replay, count and give way as promised, after any history."""
    monkeypatch.setattr(sqlite_book, "GIVING_WAY", 60.0)  # a slow machine owes nothing, either
    run_state_machine_as_test(Stores, settings=settings(stateful_step_count=30))


# Trees


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(WHICH, min_size=1, max_size=30), st.integers(1, 100))
def test_a_replay_is_the_path_to_the_root(kind: str, parents: list[int], deep: int) -> None:
    """In any tree each turn is replayed as the turns from the root to it, and no others."""

    async def grow(folder: Path) -> None:
        async with world(kind, folder) as here:
            store = here.store
            heads: list[Head] = []
            paths: list[list[bytes]] = []
            for number, place in enumerate(parents):
                chosen = max(0, number - 1 - place % deep) if number else None
                if number and place == 0:
                    chosen = None
                parent = None if chosen is None else heads[chosen]
                heads.append(await here.put(f"t{number}", parent=parent))
                before = [] if chosen is None else paths[chosen]
                paths.append([*before, *here.inputs(f"t{number}")])
            for head, path in zip(heads, paths, strict=True):
                found = await store.path(head)
                assert found is not None
                assert [each.input for each in found] == path
                assert (head.depth, head.whole) == (len(path), True)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(grow(Path(folder)))


# Shares


@given(
    st.dictionaries(WHO, st.lists(st.integers(1, 50), max_size=5)),
    WHO,
    st.integers(1, 100),
    st.integers(0, 200),
    st.randoms(use_true_random=False),
)
def test_what_fits_stays_when_others_give_way(
    held: dict[str, list[int]], owner: str, size: int, bound: int, random: Any
) -> None:
    """If a conversation fits, evicting others of whoever holds the most ends within the bound."""
    shares = Shares()
    for name, sizes in held.items():
        for each in sizes:
            shares.add(name, each)
    if not shares.fits(owner, size, bound):
        owners = set(shares.by_owner) | {owner}
        assert size * len(owners) > bound
        assert not shares.fits(owner, size + 1, bound)
        return
    assert shares.fits(owner, size, bound + 1)
    shares.add(owner, size)
    while shares.size > bound:
        largest = shares.largest()
        assert largest is not None
        assert held.get(largest), "nothing is left to give way"
        victim = held[largest].pop(random.randrange(len(held[largest])))
        assert shares.by_owner[largest].size * len(shares.by_owner) > bound
        shares.remove(largest, victim, "size")
    assert shares.by_owner[owner].size >= size


def test_shares_forget_who_holds_nothing() -> None:
    """An owner whose last turn went is none any more; what is taken back counts as before."""
    shares = Shares()
    shares.add("a", 5)
    shares.add("b", 7, 2)
    shares.remove("b", 2, "ttl")
    shares.restore("b", 2, "ttl")
    shares.remove("a", 5, "ttl")
    shares.remove("b", 3, None)
    assert shares == Shares({"b": Share(4, 1)}, {"ttl": 1, "size": 0, "deleted": 0}, 4, 1)
    assert shares.largest() == "b"
    shares.remove("b", 4, "deleted")
    assert (shares.by_owner, shares.largest()) == ({}, None)
    assert turn("a").size == ROW + turn("a").content.size


@given(
    st.lists(st.tuples(WHO, st.integers(1, 50)), max_size=12), WHO, st.integers(1, 100),
    st.integers(0, 200),
)  # fmt: skip
def test_what_fits_is_told_as_by_looking_at_all(
    held: list[tuple[str, int]], owner: str, size: int, bound: int
) -> None:
    """The largest owner and what fits are those that a look at every owner would find."""
    shares = Shares()
    for name, each in held:
        shares.add(name, each)
    if held:
        shares.remove(*held[0], "size")
    by_owner = shares.by_owner
    others = sum(min(share.size, size) for name, share in by_owner.items() if name != owner)
    assert shares.fits(owner, size, bound) == (others + size <= bound)
    assert (shares.largest() is None) == (not by_owner)
    largest = shares.largest()
    assert largest is None or by_owner[largest].size == max(s.size for s in by_owner.values())
