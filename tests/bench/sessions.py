"""What conversations cost: `python tests/bench/sessions.py [DIRECTORY]`.

Storing a turn and replaying a conversation, in memory and in SQLite (in DIRECTORY, by default a
temporary one), beside the JSON work of one request, measured in the same run.
"""
# ruff: noqa: T201 - a program for a terminal prints

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import uvloop

from aiproxy.dialects.responses_items import may_reason
from aiproxy.sessions import Content, Head, SessionStore, Turn, new_response_id
from aiproxy.sessions.items import identified, joined
from aiproxy.stores.memory_sessions import MemorySessions
from aiproxy.stores.sqlite import SqliteSessions

TURNS, SIZE = 100, 4096  # of the conversation that is replayed
ROUNDS = 60
AT_ONCE = 32  # connections


def content(size: int = SIZE) -> Content:
    """Return a turn of that many bytes, half of them asked."""
    text = "x" * (size // 2 - 100)
    given = [{"type": "message", "role": "user", "content": text}]
    part = {"type": "output_text", "text": text, "annotations": []}
    made = [{"id": new_response_id(), "type": "message", "role": "assistant", "content": [part]}]
    encode = msgspec.json.encode
    return Content(encode(given), encode(made), b'{"id":"x","output":', b"}")


def turn(parent: Head | None = None, size: int = SIZE) -> Turn:
    """Return a new turn."""
    kept = content(size)
    items = identified(kept.input, kept.output)
    return Turn(
        new_response_id(), "bench", parent, 0, "m", "u", 100, content=kept, items=items,
        reasons=may_reason(kept.input, kept.output),
    )  # fmt: skip


async def grow(store: SessionStore, turns: int) -> str:
    """Store a conversation; return the id of its last turn."""
    parent = None
    last = ""
    for _ in range(turns):
        made = turn(parent)
        await store.put(made)
        last = made.id
        parent = (await store.load("bench", last)).head
    return last


async def replay(store: SessionStore, last: str) -> bytes:
    """Do what a request does that goes on from a turn."""
    head = (await store.load("bench", last)).head
    assert head is not None
    path = await store.path(head)
    assert path is not None
    assert not any(delta.reasons for delta in path)
    return joined(each for delta in path for each in (delta.input, delta.output))


async def median(work: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """Return the median of wall and CPU time of some work, in ms."""
    walls, cpus = [], []
    for _ in range(ROUNDS):
        wall, cpu = time.perf_counter(), time.process_time()
        await work()
        walls.append(1000 * (time.perf_counter() - wall))
        cpus.append(1000 * (time.process_time() - cpu))
    return statistics.median(walls), statistics.median(cpus)


async def bench(store: SessionStore, base: float) -> None:
    """Measure one store; `base` is the CPU time to compare with, ms."""
    store.open()
    store.configure(ttl=0, max_bytes=1 << 30)
    last = await grow(store, TURNS)
    size = len(await replay(store, last))
    wall, cpu = await median(lambda: replay(store, last))
    print(
        f"{store.name}: replay of {TURNS} turns, {size} bytes: {wall:.2f} ms, CPU {cpu:.2f} ms"
        f" ({cpu / base:.1f} x one JSON round trip of it)"
    )

    async def put_many() -> None:
        await asyncio.gather(*(store.put(turn(size=1024)) for _ in range(AT_ONCE)))

    wall, cpu = await median(put_many)
    print(
        f"{store.name}: {AT_ONCE} turns stored at once: {wall:.2f} ms,"
        f" CPU {1000 * cpu / AT_ONCE:.0f} us a turn"
    )
    await store.close()


async def main(directory: Path) -> None:
    """Measure both."""
    whole = [msgspec.json.decode(content().input) for _ in range(2 * TURNS)]
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        msgspec.json.decode(msgspec.json.encode(whole))
        times.append(1000 * (time.process_time() - began))
    base = statistics.median(times)
    print(f"JSON round trip of as much: CPU {base:.2f} ms")
    await bench(MemorySessions(), base)
    await bench(SqliteSessions(directory / "bench.db"), base)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        uvloop.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary)))
