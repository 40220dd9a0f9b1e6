"""The official `anthropic` package finds no difference between aiproxy and the upstream itself."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel

from answers import messages_events, messages_json, sse
from invariants import check_invariants, take_baseline
from rig import CREDENTIAL, Proxy
from steps import Reset, Sleep, Stall, Step, json_answer, stream
from upstream import ScriptedUpstream

Serve = Callable[..., Awaitable[Proxy]]
ASK: Any = {
    "model": "gpt-test",
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "hi"}],
}
TOOLS = [("get_weather", {"city": "Zürich", "days": [1, 2]}), ("stop", {})]


def refusal(status: int, kind: str, headers: Any = ()) -> list[Step]:
    """Refuse in the shape of the Anthropic API, with a field that aiproxy knows nothing of."""
    error = {"type": kind, "message": f"scripted {kind}"}
    return json_answer({"type": "error", "error": error, "request_id": "up"}, status, headers)


class Pair(NamedTuple):
    """The same SDK twice: through aiproxy, and straight to the upstream."""

    through: AsyncAnthropic
    direct: AsyncAnthropic


@pytest.fixture
async def proxy(serve: Serve) -> Proxy:
    """Run the daemon as it is usually configured."""
    return await serve()


@pytest.fixture
async def pair(proxy: Proxy, upstream: ScriptedUpstream) -> AsyncIterator[Pair]:
    """Make both clients."""
    base = upstream.url.removesuffix("/v1")
    async with (
        proxy.anthropic() as through,
        AsyncAnthropic(base_url=base, api_key="k", max_retries=0) as direct,
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


async def streamed(client: AsyncAnthropic) -> list[Any]:
    """Ask for a plain stream; return its events."""
    async with await client.messages.create(**ASK, stream=True) as events:
        return [event async for event in events]


async def helped(client: AsyncAnthropic) -> tuple[list[Any], Any]:
    """Use the stream helper; return its events and the message that it put together."""
    async with client.messages.stream(**ASK) as helper:
        return [event async for event in helper], await helper.get_final_message()


@pytest.mark.parametrize("tools", [[], TOOLS])
async def test_messages_are_the_same(pair: Pair, upstream: ScriptedUpstream, tools: Any) -> None:
    """Text and tool uses are parsed alike: whole, event by event, by the helper."""
    script = json_answer(messages_json("Grüezi 世界", tool_uses=tools))
    whole = await same(pair, upstream, script, lambda client: client.messages.create(**ASK))
    script = stream(messages_events("Grüezi 世界", tool_uses=tools))
    events = await same(pair, upstream, script, streamed)
    _, final = await same(pair, upstream, script, helped)
    assert [block.type for block in final.content] == ["text"] + ["tool_use"] * len(tools)
    for message in (whole, final):
        assert message.content[0].text == "Grüezi 世界"
        assert [(block.name, block.input) for block in message.content[1:]] == tools
        assert message.stop_reason == ("tool_use" if tools else "end_turn")
    assert final.usage == whole.usage
    assert (events[0].type, events[-1].type) == ("message_start", "message_stop")


async def test_heartbeats_are_not_seen(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Comments before and within a stream change nothing of what the SDK reads."""
    proxy = await serve(streams={"keepalive": "50ms"})
    head, *rest = stream(messages_events())
    slow = [Sleep(0.2), head, *rest[:3], Sleep(0.2), *rest[3:]]
    base = upstream.url.removesuffix("/v1")
    async with (
        proxy.anthropic() as through,
        AsyncAnthropic(base_url=base, api_key="k") as direct,
    ):
        await same(Pair(through, direct), upstream, slow, helped)


def use_sync(url: str, key: str) -> list[Any]:
    """Do the usual things with the synchronous client; return all that it parsed."""
    with Anthropic(base_url=url.removesuffix("/v1"), api_key=key, max_retries=0) as client:
        results: list[Any] = [client.messages.create(**ASK)]
        with client.messages.create(**ASK, stream=True) as events:
            results.append(list(events))
        with client.messages.stream(**ASK) as helper:
            results += [list(helper), helper.get_final_message()]
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.messages.create(**ASK)
        return [*(dumped(result) for result in results), caught.value.body]


