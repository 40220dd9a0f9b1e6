"""A process that has a file of sessions open, and does with it what it is told, line by line.

    python tests/store_peer.py FILE MAX_BYTES

Told as JSON, answered as JSON. Turns are as of `turns.turn`, by their names.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any, Self

from aiproxy.sessions import Head, StoreError
from aiproxy.stores.sqlite import SqliteSessions
from turns import ALICE, turn

AT_ONCE = 8  # turns that are put at a time


async def head_of(store: SqliteSessions, name: str, owner: str = ALICE) -> Head:
    """Find a turn that must be there."""
    loaded = await store.load(owner, name)
    if loaded.head is None:
        raise LookupError(f"{name}: {loaded.result}")
    return loaded.head


async def put(store: SqliteSessions, names: Sequence[str], **how: Any) -> None:
    """Put turns, several at a time; arguments as of `turn`, but the parent by its name."""
    parent, left = how.pop("parent", None), iter(names)
    head = None if parent is None else await head_of(store, parent, how.get("owner", ALICE))

    async def work() -> None:
        for name in left:
            await store.put(turn(name, parent=head, **how))

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))


async def answer(store: SqliteSessions, do: str, **told: Any) -> Any:
    """Do one thing."""
    match do:
        case "put":
            await put(store, **told)
            return None
        case "put for ever":
            number = 0
            while True:
                await store.put(turn(f"{told['name']}-{number}"))
                print(json.dumps({"put": f"{told['name']}-{number}"}), flush=True)  # noqa: T201 - told
                number += 1
        case "keys":
            return [(await head_of(store, name)).key for name in told["names"]]
        case "missing":
            found = [(name, await store.load(ALICE, name)) for name in told["names"]]
            return [name for name, loaded in found if loaded.result != "hit"]
        case "path":
            path = await store.path(await head_of(store, told["name"]))
            return None if path is None else [each.input.decode() for each in path]
        case "delete":
            return await store.delete(await head_of(store, told["name"]))
        case "shares":
            await store.check()
            return [store.shares.size, store.shares.turns]
        case _:
            raise LookupError(do)


async def main(file: str, max_bytes: str) -> None:
    """Open when told to, do, close."""
    print(json.dumps({"waits": file}), flush=True)  # noqa: T201 - told
    await asyncio.to_thread(sys.stdin.readline)
    store = SqliteSessions(Path(file), patience=20.0)
    store.open()
    store.configure(ttl=0, max_bytes=int(max_bytes))
    print(json.dumps({"open": file}), flush=True)  # noqa: T201 - told
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            told = {"did": await answer(store, **json.loads(line))}
        except (StoreError, LookupError) as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), flush=True)  # noqa: T201 - told
    await store.close()


@dataclass
class Peer:
    """Such a process, as who started it sees it."""

    process: asyncio.subprocess.Process

    async def line(self) -> Any:
        """Return what it says next."""
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            line = await self.process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    async def do(self, do: str, **told: Any) -> Any:
        """Have it do something that must go well."""
        self.tell(do, **told)
        said = await self.line()
        assert "error" not in said, said
        return said["did"]

    def tell(self, do: str, **told: Any) -> None:
        """Have it do something, and do not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **told}).encode() + b"\n")

    async def close(self) -> None:
        """Let it end, and well."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        async with asyncio.timeout(60):
            assert await self.process.wait() == 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()


@asynccontextmanager
async def peer(
    file: Path, max_bytes: int = 1 << 30, *, together: asyncio.Barrier | None = None
) -> AsyncIterator[Peer]:
    """Start one, and wait until it has the file open; it is killed unless it was closed.

    With `together` it opens the file when all others that wait there do.
    """
    command = (sys.executable, __file__, str(file), str(max_bytes))
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, limit=2**24)
    async with Peer(process) as one:
        assert await one.line() == {"waits": str(file)}
        if together is not None:
            await together.wait()
        one.tell("open")
        assert await one.line() == {"open": str(file)}
        yield one


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
