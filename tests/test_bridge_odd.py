"""Odd requests and odd answers over bridges: what is told, what is charged, what is never lost."""

import asyncio
import json
import time
from typing import Any

import pytest

from aiproxy.dialects.chat_bridge import ChatBridge
from aiproxy.dialects.responses_writer import MAX_ITEMS
from client import parse_sse
from invariants import check_invariants
from responses import responses_json
from rig import CREDENTIAL, Proxy, prompt, totals
from sessions_rig import Serve
from steps import Chunk, EndChunks, Headers, Sleep, Stall, json_answer
from test_bridge_hostile import asked
from upstream import ScriptedUpstream

HEAD = Headers(200, [("content-type", "text/event-stream")])
STOP = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
HELLO = {"choices": [{"index": 0, "delta": {"content": "Hello"}}]}
SECONDS_OF_WORK = 10.0  # what comparing each call with each other one would take many times


def frame(document: object) -> Chunk:
    """Return one event."""
    return Chunk(b"data: %b\n\n" % json.dumps(document).encode())


def whole(message: Any, **fields: Any) -> Any:
    """Return a chat completion."""
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], **fields}


@pytest.fixture
async def chat(serve: Serve) -> Proxy:
    """Run the daemon before an upstream that speaks chat."""
    return await serve(upstreams={"scripted": {"apis": ["chat"]}})


@pytest.fixture
async def claude(serve: Serve) -> Proxy:
    """Run the daemon before an upstream that speaks messages."""
    return await serve(upstreams={"scripted": {"apis": ["messages"]}})


