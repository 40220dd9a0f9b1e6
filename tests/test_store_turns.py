"""Stores of conversations, each the same: what is found, renewed, forked, removed, and counted."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aiproxy.sessions import NOTHING, ROW, Content, NoRoomError
from turns import ALICE, BOB, CAROL, KINDS, PLENTY, TTL, World, delta, message, turn, world


@pytest.fixture(params=KINDS)
async def here(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """Open an empty store of each kind."""
    async with world(request.param, tmp_path) as opened:
        yield opened


# What is found


async def test_a_turn_is_found_by_its_owner_alone(here: World) -> None:
    """To its owner a turn is a hit, to another foreign, and an id that nobody has is missing."""
    await here.put("a")
    assert await here.result("a") == "hit"
    assert await here.result("a", BOB) == "foreign"
    assert await here.results("b", "A", "a ", "") == ["missing"] * 4


async def test_a_head_says_what_its_turn_is(here: World) -> None:
    """The row of a turn has all that was put, and its place in the tree."""
    root = await here.put("a", ids=["i"])
    child = await here.put("b", parent=root, upstream="two", ids=["j", "k"])
    first, second = here.put_turns[ALICE, "a"].content, here.put_turns[ALICE, "b"].content
    assert (root.id, root.owner, root.parent, root.depth) == ("a", ALICE, None, 1)
    assert (root.root, root.size) == (root.key, len(first.input + first.output))
    assert (root.tokens, root.created, root.model, root.upstream) == (7, 1, "m", "one")
    assert (root.held, root.whole) == (True, True)
    assert (child.root, child.parent, child.depth) == (root.key, root.key, 2)
    assert (child.size, child.upstream) == (root.size + len(second.input + second.output), "two")
    assert child.key > root.key
    assert isinstance(child.held, bool)
    assert isinstance(child.whole, bool)


async def test_content_is_what_was_put(here: World) -> None:
    """All four parts come back byte for byte, whatever bytes they are."""
    content = Content(b'[ {"a":"\\ud800"} ]', b"[1 ,2]", b'{"\xff":\n', b"\x00}")
    root = await here.put("a", content=content)
    child = await here.put("b", parent=root)
    assert await here.store.content(root) == content
    assert await here.store.content(child) == here.put_turns[ALICE, "b"].content
    assert content.response == b'{"\xff":\n[1 ,2]\x00}'


async def test_a_path_is_from_the_root_to_the_turn(here: World) -> None:
    """What is replayed of a turn is it and all before it, in order, and nothing of its children."""
    heads = await here.chain("a", "b", "c", "d")
    for depth, head in enumerate(heads, start=1):
        expected = [delta(here.put_turns[ALICE, name]) for name in "abcd"[:depth]]
        assert await here.store.path(head) == expected
        assert (head.depth, head.root) == (depth, heads[0].key)


async def test_forks_do_not_see_each_other(here: World) -> None:
    """Two turns that go on from one share what was before it, and nothing else."""
    root = await here.put("a")
    left, right = await here.put("b", parent=root), await here.put("c", parent=root)
    deeper = await here.put("d", parent=left)
    assert await here.path(deeper) == here.inputs("a", "b", "d")
    assert await here.path(right) == here.inputs("a", "c")
    here.holds(*((ALICE, name) for name in "abcd"))


# Items


async def test_items_are_found_by_their_ids(here: World) -> None:
    """An id leads to the item itself, of an input or an output, with the place where it is."""
    given, made = message("é", "in"), message("x", "out")
    content = Content(b"[1, " + given + b"]", b"[ " + made + b" ]", b"", b"")
    head = await here.put("a", content=content)
    found = await here.store.find(ALICE, ["out", "in", "none"])
    assert set(found) == {"in", "out"}
    assert found["in"][:7] == ("in", head.key, head.root, False, 1, len(given), len(given) + 12)
    assert found["out"][3:] == (True, 0, len(made), len(made) + 12, "one", True)
    assert (found["out"].output, found["in"].output) == (True, False)
    both = [found["out"], found["in"], found["out"]]
    assert await here.store.items(ALICE, both) == [made, given, made]


async def test_items_of_others_are_not_found(here: World) -> None:
    """An item is found by the key that it was made for, and by no other."""
    await here.put("a", ids=["i"])
    await here.put("b", BOB, ids=["j"])
    assert set(await here.store.find(BOB, ["i", "j"])) == {"j"}
    assert await here.store.find(CAROL, ["i", "j"]) == {}


async def test_the_latest_turn_with_an_item_counts(here: World) -> None:
    """Of several turns with one id the last that is there is taken, within its turn the last."""
    first = await here.put("a", ids=["i"])
    second = await here.put("b", parent=first, ids=["i"], upstream="two")
    found = (await here.store.find(ALICE, ["i"]))["i"]
    assert (found.turn, found.root, found.upstream) == (second.key, first.key, "two")
    assert await here.store.items(ALICE, [found]) == [message("b of alice says i", "i")]
    await here.store.delete(second)
    assert (await here.store.find(ALICE, ["i"]))["i"].turn == first.key
    assert await here.store.items(ALICE, [found]) is None
    await here.store.delete(first)
    assert await here.store.find(ALICE, ["i"]) == {}


# Time


async def test_what_is_not_used_expires(here: World) -> None:
    """A conversation is there until `ttl` has passed since its last use, and not any longer."""
    here.store.configure(ttl=TTL, max_bytes=PLENTY)
    await here.chain("a", "b")
    here.clock.now += TTL - 1
    assert await here.results("a", "b") == ["hit", "hit"]
    here.clock.now += 2
    assert await here.results("a", "b") == ["expired", "expired"]
    assert await here.result("a", BOB) == "foreign"
    here.store.configure(ttl=2 * TTL, max_bytes=PLENTY)
    assert await here.result("a") == "hit"
    here.store.configure(ttl=0, max_bytes=PLENTY)
    here.clock.now += 1e9
    assert await here.result("a") == "hit"


@pytest.mark.parametrize("use", ["put", "path", "items"])
async def test_a_use_renews_the_whole_conversation(here: World, use: str) -> None:
    """A turn that is made or continued keeps the others of its conversation, forks included."""
    here.store.configure(ttl=TTL, max_bytes=PLENTY)
    root = await here.put("a", ids=["i"])
    await here.put("b", parent=root)
    await here.put("other")
    found = await here.store.find(ALICE, ["i"])
    here.clock.now += TTL / 2
    if use == "put":
        await here.put("c", parent=root)
    elif use == "path":
        await here.path(root)
    else:
        await here.store.items(ALICE, [found["i"]])
        await here.store.check()
    here.clock.now += TTL * 3 / 4
    assert await here.results("a", "b", "other") == ["hit", "hit", "expired"]


@pytest.mark.parametrize("use", ["load", "content", "find"])
async def test_a_look_renews_nothing(here: World, use: str) -> None:
    """What only looks at a turn does not keep it."""
    here.store.configure(ttl=TTL, max_bytes=PLENTY)
    head = await here.put("a", ids=["i"])
    here.clock.now += TTL / 2
    if use == "content":
        await here.store.content(head)
    elif use == "find":
        await here.store.find(ALICE, ["i"])
    await here.head("a")
    here.clock.now += TTL * 3 / 4
    assert await here.result("a") == "expired"


async def test_a_clock_that_goes_back_ages_nothing(here: World) -> None:
    """A use at an earlier time takes nothing from a conversation that was used later."""
    here.store.configure(ttl=TTL, max_bytes=PLENTY)
    head = await here.put("a")
    here.clock.now -= TTL / 2
    await here.path(head)
    await here.put("b", parent=head)
    here.clock.now += TTL
    assert await here.results("a", "b") == ["hit", "hit"]


async def test_items_of_expired_turns_are_not_found(here: World) -> None:
    """An expired turn hides no earlier one with the same item, and its own is not found."""
    here.store.configure(ttl=TTL, max_bytes=PLENTY)
    first = await here.put("a", ids=["i"])
    await here.put("b", ids=["i", "j"])
    here.clock.now += TTL / 2
    await here.path(first)
    here.clock.now += TTL * 3 / 4
    found = await here.store.find(ALICE, ["i", "j"])
    assert {item_id: each.turn for item_id, each in found.items()} == {"i": first.key}


async def test_tend_removes_what_has_expired(here: World) -> None:
    """Expired conversations go as wholes, in steps, and only these; each turn is counted once."""
    here.store.configure(ttl=TTL, max_bytes=PLENTY)
    heads = await here.chain(*(f"a{n}" for n in range(150)))
    await here.put("b", BOB, ids=["i"])
    here.clock.now += TTL + 1
    kept = await here.put("c", BOB)
    await here.tend(times=4)
    assert await here.results("a0", "a149") == ["missing", "missing"]
    assert await here.results("b", "c", owner=BOB) == ["missing", "hit"]
    here.holds((BOB, "c"), removed=(151, 0, 0))
    assert await here.store.path(heads[0]) is None
    assert await here.store.content(heads[9]) is None
    assert await here.path(kept) == here.inputs("c", owner=BOB)
    await here.tend()
    here.holds((BOB, "c"), removed=(151, 0, 0))


# Turns that an upstream holds: their ids are its own


async def test_two_owners_may_have_the_same_id(here: World) -> None:
    """Each finds its own turn of that id, and a third key none."""
    await here.put("a", held=False, ids=["i"])
    await here.put("a", BOB, held=False, upstream="two")
    assert ((await here.head("a")).upstream, (await here.head("a", BOB)).upstream) == ("one", "two")
    assert await here.result("a", CAROL) == "foreign"
    assert (await here.head("a")).held is False
    assert await here.store.content(await here.head("a")) == NOTHING
    found = await here.store.find(ALICE, ["i"])
    assert (found["i"].held, await here.store.find(BOB, ["i"])) == (False, {})
    await here.store.delete(await here.head("a"))
    assert await here.results("a") == ["foreign"]
    assert await here.result("a", BOB) == "hit"
    here.holds((BOB, "a"), removed=(0, 0, 1))


async def test_an_id_that_comes_again_is_replaced(here: World) -> None:
    """The later turn takes the earlier one's place, items included; it counts as no removal."""
    old = await here.put("a", held=False, ids=["i"])
    child = await here.put("b", parent=old, held=False)
    new = await here.put("a", held=False, ids=["j"], upstream="two")
    assert ((await here.head("a")).upstream, new.key != old.key) == ("two", True)
    assert set(await here.store.find(ALICE, ["i", "j"])) == {"j"}
    here.holds((ALICE, "a"), (ALICE, "b"))
    assert (await here.head("b")).whole is False
    assert await here.store.path(child) is None
    assert await here.store.delete(old) is False


