"""`GET /-/status` says what was asked of whom, how it went, and nothing that is secret."""

import asyncio
import re
from datetime import UTC, datetime
from typing import Any

import pytest

import aiproxy.daemon
import aiproxy.status
from answers import USAGE
from faults import Serve
from invariants import SECRETS, eventually
from responses import responses_events
from rig import OUTPUT_CANARY, PROMPT_CANARY, TEAM_B, Proxy, config_text, key_hash, prompt, routes
from steps import SSE_HEADERS
from upstream import (
    Chunk,
    EndChunks,
    Headers,
    Reset,
    ScriptedUpstream,
    Stall,
    Wait,
    error_answer,
)

Report = dict[str, Any]
# Of the scripted upstream's answers; disjoint.
TOKENS = {
    "input": USAGE.input - USAGE.cached,
    "input_cached": USAGE.cached,
    "output": USAGE.output - USAGE.reasoning,
    "output_reasoning": USAGE.reasoning,
}
NO_TOKENS = dict.fromkeys(TOKENS, 0)
NO_ANSWER = {"answers": 0, "p50_s": None, "p95_s": None}
STREAM = prompt(stream=True)


def times(tokens: dict[str, int], many: int) -> dict[str, int]:
    """Return the tokens of so many answers."""
    return {name: many * count for name, count in tokens.items()}


async def status(proxy: Proxy) -> Report:
    """Return the report."""
    report: Report = (await proxy.admin("/-/status")).json()
    return report


async def ended(proxy: Proxy, n: int) -> Report:
    """Wait until `n` requests have ended; return the report."""

    async def holds() -> None:
        assert sum((await status(proxy))["requests"].values()) == n

    await eventually(holds)
    return await status(proxy)


def named(rows: list[Report], name: str) -> Report:
    """Return the row of a name."""
    (row,) = [row for row in rows if name in (row.get("name"), row.get("model"))]
    return row


def is_time(text: str) -> bool:
    """Tell whether this is a time of the last minute, in UTC."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text), text
    return abs((datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()) < 60


async def test_each_upstream_has_its_attempts(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Attempts, those that failed by result, and first tokens of streams that had one."""
    dead = {"url": "http://127.0.0.1:1/v1", "apis": ["responses"]}
    proxy = await serve(
        upstreams={"dead": dead, "idle": dead},
        routes=routes(upstreams=[{"name": "dead", "tier": 1}, {"name": "scripted", "tier": 2}]),
        retries=1,
    )
    await proxy.post(body=STREAM)
    await proxy.post()
    upstream.script(*error_answer(500))
    await proxy.post(body=prompt(model="renamed"))
    report = await ended(proxy, 3)
    dead_one, idle, scripted = (
        named(report["upstreams"], name) for name in ("dead", "idle", "scripted")
    )
    assert (dead_one["attempts"], dead_one["errors"]) == (2, {"connect": 2})
    assert dead_one["first_token"] == NO_ANSWER
    assert (idle["attempts"], idle["errors"], idle["first_token"]) == (0, {}, NO_ANSWER)
    assert (scripted["attempts"], scripted["errors"]) == (3, {"status_5xx": 1})
    first = scripted["first_token"]
    assert (first["answers"], first["p50_s"]) == (1, first["p95_s"])
    assert first["p50_s"] > 0
    assert scripted["state"] == "closed"
    assert scripted["retry_in_s"] is None


async def test_an_upstream_that_is_left_alone(serve: Serve, upstream: ScriptedUpstream) -> None:
    """It is open, and says how long it will be so at most."""
    proxy = await serve(breaker={"failures": 1, "cooldown": "50s"})
    upstream.script(Reset())
    await proxy.post()
    (row,) = (await ended(proxy, 1))["upstreams"]
    assert row["state"] == "open"
    assert 0 < row["retry_in_s"] <= 50


