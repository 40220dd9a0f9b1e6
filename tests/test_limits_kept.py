"""Levels over reloads and restarts: nothing gives anybody a full bucket."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aiproxy.levels import LevelKeeper
from aiproxy.logs import Log
from aiproxy.metrics import Metrics
from aiproxy.stores import level_file
from aiproxy.stores.level_file import LevelFile, LevelFileError, state_directory
from aiproxy.stores.memory import MemoryLimits
from conftest import BlockingCalls
from invariants import check_invariants, eventually
from responses import responses_events
from rig import ABSENT, LogTap, Proxy, config_text, load, prompt, totals
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Wait

if TYPE_CHECKING:
    from aiproxy.config import Config

Serve = Callable[..., Awaitable[Proxy]]
CHUNKED = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
SECOND = 10**9


def text_of(upstream: ScriptedUpstream, limits: Any, **changes: Any) -> str:
    """A configuration in which team-a has these limits (ABSENT: no such key)."""
    if limits is ABSENT:
        return config_text(upstream.url, keys={"team-a": ABSENT}, **changes)
    absent = {name: ABSENT for name in ("requests", "tokens") if name not in limits}
    own = {"concurrent": 99, **absent, **limits}
    return config_text(upstream.url, keys={"team-a": {"limits": own}}, **changes)


async def reload(proxy: Proxy, text: str) -> None:
    """Put another configuration in force."""
    proxy.text = text
    assert (await proxy.admin("/-/reload", "POST")).status == 200


def freeze(proxy: Proxy) -> None:
    """Let the limiter's time stand still."""
    now = proxy.daemon._limits._clock.latest
    proxy.daemon._limits._clock.read = lambda: now


def left(proxy: Proxy, kind: str = "requests") -> list[int]:
    """What team-a has left in each window."""
    levels = proxy.daemon._limits.levels("keys").get("team-a", [])
    return [level.remaining for level in levels if level.kind == kind]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("10/day", "10/day", [6]),
        ("10/day", "5/day", [3]),  # scaled down
        ("10/day", "100/day", [6]),  # never up
        ("10/day", {"rate": "100/day", "burst": 20}, [6]),
        ("24/day", "1/h", [0]),  # another window of the same limit is no new one
        ("10/day", ["10/day", "100/h"], [6, 100]),  # one that comes in addition is
        (["10/day", "100/h"], "100/h", [96]),
    ],
)
async def test_a_reload_keeps_levels(
    serve: Serve, upstream: ScriptedUpstream, before: Any, after: Any, expected: list[int]
) -> None:
    """Four requests were made: of another limit as much is left as is fair, never more."""
    proxy = await Proxy.start(text_of(upstream, {"requests": before}))
    try:
        freeze(proxy)
        for _ in range(4):
            assert (await proxy.post()).status == 200
        await reload(proxy, text_of(upstream, {"requests": after}))
        assert left(proxy) == expected
    finally:
        await proxy.stop()