BIG = "9" * 5000
MALFORMED: dict[str, tuple[str, str]] = {
    "a number that nobody can count with": (f'"metadata": {{"a": {BIG}}}', "metadata"),
    "one in an item": (f'"input": [{{"role": "user", "content": [{BIG}]}}]', "input"),
    "an item without a type": ('"input": [{"content": "IMPORTANT"}]', "input[0].type"),
    "an item with a null type": ('"input": [{"type": null, "text": "x"}]', "input[0].type"),
    "an item that is empty": ('"input": [{}]', "input[0].type"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_what_cannot_be_read(chat: Proxy, upstream: ScriptedUpstream, name: str) -> None:
    """It is refused by its place: it neither breaks anything nor vanishes."""
    given, param = MALFORMED[name]
    body = f'{{"model": "gpt-test", "input": "hi", {given}}}'
    answer = await chat.post(body=body.encode())
    error = answer.json()["error"]
    assert (answer.status, error["code"], error["param"]) == (400, "invalid_type", param)
    assert upstream.requests == []


ON_MESSAGES: dict[str, tuple[dict[str, Any], str, str]] = {
    "an effort that is a list": ({"reasoning": {"effort": []}}, "invalid_type", "reasoning.effort"),
    "a tier that is an object": ({"service_tier": {}}, "invalid_type", "service_tier"),
    "no output": ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
    "an effort beside thinking": (
        {"reasoning": {"effort": "low"}, "thinking": {"type": "disabled"}},
        "unsupported_parameter",
        "thinking",
    ),
    "a file that is no data URL": (
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_data": "JVBERi0"}]}]},
        "invalid_value",
        "input[0].content[0]",
    ),
    "tools of which none is left": (
        {
            "tools": [{"type": "function", "name": "f"}],
            "tool_choice": {
                "type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "g"}],
            },
        },
        "unsupported_parameter",
        "tool_choice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_MESSAGES)
async def test_what_messages_cannot_take(
    claude: Proxy, upstream: ScriptedUpstream, name: str
) -> None:
    """It is refused by its place before the upstream is asked."""
    fields, code, param = ON_MESSAGES[name]
    answer = await claude.post(body=prompt(**fields))
    error = answer.json()["error"]
    assert (answer.status, error["code"], error["param"]) == (400, code, param)
    assert upstream.requests == []


async def test_an_unknown_field_beside_half_a_character(
    chat: Proxy, upstream: ScriptedUpstream
) -> None:
    """A lone surrogate in one field and a long number in another one go as they came."""
    upstream.script(json_answer(whole({"role": "assistant", "content": "Hi"})))
    body = f'{{"model": "gpt-test", "input": "\\ud800", "seed": {BIG}}}'
    assert (await chat.post(body=body.encode())).status == 200
    sent = upstream.requests[-1].body
    assert BIG.encode() in sent
    assert b'"\\ud800"' in sent


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_error_with_half_a_character(
    chat: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """The upstream's own words are told as far as they are characters."""
    said = {"error": {"message": "bad \ud800"}}
    upstream.script([HEAD, frame(said), EndChunks()] if streamed else json_answer(said))
    answer = await chat.post(body=prompt(stream=streamed))
    assert answer.status == (200 if streamed else 502)
    assert "bad ?" in answer.body.decode()
    await check_invariants(chat, upstream)


@pytest.mark.parametrize("streamed", [False, True])
async def test_our_credential_is_not_told(
    chat: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """An upstream that refuses it in the middle of a 200 is told of without its words."""
    said = {"error": {"code": "invalid_api_key", "message": f"Incorrect key: {CREDENTIAL}"}}
    upstream.script([HEAD, frame(said), EndChunks()] if streamed else json_answer(said))
    answer = await chat.post(body=prompt(stream=streamed))
    assert CREDENTIAL not in answer.body.decode()
    assert "upstream_credential" in answer.body.decode()


async def test_an_answer_without_usage_is_charged_by_its_text(
    chat: Proxy, upstream: ScriptedUpstream
) -> None:
    """Not by what its object repeats of the request."""
    upstream.script(json_answer(whole({"role": "assistant", "content": "Hello"})))
    await chat.post(body=prompt(instructions="x" * 40_000))
    tokens = totals(await chat.metrics(), "aiproxy_tokens_total", "type")
    assert tokens["output"] == 2


@pytest.mark.parametrize("after", ["total", "drain", "garbage"])
async def test_a_whole_answer_stays_whole(
    serve: Serve, upstream: ScriptedUpstream, after: str
) -> None:
    """With its finish reason it is complete, whatever comes while its usage is waited for."""
    upstreams = {"scripted": {"apis": ["chat"]}}
    proxy = await serve(
        upstreams=upstreams,
        timeouts={"total": "400ms" if after == "total" else "0s"},
        drain={"delay": "0s", "timeout": "200ms"},
    )
    garbage = [Chunk(b"data: no json\n\n")] if after == "garbage" else []
    upstream.script([HEAD, frame(HELLO), frame(STOP), *garbage, Stall()])
    client = await proxy.send(body=prompt(stream=True))
    await upstream.wait_request()
    if after == "drain":
        await proxy.daemon.drain()
    answer = await client.answer()
    last = json.loads(parse_sse(answer.body)[-1][1])
    assert last["type"] == "response.completed"
    assert last["response"]["output"][0]["content"][0]["text"] == "Hello"


async def test_a_name_that_comes_late(chat: Proxy, upstream: ScriptedUpstream) -> None:
    """A call is told once its tool is known, and loses nothing of its arguments."""
    pieces: list[Any] = [
        {"index": 0, "id": "c", "function": {"arguments": '{"a":'}},
        {"index": 0, "function": {"name": "f"}},
        {"index": 0, "function": {"arguments": "1}"}},
    ]
    frames = [frame({"choices": [{"index": 0, "delta": {"tool_calls": [p]}}]}) for p in pieces]
    upstream.script([HEAD, *frames, frame(STOP), EndChunks()])
    answer = await chat.post(body=prompt(stream=True))
    last = json.loads(parse_sse(answer.body)[-1][1])
    (call,) = last["response"]["output"]
    assert (call["name"], call["arguments"], call["call_id"]) == ("f", '{"a":1}', "c")


async def test_a_call_of_an_older_server(chat: Proxy, upstream: ScriptedUpstream) -> None:
    """`function_call` of the first version of the API is a call as well."""
    message = {"content": None, "function_call": {"name": "f", "arguments": "{}"}}
    upstream.script(json_answer(whole(message)))
    (call,) = (await chat.post(body=prompt())).json()["output"]
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "f", "{}")


async def test_an_input_that_is_no_text(claude: Proxy, upstream: ScriptedUpstream) -> None:
    """A custom tool that was called with something else gets it as it is."""
    block = {"type": "tool_use", "id": "t", "name": "g", "input": {"code": "print(1)"}}
    upstream.script(
        json_answer({"content": [block], "stop_reason": "tool_use", "usage": {}}),
    )
    tools = [{"type": "custom", "name": "g"}]
    (call,) = (await claude.post(body=prompt(tools=tools))).json()["output"]
    assert json.loads(call["input"]) == {"code": "print(1)"}


async def test_calls_without_end_do_not_hold_up_the_loop(
    chat: Proxy, upstream: ScriptedUpstream
) -> None:
    """A frame of megabytes of calls is read in time, and is more than an answer may have."""
    calls = [
        {"index": n, "id": f"c{n}", "function": {"name": "f", "arguments": "{}"}}
        for n in range(30_000)
    ]
    upstream.script(
        [HEAD, frame({"choices": [{"index": 0, "delta": {"tool_calls": calls}}]}), Stall()]
    )
    lags: list[float] = []
    watching = asyncio.create_task(watch_the_loop(lags))
    answer = await chat.post(body=prompt(stream=True))
    watching.cancel()
    assert max(lags, default=0.0) < SECONDS_OF_WORK
    last = json.loads(parse_sse(answer.body)[-1][1])
    assert last["type"] == "response.failed"
    assert "too many items" in last["response"]["error"]["message"]
    assert len(last["response"]["output"]) <= MAX_ITEMS


async def watch_the_loop(lags: list[float]) -> None:
    """Note how long the loop stood still, until cancelled."""
    while True:
        before = time.monotonic()
        await asyncio.sleep(0.01)
        lags.append(time.monotonic() - before)


def test_what_is_gathered_is_bounded() -> None:
    """Log probabilities and the arguments of custom tools count, too."""
    odds = [{"token": "x", "logprob": -1.0, "bytes": [120], "top_logprobs": []}] * 1000
    text = {"index": 0, "delta": {"content": "x"}, "logprobs": {"content": odds}}
    call = {"index": 0, "id": "c", "function": {"name": "g", "arguments": "x" * 100_000}}
    custom = {"index": 0, "delta": {"tool_calls": [call]}}
    for choice in (text, custom):
        stream = ChatBridge().stream(asked(stream=True))
        raw = b"data: %b\n\n" % json.dumps({"choices": [choice]}).encode()
        for _ in range(1000):
            stream.feed(raw)
            if stream.error is not None:
                break
        assert stream.error is not None
        assert "too large" in stream.error.message


async def test_a_history_that_cannot_be_expressed(serve: Serve, upstream: ScriptedUpstream) -> None:
    """It is refused after its content was read, and takes nothing from the limits all the same."""
    native = {"url": upstream.url, "apis": ["responses"], "sessions": "replay"}
    proxy = await serve(
        upstreams={"native": native, "scripted": {"apis": ["chat"]}},
        routes=[
            {"model": "native", "upstreams": ["native"]},
            {"model": "gpt-test", "upstreams": ["scripted"]},
        ],
        keys={"team-a": {"limits": {"requests": "5/day", "tokens": "900000/day"}}},
    )
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
    upstream.script(json_answer(responses_json(items=[search])))
    first = (await proxy.post(body=prompt(model="native"))).json()
    for _ in range(7):
        answer = await proxy.post(body=prompt(previous_response_id=first["id"]))
        error = answer.json()["error"]
        assert (answer.status, error["code"]) == (400, "unsupported_parameter")
        assert error["param"] == "previous_response_id"
    levels = (await proxy.post(body=prompt(model="nothing"))).headers
    assert levels["x-ratelimit-remaining-requests"] == "4"
    assert len(upstream.requests) == 1
    await check_invariants(proxy, upstream)


async def test_large_tools_do_not_hold_up_the_loop(chat: Proxy, upstream: ScriptedUpstream) -> None:
    """What a response repeats of a large request is made beside the loop, and passes whole."""
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "x": "y" * 100_000}}
    upstream.script([HEAD, Sleep(0.05), frame(HELLO), frame(STOP), EndChunks()])
    answer = await chat.post(body=prompt(stream=True, tools=[tool] * 50))
    last = json.loads(parse_sse(answer.body)[-1][1])
    assert last["type"] == "response.completed"
    assert len(last["response"]["tools"]) == 50
