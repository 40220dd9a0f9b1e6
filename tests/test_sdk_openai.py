"""The official `openai` package finds no difference between aiproxy and the upstream itself."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from answers import chat_events, chat_json, embeddings_json, tool_call
from client import parse_sse
from invariants import check_invariants, take_baseline
from responses import function_item, message_item, reasoning_item, responses_events, responses_json
from rig import Proxy
from steps import Reset, Sleep, Stall, Step, error_answer, json_answer, stream
from upstream import Recorded, ScriptedUpstream

Serve = Callable[..., Awaitable[Proxy]]
MESSAGES: Any = [{"role": "user", "content": "hi"}]
CHAT: Any = {"model": "gpt-test", "messages": MESSAGES}
ASK: Any = {"model": "gpt-test", "input": "hi", "store": False}
ITEMS = {
    "text": [message_item("Grüße, 世界 \U0001f30d")],
    "tool": [function_item("get_weather", '{"city": "Zürich"}')],
    "reasoning": [reasoning_item(), message_item("Thought.")],
    "all": [reasoning_item(), message_item("First."), function_item(), message_item("Second.")],
}


class City(BaseModel):
    """What structured output is parsed into."""

    name: str
    people: int


CITY = '{"name": "Bern", "people": 134000}'


class Pair(NamedTuple):
    """The same SDK twice: through aiproxy, and straight to the upstream."""

    through: AsyncOpenAI
    direct: AsyncOpenAI


@pytest.fixture
async def proxy(serve: Serve) -> Proxy:
    """Run the daemon as it is usually configured."""
    return await serve()


@pytest.fixture
async def pair(proxy: Proxy, upstream: ScriptedUpstream) -> AsyncIterator[Pair]:
    """Make both clients."""
    async with (
        proxy.openai() as through,
        AsyncOpenAI(base_url=upstream.url, api_key="k", max_retries=0) as direct,
    ):
        yield Pair(through, direct)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the SDK not wait before it tries again; the list has the seconds it would have."""
    seconds: list[float] = []

    async def sleep(delay: float) -> None:
        seconds.append(delay)

    monkeypatch.setattr("anyio.sleep", sleep)
    return seconds


def dumped(result: Any) -> Any:
    """Return what the SDK parsed as plain data."""
    if isinstance(result, list | tuple):
        return [dumped(one) for one in result]
    return result.model_dump(warnings=False) if isinstance(result, BaseModel) else result


async def same(
    pair: Pair, upstream: ScriptedUpstream, script: list[Step], ask: Callable[[Any], Awaitable[Any]]
) -> Any:
    """Play a script to both clients; return what they both got from it."""
    upstream.script(script)
    upstream.script(script)
    through, direct = await ask(pair.through), await ask(pair.direct)
    assert dumped(through) == dumped(direct)
    sent, wanted = (request.json() for request in upstream.requests[-2:])
    assert sent.pop("stream", False) == wanted.pop("stream", False)
    assert sent == wanted
    return through


# Responses


async def streamed(client: AsyncOpenAI, **ask: Any) -> list[Any]:
    """Ask for a plain stream; return its events."""
    async with await client.responses.create(**{**ASK, **ask}, stream=True) as events:
        return [event async for event in events]


async def helped(client: AsyncOpenAI, **ask: Any) -> tuple[list[Any], Any]:
    """Use the stream helper; return its events and the response that it put together."""
    async with client.responses.stream(**{**ASK, **ask}) as helper:
        events = [event async for event in helper]
        return events, await helper.get_final_response()


@pytest.mark.parametrize("kind", ITEMS)
async def test_responses_are_the_same(pair: Pair, upstream: ScriptedUpstream, kind: str) -> None:
    """Text, tool calls and reasoning are parsed alike: whole, event by event, by the helper."""
    items = ITEMS[kind]
    script = json_answer(responses_json(items=items))
    whole = await same(pair, upstream, script, lambda client: client.responses.create(**ASK))
    for done in (False, True):
        script = stream(responses_events(items=items, done=done))
        events = await same(pair, upstream, script, streamed)
        _, final = await same(pair, upstream, script, helped)
    assert events[-1].type == "response.completed"
    assert [item.id for item in final.output] == [item["id"] for item in items]
    assert (final.output_text, final.usage) == (whole.output_text, whole.usage)


