"""What the tables of faults have in common: how to ask, what is seen, what is charged."""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from answers import (
    TEXT,
    USAGE,
    Usage,
    chat_events,
    chat_json,
    embeddings_json,
    messages_events,
    messages_json,
)
from client import Answer, RawClient, parse_sse
from invariants import TOKEN_FIELDS, Baseline, check_secrets, eventually, take_baseline
from responses import responses_events, responses_json
from rig import Proxy, parse_metrics, prompt, totals
from steps import Step

if TYPE_CHECKING:
    from upstream import Recorded, ScriptedUpstream

Api = Literal["responses", "chat", "messages", "embeddings"]
Charge = Literal["nothing", "input", "delivered", "estimate", "usage"]
Script = Sequence[Step]
Serve = Callable[..., Awaitable[Proxy]]

PATHS: dict[Api, str] = {
    "responses": "/v1/responses",
    "chat": "/v1/chat/completions",
    "messages": "/v1/messages",
    "embeddings": "/v1/embeddings",
}
STREAMED: tuple[Api, ...] = ("responses", "chat", "messages")
FIRST_DELTA: dict[Api, int] = {"responses": 5, "chat": 2, "messages": 4}  # events up to it
HEARTBEAT = b": keepalive\n\n"
CLOSED_CODES = {"server_error", "rate_limit_exceeded", "invalid_prompt"}
TYPES = {429: "rate_limit_error", 503: "overloaded_error"}  # of Anthropic; else api_error

_EVENT = TypeAdapter[Any](ResponseStreamEvent)
_numbers = itertools.count(1)


def asked(api: Api, *, streamed: bool, **fields: Any) -> dict[str, Any]:
    """Return the body of a request; a chat stream is asked for with its usage frame."""
    if api == "embeddings":
        return prompt(PATHS[api], **fields)
    if api == "chat" and streamed:
        fields = {"stream_options": {"include_usage": True}, **fields}
    return prompt(PATHS[api], stream=streamed, **fields)


def events_of(api: Api, text: str = TEXT, **options: Any) -> list[bytes]:
    """Return the frames of a healthy stream."""
    match api:
        case "responses":
            return responses_events(text, **options)
        case "chat":
            return chat_events(text, include_usage=True, **options)
        case _:
            return messages_events(text, **options)


def json_of(api: Api, text: str = TEXT) -> dict[str, Any]:
    """Return a healthy JSON answer."""
    match api:
        case "responses":
            return responses_json(text)
        case "chat":
            return chat_json(text)
        case "messages":
            return messages_json(text)
        case "embeddings":
            return embeddings_json()


async def begin(
    serve: Serve, upstream: "ScriptedUpstream", **changes: Any
) -> tuple[Proxy, Baseline]:
    """Start a daemon that keeps idle upstream connections but shortly; count what it holds."""
    given = dict(changes.pop("upstreams", {}))
    given["scripted"] = {"idle_connections": "50ms", **given.get("scripted", {})}
    proxy = await serve(upstreams=given, **changes)
    return proxy, await take_baseline(proxy, upstream)


@dataclass(slots=True)
class Seen:
    """One request as its client saw it, and what was written down of it."""

    answer: Answer
    line: dict[str, Any]
    client: RawClient

    @property
    def body(self) -> bytes:
        """The body without heartbeats."""
        return self.answer.body.replace(HEARTBEAT, b"")


def fresh_request_id() -> str:
    """Return a request id by which a log line is found."""
    return f"fault-{next(_numbers)}"


async def line_of(proxy: Proxy, request_id: str, within: float = 2.0) -> dict[str, Any]:
    """Wait for the one log line of a request."""
    found: list[dict[str, Any]] = []

    async def holds() -> None:
        found[:] = [line for line in proxy.request_logs() if line["request_id"] == request_id]
        assert len(found) == 1, f"{len(found)} log lines"

    await eventually(holds, within)
    return found[0]


async def ask(
    proxy: Proxy,
    api: Api,
    *,
    streamed: bool,
    fields: Mapping[str, Any] | None = None,
    **options: Any,
) -> Seen:
    """Make a request, read its whole answer, and wait for its log line."""
    request_id = fresh_request_id()
    body = asked(api, streamed=streamed, **(fields or {}))
    client = await proxy.send(PATHS[api], body, {"x-request-id": request_id}, **options)
    async with asyncio.timeout(5):
        answer = await client.answer()
    return Seen(answer, await line_of(proxy, request_id), client)


async def check_closed(client: RawClient) -> None:
    """Assert that nothing follows and that the connection is closed."""
    async with asyncio.timeout(2):
        assert await client.reader.read() == b""


def check_error(answer: Answer, status: int, code: str | None, api: Api) -> None:
    """Assert that this is an error in the shape of the API, with our own status and code."""
    assert answer.status == status, answer
    assert answer.headers["content-type"].startswith("application/json")
    document = answer.json()
    if api == "messages":
        assert set(document) == {"type", "error"}
        assert document["type"] == "error"
        assert document["error"]["type"] == TYPES.get(status, "api_error")
        assert document["error"]["message"]
        return
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert (document["error"]["code"], document["error"]["type"]) == (code, "server_error")