async def test_a_replacement_that_does_not_fit_replaces_nothing(here: World) -> None:
    """A put that is refused has changed nothing: the turn of the same id is still there."""
    here.store.configure(ttl=0, max_bytes=3 * ROW)
    old = await here.put("a", held=False)
    with pytest.raises(NoRoomError):
        await here.store.put(turn("a", held=False, size=4 * ROW))
    here.holds((ALICE, "a"))
    assert await here.head("a") == old


# Deletion


async def test_deletion_breaks_what_goes_on_from_it(here: World) -> None:
    """The turn is gone, its descendants cannot be continued, and all others can, at any depth."""
    a, b, c, d = await here.chain("a", "b", "c", "d")
    beside = await here.put("e", parent=a)
    after = await here.put("f", parent=b)
    assert await here.store.delete(b) is True
    assert await here.results("a", "b", "c", "d") == ["hit", "missing", "hit", "hit"]
    whole = {name: (await here.head(name)).whole for name in "acdef"}
    assert whole == {"a": True, "c": False, "d": False, "e": True, "f": False}
    for head in (b, c, d, after):
        assert await here.store.path(head) is None
    assert await here.path(beside) == here.inputs("a", "e")
    assert await here.store.content(b) is None
    assert await here.store.content(d) == here.put_turns[ALICE, "d"].content
    here.holds(*((ALICE, name) for name in "acdef"), removed=(0, 0, 1))