async def test_the_synchronous_client_is_the_same(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """The client that blocks, in a thread, parses the same too, an upstream's refusal included."""
    events = stream(messages_events(tool_uses=TOOLS))
    refused = refusal(400, "invalid_request_error")
    for script in (json_answer(messages_json()), events, events, refused) * 2:
        upstream.script(script)
    through = await asyncio.to_thread(use_sync, proxy.url, proxy.key)
    direct = await asyncio.to_thread(use_sync, upstream.url, "k")
    assert through == direct
    assert (upstream.scripts_left, len(upstream.requests)) == (0, 8)


async def test_headers_and_query(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Versions, betas and the `beta` query go upstream, the client's key and other queries not."""
    async with (
        proxy.anthropic() as client,
        proxy.anthropic(api_key=None, auth_token=proxy.key) as bearer,
    ):
        raw = await client.messages.with_raw_response.create(**ASK, extra_query={"secret": "1"})
        await client.beta.messages.create(
            **ASK, betas=["some-beta-2026-01-01"], extra_query={"beta": "true"}
        )
        await bearer.messages.create(**ASK)
    plain, beta, last = upstream.requests
    assert (plain.target, beta.target) == ("/v1/messages", "/v1/messages?beta=true")
    assert (beta.header("anthropic-beta") or "").split(",")[-1] == "some-beta-2026-01-01"
    for request in upstream.requests:
        assert request.header("anthropic-version") == client.default_headers["anthropic-version"]
        assert request.header("x-api-key") == CREDENTIAL
        assert request.header("authorization") is None
    assert last.json() == plain.json()
    assert raw.headers["x-aiproxy-upstream"] == "scripted"
    assert raw.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("ask", "kind", "name"),
    [
        ({"api_key": "sk-no"}, anthropic.AuthenticationError, "authentication_error"),
        ({"model": "none"}, anthropic.NotFoundError, "not_found_error"),
        ({"model": ""}, anthropic.BadRequestError, "invalid_request_error"),
        ({"messages": "hi", "stream": True}, anthropic.BadRequestError, "invalid_request_error"),
    ],
)
async def test_own_errors(proxy: Proxy, ask: Any, kind: Any, name: str) -> None:
    """What aiproxy refuses is the SDK's own exception, in the shape of Anthropic's errors."""
    async with proxy.anthropic(api_key=ask.get("api_key", proxy.key)) as client:
        with pytest.raises(kind) as caught:
            await client.messages.create(
                **{k: v for k, v in {**ASK, **ask}.items() if k != "api_key"}
            )
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"].keys() == {"type", "message"}
    assert caught.value.body["error"]["type"] == name


async def test_tokens_are_counted(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """The SDK's `count_tokens` gets what the upstream counted."""
    upstream.script(json_answer({"input_tokens": 7}))
    async with proxy.anthropic() as client:
        counted = await client.messages.count_tokens(model="gpt-test", messages=ASK["messages"])
    assert counted.input_tokens == 7
    assert upstream.requests[-1].path == "/v1/messages/count_tokens"


async def test_tokens_that_nobody_counts(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Where the upstream has no such path the SDK says NotFoundError."""
    upstream.script(json_answer({"error": "no such path"}, 404))
    async with proxy.anthropic() as client:
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.count_tokens(model="gpt-test", messages=ASK["messages"])


REFUSALS: list[Any] = [
    (refusal(400, "invalid_request_error"), anthropic.BadRequestError, "invalid_request_error", []),
    (refusal(404, "not_found_error"), anthropic.NotFoundError, "not_found_error", []),
    (
        refusal(429, "rate_limit_error", [("retry-after", "7")]),
        anthropic.RateLimitError,
        "rate_limit_error",
        [7],
    ),
    (refusal(529, "overloaded_error", [("retry-after", "3")]), 503, "overloaded_error", [3]),
    (refusal(500, "api_error"), 502, "api_error", [pytest.approx(0.5, rel=0.3)]),
    (refusal(401, "authentication_error"), 502, "api_error", []),
    ([Stall()], 504, "api_error", []),
]


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("streams", [False, True])
async def test_upstream_errors(
    serve: Serve, upstream: ScriptedUpstream, slept: list[float], case: Any, *, streams: bool
) -> None:
    """Each is the right exception, and the SDK tries again only where it may, when it may."""
    upstream.default, kind, name, naps = case
    proxy = await serve(timeouts={"first_byte": "100ms"})
    expected = anthropic.APIStatusError if isinstance(kind, int) else kind
    async with proxy.anthropic(max_retries=1) as client:
        with pytest.raises(expected) as caught:
            await client.messages.create(**ASK, stream=streams)
    assert kind in {caught.value.status_code, expected}
    assert (caught.value.body["error"]["type"], slept) == (name, naps)
    assert len(upstream.requests) == 1 + len(naps)


async def test_errors_within_a_stream(pair: Pair, upstream: ScriptedUpstream) -> None:
    """A cut, and an error that the upstream itself sends, are exceptions for who reads on."""
    begun = stream(messages_events())[:4]
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    declared = [*begun, *stream([sse(error, event="error")])[1:]]
    upstream.script(begun, Reset())
    with pytest.raises(anthropic.APIStatusError, match=r"The upstream's answer broke off\.") as cut:
        await helped(pair.through)
    raised = []
    for client in pair:
        upstream.script(declared)
        with pytest.raises(anthropic.APIStatusError, match="Overloaded") as caught:
            await helped(client)
        raised.append((type(caught.value), caught.value.body, caught.value.status_code))
    assert cut.value.body == {
        "type": "error",
        "error": {"type": "api_error", "message": "The upstream's answer broke off."},
    }
    assert raised[0] == raised[1]


@pytest.mark.parametrize("way", ["close", "timeout"])
async def test_leaving_early(proxy: Proxy, upstream: ScriptedUpstream, way: str) -> None:
    """A client that closes its stream, or waits no longer, frees the upstream."""
    baseline = await take_baseline(proxy, upstream)
    upstream.script([] if way == "timeout" else stream(messages_events())[:4], Stall())
    before = len(upstream.requests)
    async with proxy.anthropic(timeout=0.2 if way == "timeout" else 30) as client:
        asked = asyncio.ensure_future(client.messages.create(**ASK, stream=True))
        request = await upstream.wait_request(before + 1)
        if way == "timeout":
            with pytest.raises(anthropic.APITimeoutError):
                await asked
        else:
            events = await asked
            assert (await anext(events)).type == "message_start"
            await events.close()
        async with asyncio.timeout(1):
            await request.closed.wait()
    await check_invariants(proxy, upstream, baseline=baseline)
    assert "client_disconnected" in {line["outcome"] for line in proxy.request_logs()}
