"""kill -9 loses nothing that a client saw complete; the long form is the command `crash.py`."""

import json
from pathlib import Path
from typing import Any

import pytest

from child_rig import child
from client import IncompleteBody, RawClient, parse_sse
from crash import (
    Daemon,
    Seen,
    ask,
    check_file,
    goes_on,
    is_there,
    lost_of,
    main,
    running_upstream,
    series,
)
from invariants import check_conservation, check_ids, eventually
from responses import responses_events
from rig import prompt
from sessions_rig import UNKNOWN
from steps import SSE_HEADERS, Chunk, Headers, Stall, Step
from upstream import ScriptedUpstream


async def test_f26_kill_9_loses_nothing(tmp_path: Path) -> None:
    """Every id seen complete before one of two kills is there after it, with its whole past."""
    report = await series(tmp_path, rounds=2, ids=200, connections=16, seed=26)
    assert report.rounds == 2
    assert report.seen >= 400
    assert report.lost == []
    assert report.integrity == "ok"


@pytest.mark.timeout(60)  # a process starts twice
async def test_f26_slots_are_free_after_a_kill(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    """Killed with all slots of a key in use, it has all of them again; ids go on for their owner.

    The streams that were cut promised nothing: none of them can be continued by anybody.
    """
    changes: Any = {
        "keys": {"team-a": {"limits": {"concurrent": 4}}},
        "sessions": {"store": f"sqlite:{tmp_path}/sessions.db"},
        "upstreams": {"scripted": {"sessions": "replay"}},
    }
    frames = responses_events()
    held: list[Step] = [Headers(200, SSE_HEADERS), Chunk(b"".join(frames[:5])), Stall()]
    async with child(upstream, tmp_path, **changes) as daemon:
        seen = [(await daemon.post()).json()["id"] for _ in range(4)]
        upstream.default = held
        clients = [await daemon.send(body=prompt(stream=True)) for _ in range(4)]
        cut = []
        for client in clients:
            await client.read_head()
            cut.append(parse_sse(await client.read_until(b"Hello")))
        assert (await daemon.post()).status == 429
        daemon.process.kill()
        await daemon.process.wait()
        for client in clients:
            with pytest.raises((IncompleteBody, ConnectionError)):
                await client.read_body()
    async with child(upstream, tmp_path, **changes) as daemon:
        clients = [await daemon.send(body=prompt(stream=True)) for _ in range(4)]
        assert [(await client.read_head()).status for client in clients] == [200] * 4
        assert (await daemon.post()).status == 429
        await daemon.close_clients()
        upstream.heal()
        broken = [json.loads(events[0][1])["response"]["id"] for events in cut]

        async def continued() -> None:
            await check_ids(daemon, seen, broken)

        await eventually(continued)  # once those that have left are noticed
        await check_conservation(daemon)
    assert check_file(tmp_path / "sessions.db") == "ok"


async def test_what_is_not_there_is_reported(tmp_path: Path) -> None:
    """An id that never was, another text and a shorter past are each found, and nothing else."""
    async with running_upstream() as upstream, Daemon(tmp_path, upstream, "memory:") as daemon:
        await daemon.start()
        seen: list[Seen] = []
        async with await RawClient.connect(daemon.port) as client:
            for streams in (False, True, True, False):
                one, _ = await ask(client, seen[-1] if seen else None, streams=streams)
                assert one is not None
                seen.append(one)
        for holds in (is_there, goes_on):
            assert await lost_of(daemon.port, seen, holds) == set()
        changed, cut = seen[1]._replace(text="another"), seen[2]._replace(turns=4)
        asked = [seen[0], changed, cut, seen[3], Seen(UNKNOWN, "never was", 1)]
        assert await lost_of(daemon.port, asked, is_there) == {changed.id, UNKNOWN}
        assert await lost_of(daemon.port, asked, goes_on) == {cut.id, UNKNOWN}


@pytest.mark.parametrize(("store", "code"), [([], 0), (["--store", "memory:"], 1)])
def test_the_command(capsys: pytest.CaptureFixture[str], store: list[str], code: int) -> None:
    """It ends with 0 where all is kept and with 1 where it is not, and prints what was lost."""
    numbers = ["--rounds", "1", "--ids", "40", "--connections", "4", "--seed", "1"]
    assert main([*numbers, *store]) == code
    out = capsys.readouterr().out
    assert out.startswith("seed 1\n1 rounds, ")
    assert (", 0 lost, " in out) is not bool(store)
    assert ("lost: resp_" in out) is bool(store)
    assert out.endswith("; integrity: ok\n" if not store else "; integrity: not a file\n")
