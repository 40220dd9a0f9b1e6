"""What a chat upstream is asked where a client asks for a response, field by field."""

import json
from typing import Any, NamedTuple

import pytest

from chat_upstream import (
    CHAT_PATH,
    FUNCTION,
    PATH,
    Fact,
    Serve,
    ask,
    chat_only,
    check_pairs,
    messages_of,
    row,
)
from rig import Proxy
from upstream import ScriptedUpstream

HOLDER = "replay"

USER: Fact = {"role": "user", "content": "hi"}
IMAGE = "data:image/png;base64,iVBORw0KGgo="
URL = "https://example.com/a.png"
SCHEMA: Fact = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
TOOL: Fact = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OTHER: Fact = {"type": "function", "name": "g", "parameters": {"type": "object"}}
CUSTOM: Fact = {"type": "custom", "name": "patch", "description": "Applies a patch."}
CUSTOM_SENT: Fact = {
    "type": "function",
    "function": {
        "name": "patch",
        "description": "Applies a patch.",
        "parameters": {
            "type": "object",
            "properties": {"input": {"type": "string"}},
            "required": ["input"],
            "additionalProperties": False,
        },
    },
}


class Row(NamedTuple):
    """One row: fields of the request, and what they make of the usual chat body."""

    asked: Fact
    sent: Fact


def said(*items: Any) -> Fact:
    """Return the field `input`."""
    return {"input": list(items)}


def heard(*messages: Any) -> Fact:
    """Return the field `messages`."""
    return {"messages": list(messages)}


def user(*parts: Fact) -> Fact:
    """Return a user's message of parts."""
    return {"type": "message", "role": "user", "content": list(parts)}


def assistant(*parts: Fact) -> Fact:
    """Return an assistant's message of parts."""
    return {"type": "message", "role": "assistant", "content": list(parts)}


def written(words: str) -> Fact:
    """Return a part of text that came in."""
    return {"type": "input_text", "text": words}


def spoken(words: str) -> Fact:
    """Return a part of text that an answer had."""
    return {"type": "output_text", "text": words, "annotations": []}


def plain(words: str) -> Fact:
    """Return a text part of chat."""
    return {"type": "text", "text": words}


def call(call_id: str = "c1", name: str = "f", arguments: str = '{"a": 1}') -> Fact:
    """Return a function call of a conversation."""
    return {
        "type": "function_call",
        "id": f"fc_{call_id}",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": "completed",
    }


def result(call_id: str = "c1", output: Any = "done") -> Fact:
    """Return the output of a call."""
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def called(call_id: str = "c1", name: str = "f", arguments: str = '{"a": 1}') -> Fact:
    """Return a tool call of chat."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*tool_calls: Fact, content: Any = None, **members: Any) -> Fact:
    """Return an assistant's message with tool calls."""
    return {"role": "assistant", "content": content, "tool_calls": list(tool_calls), **members}


def tool(content: Any = "done", call_id: str = "c1") -> Fact:
    """Return a tool's message."""
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def reasoned(*summary: str, content: Any = None, **members: Any) -> Fact:
    """Return a reasoning item."""
    parts = [{"type": "summary_text", "text": each} for each in summary]
    return {"type": "reasoning", "id": "rs_1", "summary": parts, "content": content, **members}


