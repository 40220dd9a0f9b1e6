"""One SQLite file that two processes have open: nothing is lost, and each sees what the other did.

So it is while one daemon takes over from another that still drains.
"""

import asyncio
import json
import signal
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest

from aiproxy.sessions import StoreError
from aiproxy.stores.sqlite import SqliteSessions
from conftest import BlockingCalls
from invariants import eventually
from responses import responses_events
from rig import Proxy, prompt
from sessions_rig import (
    NO_PARENT,
    NOT_FOUND,
    PATH,
    files_with,
    heard,
    held_here,
    response_of,
    turn,
    use,
)
from steps import SSE_HEADERS
from store_peer import peer
from turns import ALICE, PLENTY
from turns import turn as a_turn
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Wait

CANARY = "SHARED-CANARY-6207"
SIZE = 1000  # bytes that each of many turns counts

Two = tuple[Proxy, Proxy]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Say where the file is."""
    return tmp_path / "sessions.db"


@pytest.fixture
async def two(upstream: ScriptedUpstream, tmp_path: Path) -> AsyncIterator[Two]:
    """Start two daemons with one file."""
    text = held_here(upstream, f"sqlite:{tmp_path}/sessions.db")
    proxies = await Proxy.start(text), await Proxy.start(text)
    yield proxies
    for proxy in proxies:
        await proxy.stop()


def names(prefix: str, count: int) -> list[str]:
    """Return names of turns."""
    return [f"{prefix}-{number}" for number in range(count)]


def whole(file: Path) -> bool:
    """Tell whether SQLite finds nothing wrong with a file."""
    with closing(sqlite3.connect(file)) as connection:
        return [row[0] for row in connection.execute("PRAGMA integrity_check")] == ["ok"]


def size_of(file: Path) -> int:
    """Return its bytes."""
    return file.stat().st_size


# Two daemons


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_turn_goes_on_at_the_other_at_once(
    two: Two, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """A conversation that changes between two daemons at every turn is heard whole each time."""
    previous = None
    for number in range(8):
        response = await turn(two[number % 2], f"say {number}", previous, streamed=streamed)
        previous = response["id"]
        said = [text for text in heard(upstream.requests[-1]) if text.startswith("say ")]
        assert said == [f"say {earlier}" for earlier in range(number + 1)]
    assert previous is not None
    for proxy in two:
        assert (await use(proxy, "get", previous)).json()["id"] == previous


async def test_a_delete_is_one_for_both(
    two: Two, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """What one deletes no verb finds at the other; its content is in no file, nor what led on."""
    one, other = two
    first = await turn(one, f"{CANARY} one")
    second = await turn(other, "two", first["id"])
    assert files_with(tmp_path, CANARY)
    assert (await use(other, "delete", first["id"])).json()["deleted"] is True
    assert files_with(tmp_path, CANARY) == []
    for proxy in two:
        NO_PARENT.check(await use(proxy, "continue", first["id"]))
        NO_PARENT.check(await use(proxy, "continue", second["id"]))
        for verb in ("get", "input_items", "cancel", "delete"):
            NOT_FOUND.check(await use(proxy, verb, first["id"]))
        assert (await use(proxy, "get", second["id"])).status == 200


async def test_a_parent_that_the_other_deletes_while_a_turn_is_made(
    two: Two, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """The turn that cannot be kept is told as failed, never as one that can be continued.

    The one that deletes does not know what is being made at the other: the whole conversation goes.
    """
    one, other = two
    first = await turn(one, f"{CANARY} one")
    go_on = asyncio.Event()
    frames = responses_events()
    upstream.script(Headers(200, SSE_HEADERS), *map(Chunk, frames[:5]), Wait(go_on),
                    *map(Chunk, frames[5:]), EndChunks())  # fmt: skip
    body = prompt(input="two", previous_response_id=first["id"], stream=True)
    client = await one.send(PATH, body)
    await upstream.wait_request(2)
    assert (await use(other, "delete", first["id"])).json()["deleted"] is True
    assert files_with(tmp_path, CANARY) == []
    go_on.set()
    second = response_of(await client.answer())
    assert second["status"] == "failed"
    assert second["error"]["message"].startswith("[store_unavailable] ")
    for proxy in two:
        NOT_FOUND.check(await use(proxy, "get", second["id"]))
        NO_PARENT.check(await use(proxy, "continue", second["id"]))
    assert files_with(tmp_path, CANARY) == []


async def test_what_one_leaves_at_its_end_the_other_has(
    two: Two, upstream: ScriptedUpstream
) -> None:
    """The end of one daemon takes nothing away from the other, nor from one that comes after."""
    one, other = two
    first = await turn(one, "one")
    second = await turn(one, "two", first["id"])
    await one.stop()
    third = await turn(other, "three", second["id"])
    later = await Proxy.start(one.text)
    try:
        await other.stop()
        assert (await turn(later, "four", third["id"]))["status"] == "completed"
    finally:
        await later.stop()
    assert len(heard(upstream.requests[-1])) == 7


# Two processes


async def test_what_one_puts_the_other_finds(file: Path) -> None:
    """At once, whole, and with keys that are nobody else's."""
    async with peer(file) as one, peer(file) as other:
        await one.do("put", names=["a"])
        await other.do("put", names=["b"], parent="a")
        await one.do("put", names=["c"], parent="b")
        for each in (one, other):
            path = await each.do("path", name="c")
            assert [
                f'"{name} of {ALICE} asks"' in said for name, said in zip("abc", path, strict=True)
            ] == [True] * 3
        keys = await other.do("keys", names=["a", "b", "c"])
        assert len(set(keys)) == 3
        assert await one.do("delete", name="b") is True
        assert await other.do("missing", names=["a", "b", "c"]) == ["b"]
        assert await other.do("path", name="c") is None
        await one.close()
        await other.close()
    assert whole(file)