async def test_a_second_deletion_finds_nothing(here: World) -> None:
    """It says so, and is not counted; the same id may be put anew."""
    head = await here.put("a")
    assert await here.store.delete(head) is True
    assert await here.store.delete(head) is False
    here.holds(removed=(0, 0, 1))
    again = await here.put("a")
    assert again.key > head.key
    assert await here.store.delete(head) is False
    assert await here.store.path(head) is None
    here.holds((ALICE, "a"), removed=(0, 0, 1))


@pytest.mark.parametrize("gone", ["leaf", "middle", "conversation"])
async def test_a_turn_whose_parent_is_gone_is_kept_but_not_whole(here: World, gone: str) -> None:
    """What was under way when its parent was deleted is there, and cannot be continued."""
    a, b = await here.chain("a", "b")
    here.store.pins.add(a.root)
    if gone != "leaf":
        await here.store.delete(a)
    if gone != "middle":
        await here.store.delete(b)
    child = await here.put("c", parent=b)
    assert (child.whole, child.depth, child.root) == (False, 3, a.key)
    assert await here.store.path(child) is None
    assert await here.store.content(child) == here.put_turns[ALICE, "c"].content
    deeper = await here.put("d", parent=child)
    assert (deeper.whole, deeper.depth) == (False, 4)
    assert await here.store.path(deeper) is None
    left = {"leaf": "acd", "middle": "bcd", "conversation": "cd"}[gone]
    here.holds(*((ALICE, name) for name in left), removed=(0, 0, 4 - len(left)))


# The bound


