"""The table of faults, row by row, and after each row what must be true of it: I1 to I8."""

import ast
import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import pytest

from client import parse_sse
from fault_moves import Ran
from fault_table import IDS, TABLE, Row
from faults import (
    Api,
    Charge,
    Serve,
    check_charge,
    check_closed,
    check_error,
    check_failure,
    delivered,
    fresh_request_id,
    line_of,
)
from invariants import (
    Purse,
    check_ids,
    check_invariants,
    check_terminal,
    take_baseline,
)
from rig import AMPLE, Proxy, routes
from steps import Step, body_of
from upstream import ScriptedUpstream

HERE = Path(__file__).resolve().parent
DRIVEN = [row for row in TABLE if not row.tests]
MODELS = ("gpt-test", "kept")  # whose conversations the upstream holds, and aiproxy itself
LIFECYCLE = {"response.created", "response.queued", "response.in_progress"}
ENDS = {"response.completed", "response.incomplete", "response.failed"}
OURS = {
    "cache-control", "connection", "content-length", "content-type", "date", "retry-after",
    "transfer-encoding", "x-accel-buffering", "x-aiproxy-upstream", "x-request-id",
    "x-should-retry",
    *(f"x-ratelimit-{it}-{of}" for it in ("limit", "remaining", "reset")
      for of in ("requests", "tokens")),
}  # fmt: skip
OUTCOMES = {  # by what a row says; else upstream_error
    "upstream_timeout": "upstream_timeout",
    "as it came": "upstream_rejected",
    "scripted": "upstream_rejected",
}


async def begin(serve: Serve, upstream: ScriptedUpstream, row: Row) -> Proxy:
    """Start a daemon with one slot for team-a, so that a slot that is held is seen at once."""
    same = {"url": upstream.url, "credential": {"env": "UPSTREAM_KEY"}, "idle_connections": "50ms",
            "apis": ["responses", "chat", "messages"]}  # fmt: skip
    upstreams = {
        "scripted": {"idle_connections": "50ms"},
        "keeping": {**same, "sessions": "replay"},
        "nowhere": {**same, "url": "http://no-such-host.invalid/v1"},
    }
    further = [("kept", "keeping"), ("nowhere", "nowhere")]
    base = {
        "upstreams": upstreams,
        "routes": [
            *routes(),
            *({"model": model, "upstreams": [upstream]} for model, upstream in further),
        ],
        "keys": {"team-a": {"limits": {**AMPLE, "concurrent": 1}}},
    }
    return await serve(**{**base, **row.having})


def ways(row: Row) -> list[tuple[Api, bool, str]]:
    """Return in which APIs a row is run, whether as a stream, and under which model."""
    found: list[tuple[Api, bool, str]] = []
    for streamed in {"stream": [True], "JSON": [False], "both": [False, True]}[row.asks]:
        for api in row.apis:
            models = [row.model] if row.model else MODELS[: 2 if api == "responses" else 1]
            found += [(api, streamed, model) for model in models]
    return found


def script_of(row: Row, api: Api, *, streamed: bool) -> list[Step]:
    """Return what the upstream does in this API."""
    steps: list[Step] = []
    for part in row.does:
        steps.extend(part(api, streamed) if callable(part) else [part])
    return steps


async def run(row: Row, proxy: Proxy, upstream: ScriptedUpstream, way: Any) -> Ran:
    """Make the request of a row, and wait until it is written down."""
    api, streamed, model = way
    script = script_of(row, api, streamed=streamed)
    before = len(upstream.requests)
    ran = Ran(proxy, upstream, api, streamed, model, script, fresh_request_id(), before)
    if row.before is not None:
        await row.before(ran)
    if script:
        upstream.script(script)
    client = asyncio.ensure_future(row.client(ran))
    try:
        if row.meanwhile is not None:
            await row.meanwhile(ran)
            assert not client.done()
    finally:
        await client
    ran.line = await line_of(proxy, ran.request_id, within=5)
    return ran


@pytest.mark.parametrize("row", DRIVEN, ids=lambda row: f"{row.id} {row.fault}")
async def test_a_fault(serve: Serve, upstream: ScriptedUpstream, row: Row) -> None:
    """What the client sees and what is charged are as in the table, and I1 to I8 hold."""
    proxy = await begin(serve, upstream, row)
    baseline = await take_baseline(proxy, upstream)
    purse = await Purse.of(proxy)
    runs: list[Ran] = []
    for way in ways(row):
        ran = await run(row, proxy, upstream, way)
        await check_seen(row, ran)
        check_charged(row, ran)
        for check in row.also:
            await check(ran)
        proxy.calm()  # a refused credential has the upstream left alone
        # The only slot is free again, and another request is served at once.
        assert (await proxy.post()).status == 200
        runs.append(ran)
        await proxy.close_clients()
    upstream.heal()
    await check_ids(proxy, *ids_of(runs))
    bodies = [ran.answer.body for ran in runs if ran.answer and len(ran.answer.body) < 2**20]
    await check_invariants(proxy, upstream, baseline=baseline, bodies=bodies)
    await purse.check()