MESSAGES: dict[str, Row] = {
    "a string": Row({"input": "hi"}, heard(USER)),
    "an easy message": Row(said({"role": "user", "content": "hi"}), heard(USER)),
    "one text part": Row(said(user(written("hi"))), heard(USER)),
    "several text parts": Row(
        said(user(written("a"), written("b"))),
        heard({"role": "user", "content": [plain("a"), plain("b")]}),
    ),
    "two users in a row": Row(said(USER, USER), heard(USER, USER)),
    "an assistant's string": Row(
        said(USER, {"role": "assistant", "content": "yes"}, USER),
        heard(USER, {"role": "assistant", "content": "yes"}, USER),
    ),
    "an assistant's part": Row(
        said(USER, assistant(spoken("yes")), USER),
        heard(USER, {"role": "assistant", "content": "yes"}, USER),
    ),
    "an assistant's parts": Row(
        said(USER, assistant(spoken("a"), spoken("b")), USER),
        heard(USER, {"role": "assistant", "content": [plain("a"), plain("b")]}, USER),
    ),
    "an item as it was answered": Row(
        said(USER, {**assistant(spoken("yes")), "id": "msg_1", "status": "completed"}, USER),
        heard(USER, {"role": "assistant", "content": "yes"}, USER),
    ),
    "a refusal": Row(
        said(USER, assistant({"type": "refusal", "refusal": "no"}), USER),
        heard(USER, {"role": "assistant", "content": None, "refusal": "no"}, USER),
    ),
    "text and a refusal": Row(
        said(USER, assistant(spoken("well"), {"type": "refusal", "refusal": "no"}), USER),
        heard(
            USER,
            {
                "role": "assistant",
                "content": [plain("well"), {"type": "refusal", "refusal": "no"}],
            },
            USER,
        ),
    ),
    "odd text": Row(
        {"input": 'Ü 世界 \U0001f30d "\\\n\x00'},
        heard({**USER, "content": 'Ü 世界 \U0001f30d "\\\n\x00'}),
    ),
}

SYSTEM: dict[str, Row] = {
    "instructions": Row(
        {"instructions": "Be brief."}, heard({"role": "system", "content": "Be brief."}, USER)
    ),
    "a system message": Row(
        said({"role": "system", "content": "A"}, USER),
        heard({"role": "system", "content": "A"}, USER),
    ),
    "a developer message": Row(
        said({"type": "message", "role": "developer", "content": [written("A")]}, USER),
        heard({"role": "system", "content": "A"}, USER),
    ),
    "leading ones are one": Row(
        said(
            {"role": "developer", "content": "A"},
            {"type": "message", "role": "system", "content": [written("B")]},
            USER,
        )
        | {"instructions": "I"},
        heard({"role": "system", "content": "I\n\nA\n\nB"}, USER),
    ),
    "later ones stay in place": Row(
        said(
            {"role": "system", "content": "A"},
            USER,
            {"role": "developer", "content": "late"},
            USER,
            {"role": "system", "content": "later"},
        ),
        heard(
            {"role": "system", "content": "A"},
            USER,
            {"role": "system", "content": "late"},
            USER,
            {"role": "system", "content": "later"},
        ),
    ),
    "none leads": Row(
        said(USER, {"role": "developer", "content": [written("late")]}),
        heard(USER, {"role": "system", "content": "late"}),
    ),
}

PARTS: dict[str, Row] = {
    "an image by URL": Row(
        said(user(written("see"), {"type": "input_image", "image_url": URL})),
        heard(
            {
                "role": "user",
                "content": [plain("see"), {"type": "image_url", "image_url": {"url": URL}}],
            }
        ),
    ),
    "an image with its detail": Row(
        said(user({"type": "input_image", "image_url": URL, "detail": "low"})),
        heard(
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": URL, "detail": "low"}}],
            }
        ),
    ),
    "an image by data": Row(
        said(user({"type": "input_image", "image_url": IMAGE}, written("see"))),
        heard(
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": IMAGE}}, plain("see")],
            }
        ),
    ),
    "a file by data": Row(
        said(
            user(
                {
                    "type": "input_file",
                    "filename": "a.pdf",
                    "file_data": "data:application/pdf;base64,JVBERg==",
                }
            )
        ),
        heard(
            {
                "role": "user",
                "content": [
                    {
                        "type": "file",
                        "file": {
                            "filename": "a.pdf",
                            "file_data": "data:application/pdf;base64,JVBERg==",
                        },
                    }
                ],
            }
        ),
    ),
    "a file by id": Row(
        said(user({"type": "input_file", "file_id": "file-1"}, written("read"))),
        heard(
            {
                "role": "user",
                "content": [{"type": "file", "file": {"file_id": "file-1"}}, plain("read")],
            }
        ),
    ),
    "audio": Row(
        said(user({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}})),
        heard(
            {
                "role": "user",
                "content": [
                    {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
                ],
            }
        ),
    ),
}