async def test_the_largest_owner_loses_what_it_used_last(here: World) -> None:
    """At the bound the key that holds the most loses its least recently used conversation."""
    here.store.configure(ttl=0, max_bytes=10_000)
    a = await here.put("a", size=2500)
    await here.put("b", size=2500, ids=["i"])
    await here.put("c", size=2500)
    await here.put("x", BOB, size=2400)
    await here.path(a)
    await here.put("y", BOB, size=1000)
    assert await here.results("a", "b", "c") == ["hit", "missing", "hit"]
    assert await here.store.find(ALICE, ["i"]) == {}
    left = [(ALICE, "a"), (ALICE, "c"), (BOB, "x"), (BOB, "y")]
    here.holds(*left, removed=(0, 1, 0))


async def test_a_conversation_that_grows_displaces_others_of_its_owner(here: World) -> None:
    """The one that is being continued stays, the others go one after another."""
    here.store.configure(ttl=0, max_bytes=10_000)
    a = await here.put("a", size=3000)
    await here.put("b", size=3000)
    await here.put("c", size=3000)
    d = await here.put("d", parent=a, size=6000)
    assert await here.results("a", "b", "c", "d") == ["hit", "missing", "missing", "hit"]
    assert await here.path(d) == here.inputs("a", "d")
    here.holds((ALICE, "a"), (ALICE, "d"), removed=(0, 2, 0))


async def test_what_cannot_fit_is_refused_and_displaces_nothing(here: World) -> None:
    """Neither a turn above the bound, nor a conversation that grows above it, nor one too many."""
    here.store.configure(ttl=0, max_bytes=10_000)
    a = await here.put("a", size=6000)
    await here.put("x", BOB, size=3000)
    for refused in (
        turn("b", size=10_001),
        turn("b", parent=a, size=1001),
        turn("b", CAROL, size=3501),
    ):
        with pytest.raises(NoRoomError, match=r"sessions\.max_bytes"):
            await here.store.put(refused)
    assert await here.result("b") == "missing"
    here.holds((ALICE, "a"), (BOB, "x"))
    await here.put("b", parent=a, size=1000)
    here.holds((ALICE, "a"), (BOB, "x"), (ALICE, "b"))
    assert here.store.shares.size == 10_000


async def test_a_turn_whose_conversation_was_evicted_is_refused(here: World) -> None:
    """It could not be continued, so nobody is to be told that it is there."""
    here.store.configure(ttl=0, max_bytes=10_000)
    a = await here.put("a", size=4000)
    await here.put("b", size=8000)
    with pytest.raises(NoRoomError, match="had to give way"):
        await here.store.put(turn("c", parent=a, size=1500))
    assert await here.results("a", "b", "c") == ["missing", "hit", "missing"]
    here.holds((ALICE, "b"), removed=(0, 1, 0))


async def test_a_conversation_in_use_goes_last(here: World) -> None:
    """While a turn of it is made it does not expire, and others give way before it."""
    here.store.configure(ttl=TTL, max_bytes=10_000)
    a = await here.put("a", size=4000)
    here.store.pins.add(a.root)
    here.clock.now += TTL * 2
    await here.tend()
    await here.put("b", size=4000)
    await here.put("c", size=4000)
    assert await here.results("a", "b", "c") == ["hit", "missing", "hit"]
    await here.put("d", parent=a, size=1000)
    here.store.pins.remove(a.root)
    here.clock.now += TTL
    await here.tend()
    assert await here.results("a", "c", "d") == ["missing"] * 3
    here.holds(removed=(3, 1, 0))


async def test_a_smaller_bound_takes_effect(here: World) -> None:
    """After a reload the largest give way until the rest fits, in steps; nothing else changes."""
    for number in range(80):
        await here.put(f"a{number}", size=1000)
        await here.put(f"b{number}", BOB, size=600)
    here.store.configure(ttl=0, max_bytes=10_000)
    await here.tend(times=5)
    kept = [(ALICE, f"a{n}") for n in range(75, 80)] + [(BOB, f"b{n}") for n in range(72, 80)]
    here.holds(*kept, removed=(0, 147, 0))
    here.store.configure(ttl=0, max_bytes=PLENTY)
    await here.tend()
    here.holds(*kept, removed=(0, 147, 0))


async def test_a_shorter_ttl_takes_effect(here: World) -> None:
    """After a reload conversations that are older than it allows are expired, then removed."""
    await here.put("a")
    here.clock.now += TTL * 2
    await here.put("b")
    await here.tend()
    here.store.configure(ttl=TTL, max_bytes=PLENTY)
    assert await here.results("a", "b") == ["expired", "hit"]
    await here.tend()
    assert await here.results("a", "b") == ["missing", "hit"]
    here.holds((ALICE, "b"), removed=(1, 0, 0))