async def test_both_put_thousands(file: Path) -> None:
    """Two processes that put at the same time lose no turn, make no error, and share no key."""
    mine, others = names("a", 3000), names("b", 3000)
    async with peer(file) as one, peer(file) as other:
        one.tell("put", names=mine)
        other.tell("put", names=others)
        assert [await one.line(), await other.line()] == [{"did": None}] * 2
        for each in (one, other):
            assert await each.do("missing", names=mine + others) == []
        keys = await one.do("keys", names=mine + others)
        assert len(set(keys)) == 6000
        await one.close()
        await other.close()
    async with peer(file) as again:
        assert (await again.do("shares"))[1] == 6000
    assert whole(file)


async def test_the_bound_holds_over_both(file: Path) -> None:
    """Two processes that put ten times what is kept keep that together, and a little more."""
    most = 300 * SIZE
    async with peer(file, most) as one, peer(file, most) as other:
        for round_ in range(10):
            for each, name in ((one, "a"), (other, "b")):
                each.tell("put", names=names(f"{name}-{round_}", 150), size=SIZE)
            assert [await one.line(), await other.line()] == [{"did": None}] * 2
        await asyncio.sleep(1.1)  # they count what the other holds once a second
        for each, name in ((one, "c"), (other, "d")):
            await each.do("put", names=[name], size=SIZE)

        async def bounded() -> None:
            with closing(sqlite3.connect(file)) as connection:
                counted = connection.execute("SELECT sum(size) FROM turns").fetchone()[0]
            assert counted <= most
            for each in (one, other):
                size, _ = await each.do("shares")
                assert size <= most + SIZE

        await eventually(bounded, 20)
        assert await one.do("missing", names=["c", "d"]) == []
        await one.close()
        await other.close()
    assert size_of(file) <= 4 * most
    assert whole(file)


async def test_nobody_holds_less_than_nothing(file: Path) -> None:
    """Deletions of what the other has put are not counted before that itself is."""
    async with peer(file) as one, peer(file) as other:
        await one.do("put", names=["a", "b"])
        assert await other.do("delete", name="a") is True
        size, turns = await other.do("shares")
        assert (size >= 0, turns >= 0) == (True, True)

        async def counted() -> None:
            assert (await other.do("shares"))[1] == 1

        await eventually(counted, 20)