async def test_structured_output_is_parsed(pair: Pair, upstream: ScriptedUpstream) -> None:
    """`text_format` gives the same object from a whole answer and from a stream."""

    async def parse(client: AsyncOpenAI) -> Any:
        return await client.responses.parse(**ASK, text_format=City)

    async def helper(client: AsyncOpenAI) -> Any:
        return await helped(client, text_format=City)

    whole = await same(pair, upstream, json_answer(responses_json(CITY)), parse)
    _, final = await same(pair, upstream, stream(responses_events(CITY, deltas=9)), helper)
    assert whole.output_parsed == final.output_parsed == City(name="Bern", people=134000)
    assert upstream.requests[0].json()["text"]["format"]["type"] == "json_schema"


@pytest.mark.parametrize("terminal", ["incomplete", "failed"])
async def test_other_ends_are_the_same(
    pair: Pair, upstream: ScriptedUpstream, terminal: Any
) -> None:
    """What the upstream itself ends as incomplete or failed reaches the SDK as such."""
    script = stream(responses_events(terminal=terminal))
    events = await same(pair, upstream, script, streamed)
    assert events[-1].response.status == terminal


async def test_heartbeats_are_not_seen(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Comments before and within a stream change nothing of what the SDK reads."""
    proxy = await serve(streams={"keepalive": "50ms"})
    head, *rest = stream(responses_events(items=ITEMS["all"]))
    slow = [Sleep(0.2), head, *rest[:3], Sleep(0.2), *rest[3:]]
    async with (
        proxy.openai() as through,
        AsyncOpenAI(base_url=upstream.url, api_key="k") as direct,
    ):
        await same(Pair(through, direct), upstream, slow, helped)
        upstream.script(slow)
        raw = await proxy.post(body={**ASK, "stream": True})
    assert raw.body.count(b": keepalive") >= 2


# Chat, embeddings, models


@pytest.mark.parametrize("tools", [False, True])
async def test_chat_is_the_same(pair: Pair, upstream: ScriptedUpstream, *, tools: bool) -> None:
    """Whole chat completions are parsed alike, structured output and tool calls included."""
    calls = [tool_call("f", '{"a": 1}'), tool_call("g", "{}")] if tools else []

    async def parse(client: AsyncOpenAI) -> Any:
        return await client.chat.completions.parse(**CHAT, response_format=City)

    script = json_answer(chat_json(None if tools else CITY, tool_calls=calls))
    await same(pair, upstream, script, lambda client: client.chat.completions.create(**CHAT))
    parsed = (await same(pair, upstream, script, parse)).choices[0].message
    assert parsed.parsed == (None if tools else City(name="Bern", people=134000))
    assert len(parsed.tool_calls or ()) == len(calls)


@pytest.mark.parametrize("asked", [False, True, None])
@pytest.mark.parametrize("tools", [False, True])
async def test_chat_streams_are_the_same(
    pair: Pair, upstream: ScriptedUpstream, *, tools: bool, asked: bool | None
) -> None:
    """A chat stream is parsed alike, and has the usage only where `include_usage` was asked."""
    calls = [tool_call("f", '{"a": [1, 2]}'), tool_call("g", "{}")] if tools else []
    frames = chat_events("Hello there, world", tool_calls=calls, include_usage=True)

    def answer(request: Recorded) -> list[Step]:
        wanted = (request.json().get("stream_options") or {}).get("include_usage")
        return stream([f for f in frames if wanted or b'"choices": []' not in f])

    async def plain(client: AsyncOpenAI) -> list[Any]:
        async with await client.chat.completions.create(**options, stream=True) as chunks:
            return [chunk async for chunk in chunks]

    async def helper(client: AsyncOpenAI) -> Any:
        async with client.chat.completions.stream(**options) as events:
            return [event async for event in events], await events.get_final_completion()

    upstream.default = answer
    options = CHAT if asked is None else {**CHAT, "stream_options": {"include_usage": asked}}
    results = [[await plain(client), await helper(client)] for client in pair]
    assert dumped(results[0]) == dumped(results[1])
    chunks, (_, final) = results[0]
    assert final.choices[0].message.content == "Hello there, world"
    assert (final.usage is not None) is (chunks[-1].usage is not None) is bool(asked)


async def test_embeddings_are_the_same(pair: Pair, upstream: ScriptedUpstream) -> None:
    """Vectors come back alike, by base64, which the SDK asks for by itself, and as numbers."""
    packed = json_answer(embeddings_json(2, dimensions=8, encoding="base64"))
    plain = json_answer(embeddings_json(2, dimensions=8))

    async def ask(client: AsyncOpenAI, **options: Any) -> Any:
        return await client.embeddings.create(model="gpt-test", input=["a", "b"], **options)

    first = await same(pair, upstream, packed, ask)
    assert upstream.requests[0].json()["encoding_format"] == "base64"
    second = await same(pair, upstream, plain, lambda c: ask(c, encoding_format="float"))
    assert [one.embedding for one in first.data] == [one.embedding for one in second.data]


async def test_models(proxy: Proxy) -> None:
    """The models of the routes are listed and found; a glob itself is not a model."""
    async with proxy.openai() as client:
        listed = [model async for model in client.models.list()]
        found = await client.models.retrieve("org/small")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("org/*")
    assert [model.id for model in listed] == ["gpt-test", "renamed", "org/small"]
    assert (found.id, found.object, listed[0].owned_by) == ("org/small", "model", "aiproxy")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_headers(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Raw answers and streams show the request's id, a given one too, and the upstream."""
    async with proxy.openai() as client:
        raw = await client.responses.with_raw_response.create(**ASK)
        given = await client.responses.create(**ASK, extra_headers={"x-request-id": "mine-1"})
        async with client.responses.with_streaming_response.create(**ASK, stream=True) as streaming:
            events = parse_sse(await streaming.read())
    assert (
        raw.headers["x-aiproxy-upstream"] == streaming.headers["x-aiproxy-upstream"] == "scripted"
    )
    assert re.fullmatch(r"req_[0-9a-f]{32}", raw.headers["x-request-id"])
    assert raw.parse()._request_id == raw.headers["x-request-id"]
    assert given._request_id == upstream.requests[1].header("x-request-id") == "mine-1"
    assert streaming.headers["content-type"].startswith("text/event-stream")
    assert streaming.headers["cache-control"] == "no-cache"
    assert events[-1][0] == "response.completed"
    crossed = upstream.requests[0].header
    assert crossed("x-stainless-lang") == "python"
    assert (crossed("user-agent") or "").startswith("AsyncOpenAI/Python")


def use_sync(url: str, key: str) -> list[Any]:
    """Do the usual things with the synchronous client; return all that it parsed."""
    with OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        results: list[Any] = [client.responses.create(**ASK)]
        with client.responses.create(**ASK, stream=True) as events:
            results.append(list(events))
        with client.responses.stream(**ASK) as helper:
            results += [list(helper), helper.get_final_response()]
        results.append(client.chat.completions.create(**CHAT))
        with client.chat.completions.create(**CHAT, stream=True) as chunks:
            results.append(list(chunks))
        results.append(client.embeddings.create(model="gpt-test", input="a"))
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="gpt-test", input="refused")
        return [dumped(result) for result in results] + [caught.value.body]