# What the client sees


def prefix_of(script: Sequence[Step]) -> bytes:
    """Return the whole events that a script sends."""
    body = body_of(script).replace(b": drip\n\n", b"")
    return body[: body.rfind(b"\n\n") + 2] if b"\n\n" in body else b""


async def check_seen(row: Row, ran: Ran) -> None:
    """Assert what the row says that the client sees."""
    kind, _, code = row.sees.partition(" ")
    if kind.startswith("whole"):
        code = ""
    outcome = ran.line["outcome"]
    if row.sees in {"cut", "-"}:
        assert (ran.line["status"], outcome) == (499, "client_disconnected")
        assert not any(name in ENDS for name, _ in parse_sse(ran.body))
        return
    if row.sees == "lost":
        assert outcome == ("completed" if row.charged == "usage" else "upstream_timeout")
        return
    assert ran.answer is not None
    assert set(ran.answer.headers) <= OURS
    assert outcome == (OUTCOMES.get(code, "upstream_error") if code else "completed")
    if kind.isdigit():
        if code == "as it came":
            assert (ran.answer.status, ran.answer.body) == (int(kind), body_of(ran.script))
        else:
            check_error(ran.answer, int(kind), code, ran.api)
    elif kind == "failed":
        assert ran.answer.status == 200
        await check_failed(ran, code)
    else:
        assert ran.answer.status == 200
        if row.sees == "whole":
            check_whole(ran)
    if ran.api == "responses" and ran.streamed and ran.answer.status == 200:
        check_terminal(ran.body, completed=kind != "failed")


def told(body: bytes) -> list[tuple[str, str]]:
    """Return the events of a stream, those that have aiproxy's own id in them by their names."""
    own = LIFECYCLE | ENDS
    return [(name, "" if name in own else data) for name, data in parse_sse(body)]


def check_whole(ran: Ran) -> None:
    """Assert that all came as the upstream sent it; ids of a response that we keep are ours."""
    sent = body_of(ran.script)
    if ran.api != "responses" or ran.model != "kept":
        assert ran.body == sent, "not the upstream's bytes"
    elif ran.streamed:
        assert told(ran.body) == told(sent)
    else:
        ours = {"id": "", "store": True, "previous_response_id": None}
        assert json.loads(ran.body) | ours == json.loads(sent) | ours


async def check_failed(ran: Ran, code: str) -> None:
    """Assert that the whole events came, and then the failure alone."""
    prefix = prefix_of(ran.script) if ran.script[0] != ran.script[-1] else b""
    if ran.model == "kept" and prefix:
        frames = ran.body.split(b"\n\n")[: prefix.count(b"\n\n")]
        seen = b"".join(frame + b"\n\n" for frame in frames)
        assert told(seen) == told(prefix)
        prefix = seen
    check_failure(ran.api, prefix, ran.body, code)
    assert ran.client is not None
    await check_closed(ran.client)


def ids_of(runs: Sequence[Ran]) -> tuple[list[str], list[str]]:
    """Return the ids of responses that were seen complete, and of those seen otherwise."""
    complete: list[str] = []
    broken: list[str] = []
    for ran in runs:
        if ran.api != "responses" or ran.answer is None or ran.answer.status != 200:
            continue
        if not ran.streamed:
            complete.append(json.loads(ran.body)["id"])
            continue
        facts = [json.loads(data) for _, data in parse_sse(ran.body)]
        told = [fact for fact in facts if "response" in fact]
        if told:
            whole = told[-1]["type"] == "response.completed"
            (complete if whole else broken).append(told[-1]["response"]["id"])
    return complete, broken


# What is charged


def check_charged(row: Row, ran: Ran) -> None:
    """Assert what the row says that is charged; a client that left pays at least what it got."""
    charge = row.charged
    request = ran.requests[0] if ran.requests else None
    if request is not None and ran.model == "kept":
        request = replace(request, body=ran.sent)  # to which we add, but for our own ends
    if charge == "delivered" and row.sees in {"cut", "-"}:
        check_charge(ran.line, "estimate", request)
        assert ran.line["output_tokens"] >= delivered(ran.body)
        return
    assert charge in get_args(Charge)
    made = delivered(prefix_of(ran.script)) if charge == "delivered" else 0
    check_charge(ran.line, cast("Charge", charge), request, made=made)


# The table itself


def test_every_fault_is_in_the_table() -> None:
    """Those of the list, in its order, and no other."""
    ids = [row.id for row in TABLE]
    assert set(ids) == IDS
    assert ids == sorted(ids)


def test_every_row_says_all() -> None:
    """What is wrong, what is seen and what is charged; a row is run here, or elsewhere."""
    for row in TABLE:
        assert row.fault
        assert row.sees
        assert row.charged
        assert not (row.does and row.tests)


@pytest.mark.parametrize("named", sorted({test for row in TABLE for test in row.tests}))
def test_the_tests_that_are_named_are_there(named: str) -> None:
    """A row that is not run here names tests that exist."""
    module, _, name = named.partition("::")
    tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert name in {node.name for node in tree.body if isinstance(node, functions)}