async def test_the_end_of_one_leaves_all_to_the_other(file: Path) -> None:
    """A close, even in the midst of the other's puts, is seen by nobody."""
    async with peer(file) as one, peer(file) as other:
        other.tell("put", names=names("b", 1000))
        await one.do("put", names=names("a", 100))
        await one.close()
        assert await other.line() == {"did": None}
        assert await other.do("missing", names=names("a", 100) + names("b", 1000)) == []
        await other.close()
    assert whole(file)


@pytest.mark.parametrize("round_", range(3))
async def test_a_kill_of_one_leaves_the_other_working(file: Path, round_: int) -> None:
    """One that is killed while it writes: the other puts on, and has all that was promised."""
    async with AsyncExitStack() as stack:
        killed = await stack.enter_async_context(peer(file))
        other = await stack.enter_async_context(peer(file))
        killed.tell("put for ever", name="a")
        other.tell("put", names=names("b", 300 + 200 * round_))
        seen = [(await killed.line())["put"] for _ in range(20)]
        assert await other.line() == {"did": None}
        killed.process.send_signal(signal.SIGKILL)
        try:
            while True:
                seen.append((await killed.line())["put"])
        except (EOFError, json.JSONDecodeError):
            pass  # its last line may be cut
        await other.do("put", names=["c"], parent=seen[-1])
        lost = await other.do("missing", names=[*seen, *names("b", 300 + 200 * round_), "c"])
        assert lost == []
        assert await other.do("delete", name=seen[0]) is True
        late = await stack.enter_async_context(peer(file))  # the killed one is in nobody's way
        assert await late.do("missing", names=[*seen, "c"]) == [seen[0]]
        await other.close()
        await late.close()
    assert whole(file)


async def test_a_delete_while_the_other_reads_and_writes(file: Path, tmp_path: Path) -> None:
    """The content is gone from every file when the deletion is told, however busy the other is."""
    async with peer(file) as one, peer(file) as other:
        await one.do("put", names=names(CANARY, 5))
        await one.do("put", names=names("a", 200))
        for number in range(5):
            other.tell("put", names=names(f"b-{number}", 300))
            other.tell("missing", names=names("a", 200))
        for number in range(5):
            name = f"{CANARY}-{number}"
            assert await one.do("delete", name=name) is True
            assert files_with(tmp_path, f"{name} of") == []
        for _ in range(5):
            assert await other.line() == {"did": None}
            assert await other.line() == {"did": []}
        await one.close()
        await other.close()


def hold(file: Path, over: threading.Event) -> None:
    """Have the file locked nearly all the time, as one that writes all the time has it."""
    with closing(sqlite3.connect(file, isolation_level=None, timeout=20)) as connection:
        while not over.is_set():
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(0.015)
            connection.execute("COMMIT")
            time.sleep(0.001)


async def test_one_that_writes_all_the_time_starves_nobody(
    file: Path, blocking_calls: BlockingCalls
) -> None:
    """Who waits for the lock gets it when it is free, in a time that hardly varies."""
    blocking_calls.allow("aiproxy/stores/sqlite.py", {"open"})  # as before a daemon serves
    store, over = SqliteSessions(file, patience=0.5), threading.Event()
    store.open()
    store.configure(ttl=0, max_bytes=PLENTY)
    holding = asyncio.create_task(asyncio.to_thread(hold, file, over))
    late = []
    for number in range(150):
        try:
            await store.put(a_turn(f"a-{number}"))
        except StoreError as error:
            late.append(error)
    over.set()
    await holding
    await store.close()
    assert late == []


async def test_both_make_the_file(file: Path) -> None:
    """Of several that find no file each has the one that was made, whoever was first."""
    count = 6
    async with AsyncExitStack() as stack:
        all_of = asyncio.Barrier(count)
        entering = [stack.enter_async_context(peer(file, together=all_of)) for _ in range(count)]
        peers = await asyncio.gather(*entering)
        for number, each in enumerate(peers):
            await each.do("put", names=[f"of-{number}"])
        for each in peers:
            assert await each.do("missing", names=names("of", count)) == []
        for each in peers:
            await each.close()
    assert whole(file)