def check_failure(api: Api, prefix: bytes, body: bytes, code: str) -> list[dict[str, Any]]:
    """Assert that the body is a prefix and then the API's own way to say that it failed.

    Returns:
        The events after the prefix, decoded.
    """
    assert body.startswith(prefix), "the bytes so far are not the upstream's"
    tail = parse_sse(body[len(prefix) :])
    assert body.endswith(b"\n\n"), body[-300:]
    facts: list[dict[str, Any]] = [json.loads(data) for _, data in tail]
    last = facts[-1]
    if api == "messages":
        assert [name for name, _ in tail] == ["error"]
        assert last["type"] == "error"
        assert last["error"]["message"]
    elif api == "chat":
        assert len(tail) == 1
        assert set(last["error"]) == {"message", "type", "param", "code"}
        assert last["error"]["code"] == code
    else:
        _check_failed_response(prefix, tail, facts, code)
    return facts


def _check_failed_response(
    prefix: bytes, tail: list[tuple[str, str]], facts: list[dict[str, Any]], code: str
) -> None:
    before = [json.loads(data) for _, data in parse_sse(prefix)]
    ours = ["response.failed"] if before else ["response.created", "response.failed"]
    assert [name for name, _ in tail] == [fact["type"] for fact in facts] == ours
    numbers = [fact["sequence_number"] for fact in (*before, *facts)]
    assert numbers == list(range(len(numbers)))
    for _, data in tail:
        _EVENT.validate_json(data)
    response = facts[-1]["response"]
    done = [fact["item"] for fact in before if fact["type"] == "response.output_item.done"]
    assert (response["status"], response["output"]) == ("failed", done)
    assert response["error"]["code"] in CLOSED_CODES
    assert response["error"]["message"].startswith(f"[{code}] ")
    first = (before or facts)[0]["response"]
    assert response["id"] == first["id"]


def delivered(frames: bytes) -> int:
    """Return the estimate of the output in these frames: text pieces, or a quarter of bytes."""
    texts: list[str] = []
    for _, data in parse_sse(frames):
        if data == "[DONE]":
            continue
        event = json.loads(data)
        delta = event.get("delta")
        if isinstance(delta, str):
            texts.append(delta)
        elif isinstance(delta, dict):
            texts += [delta.get(name, "") for name in ("text", "partial_json")]
        for choice in event.get("choices", []):
            texts.append(choice["delta"].get("content") or "")
    sizes = [len(json.dumps(text)) - 2 for text in texts if text]
    return max(len(sizes), -(-sum(sizes) // 4))


def check_charge(
    line: Mapping[str, Any],
    charge: Charge,
    request: "Recorded | None" = None,
    *,
    made: int = 0,
    usage: Usage = USAGE,
) -> None:
    """Assert what a log line charges.

    Args:
        line: the request's.
        charge: what is charged.
        request: as the upstream got it; its size is the estimate of the input.
        made: output tokens of `delivered`.
        usage: the upstream's own count.
    """
    counts = {kind: line[name] for kind, name in TOKEN_FIELDS.items()}
    if charge == "usage":
        assert (counts, line["estimated"]) == (usage.disjoint(), False)
        return
    if charge == "nothing":
        assert (counts, line["estimated"]) == (dict.fromkeys(TOKEN_FIELDS, 0), False)
        return
    assert request is not None
    assert line["estimated"] is True
    # Four bytes are a token, until a route's answers show another ratio; ours are not far from it.
    assert abs(counts["input"] - len(request.body) // 4) <= 1 + len(request.body) // 100
    assert counts["input_cached"] == counts["output_reasoning"] == 0
    if charge == "estimate":
        assert counts["output"] > 0
    else:
        assert counts["output"] == (made if charge == "delivered" else 0)


async def results_of(proxy: Proxy) -> dict[str, float]:
    """Return how many attempts ended in which way."""
    return totals(await proxy.metrics(), "aiproxy_upstream_attempts_total", "result")


async def check_ended(proxy: Proxy, bodies: Sequence[bytes] = ()) -> None:
    """Assert I1, I3 and I5 of a daemon that has ended, whose admin listener is gone."""
    metrics = parse_metrics(proxy.daemon._metrics.exposition().decode())
    lines = proxy.request_logs()
    assert totals(metrics, "aiproxy_requests_in_flight", "endpoint") == {}
    assert sum(totals(metrics, "aiproxy_requests_total", "outcome").values()) == len(lines)
    counted = totals(metrics, "aiproxy_tokens_total", "type")
    logged = {kind: sum(line[name] for line in lines) for kind, name in TOKEN_FIELDS.items()}
    assert counted == {kind: number for kind, number in logged.items() if number}
    sink = _Ended(proxy)
    await check_secrets(sink, bodies)


class _Ended(Proxy):
    """A daemon that has ended, with the metrics that it had at its end."""

    def __init__(self, proxy: Proxy) -> None:
        self.tap = proxy.tap
        self._last = proxy.daemon._metrics.exposition()

    async def admin(self, path: str, method: str = "GET", body: bytes | None = None) -> Answer:
        """Return the last metrics."""
        return Answer(200, {}, self._last)


async def wait_gone(upstream: "ScriptedUpstream", n: int) -> "Recorded":
    """Wait until the n-th request's connection was closed by aiproxy."""
    request = await upstream.wait_request(n)
    async with asyncio.timeout(2):
        await request.closed.wait()
    return request
