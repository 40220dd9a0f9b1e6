"""A request of the Responses API as an upstream of messages gets it: row by row, the exact body."""

import base64
from typing import Any, NamedTuple

import pytest

from messages_items import (
    BOTH,
    EMPTY_SCHEMA,
    FREE,
    HI,
    NOTES,
    PDF,
    PNG,
    SCHEMA,
    SENT_BOTH,
    SENT_F,
    SENT_FREE,
    SENT_G,
    SENT_PNG,
    F,
    Fields,
    assistant,
    call,
    image,
    item,
    output,
    part,
    reasoning,
    result,
    source,
    told,
    used,
    user,
)
from messages_upstream import (
    DEFAULT_MAX,
    PATH,
    SIGNATURE,
    Plan,
    Serve,
    ask,
    bridged,
    check_asked,
    heard,
    plain,
    text,
    thinking,
)
from refusals import Refusal
from rig import CREDENTIAL, prompt, routes
from upstream import ScriptedUpstream
from validating import check_bridged, facts_of

HOLDER = "replay"


class Row(NamedTuple):
    """A request's own fields, and what differs in the body from that of a bare one."""

    fields: Fields
    expected: Fields


def talk(given: Any, *messages: Fields) -> Row:
    """A row about the input alone."""
    return Row({"input": given}, {"messages": list(messages)})


