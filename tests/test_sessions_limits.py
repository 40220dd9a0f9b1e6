"""Bounds of what is held, what a continued turn costs, and how both are told."""

import asyncio
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from aiproxy.conversation import Conversation
from answers import Usage
from client import Answer
from invariants import check_invariants, eventually
from refusals import Refusal
from responses import responses_events, responses_json
from rig import ABSENT, AMPLE, TEAM_A, TEAM_B, Proxy, key_hash, totals
from sessions_rig import (
    NO_PARENT,
    STORES,
    UNKNOWN,
    VERBS,
    Serve,
    ask,
    check_unknown,
    heard,
    store_of,
    turn,
    use,
)
from steps import json_answer, stream
from upstream import ScriptedUpstream

HOLDER = "replay"

TOO_LONG = Refusal(400, "context_length_exceeded", param="previous_response_id")
NO_RETRY = {"retry-after": None, "x-should-retry": "false"}
LARGE = Usage(input=99_000, cached=0, output=1_000, reasoning=0)  # 100,000 in all
SMALL = Usage(input=300, cached=0, output=10, reasoning=0)
BACKGROUND = 5.0  # seconds within which expiry and eviction have been at work


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the conversations are."""
    return store_of(request.param, tmp_path)


def limited(**limits: Any) -> dict[str, Any]:
    """Configure team-a with these limits alone."""
    absent = {name: ABSENT for name in AMPLE if name not in limits}
    return {"team-a": {"sha256": key_hash(TEAM_A), "limits": {**absent, **limits}}}


def freeze(proxy: Proxy) -> None:
    """Let the limiter's time stand still."""
    now = proxy.daemon._limits._clock.latest
    proxy.daemon._limits._clock.read = lambda: now


def remaining(answer: Answer, kind: str = "tokens") -> int:
    """Return what the key has left."""
    return int(answer.headers[f"x-ratelimit-remaining-{kind}"])


async def gauge(proxy: Proxy, name: str) -> float:
    """Return a metric without labels."""
    return (await proxy.metrics())[(name, frozenset())]


async def counted(proxy: Proxy, name: str, by: str) -> dict[str, float]:
    """Return a counter of sessions by its label."""
    return totals(await proxy.metrics(), f"aiproxy_sessions_{name}_total", by)


async def test_a_path_of_max_turns(serve: Serve, upstream: ScriptedUpstream, store: str) -> None:
    """A path is no longer than that; a fork from further up still goes on."""
    proxy = await serve(sessions={"store": store, "max_turns": 3})
    path = [(await turn(proxy, "root"))["id"]]
    for number in range(2):
        path.append((await turn(proxy, f"{number}", path[-1]))["id"])
    asked = len(upstream.requests)
    for streamed in (False, True):
        TOO_LONG.check(await ask(proxy, "over", path[-1], streamed=streamed))
    assert len(upstream.requests) == asked
    await turn(proxy, "fork", path[-2])
    assert (await use(proxy, "get", path[-1])).status == 200


async def test_a_request_of_max_replay(
    serve: Serve, upstream: ScriptedUpstream, store: str
) -> None:
    """A rebuilt request is no larger than that, its new input included."""
    proxy = await serve(sessions={"store": store, "max_replay": "4KiB"})
    large = await turn(proxy, "x" * 5000)
    middle = await turn(proxy, "x" * 2000)
    asked = len(upstream.requests)
    for previous, new in ((large, "y"), (middle, "y" * 3000)):
        for streamed in (False, True):
            TOO_LONG.check(await ask(proxy, new, previous["id"], streamed=streamed))
    assert len(upstream.requests) == asked
    await turn(proxy, "y", middle["id"])


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_continued_turn_reserves_its_history(
    serve: Serve, upstream: ScriptedUpstream, store: str, *, streamed: bool
) -> None:
    """A request of 1 KB on a parent of 100,000 tokens sets aside more than 100,000 of them."""
    proxy = await serve(keys=limited(tokens="1000000/day"), sessions={"store": store})
    freeze(proxy)
    upstream.usage = LARGE
    parent = await turn(proxy, streamed=streamed)
    upstream.usage = SMALL
    alone = await ask(proxy, "x" * 1000, streamed=streamed)
    assert 1_000_000 - 100_000 - remaining(alone) < 20_000
    answer = await ask(proxy, "x" * 1000, parent["id"], streamed=streamed)
    before = 1_000_000 - 100_000 - 310
    assert 100_000 < before - remaining(answer) < 120_000
    after = await ask(proxy, "x", streamed=streamed)
    assert remaining(after) > before - 20_000  # settled with what it really was