async def test_the_synchronous_client_is_the_same(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """The client that blocks, in a thread, parses the same too, an upstream's refusal included."""
    scripts = (
        json_answer(responses_json()),
        stream(responses_events(items=ITEMS["all"])),
        stream(responses_events(items=ITEMS["all"])),
        json_answer(chat_json()),
        stream(chat_events()),
        json_answer(embeddings_json()),
        error_answer(400, "no", code="no_good", param="input"),
    )
    for script in scripts * 2:
        upstream.script(script)
    through = await asyncio.to_thread(use_sync, proxy.url, proxy.key)
    direct = await asyncio.to_thread(use_sync, upstream.url, "k")
    assert through == direct
    assert (upstream.scripts_left, len(upstream.requests)) == (0, 2 * len(scripts))


# Errors


@pytest.mark.parametrize(
    ("ask", "kind", "code", "param"),
    [
        ({"api_key": "sk-no"}, openai.AuthenticationError, "invalid_api_key", None),
        ({"model": "none"}, openai.NotFoundError, "model_not_found", "model"),
        ({"input": 7, "stream": True}, openai.BadRequestError, "invalid_type", "input"),
        ({"model": ""}, openai.BadRequestError, "missing_required_parameter", "model"),
        ({"background": True}, openai.BadRequestError, "unsupported_parameter", "background"),
    ],
)
async def test_own_errors(proxy: Proxy, ask: Any, kind: Any, code: str, param: str) -> None:
    """What aiproxy refuses is the SDK's own exception, with type, code, param and request id."""
    fields = {**ASK, "extra_headers": {"x-request-id": "me"}, **ask}
    async with proxy.openai(api_key=fields.pop("api_key", proxy.key)) as client:
        with pytest.raises(kind) as caught:
            await client.responses.create(**fields)
    error = caught.value
    assert (error.type, error.code, error.param) == ("invalid_request_error", code, param)
    assert error.request_id == "me"


REFUSALS: list[Any] = [
    (error_answer(400, code="odd", param="input"), openai.BadRequestError, "odd", []),
    (error_answer(409, code="odd"), openai.ConflictError, "odd", [pytest.approx(0.5, rel=0.3)]),
    (error_answer(422, code="odd"), openai.UnprocessableEntityError, "odd", []),
    (error_answer(429, headers=[("retry-after", "7")]), openai.RateLimitError, None, [7]),
    (error_answer(429, headers=[("retry-after-ms", "40")]), openai.RateLimitError, None, [0.04]),
    (error_answer(429, headers=[("x-should-retry", "false")]), openai.RateLimitError, None, []),
    (error_answer(529, headers=[("retry-after", "3")]), 503, "upstream_overloaded", [3]),
    (error_answer(503), 503, "upstream_overloaded", [1]),
    (error_answer(500), 502, "upstream_error", [pytest.approx(0.5, rel=0.3)]),
    (error_answer(401), 502, "upstream_credential", []),
    ([Stall()], 504, "upstream_timeout", []),
]


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("streams", [False, True])
async def test_upstream_errors(
    serve: Serve, upstream: ScriptedUpstream, slept: list[float], case: Any, *, streams: bool
) -> None:
    """Each is the right exception, and the SDK tries again only where it may, when it may."""
    upstream.default, kind, code, naps = case
    proxy = await serve(timeouts={"first_byte": "100ms"})
    expected = openai.InternalServerError if isinstance(kind, int) else kind
    async with proxy.openai(max_retries=1) as client:
        with pytest.raises(expected) as caught:
            await client.responses.create(**ASK, stream=streams)
    assert kind in {caught.value.status_code, expected}
    assert (caught.value.code, slept) == (code, naps)
    assert len(upstream.requests) == 1 + len(naps)


async def test_a_cut_stream_is_seen(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A cut that the SDK alone would take for success is a failed response, or an exception."""
    upstream.script(stream(responses_events())[:6], Reset())
    upstream.script(stream(chat_events())[:3], Reset())
    async with proxy.openai(max_retries=2) as client:
        events = await streamed(client)
        chunks = await client.chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.APIError, match=r"The upstream's answer broke off\.") as caught:
            async for _ in chunks:
                pass
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    assert events[-1].response.error.message.startswith("[upstream_error] ")
    assert (caught.value.code, len(upstream.requests)) == ("upstream_error", 2)


@pytest.mark.parametrize("way", ["close", "timeout"])
async def test_leaving_early(proxy: Proxy, upstream: ScriptedUpstream, way: str) -> None:
    """A client that closes its stream, or waits no longer, frees the upstream."""
    baseline = await take_baseline(proxy, upstream)
    upstream.script([] if way == "timeout" else stream(responses_events())[:4], Stall())
    before = len(upstream.requests)
    async with proxy.openai(timeout=0.2 if way == "timeout" else 30) as client:
        asked = asyncio.ensure_future(client.responses.create(**ASK, stream=True))
        request = await upstream.wait_request(before + 1)
        if way == "timeout":
            with pytest.raises(openai.APITimeoutError):
                await asked
        else:
            events = await asked
            assert (await anext(events)).type == "response.created"
            await events.close()
        async with asyncio.timeout(1):
            await request.closed.wait()
    await check_invariants(proxy, upstream, baseline=baseline)
    assert "client_disconnected" in {line["outcome"] for line in proxy.request_logs()}