async def test_each_route_has_its_requests(serve: Serve, upstream: ScriptedUpstream) -> None:
    """By outcome, how many of them failed, first tokens, and the tokens of today."""
    proxy = await serve()
    await proxy.post(body=STREAM)
    await proxy.post()
    upstream.script(Reset())
    await proxy.post()
    upstream.script(*error_answer(400))
    await proxy.post()
    await proxy.post(body=prompt(model="org/any"))
    await proxy.post(body=prompt(model="unknown"))
    report = await ended(proxy, 6)
    first, renamed, glob = report["routes"]
    assert (first["model"], first["requests"], first["errors"]) == ("gpt-test", 4, 2)
    assert first["outcomes"] == {"completed": 2, "upstream_error": 1, "upstream_rejected": 1}
    assert first["first_token"]["answers"] == 1
    assert (glob["model"], glob["outcomes"]) == ("org/*", {"completed": 1})
    assert glob["tokens_today"] == TOKENS
    assert (renamed["requests"], renamed["errors"], renamed["outcomes"]) == (0, 0, {})
    assert (renamed["tokens_today"], renamed["first_token"]) == (NO_TOKENS, NO_ANSWER)
    assert report["requests"] == {
        "completed": 3, "rejected_invalid": 1, "upstream_error": 1, "upstream_rejected": 1,
    }  # fmt: skip


async def test_each_key_has_its_day(serve: Serve) -> None:
    """Its requests, those over a limit, and its tokens, since midnight or the start."""
    proxy = await serve(keys={"team-b": {"limits": {"requests": "2/day"}}})
    for _ in range(3):
        await proxy.post(key=TEAM_B)
    await proxy.post()
    await proxy.post(key="sk-nobody")
    report = await ended(proxy, 5)
    one, other = (named(report["keys"], name) for name in ("team-a", "team-b"))
    assert (one["requests_today"], one["limited_today"], one["tokens_today"]) == (1, 0, TOKENS)
    assert (other["requests_today"], other["limited_today"]) == (3, 1)
    assert other["tokens_today"] == times(TOKENS, 2)
    (limit,) = other["limits"]
    assert (limit["capacity"], limit["remaining"]) == (2, 0)
    assert report["tokens"] == times(TOKENS, 3)
    assert is_time(report["today_since"])


