"""The rig with the real daemon: a healthy case passes, and every seeded fault turns it red."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable

import pytest

import invariants
from answers import USAGE
from invariants import (
    Purse,
    check_at_rest,
    check_conservation,
    check_healthy,
    check_ids,
    check_invariants,
    check_secrets,
    check_terminal,
    check_tokens,
    take_baseline,
)
from responses import responses_events
from rig import (
    ABSENT,
    PROMPT_CANARY,
    TEAM_B,
    LogTap,
    Proxy,
    config_text,
    load,
    parse_metrics,
    prompt,
    totals,
)
from steps import error_answer
from upstream import ScriptedUpstream

Serve = Callable[..., Awaitable[Proxy]]
PATHS = ["/v1/responses", "/v1/chat/completions", "/v1/messages", "/v1/embeddings"]
REQUEST = {"event": "request", "request_id": "x", "outcome": "completed", "input_tokens": 1}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at once what would settle in time."""
    monkeypatch.setattr(invariants, "SETTLE", 0.0)


async def test_a_healthy_case_passes(serve: Serve, upstream: ScriptedUpstream) -> None:
    """All four endpoints, whole and streamed, leave every invariant as it was."""
    proxy = await serve()
    baseline = await take_baseline(proxy, upstream)
    for path in PATHS:
        for streamed in (False, True)[: 1 if path == PATHS[3] else 2]:
            answer = await proxy.post(path, prompt(path, stream=streamed), key=TEAM_B)
            assert answer.status == 200, answer
    stream = (await proxy.post(PATHS[0], prompt(stream=True))).body
    await check_invariants(
        proxy, upstream, baseline=baseline, stream=stream, completed=True, bodies=[b"{}"]
    )
    line = proxy.request_logs()[0]
    disjoint = {kind: line[field] for kind, field in invariants.TOKEN_FIELDS.items()}
    assert disjoint == USAGE.disjoint()


async def test_a_failing_upstream_is_not_healthy(serve: Serve, upstream: ScriptedUpstream) -> None:
    """I8 turns red when the next request fails."""
    proxy = await serve()
    upstream.default = error_answer(400)
    with pytest.raises(AssertionError):
        await check_healthy(proxy)


@pytest.mark.usefixtures("impatient")
async def test_a_seeded_log_line_is_seen(serve: Serve) -> None:
    """I1 and I3 turn red when a log line and the metrics disagree."""
    proxy = await serve()
    await check_conservation(proxy)
    await check_tokens(proxy)
    proxy.tap.write(json.dumps(REQUEST).encode() + b"\n")
    with pytest.raises(AssertionError):
        await check_conservation(proxy)
    with pytest.raises(AssertionError):
        await check_tokens(proxy)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("leak", ["task", "descriptor"])
async def test_a_seeded_leak_is_seen(serve: Serve, upstream: ScriptedUpstream, leak: str) -> None:
    """I4 turns red for one task or one descriptor more than before."""
    baseline = await take_baseline(await serve(), upstream)
    await check_at_rest(upstream, baseline)
    read, write = os.pipe() if leak == "descriptor" else (-1, -1)
    task = asyncio.ensure_future(asyncio.Event().wait()) if leak == "task" else None
    with pytest.raises(AssertionError):
        await check_at_rest(upstream, baseline)
    if task is None:
        os.close(read)
        os.close(write)
    else:
        task.cancel()


@pytest.mark.parametrize("secret", [*invariants.SECRETS, PROMPT_CANARY])
async def test_a_seeded_secret_is_seen(serve: Serve, secret: str) -> None:
    """I5 turns red for each secret, in the log and in an error body."""
    proxy = await serve()
    with pytest.raises(AssertionError, match="in body 0"):
        await check_secrets(proxy, [secret.encode()])
    proxy.tap.write(secret.encode())
    with pytest.raises(AssertionError, match="in log"):
        await check_secrets(proxy)


async def test_an_id_that_anybody_can_continue_is_seen(serve: Serve) -> None:
    """I6 turns red for an id that its owner cannot continue, and for one that another key can."""
    proxy = await serve()
    own = (await proxy.post()).json()["id"]
    foreign = (await proxy.post(key=TEAM_B)).json()["id"]
    await check_ids(proxy, [own], ["resp_" + "Q" * 43])
    for whole, broken in (
        ([foreign], []),
        ([], [foreign]),
        (["resp_" + "Q" * 43], []),
        ([], [own]),
    ):
        with pytest.raises(AssertionError):
            await check_ids(proxy, whole, broken)


async def test_a_bucket_that_differs_from_the_log_is_seen(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I3 turns red for one token that was taken and not logged."""
    proxy = await serve()
    await check_healthy(proxy)
    purse = await Purse.of(proxy)
    await check_healthy(proxy)
    await purse.check()
    account = proxy.daemon._limits._books["keys"]["team-a"]
    bucket = account.tokens[0]
    bucket.full_at += bucket.unit
    monkeypatch.setattr(invariants, "SETTLE", 0.0)
    with pytest.raises(AssertionError):
        await purse.check()


def test_terminal_events_are_counted() -> None:
    """I7 turns red for no terminal event, two, one with more behind it, and an invented one."""
    events = responses_events()
    whole = b"".join(events)
    check_terminal(whole, completed=True)
    check_terminal(b"".join(responses_events(terminal="failed", done=True)), completed=False)
    for broken in (b"".join(events[:-1]), whole + events[-1], whole + events[3], whole + b"data"):
        with pytest.raises(AssertionError):
            check_terminal(broken, completed=True)
    with pytest.raises(AssertionError, match="invented"):
        check_terminal(whole, completed=False)


def test_overrides_are_merged() -> None:
    """Mappings are merged, lists and scalars replaced, and ABSENT leaves a key out."""
    text = config_text(
        "http://127.0.0.1:1/v1", timeouts={"idle": "200ms"}, drain=ABSENT, keys={"team-b": ABSENT}
    )
    config = load(text)
    assert "drain:" not in text
    assert list(config.keys) == ["team-a"]
    assert load(config_text("http://127.0.0.1:1/v1")).keys.keys() == {"team-a", "team-b"}


def test_the_log_is_read_by_whole_lines() -> None:
    """A line in parts is read once it is whole, without its journald priority."""
    tap = LogTap()
    tap.write(b'<6>{"event": "request"}\n{"event"')
    assert tap.lines() == [{"event": "request"}]
    tap.write(b': "x"}\n')
    tap.flush()
    assert tap.lines()[1] == {"event": "x"}


def test_metrics_are_added_up_by_a_label() -> None:
    """Samples are found by name and labels, and totals leave zeros out."""
    text = '# TYPE a counter\na_total{k="x",r="1"} 2\na_total{k="x",r="2"} 3\na_total{k="y"} 0\n'
    metrics = parse_metrics(text)
    assert metrics["a_total", frozenset({("k", "x"), ("r", "1")})] == 2
    assert totals(metrics, "a_total", "k") == {"x": 5}
