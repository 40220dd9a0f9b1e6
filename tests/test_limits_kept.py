"""Levels over reloads and restarts: nothing gives anybody a full bucket."""

import asyncio
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aiproxy.levels import LevelKeeper
from aiproxy.limits import SavedBucket
from aiproxy.logs import Log
from aiproxy.metrics import Metrics
from aiproxy.stores import level_file
from aiproxy.stores.level_file import LevelFile, LevelFileError, TakenOverError, state_directory
from aiproxy.stores.memory import MemoryLimits
from conftest import BlockingCalls
from invariants import check_invariants, eventually
from responses import responses_events
from rig import ABSENT, TEAM_B, LogTap, Proxy, config_text, load, prompt, routes, totals
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Wait

if TYPE_CHECKING:
    from aiproxy.config import Config

Serve = Callable[..., Awaitable[Proxy]]
Run = Serve
CHUNKED = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
SECOND = 10**9


@pytest.fixture
async def run(upstream: ScriptedUpstream) -> AsyncIterator[Run]:
    """Start daemons that end with the test, if they have not before."""
    proxies: list[Proxy] = []

    async def start(text: str, state: Path | None = None) -> Proxy:
        proxies.append(await Proxy.start(text, state=state))
        return proxies[-1]

    yield start
    for proxy in proxies:
        await proxy.stop()


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
        ("600/day", "36000/h", [596]),
        ("24/day", "1/h", [0]),  # another window of the same limit is no new one
        ("10/day", ["10/day", "100/h"], [6, 100]),  # one that comes in addition is
        (["10/day", "100/h"], "100/h", [96]),
    ],
)
async def test_a_reload_keeps_levels(
    run: Run, upstream: ScriptedUpstream, before: Any, after: Any, expected: list[int]
) -> None:
    """Four requests were made: of another limit as much is left as is fair, never more."""
    proxy = await run(text_of(upstream, {"requests": before}))
    freeze(proxy)
    for _ in range(4):
        assert (await proxy.post()).status == 200
    await reload(proxy, text_of(upstream, {"requests": after}))
    assert left(proxy) == expected


