"""Stores that are away, damaged or started again, and what of a text is left on the disk."""

import asyncio
import json
import re
import resource
import shutil
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from answers import Usage
from client import Answer
from invariants import check_invariants, check_terminal, eventually
from refusals import SERVER, Refusal
from responses import message_item, reasoning_item, responses_events, responses_json
from rig import TEAM_B, Proxy
from sessions_rig import (
    NO_PARENT,
    NOT_FOUND,
    STORES,
    Serve,
    ask,
    check_unknown,
    facts_of,
    files_with,
    heard,
    held_here,
    sent,
    store_of,
    turn,
    use,
)
from steps import json_answer, stream
from upstream import ScriptedUpstream

HOLDER = "replay"

Run = Callable[[str], Awaitable[Proxy]]

AWAY = Refusal(503, "store_unavailable", SERVER, headers={"retry-after": None})
MOST_WAIT = 4.0  # seconds that a request waits for a store at most
CANARY = "CANARY-ON-THE-DISK-6203"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the database is."""
    return tmp_path / "sessions.db"


@pytest.fixture
async def run(upstream: ScriptedUpstream) -> AsyncIterator[Run]:
    """Start daemons that end with the test, if they have not before."""
    proxies: list[Proxy] = []

    async def start(text: str) -> Proxy:
        proxies.append(await Proxy.start(text))
        return proxies[-1]

    yield start
    for proxy in proxies:
        await proxy.stop()


@pytest.fixture
async def proxy(serve: Serve, file: Path) -> Proxy:
    """A daemon with a database."""
    return await serve(sessions={"store": f"sqlite:{file}"})


@pytest.fixture
def other(proxy: Proxy, file: Path) -> Iterator[sqlite3.Connection]:
    """Another program's connection to the daemon's database, with no transaction open."""
    connection = sqlite3.connect(file, timeout=0, isolation_level=None)
    yield connection
    connection.close()


@pytest.mark.parametrize("kind", STORES)
async def test_a_restart(run: Run, upstream: ScriptedUpstream, tmp_path: Path, kind: str) -> None:
    """Conversations in a file outlive the daemon, byte for byte; those in memory do not."""
    text = held_here(upstream, store_of(kind, tmp_path))
    proxy = await run(text)
    items = [reasoning_item(), message_item("one answered")]
    upstream.script(json_answer(responses_json(items=items)))
    first = await turn(proxy, "one")
    upstream.script(stream(responses_events("two answered")))
    second = await turn(proxy, "two", first["id"], streamed=True)
    reference = [{"type": "item_reference", "id": items[1]["id"]}]
    listed = (await use(proxy, "input_items", second["id"])).body
    deleted = (await turn(proxy))["id"]
    assert (await use(proxy, "delete", deleted)).status == 200
    await proxy.stop()
    proxy = await run(text)
    if kind == "memory":
        await check_unknown(proxy, first["id"])
        return
    assert (await use(proxy, "get", second["id"])).json() == second
    assert (await use(proxy, "input_items", second["id"])).body == listed
    third = await turn(proxy, "three", second["id"])
    told = ["one", "<reasoning>", "one answered", "two", "two answered", "three"]
    assert heard(upstream.requests[-1]) == told
    assert sent(upstream.requests[-1])[1:3] == [json.dumps(item).encode() for item in items]
    await turn(proxy, reference)
    assert heard(upstream.requests[-1]) == ["one answered"]
    await check_unknown(proxy, second["id"], key=TEAM_B)
    NO_PARENT.check(await use(proxy, "continue", deleted))
    metrics = await proxy.metrics()
    assert metrics[("aiproxy_sessions_stored_turns", frozenset())] == 4
    assert (await use(proxy, "get", third["id"])).status == 200


async def test_an_end_amid_streams_keeps_what_was_told(
    run: Run, upstream: ScriptedUpstream, file: Path
) -> None:
    """Every id that a client saw complete before the daemon ended can be continued after it."""
    text = held_here(upstream, f"sqlite:{file}")
    proxy = await run(text)
    made = await asyncio.gather(*(turn(proxy, f"{n}", streamed=n % 2 == 0) for n in range(40)))
    await proxy.stop()
    proxy = await run(text)
    for number, response in enumerate(made):
        await turn(proxy, "more", response["id"])
        assert heard(upstream.requests[-1])[::2] == [f"{number}", "more"]


def copy(file: Path, folder: Path) -> Path:
    """Copy a database with its log of writes, as an end without warning would leave them."""
    for path in file.parent.glob(f"{file.name}*"):
        if not path.name.endswith("-shm"):
            shutil.copy(path, folder / path.name)
    return folder / file.name


async def test_what_a_crash_would_leave(
    run: Run, upstream: ScriptedUpstream, file: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """At the moment a client sees its turn complete, the turn is in the file."""
    proxy = await run(held_here(upstream, f"sqlite:{file}"))
    previous = None
    for number in range(6):
        response = await turn(proxy, f"{number}", previous, streamed=number % 2 == 0)
        left = copy(file, tmp_path_factory.mktemp("crash"))
        previous = response["id"]
        after = await run(held_here(upstream, f"sqlite:{left}"))
        assert (await use(after, "get", previous)).json() == response
        await turn(after, "more", previous)
        told = [*map(str, range(number + 1)), "more"]
        assert heard(upstream.requests[-1])[::2] == told


async def canaries(proxy: Proxy, upstream: ScriptedUpstream, **fields: Any) -> list[str]:
    """Make turns in which everything has the canary in it; return their ids, the last one first."""
    made: list[str] = []
    for streamed in (False, True):
        items = [reasoning_item(f"enc {CANARY}", summary=CANARY), message_item(f"out {CANARY}")]
        frames = responses_events(items=items)
        upstream.script(stream(frames) if streamed else json_answer(responses_json(items=items)))
        told = {"instructions": CANARY, "metadata": {"a": CANARY}, **fields}
        previous = made[0] if made and fields.get("store", True) else None
        given: Any = [{"role": "user", "content": f"in {CANARY}"}] if streamed else f"in {CANARY}"
        response = await turn(proxy, given, previous, streamed=streamed, **told)
        made.insert(0, response["id"])
    return made


async def test_nothing_is_left_after_a_delete(
    proxy: Proxy, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """Input, output and instructions are gone from the database, its log of writes, our log."""
    await turn(proxy, "something else")
    made = await canaries(proxy, upstream)
    assert files_with(tmp_path, CANARY)
    for response_id in made:
        assert (await use(proxy, "delete", response_id)).status == 200

    async def gone() -> None:
        assert files_with(tmp_path, CANARY) == []

    await eventually(gone)
    assert CANARY.encode() not in proxy.tap.raw
    assert CANARY.encode() not in (await proxy.admin("/metrics")).body
    await proxy.stop()
    assert files_with(tmp_path, CANARY) == []


@pytest.mark.timeout(30)  # waits for a bounded wait, of about MOST_WAIT
async def test_a_delete_while_a_backup_reads(
    proxy: Proxy, upstream: ScriptedUpstream, other: sqlite3.Connection, tmp_path: Path
) -> None:
    """It is refused for now, the turn is gone for all else, and a repeat is answered when true."""
    made = (await canaries(proxy, upstream))[0]
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM turns").fetchone()
    async with asyncio.timeout(MOST_WAIT):
        AWAY.check(await use(proxy, "delete", made))
    NOT_FOUND.check(await use(proxy, "get", made))
    NOT_FOUND.check(await use(proxy, "input_items", made))
    NO_PARENT.check(await use(proxy, "continue", made))
    await check_unknown(proxy, made, key=TEAM_B)
    assert (await proxy.admin("/-/ready")).status == 200
    other.execute("ROLLBACK")
    answer = await use(proxy, "delete", made)
    assert (answer.status, answer.json()["deleted"]) == (200, True)
    await check_unknown(proxy, made)
    assert (await use(proxy, "get", (await turn(proxy, "kept"))["id"])).status == 200


async def test_nothing_is_written_of_an_unstored_turn(
    proxy: Proxy, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """`store: false` leaves nothing in the database, its log of writes, our log, at any time."""
    await turn(proxy, "something else")
    made = await canaries(proxy, upstream, store=False)
    for response_id in made:
        await check_unknown(proxy, response_id)
    assert files_with(tmp_path, CANARY) == []
    await proxy.stop()
    assert files_with(tmp_path, CANARY) == []
    assert CANARY.encode() not in proxy.tap.raw


def check_away(streamed: Answer) -> None:
    """Assert that a stream ended as one whose turn could not be stored."""
    check_terminal(streamed.body, completed=False)
    last = facts_of(streamed)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert last["response"]["error"]["message"].startswith("[store_unavailable]")


async def longest_gap(until: asyncio.Event) -> float:
    """Return the longest time in which this loop could not run, in seconds."""
    loop, longest = asyncio.get_running_loop(), 0.0
    while not until.is_set():
        before = loop.time()
        await asyncio.sleep(0.005)
        longest = max(longest, loop.time() - before)
    return longest


@pytest.mark.timeout(30)  # waits for a bounded wait, of about MOST_WAIT
async def test_f33_a_locked_database(
    proxy: Proxy, upstream: ScriptedUpstream, other: sqlite3.Connection
) -> None:
    """A turn that cannot be stored ends in bounded time, told as such, charged and unpromised."""
    root = (await turn(proxy, "root"))["id"]
    kept = (await turn(proxy, "kept"))["id"]
    upstream.usage = Usage(input=1000, cached=0, output=100, reasoning=0)
    other.execute("BEGIN IMMEDIATE")
    until = asyncio.Event()
    gap = asyncio.get_running_loop().create_task(longest_gap(until))
    async with asyncio.timeout(MOST_WAIT):
        whole, streamed, unstored, seen, deleted = await asyncio.gather(
            ask(proxy, "a", root),
            ask(proxy, "b", root, streamed=True),
            ask(proxy, "c", root, store=False),
            use(proxy, "get", root),
            use(proxy, "delete", kept),
        )
    until.set()
    assert await gap < 0.25
    AWAY.check(whole, upstream="scripted")
    AWAY.check(deleted)
    check_away(streamed)
    assert (unstored.status, seen.status) == (200, 200)  # neither writes
    other.execute("ROLLBACK")
    NO_PARENT.check(await use(proxy, "continue", facts_of(streamed)[-1]["response"]["id"]))
    await turn(proxy, "more", root)
    assert heard(upstream.requests[-1])[::2] == ["root", "more"]
    assert (await use(proxy, "get", kept)).status == 200
    assert (await use(proxy, "delete", kept)).status == 200
    lines = [line for line in proxy.request_logs() if line["outcome"] == "store_error"]
    assert {line["error_code"] for line in lines} == {"store_unavailable"}
    charged = [(line["input_tokens"], line["output_tokens"]) for line in lines]
    assert sorted(charged) == [(0, 0), (1000, 100), (1000, 100)]
    await check_invariants(proxy, upstream)


@pytest.mark.timeout(30)
async def test_f33_the_loop_goes_on_while_the_database_is_locked(
    proxy: Proxy, upstream: ScriptedUpstream, other: sqlite3.Connection
) -> None:
    """While turns wait for a lock the loop is never held up for 50 ms by it.

    Other programs may hold it up; hence the best of five tries counts, each with a lock of 300 ms.
    """
    root = (await turn(proxy, "root"))["id"]
    loop, gaps = asyncio.get_running_loop(), list[float]()
    while len(gaps) < 5 and min(gaps, default=1.0) >= 0.05:
        other.execute("BEGIN IMMEDIATE")
        until = asyncio.Event()
        gap = loop.create_task(longest_gap(until))
        turns = [loop.create_task(turn(proxy, f"{n}", root, streamed=n % 2 == 0)) for n in range(8)]
        await asyncio.sleep(0.3)  # the lock's own duration
        assert (await use(proxy, "get", root)).status == 200
        assert not any(task.done() for task in turns)
        until.set()
        gaps.append(await gap)
        other.execute("ROLLBACK")
        made = await asyncio.gather(*turns)
        await turn(proxy, "more", made[-1]["id"])
    assert min(gaps) < 0.05
    await check_invariants(proxy, upstream)


async def test_f33_a_database_that_became_read_only(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """Turns are told as not stored, what was there is read on, and it goes on once it can."""
    root = (await turn(proxy, "root"))["id"]
    store: Any = proxy.daemon._sessions._store
    execute = store._book._execute
    execute("PRAGMA query_only = ON")  # as on a file system that the kernel has made so
    whole, streamed = await asyncio.gather(
        ask(proxy, "a", root), ask(proxy, "b", root, streamed=True)
    )
    AWAY.check(whole, upstream="scripted")
    check_away(streamed)
    asked = len(upstream.requests)
    AWAY.check(await ask(proxy, "too late", root))  # nobody makes what cannot be kept
    assert len(upstream.requests) == asked
    assert (await use(proxy, "get", root)).status == 200
    AWAY.check(await use(proxy, "delete", root))
    assert (await ask(proxy, "c", root, store=False)).status == 200
    execute("PRAGMA query_only = OFF")
    NO_PARENT.check(await use(proxy, "continue", facts_of(streamed)[-1]["response"]["id"]))
    await turn(proxy, "more", root)
    assert heard(upstream.requests[-1])[::2] == ["root", "more"]
    await check_invariants(proxy, upstream, stream=streamed.body, bodies=[whole.body])
    lines = [line for line in proxy.request_logs() if line["outcome"] == "store_error"]
    assert sorted(line["output_tokens"] for line in lines) == [0, 0, 5, 5]
    assert not any(line["estimated"] for line in lines)


@pytest.mark.timeout(30)
async def test_a_lock_that_is_soon_gone(
    proxy: Proxy, upstream: ScriptedUpstream, other: sqlite3.Connection
) -> None:
    """A turn waits for a lock that ends within its bound, and is stored."""
    other.execute("BEGIN IMMEDIATE")
    task = asyncio.get_running_loop().create_task(turn(proxy, "patient"))
    await upstream.wait_request(1)
    await asyncio.sleep(0.1)  # the lock's own duration
    assert not task.done()
    other.execute("ROLLBACK")
    response = await task
    assert (await use(proxy, "get", response["id"])).json() == response


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size in bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.timeout(30)  # waits for a bounded wait, of about MOST_WAIT
async def test_f31_a_full_disk(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """What cannot be written is not promised, and once there is room again all is as before."""
    root = (await turn(proxy, "root"))["id"]
    large = "x" * 2**20
    with no_file_beyond(2**19):
        async with asyncio.timeout(MOST_WAIT):
            whole = await ask(proxy, large, root)
            streamed = await ask(proxy, large, root, streamed=True)
        assert (await use(proxy, "get", root)).status == 200
    AWAY.check(whole, upstream="scripted")
    check_away(streamed)
    NO_PARENT.check(await use(proxy, "continue", facts_of(streamed)[-1]["response"]["id"]))
    child = await turn(proxy, large, root)
    await turn(proxy, "more", child["id"])
    assert heard(upstream.requests[-1])[::2] == ["root", large, "more"]
    await check_invariants(proxy, upstream)


def read(file: Path) -> bytes:
    """Return all that is in it."""
    return file.read_bytes()


def set_version(file: Path) -> bytes:
    """Mark a database as one of a version to come."""
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA user_version = 999999")
    connection.close()
    return read(file)


def corrupt(file: Path) -> bytes:
    """Overwrite most of a database, but not what tells that it is one."""
    data = file.read_bytes()
    file.write_bytes(data[:100] + b"\xa5" * (len(data) - 100))
    return read(file)


def corrupt_later(file: Path) -> bytes:
    """Overwrite all but the first page of a database."""
    data = file.read_bytes()
    file.write_bytes(data[:4096] + b"\xa5" * (len(data) - 4096))
    return read(file)


def replace(file: Path) -> bytes:
    """Put something else in a database's place."""
    file.write_bytes(b"This is the diary of somebody else.\n" * 400)
    return read(file)


@pytest.mark.parametrize("damage", [set_version, corrupt, corrupt_later, replace])
async def test_a_file_that_cannot_be_used(
    run: Run, upstream: ScriptedUpstream, file: Path, damage: Callable[[Path], bytes]
) -> None:
    """The daemon refuses to start, names the file, and leaves it as it is."""
    text = held_here(upstream, f"sqlite:{file}")
    proxy = await run(text)
    await turn(proxy)
    await proxy.stop()
    before = damage(file)
    with pytest.raises(Exception, match=re.escape(str(file))) as refused:
        await run(text)
    assert len(str(refused.value)) > len(str(file)) + 10
    assert read(file) == before


async def test_a_place_where_no_file_can_be(
    run: Run, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """A folder in the file's place is refused by its name."""
    text = held_here(upstream, f"sqlite:{tmp_path}")
    with pytest.raises(Exception, match=re.escape(str(tmp_path))):
        await run(text)