PICTURE: Fact = {"type": "image_url", "image_url": {"url": IMAGE}}
LOOP: dict[str, Row] = {
    "a call and its result": Row(
        said(USER, call(), result()), heard(USER, calling(called()), tool())
    ),
    "a call after text": Row(
        said(USER, assistant(spoken("Let me see.")), call(), result()),
        heard(USER, calling(called(), content="Let me see."), tool()),
    ),
    "calls at once": Row(
        said(USER, call(), call("c2", "g", "{}"), result(), result("c2", "2"), USER),
        heard(USER, calling(called(), called("c2", "g", "{}")), tool(), tool("2", "c2"), USER),
    ),
    "calls one after another": Row(
        said(USER, call(), result(), call("c2", "g", "{}"), result("c2", "2")),
        heard(USER, calling(called()), tool(), calling(called("c2", "g", "{}")), tool("2", "c2")),
    ),
    "arguments as they are": Row(
        said(USER, call(arguments='{ "a":  [1,\n2] }'), result()),
        heard(USER, calling(called(arguments='{ "a":  [1,\n2] }')), tool()),
    ),
    "a result of one text part": Row(
        said(USER, call(), result(output=[written("a")])),
        heard(USER, calling(called()), tool("a")),
    ),
    "a result of text parts": Row(
        said(USER, call(), result(output=[written("a"), written("b")])),
        heard(USER, calling(called()), tool([plain("a"), plain("b")])),
    ),
    "images of results": Row(
        said(
            USER,
            call(),
            call("c2"),
            result(output=[written("a"), {"type": "input_image", "image_url": IMAGE}]),
            result(
                "c2",
                [
                    written("b"),
                    {"type": "input_file", "file_id": "file-1"},
                    {"type": "input_image", "image_url": URL, "detail": "high"},
                ],
            ),
            {"role": "user", "content": "go on"},
        ),
        heard(
            USER,
            calling(called(), called("c2")),
            tool("a"),
            tool("b", "c2"),
            {
                "role": "user",
                "content": [
                    PICTURE,
                    {"type": "file", "file": {"file_id": "file-1"}},
                    {"type": "image_url", "image_url": {"url": URL, "detail": "high"}},
                ],
            },
            {"role": "user", "content": "go on"},
        ),
    ),
    "reasoning is left out": Row(
        said(USER, reasoned("Hm."), assistant(spoken("yes")), USER),
        heard(USER, {"role": "assistant", "content": "yes"}, USER),
    ),
    "reasoning before calls is left out": Row(
        said(USER, reasoned(encrypted_content="gAAA"), call(), result()),
        heard(USER, calling(called()), tool()),
    ),
}

FUNCTION_FULL: Fact = {
    "type": "function",
    "name": "f",
    "description": "Does f.",
    "parameters": SCHEMA,
    "strict": True,
}
TOOLS: dict[str, Row] = {
    "a function": Row({"tools": [FUNCTION]}, {"tools": [TOOL]}),
    "a whole function": Row(
        {"tools": [FUNCTION_FULL]},
        {
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "description": "Does f.",
                        "parameters": SCHEMA,
                        "strict": True,
                    },
                }
            ]
        },
    ),
    "a bare function": Row(
        {"tools": [{"type": "function", "name": "f"}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
    ),
    "a custom tool": Row({"tools": [CUSTOM]}, {"tools": [CUSTOM_SENT]}),
    "a custom tool for text": Row(
        {"tools": [FUNCTION, {**CUSTOM, "format": {"type": "text"}}]},
        {"tools": [TOOL, CUSTOM_SENT]},
    ),
    **{
        f"choice {choice}": Row(
            {"tools": [FUNCTION], "tool_choice": choice}, {"tools": [TOOL], "tool_choice": choice}
        )
        for choice in ("none", "auto", "required")
    },
    "choice of a function": Row(
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "f"}},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    ),
    "choice of a custom tool": Row(
        {"tools": [CUSTOM], "tool_choice": {"type": "custom", "name": "patch"}},
        {
            "tools": [CUSTOM_SENT],
            "tool_choice": {"type": "function", "function": {"name": "patch"}},
        },
    ),
    **{
        f"allowed tools, {mode}": Row(
            {
                "tools": [OTHER, FUNCTION, CUSTOM],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": mode,
                    "tools": [
                        {"type": "function", "name": "f"},
                        {"type": "custom", "name": "patch"},
                    ],
                },
            },
            {"tools": [TOOL, CUSTOM_SENT], "tool_choice": mode},
        )
        for mode in ("auto", "required")
    },
    "choice auto without tools": Row({"tool_choice": "auto"}, {}),
    "choice none without tools": Row({"tools": [], "tool_choice": "none"}, {}),
    **{
        f"parallel {value}": Row(
            {"tools": [FUNCTION], "parallel_tool_calls": value},
            {"tools": [TOOL], "parallel_tool_calls": value},
        )
        for value in (True, False)
    },
    "parallel without tools": Row({"parallel_tool_calls": False}, {}),
}