async def test_streams_in_flight(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A request is a stream from its head on; it is in flight for its route and its key, too."""
    proxy = await serve()
    go_on = asyncio.Event()
    upstream.script(Headers(200, SSE_HEADERS), Chunk(b": x\n\n"), Wait(go_on), EndChunks())
    streaming = await proxy.send(body=STREAM)
    await streaming.read_head()
    await streaming.read_until(b": x\n\n")
    upstream.script(Stall())
    await proxy.send(body=prompt(model="renamed"), key=TEAM_B)
    await upstream.wait_request(2)
    report = await status(proxy)
    assert (report["in_flight"], report["streams"]) == (2, 1)
    assert [route["in_flight"] for route in report["routes"]] == [1, 1, 0]
    assert [key["in_flight"] for key in report["keys"]] == [1, 1]
    assert report["failures"] == []
    go_on.set()
    await proxy.close_clients()
    assert (await ended(proxy, 2))["streams"] == 0


async def test_failures_are_found_in_the_log(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The last twenty, newest first; each says what its line of the log says."""
    proxy = await serve()
    for _ in range(22):
        upstream.script(*error_answer(500))
        await proxy.post()
    await proxy.post(key="sk-nobody")
    await proxy.post()
    report = await ended(proxy, 24)

    async def logged() -> None:
        assert len(proxy.request_logs()) == 24

    await eventually(logged)
    lines = [line for line in proxy.request_logs() if line["outcome"] == "upstream_error"]
    assert len(report["failures"]) == 20
    for failure, line in zip(report["failures"], reversed(lines[2:]), strict=True):
        assert is_time(failure.pop("time"))
        assert failure.pop("duration_s") == round(line["duration_s"], 3)
        assert failure == {name: line[name] for name in failure}
        assert failure["error_code"] == "upstream_error"
    assert set(report["failures"][0]) == {
        "request_id", "endpoint", "key", "route", "upstream", "outcome", "error_code", "status",
    }  # fmt: skip


async def test_a_failure_that_nobody_was_asked_for(serve: Serve) -> None:
    """Of a request that reached no upstream none is named."""
    proxy = await serve(breaker={"failures": 1, "cooldown": "50s"}, upstreams={"scripted": DEAD})
    await proxy.post()
    await proxy.post()
    report = await ended(proxy, 2)
    assert [failure["upstream"] for failure in report["failures"]] == [None, "scripted"]
    assert [failure["status"] for failure in report["failures"]] == [503, 502]


DEAD = {"url": "http://127.0.0.1:1/v1"}


async def test_a_reload_forgets_what_is_gone(serve: Serve, upstream: ScriptedUpstream) -> None:
    """What is configured no more is not shown, what comes back begins at 0; totals go on."""
    proxy = await serve()
    await proxy.post(key=TEAM_B)
    await proxy.post(body=prompt(model="renamed"), key=TEAM_B)
    await ended(proxy, 2)
    whole = proxy.text
    keys = {"team-c": {"sha256": key_hash(TEAM_B)}}
    proxy.text = config_text(upstream.url, routes=routes()[:1], keys=keys).replace("team-b", "new")
    proxy.text = proxy.text.replace(key_hash(TEAM_B), key_hash("x"), 1)
    await proxy.daemon.reload()
    report = await status(proxy)
    assert [key["name"] for key in report["keys"]] == ["team-a", "new", "team-c"]
    assert [key["requests_today"] for key in report["keys"]] == [0, 0, 0]
    assert [route["requests"] for route in report["routes"]] == [1]
    proxy.text = whole
    await proxy.daemon.reload()
    report = await status(proxy)
    assert [key["requests_today"] for key in report["keys"]] == [0, 0]
    assert [route["requests"] for route in report["routes"]] == [1, 0, 0]
    assert (report["requests"], report["tokens"]) == ({"completed": 2}, times(TOKENS, 2))


async def test_the_age_of_the_configuration(serve: Serve) -> None:
    """There was no reload at the start; then the last one is told, as it went, with its age."""
    proxy = await serve()
    whole = proxy.text
    report = await status(proxy)
    started = report["configuration"]
    assert (started["last_reload"], started["last_reload_failed"]) == (None, None)
    assert is_time(report["now"])
    assert 0 <= started["age_s"] <= report["uptime_s"]
    proxy.text = "nonsense"
    await proxy.daemon.reload()
    refused = (await status(proxy))["configuration"]
    assert refused["loaded"] == started["loaded"]
    last = refused["last_reload"]
    assert (last["result"], last["time"]) == ("failed", refused["last_reload_failed"])
    proxy.text = whole
    await proxy.daemon.reload()
    taken = (await status(proxy))["configuration"]
    last = taken["last_reload"]
    assert (last["result"], last["time"]) == ("successful", taken["loaded"])
    assert taken["last_reload_failed"] is None
    assert last["age_s"] == taken["age_s"] <= refused["age_s"] + 60


async def test_nothing_secret_is_in_it(upstream: ScriptedUpstream) -> None:
    """No key, hash, credential, header, query, prompt or output, after all kinds of ends."""
    scripted = {
        "url": f"{upstream.url}?key=query-secret-4415", "headers": {"X-Org": "header-secret-8812"},
    }  # fmt: skip
    proxy = await Proxy.start(config_text(upstream.url, upstreams={"scripted": scripted}))
    try:
        upstream.text = OUTPUT_CANARY
        await proxy.post(body=STREAM)
        await proxy.post("/v1/messages", key=TEAM_B)
        broken = [Chunk(event) for event in responses_events(OUTPUT_CANARY)[:6]]
        upstream.script(Headers(200, SSE_HEADERS), *broken, Reset())
        await proxy.post(body=STREAM)
        upstream.script(*error_answer(400, f"{PROMPT_CANARY} is no prompt"))
        await proxy.post()
        await proxy.post(body=prompt(model=PROMPT_CANARY))
        await proxy.post(headers=[("x-request-id", "chosen-by-the-caller")], key="sk-wrong-one")
        await ended(proxy, 6)
        body = (await proxy.admin("/-/status")).body
        seeded = ("query-secret-4415", "header-secret-8812", "sk-wrong-one")
        for secret in (*SECRETS, *seeded, PROMPT_CANARY, OUTPUT_CANARY):
            assert secret.encode() not in body, secret
    finally:
        await proxy.stop()


async def test_it_is_made_in_pieces(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many keys and routes there are, others have their turns between any two of them."""
    keys = {f"key-{number}": {"sha256": key_hash(f"key-{number}")} for number in range(40)}
    some = [{"model": f"model-{number}", "upstreams": ["scripted"]} for number in range(20)]
    made: list[aiproxy.status.Status] = []

    def make(**given: Any) -> aiproxy.status.Status:
        made.append(aiproxy.status.Status(**given))
        return made[-1]

    monkeypatch.setattr(aiproxy.daemon, "Status", make)
    await serve(keys=keys, routes=some)
    monkeypatch.setattr(aiproxy.status, "_AT_ONCE", -1.0)  # a piece is over at once
    report = asyncio.ensure_future(made[0].report())
    turns = 0
    while not report.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 40 + 20 + 1
    assert len((await report)["keys"]) == 42
