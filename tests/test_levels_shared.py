"""One state directory of two daemons: who began last owns the file of levels.

So it is while one takes over from the other, which drains; nobody gets a full bucket by it.
"""

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from aiproxy import levels
from aiproxy.stores.level_file import LevelFile, TakenOverError
from drain_rig import FRAMES, held_up
from faults import asked
from invariants import eventually
from rig import Proxy, config_text
from test_limits_kept import left
from test_systemd import connected, logged, process, send
from test_systemd import ended as process_ended
from upstream import ScriptedUpstream

REQUESTS = 1000  # that a key may make a day


@pytest.fixture
def text(upstream: ScriptedUpstream) -> str:
    """Return a configuration in which team-a has a limit that time hardly refills."""
    limits = {"requests": f"{REQUESTS}/day"}
    return config_text(upstream.url, keys={"team-a": {"limits": limits}})


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """Give what ends with the test."""
    async with AsyncExitStack() as made:
        yield made


async def started(stack: AsyncExitStack, text: str, state: Path) -> Proxy:
    """Start a daemon, and wait until the file is its own."""
    proxy = await Proxy.start(text, state=state)
    stack.push_async_callback(proxy.stop)

    async def owns() -> None:
        assert await asyncio.to_thread(owner_in, state) == owner_of(proxy)

    await eventually(owns)
    return proxy


def owner_of(proxy: Proxy) -> str:
    """Return the mark by which a daemon knows the file."""
    file = proxy.daemon._levels._file
    assert file is not None
    return file._owner


def owner_in(state: Path) -> str:
    """Return the mark in the file, empty if there is none."""
    return str(document_in(state)["owner"]) if (state / "levels.json").exists() else ""


def document_in(state: Path) -> dict[str, Any]:
    """Read the file; there is always a whole one."""
    document: dict[str, Any] = json.loads((state / "levels.json").read_bytes())
    return document


def kept(state: Path) -> int:
    """Return how many requests of team-a are left by the file."""
    (bucket,) = document_in(state)["levels"]["keys"]["team-a"]["requests"]
    return int(bucket["level"]) // 10**6


async def post(proxy: Proxy, count: int) -> None:
    """Make requests that are served."""
    for _ in range(count):
        assert (await proxy.post()).status == 200


async def test_the_new_one_begins_with_what_is_left(
    stack: AsyncExitStack, text: str, tmp_path: Path
) -> None:
    """It takes over what was written last: no key has more than before."""
    old = await started(stack, text, tmp_path)
    await post(old, 5)
    await old.daemon._levels.stop()  # writes, as it does now and then
    new = await started(stack, text, tmp_path)
    assert left(new) == [REQUESTS - 5]


async def test_the_end_of_the_old_one_overwrites_nothing(
    stack: AsyncExitStack, upstream: ScriptedUpstream, text: str, tmp_path: Path
) -> None:
    """What drains, however long, leaves the file to the new one, which goes on writing it.

    The next one begins with the new one's levels.
    """
    old = await started(stack, text, tmp_path)
    go_on = asyncio.Event()
    upstream.script(held_up(go_on))
    client = await old.send(body=asked("responses", streamed=True))
    await client.read_head()
    new = await started(stack, text, tmp_path)
    await post(new, 7)
    drain = asyncio.create_task(old.daemon.drain())
    await post(new, 3)
    go_on.set()
    assert await client.read_body() == b"".join(FRAMES)
    await drain
    assert owner_in(tmp_path) == owner_of(new)
    said = [line["event"] for line in old.logs()]
    assert (said.count("levels kept by another process"), said[-1]) == (1, "stopped")
    await new.stop()
    assert (owner_in(tmp_path), kept(tmp_path)) == (owner_of(new), REQUESTS - 10)
    assert "levels kept by another process" not in [line["event"] for line in new.logs()]
    third = await started(stack, text, tmp_path)
    assert left(third) == [REQUESTS - 10]
    assert os.listdir(tmp_path) == ["levels.json"]  # noqa: PTH208 - of this test alone