FORMAT: Fact = {"type": "json_schema", "name": "out", "schema": SCHEMA}
FIELDS: dict[str, Row] = {
    "text": Row({"text": {"format": {"type": "text"}}}, {}),
    "json_schema": Row(
        {"text": {"format": FORMAT}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "out", "schema": SCHEMA},
            }
        },
    ),
    "a whole json_schema": Row(
        {"text": {"format": {**FORMAT, "strict": True, "description": "What is put out."}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "out",
                    "schema": SCHEMA,
                    "strict": True,
                    "description": "What is put out.",
                },
            }
        },
    ),
    "json_object": Row(
        {"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}
    ),
    "verbosity": Row({"text": {"verbosity": "low"}}, {"verbosity": "low"}),
    **{
        f"effort {effort}": Row({"reasoning": {"effort": effort}}, {"reasoning_effort": effort})
        for effort in ("none", "low", "medium", "high", "xhigh")
    },
    "summary": Row(
        {"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}
    ),
    "summary alone": Row({"reasoning": {"summary": "detailed"}}, {}),
    "max_output_tokens": Row({"max_output_tokens": 77}, {"max_tokens": 77}),
    "top_logprobs": Row({"top_logprobs": 5}, {"logprobs": True, "top_logprobs": 5}),
    "top_logprobs and include": Row(
        {"top_logprobs": 2, "include": ["message.output_text.logprobs"]},
        {"logprobs": True, "top_logprobs": 2},
    ),
    "other includes": Row(
        {"include": ["reasoning.encrypted_content", "web_search_call.action.sources"]}, {}
    ),
    "temperature": Row({"temperature": 0.5}, {"temperature": 0.5}),
    "top_p": Row({"top_p": 0.25}, {"top_p": 0.25}),
    "presence_penalty": Row({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
    "frequency_penalty": Row({"frequency_penalty": -0.5}, {"frequency_penalty": -0.5}),
    "service_tier": Row({"service_tier": "flex"}, {"service_tier": "flex"}),
    "user": Row({"user": "u-1"}, {"user": "u-1"}),
    "safety_identifier": Row({"safety_identifier": "s-1"}, {"safety_identifier": "s-1"}),
    "metadata": Row({"metadata": {"a": "b"}}, {"metadata": {"a": "b"}}),
    "prompt_cache_key": Row({"prompt_cache_key": "k"}, {"prompt_cache_key": "k"}),
    "prompt_cache_retention": Row(
        {"prompt_cache_retention": "24h"}, {"prompt_cache_retention": "24h"}
    ),
    "truncation disabled": Row({"truncation": "disabled"}, {}),
    "max_tool_calls": Row({"max_tool_calls": 3}, {}),
    "client_metadata": Row({"client_metadata": {"x-codex": "1"}}, {}),
    "store": Row({"store": True}, {}),
    "no store": Row({"store": False}, {}),
    "fields of the upstream": Row(
        {"seed": 7, "top_k": 40, "stop": ["\n"], "vendor": {"deep": [1, None, {"a": 2.5}]}},
        {"seed": 7, "top_k": 40, "stop": ["\n"], "vendor": {"deep": [1, None, {"a": 2.5}]}},
    ),
}

TABLES = {
    "messages": MESSAGES,
    "system": SYSTEM,
    "parts": PARTS,
    "loop": LOOP,
    "tools": TOOLS,
    "fields": FIELDS,
}


NULLABLE = [
    "background",
    "conversation",
    "include",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "parallel_tool_calls",
    "previous_response_id",
    "prompt",
    "prompt_cache_key",
    "reasoning",
    "safety_identifier",
    "service_tier",
    "stream_options",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "truncation",
    "user",
]


@pytest.fixture
async def proxy(serve: Serve) -> Proxy:
    """A daemon whose upstream speaks chat completions alone."""
    return await serve(upstreams=chat_only())


async def sent_for(proxy: Proxy, upstream: ScriptedUpstream, asked: Fact, **how: Any) -> Fact:
    """Ask, with a check of the answer; return the one body that the upstream got."""
    before = len(upstream.requests)
    await ask(proxy, **{"streamed": False, "input": "hi", **asked, **how})
    (request,) = upstream.requests[before:]
    assert (request.method, request.target) == ("POST", CHAT_PATH)
    body: Fact = request.json()
    return body


@pytest.mark.parametrize("table", TABLES)
async def test_what_is_sent(proxy: Proxy, upstream: ScriptedUpstream, table: str) -> None:
    """Each field becomes just what the table says, whole and streamed, and nothing else is sent."""
    usual = {"model": "gpt-test", "messages": [USER], "stream": False}
    streams = {"stream": True, "stream_options": {"include_usage": True}}
    for name, (asked, sent) in TABLES[table].items():
        with row(name):
            assert await sent_for(proxy, upstream, asked) == usual | sent
            body = await sent_for(proxy, upstream, asked, streamed=True)
            assert body == usual | sent | streams


async def test_options_of_the_stream(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """The client's `stream_options` are about its own stream: the upstream is asked for usage."""
    asked = {"stream_options": {"include_obfuscation": False}}
    body = await sent_for(proxy, upstream, asked, streamed=True)
    assert body["stream_options"] == {"include_usage": True}
    assert "stream_options" not in await sent_for(proxy, upstream, asked)


async def test_logprobs_that_are_included(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """To include the log probabilities of the text is to ask for them."""
    body = await sent_for(proxy, upstream, {"include": ["message.output_text.logprobs"]})
    assert body["logprobs"] is True
    assert not body.get("top_logprobs")


async def test_the_model_is_renamed(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """The upstream is asked for the model as the route renames it, and the client is told its own
    name.
    """  # noqa: D205 - one sentence does not fit the line
    for streamed in (False, True):
        _, response = await ask(proxy, streamed=streamed, model="renamed")
        assert upstream.requests[-1].json()["model"] == "upstream-model"
        assert response["model"] == "renamed"


async def test_nulls_are_as_if_left_out(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A field that is null asks for nothing."""
    body = await sent_for(proxy, upstream, dict.fromkeys(NULLABLE))
    told = {name: value for name, value in body.items() if value is not None}
    assert told == {"model": "gpt-test", "messages": [USER], "stream": False}


@pytest.mark.parametrize("item", [call(), assistant(spoken("yes"))], ids=["call", "text"])
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (reasoned("One.", "Two."), "One.\n\nTwo."),
        (reasoned("One.", content=[{"type": "reasoning_text", "text": "Whole."}]), "Whole."),
        (reasoned("One.", encrypted_content="gAAA"), "One."),
    ],
)
async def test_reasoning_that_is_sent(
    serve: Serve, upstream: ScriptedUpstream, item: Fact, given: Fact, told: str
) -> None:
    """With `reasoning_content: send` earlier reasoning is told with the message that followed."""
    proxy = await serve(upstreams=chat_only(reasoning_content="send"))
    is_call = item["type"] == "function_call"
    after = result() if is_call else USER
    body = await sent_for(proxy, upstream, said(USER, given, item, after))
    thinks = calling(called()) if is_call else {"role": "assistant", "content": "yes"}
    answered = tool() if is_call else USER
    assert body["messages"] == [USER, {**thinks, "reasoning_content": told}, answered]


async def test_custom_calls(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Earlier calls of custom tools and their outputs are told as calls of functions."""
    made = {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": 'a "b"\n'}
    output = {"type": "custom_tool_call_output", "call_id": "c1", "output": "applied"}
    body = await sent_for(proxy, upstream, said(USER, made, output) | {"tools": [CUSTOM]})
    first, second, third = body["messages"]
    assert (first, third) == (USER, tool("applied"))
    function = second["tool_calls"][0]["function"]
    assert json.loads(function.pop("arguments")) == {"input": 'a "b"\n'}
    assert second == calling({"id": "c1", "type": "function", "function": {"name": "patch"}})


async def test_a_result_that_is_an_image_alone(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A tool's message is there for every call, and an image follows in a user's message."""
    given = said(USER, call(), result(output=[{"type": "input_image", "image_url": IMAGE}]))
    messages = (await sent_for(proxy, upstream, given))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "user"]
    assert isinstance(messages[2]["content"], str)
    assert messages[3]["content"] == [PICTURE]
    check_pairs(messages)


async def test_text_between_a_call_and_its_result(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Text that came after a call does not part it from its result, which chat would refuse."""
    given = said(
        USER, assistant(spoken("one")), call(), assistant(spoken("two")), call("c2"), result(),
        result("c2"),
    )  # fmt: skip
    messages = (await sent_for(proxy, upstream, given))["messages"]
    check_pairs(messages)
    told = json.dumps(messages)
    assert told.index('"one"') < told.index('"two"') < told.index('"tool"')


# Which API is spoken


@pytest.mark.parametrize(
    ("apis", "path"),
    [
        (["responses", "chat"], "/v1/responses"),
        (["chat", "responses", "messages"], "/v1/responses"),
        (["chat", "messages"], CHAT_PATH),
        (["embeddings", "messages", "chat"], CHAT_PATH),
    ],
)
async def test_the_api_that_is_spoken(
    serve: Serve, upstream: ScriptedUpstream, apis: list[str], path: str
) -> None:
    """An upstream is asked in Responses where it speaks it, else in chat before messages."""
    proxy = await serve(upstreams=chat_only(apis=apis))
    for streamed in (False, True):
        await ask(proxy, streamed=streamed)
    assert [request.path for request in upstream.requests] == [path] * 2


async def test_an_upstream_that_speaks_none(serve: Serve, upstream: ScriptedUpstream) -> None:
    """An upstream without any of the three is refused as before."""
    proxy = await serve(upstreams=chat_only(apis=["embeddings"]))
    answer = await proxy.post(PATH, {"model": "gpt-test", "input": "hi"})
    error = answer.json()["error"]
    assert (answer.status, error["code"], error["param"]) == (400, "unsupported_parameter", "model")
    assert upstream.requests == []


async def test_chat_itself_is_not_bridged(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A client of chat completions is relayed as it was, byte for byte."""
    body = json.dumps({"model": "gpt-test", "messages": [USER], "seed": 1, "n": 2, "stream": False})
    answer = await proxy.post(CHAT_PATH, body.encode())
    assert answer.status == 200
    assert answer.json()["object"] == "chat.completion"
    assert upstream.requests[0].json() == json.loads(body)


async def test_the_url_of_an_upstream(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A trailing slash and a query of an upstream's URL are kept where it is bridged too."""
    proxy = await serve(upstreams=chat_only(url=f"{upstream.url}/?api-version=3"))
    await ask(proxy, streamed=False)
    assert upstream.requests[0].target == f"{CHAT_PATH}?api-version=3"


async def test_headers_of_the_upstream_request(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """The upstream gets its credential, our id, and what the client may pass, and no more."""
    body = {"model": "gpt-test", "input": "hi"}
    given = {"x-request-id": "mine-1", "cookie": "a=b", "x-codex-turn": "t"}
    assert (await proxy.post(PATH, body, given)).status == 200
    header = upstream.requests[0].header
    assert header("x-request-id") == "mine-1"
    assert header("x-codex-turn") == "t"
    assert header("authorization") == "Bearer sk-upstream-credential-8842-QwErTy"
    assert header("content-type") == "application/json"
    assert header("cookie") is None


async def test_messages_of_a_whole_conversation(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A client that sends the whole conversation itself, `store: false`, has it told in order."""
    given = said(
        {"role": "developer", "content": "D"},
        USER,
        reasoned("Hm."),
        call(),
        call("c2"),
        result("c2"),
        result(),
        assistant(spoken("yes")),
        {"role": "user", "content": "more"},
    )
    body = await sent_for(proxy, upstream, given | {"store": False})
    assert messages_of(upstream.requests[-1]) == [
        {"role": "system", "content": "D"},
        USER,
        calling(called(), called("c2")),
        tool(call_id="c2"),
        tool(),
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more"},
    ]
    assert "store" not in body