ROWS: dict[str, Row] = {
    # Who speaks
    "a string": talk("hi", user("hi")),
    "a message": talk([item("user", "hi")], user("hi")),
    "a message with type and id": talk([told("user", "hi")], user("hi")),
    "instructions": Row({"instructions": "Be brief."}, {"system": "Be brief."}),
    "instructions null": Row({"instructions": None}, {}),
    "system and developer, wherever they stand": Row(
        {
            "instructions": "one",
            "input": [
                item("system", "two"),
                item("user", "hi"),
                item("developer", [part("input_text", text="three")]),
                item("assistant", "ho"),
                item("user", "more"),
                item("system", "four"),
            ],
        },
        {
            "system": "one\n\ntwo\n\nthree\n\nfour",
            "messages": [user("hi"), assistant("ho"), user("more")],
        },
    ),
    "system without instructions": Row(
        {"input": [item("developer", "alone"), item("user", "hi")]}, {"system": "alone"}
    ),
    "turns": talk(
        [item("user", "a"), item("assistant", "b"), item("user", "c")],
        user("a"), assistant("b"), user("c"),
    ),
    "one role twice": talk(
        [item("user", "a"), item("user", "b"), item("assistant", "c"), item("assistant", "d"),
         item("user", "e")],
        user("a", "b"), assistant("c", "d"), user("e"),
    ),
    "text parts": talk(
        [item("user", [part("input_text", text="a"), part("input_text", text="b")])],
        user("a", "b"),
    ),
    "an answer sent back": talk(
        [
            item("user", "a"),
            {
                "type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                "content": [part("output_text", text="b", annotations=[], logprobs=[])],
            },
            item("user", "c"),
        ],
        user("a"), assistant("b"), user("c"),
    ),
    "a refusal sent back": talk(
        [item("user", "a"), told("assistant", [part("refusal", refusal="No.")]), item("user", "c")],
        user("a"), assistant("No."), user("c"),
    ),
    "odd text": talk('\u0000\u2028\U0001f30d "\\', user('\u0000\u2028\U0001f30d "\\')),
    # Images and files
    "an image by url": talk(
        [item("user", [part("input_text", text="see"), image("https://example.org/a.png")])],
        user("see", source("url", url="https://example.org/a.png")),
    ),
    "an image as data, with a detail": talk(
        [item("user", [image(f"data:image/png;base64,{PNG}", detail="high")])], user(SENT_PNG)
    ),
    "a jpeg": talk(
        [item("user", [image(f"data:image/jpeg;base64,{PNG}", detail="auto")])],
        user(source("base64", media_type="image/jpeg", data=PNG)),
    ),
    "a pdf": talk(
        [item("user", [part("input_file", filename="a.pdf",
                            file_data=f"data:application/pdf;base64,{PDF}")])],
        user({"type": "document",
              "source": {"type": "base64", "media_type": "application/pdf", "data": PDF}}),
    ),
    "a text file": talk(
        [item("user", [part("input_file", filename="a.txt", file_data="data:text/plain;base64,"
                            + base64.b64encode(NOTES.encode()).decode())])],
        user({"type": "document",
              "source": {"type": "text", "media_type": "text/plain", "data": NOTES}}),
    ),
    "a file by url": talk(
        [item("user", [part("input_file", file_url="https://example.org/a.pdf")])],
        user({"type": "document", "source": {"type": "url", "url": "https://example.org/a.pdf"}}),
    ),
    # Calls
    "a call and its output": talk(
        [item("user", "a"), call("f", '{"a": 1}', id="fc_1", status="completed"), output("2")],
        user("a"), assistant(used("f", {"a": 1})), user(result("2")),
    ),
    "text, parallel calls, outputs, text": talk(
        [item("user", "a"), item("assistant", "b"), call("f", "{}"), call("g", "", "call_2"),
         output("x"), output("y", "call_2"), item("user", "c")],
        user("a"), assistant("b", used("f", {}), used("g", {}, "call_2")),
        user(result("x"), result("y", call_id="call_2"), "c"),
    ),
    "two rounds of calls": talk(
        [item("user", "a"), call("f", "{}"), output("x"), call("f", "{}", "call_2"),
         output("y", "call_2")],
        user("a"), assistant(used("f", {})), user(result("x")),
        assistant(used("f", {}, "call_2")), user(result("y", call_id="call_2")),
    ),
    "arguments that are no object": talk(
        [item("user", "a"), call("f", "[1, 2]"), output("x")],
        user("a"), assistant(used("f", {"arguments": "[1, 2]"})), user(result("x")),
    ),
    "arguments that are no JSON": talk(
        [item("user", "a"), call("f", '{"a": '), output("x")],
        user("a"), assistant(used("f", {"arguments": '{"a": '})), user(result("x")),
    ),
    "an output of parts": talk(
        [item("user", "a"), call("f", "{}"),
         output([part("input_text", text="x"), image(f"data:image/png;base64,{PNG}")])],
        user("a"), assistant(used("f", {})), user(result("x", SENT_PNG)),
    ),
    "an output that is empty": talk(
        [item("user", "a"), call("f", "{}"), output("")],
        user("a"), assistant(used("f", {})), user(result()),
    ),
    "a custom call and its output": talk(
        [item("user", "a"),
         {"type": "custom_tool_call", "call_id": "call_1", "name": "free", "input": "x\n{"},
         output("y", kind="custom_tool_call_output")],
        user("a"), assistant(used("free", {"input": "x\n{"})), user(result("y")),
    ),
    # Reasoning
    "reasoning, text and a call": talk(
        [item("user", "a"), reasoning(SIGNATURE, "Hm."), item("assistant", "b"), call("f", "{}"),
         output("x")],
        user("a"),
        assistant(
            {"type": "thinking", "thinking": "Hm.", "signature": SIGNATURE}, "b", used("f", {})
        ),
        user(result("x")),
    ),
    "redacted reasoning": talk(
        [item("user", "a"), reasoning("redacted_thinking:DATA+/="), item("assistant", "b"),
         item("user", "c")],
        user("a"), assistant({"type": "redacted_thinking", "data": "DATA+/="}, "b"), user("c"),
    ),
    "reasoning that is not signed": talk(
        [item("user", "a"), reasoning(None, "Hm."), item("assistant", "b"), item("user", "c")],
        user("a"), assistant("b"), user("c"),
    ),
    "reasoning of Codex": talk(
        [item("user", "a"), reasoning(SIGNATURE, "Hm.", content=None), item("assistant", "b"),
         item("user", "c")],
        user("a"),
        assistant({"type": "thinking", "thinking": "Hm.", "signature": SIGNATURE}, "b"),
        user("c"),
    ),
    "no reasoning asked for": Row(
        {"reasoning": {"effort": "none"}}, {"thinking": {"type": "disabled"}}
    ),
    "reasoning without an effort": Row({"reasoning": {"summary": "auto"}}, {}),
    "reasoning null": Row({"reasoning": None}, {}),
    # Tools
    "functions": Row(BOTH, SENT_BOTH),
    "a function without parameters": Row(
        {"tools": [{"type": "function", "name": "h"}]},
        {"tools": [{"name": "h", "input_schema": EMPTY_SCHEMA}]},
    ),
    "a custom tool": Row({"tools": [FREE]}, {"tools": [SENT_FREE]}),
    "a custom tool of text": Row(
        {"tools": [{**FREE, "format": {"type": "text"}}]}, {"tools": [SENT_FREE]}
    ),
    "no tools": Row({"tools": []}, {}),
    "choice auto": Row({**BOTH, "tool_choice": "auto"},
                       {**SENT_BOTH, "tool_choice": {"type": "auto"}}),
    "choice none": Row({**BOTH, "tool_choice": "none"},
                       {**SENT_BOTH, "tool_choice": {"type": "none"}}),
    "choice required": Row({**BOTH, "tool_choice": "required"},
                           {**SENT_BOTH, "tool_choice": {"type": "any"}}),
    "choice of a function": Row(
        {**BOTH, "tool_choice": {"type": "function", "name": "g"}},
        {**SENT_BOTH, "tool_choice": {"type": "tool", "name": "g"}},
    ),
    "choice of a custom tool": Row(
        {"tools": [F, FREE], "tool_choice": {"type": "custom", "name": "free"}},
        {"tools": [SENT_F, SENT_FREE], "tool_choice": {"type": "tool", "name": "free"}},
    ),
    "choice of allowed tools": Row(
        {**BOTH, "tool_choice": {"type": "allowed_tools", "mode": "required",
                                 "tools": [{"type": "function", "name": "g"}]}},
        {"tools": [SENT_G], "tool_choice": {"type": "any"}},
    ),
    "choice auto without tools": Row({"tool_choice": "auto"}, {}),
    "choice none without tools": Row({"tool_choice": "none", "tools": []}, {}),
    "one call at a time": Row(
        {**BOTH, "parallel_tool_calls": False},
        {**SENT_BOTH, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    ),
    "one call at a time, of those required": Row(
        {**BOTH, "parallel_tool_calls": False, "tool_choice": "required"},
        {**SENT_BOTH, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
    ),
    "one call at a time, of one function": Row(
        {**BOTH, "parallel_tool_calls": False, "tool_choice": {"type": "function", "name": "f"}},
        {**SENT_BOTH,
         "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True}},
    ),
    "many calls at a time": Row({**BOTH, "parallel_tool_calls": True}, SENT_BOTH),
    "one call at a time without tools": Row({"parallel_tool_calls": False}, {}),
    # The text that is asked for
    "text": Row({"text": {"format": {"type": "text"}}}, {}),
    "a schema": Row(
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True,
                             "description": "d"}}},
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    ),
    "verbosity medium": Row({"text": {"verbosity": "medium"}}, {}),
    # Numbers
    "a maximum": Row({"max_output_tokens": 77}, {"max_tokens": 77}),
    "no maximum": Row({"max_output_tokens": None}, {"max_tokens": DEFAULT_MAX}),
    "temperature and top_p": Row(
        {"temperature": 0.25, "top_p": 0.5}, {"temperature": 0.25, "top_p": 0.5}
    ),
    "null numbers": Row({"temperature": None, "top_p": None, "top_logprobs": None}, {}),
    "penalties of nothing": Row({"presence_penalty": 0, "frequency_penalty": 0.0}, {}),
    "no logprobs": Row({"top_logprobs": 0}, {}),
    # Who asks, and how
    "tier auto": Row({"service_tier": "auto"}, {"service_tier": "auto"}),
    "tier default": Row({"service_tier": "default"}, {"service_tier": "standard_only"}),
    "a user": Row({"user": "u-1"}, {"metadata": {"user_id": "u-1"}}),
    "a safety identifier": Row({"safety_identifier": "s-1"}, {"metadata": {"user_id": "s-1"}}),
    "both": Row(
        {"user": "u-1", "safety_identifier": "s-1"}, {"metadata": {"user_id": "s-1"}}
    ),
    "metadata": Row({"metadata": {"a": "b"}}, {}),
    # Without effect
    "includes": Row(
        {"include": ["reasoning.encrypted_content", "message.input_image.image_url"]}, {}
    ),
    "cache keys": Row({"prompt_cache_key": "k", "prompt_cache_retention": "24h"}, {}),
    "truncation disabled": Row({"truncation": "disabled"}, {}),
    "what hosted tools may": Row({"max_tool_calls": 3}, {}),
    "what Codex tells": Row({"client_metadata": {"x": "y"}}, {}),
    "how a stream is told": Row({"stream_options": {"include_obfuscation": False}}, {}),
    "not to be stored": Row({"store": False}, {}),
    "to be stored": Row({"store": True}, {}),
    "background false": Row({"background": False}, {}),
    # The upstream's own
    "fields of the upstream": Row(
        {"top_k": 5, "seed": 1, "stop": ["x"], "vendor": {"deep": [1, None]}},
        {"top_k": 5, "seed": 1, "stop": ["x"], "vendor": {"deep": [1, None]}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
async def test_what_the_upstream_is_asked(
    serve: Serve, upstream: ScriptedUpstream, name: str
) -> None:
    """Each row is told as messages exactly so, whole and streamed, and is answered."""
    proxy = await bridged(serve)
    fields, expected = ROWS[name]
    bare = {"model": "gpt-test", "max_tokens": DEFAULT_MAX, "messages": HI}
    for streamed in (False, True):
        answer = await ask(proxy, **{"input": "hi", **fields, "stream": streamed})
        if streamed:  # whose events repeat the same
            assert facts_of(answer.body)[-1]["type"] == "response.completed"
        else:
            assert check_bridged(answer)["status"] == "completed"
        assert "x-aiproxy-dropped-tools" not in answer.headers
        assert check_asked(upstream) == plain({**bare, **expected, "stream": streamed})


async def test_the_head_of_the_request(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The credential goes as x-api-key, with the API's version and nothing of the client's key."""
    proxy = await bridged(serve)
    await ask(proxy)
    request = upstream.requests[-1]
    assert (request.method, request.target) == ("POST", "/v1/messages")
    assert request.header("x-api-key") == CREDENTIAL
    assert request.header("authorization") is None
    assert request.header("anthropic-version") == "2023-06-01"
    assert request.header("content-type") == "application/json"
    assert request.header("x-request-id")
    await proxy.post(PATH, prompt(), {"anthropic-version": "2024-01-01"})
    assert upstream.requests[-1].header("anthropic-version") == "2024-01-01"


async def test_system_is_one_string(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Every server takes a string as `system`; blocks not all do."""
    proxy = await bridged(serve)
    await ask(proxy, [item("system", "two"), item("user", "hi")], instructions="one")
    assert upstream.requests[-1].json()["system"] == "one\n\ntwo"


async def test_a_renamed_model(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The upstream is asked under the route's name for it, and answers under the client's."""
    proxy = await bridged(serve)
    for streamed in (False, True):
        answer = await proxy.post(PATH, prompt(model="renamed", stream=streamed))
        assert check_bridged(answer)["model"] == "renamed"
        assert upstream.requests[-1].json()["model"] == "upstream-model"
    assert b"upstream-model" not in answer.body


@pytest.mark.parametrize(
    ("route", "sent"),
    [
        ({"default_max_tokens": 1234}, 1234),
        ({"default_max_tokens": 1234, "max_output_tokens": 1000}, 1000),
        ({"default_max_tokens": 1234, "max_output_tokens": 5000}, 1234),
        ({"max_output_tokens": 100}, 100),
    ],
)
async def test_the_default_maximum(
    serve: Serve, upstream: ScriptedUpstream, route: Fields, sent: int
) -> None:
    """The API wants a maximum: where the client gave none it is the route's, within its bound."""
    proxy = await bridged(serve, routes=routes(**route))
    answer = await ask(proxy)
    assert upstream.requests[-1].json()["max_tokens"] == sent
    assert check_bridged(answer)["status"] == "completed"
    await ask(proxy, max_output_tokens=64)
    assert upstream.requests[-1].json()["max_tokens"] == 64


async def test_a_maximum_above_the_routes(serve: Serve, upstream: ScriptedUpstream) -> None:
    """It is refused on a bridge as elsewhere."""
    proxy = await bridged(serve, routes=routes(max_output_tokens=100))
    answer = await ask(proxy, max_output_tokens=101)
    refusal = Refusal(400, "invalid_value", param="max_output_tokens")
    refusal.check(answer, upstream=answer.headers.get("x-aiproxy-upstream"))
    assert not upstream.requests


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
async def test_an_effort_asks_for_thinking(
    serve: Serve, upstream: ScriptedUpstream, effort: str
) -> None:
    """With an effort thinking is on, and what was thought is sent back as it was signed."""
    proxy = await bridged(serve)
    blocks = [thinking("Hm."), text("first")]
    upstream.script(Plan(blocks).script(streamed=False))
    first = check_bridged(await ask(proxy, "one", reasoning={"effort": effort}))
    asked = check_asked(upstream)
    assert asked["thinking"]["type"] in {"enabled", "adaptive"}
    assert asked["max_tokens"] > asked["thinking"].get("budget_tokens", 0)
    again: Fields = {"previous_response_id": first["id"], "reasoning": {"effort": effort}}
    check_bridged(await ask(proxy, "two", **again))
    assert heard(upstream.requests[-1]) == [
        user("one"),
        assistant({"type": "thinking", "thinking": "Hm.", "signature": SIGNATURE}, "first"),
        user("two"),
    ]