async def test_a_key_that_is_gone_is_forgotten(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Its buckets go with it; when it comes back it is a new one."""
    proxy = await serve(keys={"team-a": {"limits": {"requests": "2/day"}}})
    assert [(await proxy.post()).status for _ in range(3)] == [200, 200, 429]
    await reload(proxy, text_of(upstream, ABSENT))
    assert left(proxy) == []
    await reload(proxy, text_of(upstream, {"requests": "2/day"}))
    assert left(proxy) == [2]


async def test_what_is_open_is_settled_after_a_reload(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A stream over a reload of its limits gives its slot back, and pays from the new bucket."""
    proxy = await serve(keys={"team-a": {"limits": {"tokens": "100000/day", "concurrent": 2}}})
    freeze(proxy)
    go_on = asyncio.Event()
    frames = responses_events()
    upstream.script(Headers(200, CHUNKED), Chunk(frames[0]), Wait(go_on),
                    *map(Chunk, frames[1:]), EndChunks())  # fmt: skip
    client = await proxy.send("/v1/responses", prompt(stream=True, max_output_tokens=1000))
    await client.read_head()
    assert proxy.daemon._limits.held == 1
    await reload(proxy, text_of(upstream, {"tokens": "200000/day", "concurrent": 1}))
    assert proxy.daemon._limits.held == 1
    assert (await proxy.post()).status == 429
    go_on.set()
    await client.read_body()
    assert left(proxy, "tokens") == [100_000 - 18]
    await check_invariants(proxy, upstream)


async def test_f27_a_hundred_reloads_refill_nothing(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Whatever else changes and changes back, a key gets its two requests and no third."""
    proxy = await serve(keys={"team-a": {"limits": {"requests": "2/day"}}})
    statuses = []
    for number in range(100):
        requests = ("2/day", {"rate": "3/day", "burst": 2}, ["2/day", "9/h"])[number % 3]
        turn = {"scripted": {"headers": {"X-Turn": str(number)}}}
        await reload(proxy, text_of(upstream, {"requests": requests}, upstreams=turn))
        if number % 10 == 0:
            statuses.append((await proxy.post()).status)
    assert statuses == [200, 200, *[429] * 8]


# Restarts


async def test_a_restart_gives_nobody_a_full_bucket(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """Levels are written at the end and loaded at the start; time goes on meanwhile."""
    text = text_of(upstream, {"requests": "3/day", "tokens": "86400/day"})
    for expected in ([200, 200], [200, 429], [429, 429]):
        proxy = await Proxy.start(text, state=tmp_path)
        assert [(await proxy.post()).status for _ in range(2)] == expected
        await proxy.stop()
    assert os.listdir(tmp_path) == ["levels.json"]  # noqa: PTH208 - of this test alone
    document = json.loads((tmp_path / "levels.json").read_bytes())
    document["monotonic_ns"] -= 43_200 * SECOND  # half a day ago, on the same boot
    document["time_ns"] -= 10**6 * SECOND  # the wall clock does not matter
    (tmp_path / "levels.json").write_text(json.dumps(document))
    proxy = await Proxy.start(text, state=tmp_path)
    assert left(proxy) == [1]
    assert left(proxy, "tokens") == [86400]  # aged, and not above capacity
    await proxy.stop()


async def test_a_restart_with_other_limits_is_like_a_reload(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """What shrank while the daemon was away is scaled down; who is gone is forgotten."""
    proxy = await Proxy.start(text_of(upstream, {"requests": "10/day"}), state=tmp_path)
    for _ in range(4):
        await proxy.post()
    await proxy.stop()
    proxy = await Proxy.start(text_of(upstream, {"requests": "5/day"}), state=tmp_path)
    assert left(proxy) == [3]
    await proxy.stop()
    proxy = await Proxy.start(text_of(upstream, ABSENT), state=tmp_path)
    await proxy.stop()
    assert json.loads((tmp_path / "levels.json").read_bytes())["levels"]["keys"] == {}


BROKEN = {
    "empty": b"",
    "no JSON": b"{",
    "another document": b"[]",
    "another version": b'{"version":2,"boot_id":"","monotonic_ns":0,"time_ns":0,"levels":{}}',
    "text for a level": b'{"version":1,"boot_id":"","monotonic_ns":0,"time_ns":0,"levels":{"keys":'
    b'{"team-a":{"requests":[{"amount":1,"seconds":1,"capacity":1,"level":"x"}]}}}}',
    "a rate of 0": b'{"version":1,"boot_id":"","monotonic_ns":0,"time_ns":0,"levels":{"keys":'
    b'{"team-a":{"requests":[{"amount":0,"seconds":1,"capacity":1,"level":1}]}}}}',
    "not UTF-8": b'{"version":1,"boot_id":"\xff"}',
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=list(BROKEN))
async def test_a_file_that_cannot_be_used_is_said_to_be_one(
    upstream: ScriptedUpstream, tmp_path: Path, data: bytes
) -> None:
    """The daemon serves, with a line in the log and a metric, and writes a good one at its end."""
    (tmp_path / "levels.json").write_bytes(data)
    proxy = await Proxy.start(text_of(upstream, {"requests": "3/day"}), state=tmp_path)
    assert (await proxy.post()).status == 200
    failed = totals(await proxy.metrics(), "aiproxy_store_errors_total", "operation")
    assert failed == {"load": 1}
    await proxy.stop()
    (line,) = [it for it in proxy.logs() if it["event"] == "levels not loaded"]
    assert (line["level"], line["file"]) == ("error", str(tmp_path / "levels.json"))
    assert await asyncio.to_thread(LevelFile(tmp_path).load) is not None


async def test_without_a_state_directory_it_is_said(upstream: ScriptedUpstream) -> None:
    """A warning at the start, if there is anything to keep."""
    for limits, expected in (({"requests": "3/day"}, 1), ({}, 0)):
        proxy = await Proxy.start(text_of(upstream, limits))
        await proxy.stop()
        lines = [it for it in proxy.logs() if it["event"] == "levels not kept"]
        assert [line["level"] for line in lines] == ["warning"] * expected


def limits_of(requests: str = "10/day") -> MemoryLimits:
    """Levels of one key, whose time stands still."""
    config: Config = load(
        config_text("http://127.0.0.1:9/v1", keys={"team-a": {"limits": {"requests": requests}}})
    )
    limits = MemoryLimits(lambda: 0)
    limits.configure(config)
    return limits


async def test_levels_are_written_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocking_calls: BlockingCalls
) -> None:
    """Every period; a disk that fails is logged once and counted, the old file stays."""
    tap, metrics = LogTap(), Metrics()
    log = Log(tap, level="info", fmt="json")
    keeper = LevelKeeper(limits_of(), tmp_path, metrics=metrics, log=log.process, period=0.01)
    file = tmp_path / "levels.json"
    keeper.start()

    async def changed() -> None:
        assert file.exists()
        assert file.read_bytes() != before

    before = b""
    await eventually(changed)
    before = file.read_bytes()
    await eventually(changed)
    real, failures = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal failures
        failures += 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    async def failed() -> None:
        assert failures >= 4

    await eventually(failed)
    before = file.read_bytes()
    assert json.loads(before)["version"] == 1
    monkeypatch.setattr(os, "fsync", real)
    await eventually(changed)
    await keeper.stop()
    before = file.read_bytes()
    log.close()
    said = [(line["event"], line["level"]) for line in tap.lines()]
    assert said == [("levels not written", "error"), ("levels written again", "info")]
    counted = b'aiproxy_store_errors_total{operation="save",store="levels"} %d.0' % failures
    assert counted in metrics.exposition()
    assert os.listdir(tmp_path) == ["levels.json"]  # noqa: PTH208 - of this test alone
    await asyncio.sleep(0.03)
    assert file.read_bytes() == before  # nothing is written after the end


@pytest.mark.parametrize(
    ("boot", "monotonic", "wall", "age"),
    [
        ("same", 5, 9999, 5),  # nobody sets this clock
        ("same", -5, 9999, 0),
        ("another", 5, 70, 70),
        ("another", 5, -70, 0),  # the wall clock went back
        ("", 5, 70, 70),
    ],
)
def test_the_age_of_levels(  # noqa: PLR0917 - a row of the table
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    boot: str,
    monotonic: int,
    wall: int,
    age: int,
) -> None:
    """Within one boot the monotonic clock tells it, else the wall clock; it is never negative."""
    monkeypatch.setattr(level_file, "_boot_id", lambda: "same" if boot else "")
    file = LevelFile(tmp_path)
    file.save(limits_of().save(), 100 * SECOND, 1000 * SECOND)
    monkeypatch.setattr(level_file, "_boot_id", lambda: boot)
    monkeypatch.setattr(time, "monotonic_ns", lambda: (100 + monotonic) * SECOND)
    monkeypatch.setattr(time, "time_ns", lambda: (1000 + wall) * SECOND)
    loaded = file.load()
    assert loaded is not None
    assert loaded == (limits_of().save(), age * SECOND)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """No file is no levels; a directory in its place is an error that says why."""
    assert LevelFile(tmp_path).load() is None
    (tmp_path / "levels.json").mkdir()
    with pytest.raises(LevelFileError, match="Is a directory"):
        LevelFile(tmp_path).load()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"STATE_DIRECTORY": ""}, None),
        ({"STATE_DIRECTORY": "/var/lib/aiproxy"}, Path("/var/lib/aiproxy")),
        ({"STATE_DIRECTORY": "/a:/b"}, Path("/a")),
    ],
)
def test_the_state_directory(environ: dict[str, str], expected: Path | None) -> None:
    """The first of those that systemd passes."""
    assert state_directory(environ) == expected