async def test_a_key_that_is_gone_is_forgotten(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Its buckets go with it; when it comes back it is a new one."""
    proxy = await serve(keys={"team-a": {"limits": {"requests": "2/day"}}})
    assert [(await proxy.post()).status for _ in range(3)] == [200, 200, 429]
    await reload(proxy, text_of(upstream, ABSENT))
    assert left(proxy) == []
    await reload(proxy, text_of(upstream, {"requests": "2/day"}))
    assert left(proxy) == [2]


@pytest.mark.parametrize("before", [{}, {"requests": "9/day"}])
async def test_a_key_that_gets_a_limit_has_it_at_once(
    serve: Serve, upstream: ScriptedUpstream, before: dict[str, str]
) -> None:
    """After a reload a key is looked up anew, and so when its limit goes again."""
    proxy = await serve(keys={"team-b": {"limits": before}})
    assert (await proxy.post(key=TEAM_B)).status == 200
    limited = {"team-b": {"limits": {"requests": "1/day"}}}
    await reload(proxy, config_text(upstream.url, keys=limited))
    last = 429 if before else 200  # a bucket goes on from the one before
    assert [(await proxy.post(key=TEAM_B)).status for _ in range(3)] == [last, 429, 429]
    await reload(proxy, config_text(upstream.url))
    assert (await proxy.post(key=TEAM_B)).status == 200


async def test_a_key_removed_while_its_body_comes_is_limited_still(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A request that began under a limit does not escape it, though its route has one, too."""
    shared = routes(limits={"requests": "9/day"})
    proxy = await serve(keys={"team-a": {"limits": {"requests": "1/day"}}}, routes=shared)
    assert (await proxy.post()).status == 200
    client, body = await proxy.client(), json.dumps(prompt()).encode()
    fields = proxy.headers({"content-length": str(len(body)), "expect": "100-continue"})
    await client.request("POST", "/v1/responses", fields)
    assert (await client.read_head()).status == 100  # it is known who asks
    await reload(proxy, text_of(upstream, ABSENT, routes=shared))
    client.writer.write(body)
    assert (await client.answer()).status == 429


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


async def test_f27_a_hundred_reloads_refill_nothing(run: Run, upstream: ScriptedUpstream) -> None:
    """Requests that run while limits change get what one bucket holds, and give all slots back."""
    proxy = await run(text_of(upstream, {"requests": "40/day"}))
    freeze(proxy)
    statuses: list[int] = []
    over = asyncio.Event()

    async def ask() -> None:
        while not over.is_set():
            statuses.append((await proxy.post()).status)

    workers = [asyncio.create_task(ask()) for _ in range(4)]
    for number in range(100):
        requests = (
            "40/day", {"rate": "2/h", "burst": 40}, {"rate": "60/day", "burst": 50},
            ["50/day", "90/h"],
        )[number % 4]  # fmt: skip
        await reload(proxy, text_of(upstream, {"requests": requests, "tokens": "9000000/day"}))
    over.set()
    await asyncio.gather(*workers)
    assert set(statuses) == {200, 429}
    assert 5 <= statuses.count(200) <= 40
    assert left(proxy)[0] <= 0
    assert proxy.daemon._limits.held == 0


# Restarts


async def test_a_restart_gives_nobody_a_full_bucket(
    run: Run, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """Levels are written at the end and loaded at the start; time goes on meanwhile."""
    text = text_of(upstream, {"requests": "3/day", "tokens": "86400/day"})
    for expected in ([200, 200], [200, 429], [429, 429]):
        proxy = await run(text, tmp_path)
        assert [(await proxy.post()).status for _ in range(2)] == expected
        await proxy.stop()
    assert os.listdir(tmp_path) == ["levels.json"]  # noqa: PTH208 - of this test alone
    document = json.loads((tmp_path / "levels.json").read_bytes())
    document["monotonic_ns"] -= 43_200 * SECOND  # half a day ago, on the same boot
    document["time_ns"] -= 10**6 * SECOND  # the wall clock does not matter
    (tmp_path / "levels.json").write_text(json.dumps(document))
    proxy = await run(text, tmp_path)
    assert left(proxy) == [1]
    assert left(proxy, "tokens") == [86400]  # aged, and not above capacity


async def waits(keeper: LevelKeeper) -> None:
    """Assert that it has written, and will again."""
    assert keeper._timer is not None


async def test_what_a_crash_leaves_is_not_a_full_bucket(
    run: Run, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """The daemon itself writes now and then, open requests as used; the next one goes on there."""
    text = text_of(upstream, {"requests": "5/day"}, routes=routes(limits={"requests": "9/day"}))
    proxy = await run(text, tmp_path)
    keeper = proxy.daemon._levels
    assert keeper._period == 10
    await eventually(partial(waits, keeper))
    assert keeper._timer is not None
    keeper._timer.cancel()
    keeper._period = 0.01
    keeper.start()
    assert [(await proxy.post()).status for _ in range(3)] == [200] * 3

    async def written() -> None:
        assert (tmp_path / "levels.json").exists()
        levels = json.loads((tmp_path / "levels.json").read_bytes())["levels"]
        assert levels["keys"]["team-a"]["requests"][0]["level"] < 3 * 10**6
        assert levels["routes"]["gpt-test"]["requests"][0]["level"] < 7 * 10**6

    await eventually(written)
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    (crashed / "levels.json").write_bytes((tmp_path / "levels.json").read_bytes())
    await proxy.stop()
    proxy = await run(text, crashed)
    assert left(proxy) == [2]
    assert proxy.daemon._limits.levels("routes")["gpt-test"][0].remaining == 6


async def test_a_state_directory_that_is_gone_stops_no_end(
    run: Run, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """The last levels cannot be written: that is logged and counted, and the daemon ends well."""
    proxy = await run(text_of(upstream, {"requests": "5/day"}), tmp_path / "gone")
    await proxy.stop()
    events = [line["event"] for line in proxy.logs()]
    assert events.count("levels not written") == 1
    assert events[-1] == "stopped"
    counted = b'aiproxy_store_errors_total{operation="save",store="levels"} 2.0'
    assert counted in proxy.daemon._metrics.exposition()


async def test_levels_that_cannot_be_kept_show(
    run: Run, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """The limiter is degraded from the first levels that cannot be written to the next that are."""
    state = tmp_path / "state"
    proxy = await run(text_of(upstream, {"requests": "5/day"}), state)
    keeper = proxy.daemon._levels

    async def degraded(expected: int) -> None:
        assert keeper._timer is not None  # it has tried
        assert (await proxy.metrics())["aiproxy_limiter_degraded", frozenset()] == expected

    await eventually(partial(degraded, 1))
    state.mkdir()
    keeper._period = 0.01
    assert keeper._timer is not None
    keeper._timer.cancel()
    keeper._begin()
    await eventually(partial(degraded, 0))


async def test_a_limiter_is_not_degraded_at_first(serve: Serve) -> None:
    """Without a state directory, too, nothing is where it should not be."""
    proxy = await serve()
    assert (await proxy.metrics())["aiproxy_limiter_degraded", frozenset()] == 0


async def test_a_restart_with_other_limits_is_like_a_reload(
    run: Run, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """What shrank while the daemon was away is scaled down; who is gone is forgotten."""
    proxy = await run(text_of(upstream, {"requests": "10/day"}), tmp_path)
    for _ in range(4):
        await proxy.post()
    await proxy.stop()
    proxy = await run(text_of(upstream, {"requests": "5/day"}), tmp_path)
    assert left(proxy) == [3]
    await proxy.stop()
    proxy = await run(text_of(upstream, ABSENT), tmp_path)
    await proxy.stop()
    assert json.loads((tmp_path / "levels.json").read_bytes())["levels"]["keys"] == {}


def document(**bucket: Any) -> bytes:
    """A file with one bucket of team-a."""
    whole = {"amount": 3, "seconds": 86400, "capacity": 3, "level": 10**6, **bucket}
    levels = {"keys": {"team-a": {"requests": [whole]}}}
    head = {"version": 1, "boot_id": "", "monotonic_ns": 0, "time_ns": time.time_ns()}
    return json.dumps({**head, "levels": levels}).encode()


BROKEN = {
    "empty": b"",
    "no JSON": b"{",
    "another document": b"[]",
    "another version": b'{"version":2,"boot_id":"","monotonic_ns":0,"time_ns":0,"levels":{}}',
    "text for a level": document(level="x"),
    "a fraction": document(level=1.5),
    "a rate of 0": document(amount=0),
    "no time": document(seconds=0),
    "an unknown field": document(levle=1),
    "not UTF-8": b'{"version":1,"boot_id":"\xff"}',
}


@pytest.mark.parametrize(
    "data",
    [
        *(pytest.param(data, id=name) for name, data in BROKEN.items()),
        pytest.param(document(level=-(10**30)), id="a debt without end"),
        pytest.param(document(level=-(10**400)), id="a longer one"),
    ],
)
async def test_a_file_that_cannot_be_used_is_said_to_be_one(
    run: Run, upstream: ScriptedUpstream, tmp_path: Path, data: bytes
) -> None:
    """The daemon serves, with a line in the log and a metric, and writes a good one at its end."""
    (tmp_path / "levels.json").write_bytes(data)
    proxy = await run(text_of(upstream, {"requests": "3/day"}), tmp_path)
    assert (await proxy.post()).status == 200
    failed = totals(await proxy.metrics(), "aiproxy_store_errors_total", "operation")
    assert failed == {"load": 1}
    await proxy.stop()
    (line,) = [it for it in proxy.logs() if it["event"] == "levels not loaded"]
    assert (line["level"], line["file"]) == ("error", str(tmp_path / "levels.json"))
    assert await asyncio.to_thread(LevelFile(tmp_path).load) is not None


@pytest.mark.parametrize(("bucket", "expected"), [
    ({}, 1), ({"level": 10**30}, 3), ({"amount": 10**30}, 3),
    ({"capacity": 10**30, "level": 10**36}, 3), ({"level": -(10**6)}, -1),
])  # fmt: skip
async def test_no_file_gives_more_than_a_bucket_holds(
    run: Run, upstream: ScriptedUpstream, tmp_path: Path, bucket: dict[str, int], expected: int
) -> None:
    """Whatever numbers it has, a level is at most the capacity that is configured."""
    (tmp_path / "levels.json").write_bytes(document(**bucket))
    proxy = await run(text_of(upstream, {"requests": "3/day"}), tmp_path)
    assert left(proxy) == [expected]
    assert (await proxy.post()).status == (200 if expected > 0 else 429)


async def test_without_a_state_directory_it_is_said(run: Run, upstream: ScriptedUpstream) -> None:
    """A warning at the start, if there is anything to keep."""
    for limits, expected in (({"requests": "3/day"}, 1), ({}, 0)):
        proxy = await run(text_of(upstream, limits))
        await proxy.stop()
        lines = [it for it in proxy.logs() if it["event"] == "levels not kept"]
        assert [line["level"] for line in lines] == ["warning"] * expected


def limits_of() -> MemoryLimits:
    """Levels of one key, whose time stands still."""
    keys = {"team-a": {"limits": {"requests": "10/day"}}}
    config: Config = load(config_text("http://127.0.0.1:9/v1", keys=keys))
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
    real, failures, kept = os.fsync, 0, b""

    def full(descriptor: int) -> None:
        nonlocal failures, kept
        kept = kept or file.read_bytes()
        failures += 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    async def failed() -> None:
        assert failures >= 4

    await eventually(failed)
    before = file.read_bytes()
    assert before == kept
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


@pytest.mark.parametrize(("boot", "passed", "age"), [
    ("same", (5, 9999), 5), ("same", (-5, 9999), 0),  # nobody sets the monotonic clock
    ("another", (5, 70), 70), ("another", (5, -70), 0), ("", (5, 70), 70),
])  # fmt: skip
def test_the_age_of_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boot: str, passed: tuple[int, int], age: int
) -> None:
    """Within one boot the monotonic clock tells it, else the wall clock; it is never negative."""
    monkeypatch.setattr(level_file, "_boot_id", lambda: "same" if boot else "")
    file = LevelFile(tmp_path)
    file.save(limits_of().save(), 100 * SECOND, 1000 * SECOND)
    monkeypatch.setattr(level_file, "_boot_id", lambda: boot)
    monkeypatch.setattr(time, "monotonic_ns", lambda: (100 + passed[0]) * SECOND)
    monkeypatch.setattr(time, "time_ns", lambda: (1000 + passed[1]) * SECOND)
    loaded = file.load()
    assert loaded is not None
    assert loaded == (limits_of().save(), age * SECOND)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """No file is no levels; a directory in its place is an error that says why."""
    assert LevelFile(tmp_path).load() is None
    (tmp_path / "levels.json").mkdir()
    with pytest.raises(LevelFileError, match="Is a directory"):
        LevelFile(tmp_path).load()


def test_the_state_directory() -> None:
    """The first of those that systemd passes."""
    assert state_directory({}) is state_directory({"STATE_DIRECTORY": ""}) is None
    assert state_directory({"STATE_DIRECTORY": "/a/b"}) == Path("/a/b")
    assert state_directory({"STATE_DIRECTORY": "/a:/b"}) == Path("/a")


def test_who_began_last_owns_the_file(tmp_path: Path) -> None:
    """One that drains does not overwrite its successor's levels, unless that one has died."""
    old, new = LevelFile(tmp_path), LevelFile(tmp_path)
    levels = limits_of().save()
    old.save(levels, 0, 1)
    new.save(levels, 0, 2)
    with pytest.raises(TakenOverError):
        old.save(levels, 0, 3)
    new.save(levels, 0, 4)
    document = json.loads((tmp_path / "levels.json").read_bytes())
    assert (document["time_ns"], document["pid"]) == (4, os.getpid())
    with subprocess.Popen(["/bin/true"]) as ended:  # its pid is nobody's afterwards
        pass
    (tmp_path / "levels.json").write_text(json.dumps({**document, "pid": ended.pid}))
    old.save(levels, 0, 5)
    with pytest.raises(TakenOverError):
        new.save(levels, 0, 6)


async def test_a_daemon_that_was_followed_does_not_write(
    run: Run, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """The end of the one before leaves the levels of the one that began last."""
    text = text_of(upstream, {"requests": "5/day"})
    before = await run(text, tmp_path)
    await eventually(partial(waits, before.daemon._levels))
    after = await run(text, tmp_path)
    await eventually(partial(waits, after.daemon._levels))
    assert [(await after.post()).status for _ in range(2)] == [200] * 2
    await after.daemon._levels.stop()
    written = (tmp_path / "levels.json").read_bytes()
    await before.stop()
    assert (tmp_path / "levels.json").read_bytes() == written
    said = [line["event"] for line in before.logs()]
    assert said.count("levels kept by another process") == 1
    assert "levels not written" not in said


def test_a_save_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk raises, and the unfinished file is gone."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        LevelFile(tmp_path).save(limits_of().save(), 0, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("age", "left"), [(-5, 0), (0, 0), (1, 1), (7, 7)])
def test_levels_are_refilled_for_their_age_alone(age: int, left: int) -> None:
    """To the nanosecond; levels of the future are as of now."""
    store = MemoryLimits(lambda: 100)
    saved = SavedBucket(amount=SECOND, seconds=1, capacity=SECOND, level=0)
    store.restore({"keys": {"a": {"requests": [saved]}}}, age)
    (level,) = store.levels("keys")["a"]
    assert level.remaining == left
    assert [account.owner for account in store._books["keys"].values()] == ["key 'a'"]