async def test_both_write_again_and_again(
    stack: AsyncExitStack, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While both live only the later one's levels are in the file, at any time, and a whole one."""
    monkeypatch.setattr(levels.LevelKeeper.__init__, "__kwdefaults__", {"period": 0.005})
    old = await started(stack, text, tmp_path)
    await post(old, 1)
    new = await started(stack, text, tmp_path)
    await post(new, 2)

    async def written() -> None:
        assert kept(tmp_path) == left(new)[0]

    await eventually(written)
    for _ in range(100):
        await post(old, 1)
        assert owner_in(tmp_path) == owner_of(new)
        assert kept(tmp_path) >= left(new)[0]
    taken = [line for line in old.logs() if line["event"] == "levels kept by another process"]
    assert len(taken) == 1


def test_what_one_has_found_is_true_until_it_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A successor that begins between another's look at the file and its write comes after it."""
    old, new = LevelFile(tmp_path), LevelFile(tmp_path)
    old.save({}, 0, 0)
    began = threading.Event()
    look = LevelFile._is_another_s

    def slowly(self: LevelFile) -> bool:
        found = look(self)
        began.set()
        successor.join(0.3)  # it would be done by then if it could
        return found

    def succeed() -> None:
        began.wait()
        new.save({}, 0, 0)

    successor = threading.Thread(target=succeed)
    monkeypatch.setattr(LevelFile, "_is_another_s", slowly)
    successor.start()
    old.save({}, 0, 0)
    successor.join()
    monkeypatch.setattr(LevelFile, "_is_another_s", look)
    assert owner_in(tmp_path) == new._owner
    with pytest.raises(TakenOverError):
        old.save({}, 0, 0)


async def test_of_many_in_turn_the_last_one_owns_it(
    stack: AsyncExitStack, text: str, tmp_path: Path
) -> None:
    """Through five upgrades in which each ends after its successor began, nothing is forgotten."""
    one = await started(stack, text, tmp_path)
    for upgrade in range(1, 6):
        await post(one, 10)
        await one.daemon._levels.stop()
        successor = await started(stack, text, tmp_path)
        assert left(successor) == [REQUESTS - 10 * upgrade]
        await one.stop()
        assert owner_in(tmp_path) == owner_of(successor)
        one = successor


# Processes


@pytest.mark.parametrize("way", ["in order", "killed"])
async def test_two_processes(upstream: ScriptedUpstream, tmp_path: Path, way: str) -> None:
    """The later one's levels stay at the end of the earlier one; if it was killed, they do not.

    Then the earlier one, which goes on alone, has the file again.
    """
    file, state = tmp_path / "aiproxy.yaml", tmp_path / "state"
    state.mkdir()
    limits = {"requests": f"{REQUESTS}/day"}
    text = config_text(upstream.url, keys={"team-a": {"limits": limits}})
    file.write_text(text, encoding="utf-8")
    environ = {"STATE_DIRECTORY": str(state)}
    with (
        socket.create_server(("127.0.0.1", 0)) as one_port,
        socket.create_server(("127.0.0.1", 0)) as other_port,
    ):
        async with process(file, sockets=[one_port], environ=environ) as old:
            await logged(old, "started")
            await ask(one_port, 4)

            async def claimed(by: asyncio.subprocess.Process) -> None:
                assert (state / "levels.json").exists()
                assert document_in(state)["pid"] == by.pid

            await eventually(lambda: claimed(old), 20)
            async with process(file, sockets=[other_port], environ=environ) as new:
                await logged(new, "started")
                await eventually(lambda: claimed(new), 20)
                await ask(other_port, 3)
                writes = old if way == "killed" else new
                if way == "killed":
                    new.kill()
                    await new.wait()
                old.send_signal(signal.SIGTERM)
                code, err = await process_ended(old)
                assert code == 0
                assert ("levels kept by another process" in err) == (way == "in order")
                assert document_in(state)["pid"] == writes.pid
                if way == "killed":
                    assert kept(state) == REQUESTS - 4
                    return
                new.send_signal(signal.SIGTERM)
                assert (await process_ended(new))[0] == 0
    assert kept(state) <= REQUESTS - 3


async def ask(port: socket.socket, count: int) -> None:
    """Make requests that are served."""
    for _ in range(count):
        async with await connected(port) as client:
            await send(client)
            assert (await client.answer()).status == 200