@pytest.mark.parametrize("mode", ["replay", "upstream"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_history_of_unknown_usage_is_reserved_by_its_size(
    serve: Serve, upstream: ScriptedUpstream, store: str, mode: str, *, streamed: bool
) -> None:
    """Where the upstream gave no usage, what was asked and answered on the path is its cost."""
    keys = limited(tokens="1000000/day")
    mode_of = {"scripted": {"sessions": mode}}
    proxy = await serve(keys=keys, upstreams=mode_of, sessions={"store": store})
    freeze(proxy)
    for _ in range(2):
        frames, whole = responses_events(usage=None), responses_json(usage=None)
        upstream.script(stream(frames) if streamed else json_answer(whole))
    first = await turn(proxy, "word " * 40_000, streamed=streamed)
    parent = await turn(proxy, "word " * 40_000, first["id"], streamed=streamed)
    alone = remaining(await ask(proxy, "x"))
    continued = remaining(await ask(proxy, "x", parent["id"]))
    assert 80_000 < alone - continued < 150_000


async def test_a_history_that_is_larger_than_what_is_left(
    serve: Serve, upstream: ScriptedUpstream, store: str
) -> None:
    """It is refused before anything is asked; a history larger than the bucket for good."""
    proxy = await serve(keys=limited(tokens="150000/day"), sessions={"store": store})
    freeze(proxy)
    upstream.usage = LARGE
    parent = await turn(proxy)
    asked = len(upstream.requests)
    answer = await ask(proxy, "x" * 1000, parent["id"])
    assert (answer.status, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    requested = int(answer.json()["error"]["message"].partition("Requested ")[2].partition(".")[0])
    assert requested > 100_000
    assert len(upstream.requests) == asked
    small = await serve(keys=limited(tokens="90000/day"), sessions={"store": "memory:"})
    parent = await turn(small)
    answer = await ask(small, "x" * 1000, parent["id"])
    assert (answer.status, answer.json()["error"]["code"]) == (429, "request_too_large")
    assert answer.headers["x-should-retry"] == "false"


async def test_a_refused_turn_takes_nothing(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Neither an unknown parent, nor one too long, nor an unknown item costs anything."""
    proxy = await serve(
        keys=limited(tokens="100000/day", requests="100/day", concurrent=2),
        sessions={"max_turns": 1},
    )
    freeze(proxy)
    parent = await turn(proxy)
    before = proxy.daemon._limits.save()
    reference = [{"type": "item_reference", "id": "msg_unknown"}]
    refused = [
        await ask(proxy, "x", UNKNOWN),
        await ask(proxy, "x", parent["id"]),
        await ask(proxy, "x", background=True),
        await ask(proxy, reference),
    ]
    assert [answer.status for answer in refused] == [400, 400, 400, 404]
    assert proxy.daemon._limits.save() == before


async def test_a_call_takes_one_request(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Every verb but a new turn takes one request and no tokens, whether it finds or not."""
    proxy = await serve(keys=limited(requests="100/day", tokens="100000/day"))
    freeze(proxy)
    own = (await turn(proxy))["id"]
    left = [
        remaining(await use(proxy, verb, response_id), "requests")
        for response_id in (UNKNOWN, own)
        for verb in ("get", "input_items", "cancel", "delete")
    ]
    assert left == list(range(98, 90, -1))


async def test_ttl_is_renewed_by_a_turn(
    serve: Serve, upstream: ScriptedUpstream, store: str
) -> None:
    """A conversation lives as long as it is continued, wherever in it; to look at it is no use."""
    proxy = await serve(sessions={"store": store, "ttl": "700ms"})
    root = (await turn(proxy, "kept"))["id"]
    early = (await turn(proxy, "early", root))["id"]
    unstored = (await turn(proxy, "only continued"))["id"]
    idle = (await turn(proxy, "idle"))["id"]

    async def gone() -> None:
        await turn(proxy, "again", root)
        await turn(proxy, "again", unstored, store=False)
        assert (await use(proxy, "get", idle)).status == 404

    await eventually(gone)
    for own in (root, early, unstored):
        assert (await use(proxy, "get", own)).status == 200
    await turn(proxy, "more", early)
    assert heard(upstream.requests[-1])[::2] == ["kept", "early", "more"]
    await check_unknown(proxy, idle)
    loads = await counted(proxy, "loads", "result")
    assert loads.get("expired", 0) + loads["missing"] >= 6

    async def swept() -> None:
        assert (await counted(proxy, "evictions", "reason")).get("ttl", 0) >= 1

    await eventually(swept, BACKGROUND)


async def test_all_is_given_back_at_the_end(
    serve: Serve, upstream: ScriptedUpstream, store: str
) -> None:
    """Once every conversation has expired nothing is held, and all of it is counted."""
    proxy = await serve(sessions={"store": store, "ttl": "200ms"})
    previous = None
    for _ in range(3):
        previous = (await turn(proxy, "x" * 100, previous))["id"]
    await turn(proxy)

    async def swept() -> None:
        assert await gauge(proxy, "aiproxy_sessions_stored_turns") == 0
        assert await gauge(proxy, "aiproxy_sessions_stored_bytes") == 0
        assert await counted(proxy, "evictions", "reason") == {"ttl": 4}

    await eventually(swept, BACKGROUND)


async def test_the_one_who_holds_most_loses_what_was_used_longest_ago(
    serve: Serve, upstream: ScriptedUpstream, store: str
) -> None:
    """At `max_bytes` a key below its fair share loses nothing, whoever else comes and goes."""
    proxy = await serve(sessions={"store": store, "max_bytes": "64KiB"})
    theirs = [(await turn(proxy, "b" * 8000, key=TEAM_B))["id"] for _ in range(2)]
    mine = [(await turn(proxy, "a" * 8000))["id"] for _ in range(3)]
    await turn(proxy, "used again", mine[0])  # so that mine[1] is the first to go
    mine += [(await turn(proxy, "a" * 8000))["id"] for _ in range(3)]

    async def bounded() -> None:
        assert await gauge(proxy, "aiproxy_sessions_stored_bytes") <= 64 * 1024
        assert (await counted(proxy, "evictions", "reason")).get("size", 0) >= 1

    await eventually(bounded, BACKGROUND)
    assert (await use(proxy, "get", mine[1])).status == 404
    assert (await use(proxy, "get", mine[0])).status == 200
    for _ in range(20):
        mine.append((await turn(proxy, "a" * 8000))["id"])
    await eventually(bounded, BACKGROUND)
    assert (await use(proxy, "get", mine[-1])).status == 200
    assert (await use(proxy, "get", mine[0])).status == 404
    for held in theirs:
        assert (await use(proxy, "get", held, key=TEAM_B)).status == 200
    for gone in mine[:3]:
        NO_PARENT.check(await use(proxy, "continue", gone))
    size = (await counted(proxy, "evictions", "reason"))["size"]
    assert size + await gauge(proxy, "aiproxy_sessions_stored_turns") == 2 + 1 + 26


async def test_memory_is_bounded_at_every_moment(serve: Serve, upstream: ScriptedUpstream) -> None:
    """In memory the sum is never over the bound, whatever comes at the same time."""
    proxy = await serve(sessions={"max_bytes": "64KiB"})
    for _ in range(5):
        await asyncio.gather(*(turn(proxy, "c" * 5000, key=key) for key in (TEAM_A, TEAM_B) * 4))
        assert await gauge(proxy, "aiproxy_sessions_stored_bytes") <= 64 * 1024


async def test_loads_are_counted_by_what_was_found(
    serve: Serve, upstream: ScriptedUpstream, store: str
) -> None:
    """Own turns are hits, another key's foreign, all else missing, by whatever verb."""
    proxy = await serve(sessions={"store": store})
    own = (await turn(proxy))["id"]
    assert await counted(proxy, "loads", "result") == {}
    for response_id, key, result in (
        (own, TEAM_A, "hit"), (own, TEAM_B, "foreign"), (UNKNOWN, TEAM_A, "missing"),
        ("resp_short", TEAM_B, "missing"),
    ):  # fmt: skip
        for verb in (*VERBS[:2], *VERBS[3:]):
            before = await counted(proxy, "loads", "result")
            await use(proxy, verb, response_id, key=key)
            after = await counted(proxy, "loads", "result")
            moved = {name: n - before.get(name, 0) for name, n in after.items()}
            assert {name for name, n in moved.items() if n} == {result}, (verb, response_id)


async def test_what_is_stored_is_told(serve: Serve, upstream: ScriptedUpstream, store: str) -> None:
    """The gauges follow turns, bytes and deletions; the log line counts what was replayed."""
    proxy = await serve(sessions={"store": store})
    assert await gauge(proxy, "aiproxy_sessions_stored_turns") == 0
    ids: list[str] = []
    for number in range(4):
        streamed = number % 2 == 1
        previous = ids[-1] if ids else None
        ids.append((await turn(proxy, "x" * 1000, previous, streamed=streamed))["id"])
        assert await gauge(proxy, "aiproxy_sessions_stored_turns") == number + 1
        # Each turn is kept once: what it adds does not grow with the path before it.
        stored = await gauge(proxy, "aiproxy_sessions_stored_bytes")
        assert 1000 * (number + 1) <= stored <= 6000 * (number + 1)
    status = (await proxy.admin("/-/status")).json()["sessions"]
    assert (status["turns"], status["bytes"]) == (4, stored)
    await turn(proxy, "y", ids[-1], store=False)
    assert await gauge(proxy, "aiproxy_sessions_stored_turns") == 4

    async def logged() -> None:
        lines = [line for line in proxy.request_logs() if line["endpoint"] == "responses"]
        assert [line["replayed_turns"] for line in lines] == [0, 1, 2, 3, 4]

    await eventually(logged)
    assert (await use(proxy, "delete", ids[-1])).status == 200

    async def deleted() -> None:
        assert await gauge(proxy, "aiproxy_sessions_stored_turns") == 3
        assert await counted(proxy, "evictions", "reason") == {"deleted": 1}

    await eventually(deleted)


async def test_everything_else_holds_still(
    serve: Serve, upstream: ScriptedUpstream, store: str
) -> None:
    """After turns, refusals and calls of every kind nothing is held, lost or told."""
    proxy = await serve(sessions={"store": store})
    own = (await turn(proxy))["id"]
    await turn(proxy, "two", own, streamed=True)
    bodies = [(await use(proxy, verb, UNKNOWN)).body for verb in VERBS]
    for verb in VERBS:
        await use(proxy, verb, own)
    await check_invariants(proxy, upstream, bodies=bodies)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_turn_that_cannot_be_kept_is_not_made(
    serve: Serve, upstream: ScriptedUpstream, store: str, *, streamed: bool
) -> None:
    """Where the question alone does not fit, with its history, the upstream is not asked."""
    proxy = await serve(sessions={"store": store, "max_bytes": "64KiB"})
    theirs = (await turn(proxy, "x" * 20_000, key=TEAM_B))["id"]
    own = (await turn(proxy, "x" * 20_000))["id"]
    asked = len(upstream.requests)
    refusal = Refusal(503, "store_unavailable", "server_error", headers=NO_RETRY)
    for given, previous in (("x" * 64_000, None), ("x" * 30_000, own)):
        answer = await ask(proxy, given, previous, streamed=streamed)
        refusal.check(answer, upstream="scripted")
        assert "store" in answer.json()["error"]["message"]
    assert len(upstream.requests) == asked
    await turn(proxy, "x" * 64_000, store=False, streamed=streamed)
    await turn(proxy, "x" * 15_000, own, streamed=streamed)
    assert (await use(proxy, "get", theirs, key=TEAM_B)).status == 200
    await check_invariants(proxy, upstream)


async def test_a_history_is_in_memory_twice(
    serve: Serve, upstream: ScriptedUpstream, store: str
) -> None:
    """What is brought in counts in `max_buffered` as often as it is there; all is given back."""
    bounds = {"max_body": "48KiB", "max_buffered": "64KiB"}
    proxy = await serve(**bounds, sessions={"store": store})
    item = {"type": "message", "role": "user", "content": "x" * 40_000, "id": "msg_own"}
    large, small = await turn(proxy, [item]), await turn(proxy, "x" * 20_000)
    asked = len(upstream.requests)
    reference = [{"type": "item_reference", "id": "msg_own"}]
    for given, previous in (("more", large["id"]), (reference, None)):
        answer = await ask(proxy, given, previous)
        assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
    assert len(upstream.requests) == asked
    for _ in range(3):
        await turn(proxy, "more", small["id"])
    await check_invariants(proxy, upstream)


@pytest.mark.parametrize(("known", "tokens"), [(5, 47), (None, 142)])
def test_items_that_are_referred_to_count_beside_what_it_goes_on_from(
    known: int | None, tokens: int
) -> None:
    """What the last turn used where that is known, else its size; and each item's own weight."""
    conversation = Conversation(Mock(), Mock(), Mock())
    conversation.parent = Mock(tokens=known, size=100)
    items = [Mock(weight=40), Mock(weight=2)]
    conversation._referred = Mock(found={"a": items[0]}, all=lambda: items)
    assert conversation.tokens(lambda size: size.text) == tokens


@pytest.mark.parametrize(
    ("theirs", "estimated", "output", "tokens"),
    [(True, 10, 0, 10), (True, 10, 400, 110), (True, None, 400, None), (False, 10, 400, None)],
)
def test_what_a_turn_without_usage_has_used(
    theirs: bool,  # noqa: FBT001
    estimated: int | None,
    output: int,
    tokens: int | None,
) -> None:
    """It is estimated where its content is not kept here; else that tells when it is needed."""
    call = Mock(estimate=None if estimated is None else Mock(input=estimated))
    conversation = Conversation(Mock(), call, Mock())
    conversation._theirs = theirs
    assert conversation._spent(None, output) == tokens
    assert conversation._spent(Mock(total=3), output) == 3
