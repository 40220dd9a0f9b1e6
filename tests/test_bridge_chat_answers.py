"""What a Responses client is told of a chat upstream's answer, whole and streamed."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from answers import Usage
from chat_upstream import (
    DONE,
    FUNCTION,
    HELLO,
    PATH,
    THINKING,
    TOOLS,
    Fact,
    Serve,
    Told,
    ask,
    begun,
    calls,
    chat_only,
    finish_frame,
    frame,
    function_call,
    items_of,
    more,
    piece_frame,
    refusal,
    row,
    send,
    text,
    thought,
    usage_frame,
)
from rig import Proxy, prompt
from steps import EndChunks, error_answer, json_answer
from upstream import ScriptedUpstream
from validating import check_bridged, check_stream, facts_of, timeless

HOLDER = "replay"
CUSTOM: Fact = {"type": "custom", "name": "patch"}


class Case(NamedTuple):
    """An answer and the items that a client is told of it."""

    told: Told
    items: Sequence[tuple[Any, ...]]
    asked: Fact | None = None
    status: str = "completed"
    reason: str | None = None
    parts: Sequence[str] = ()  # statuses of the items that have one, if not that of the response


def one_call(*parts: Fact, message: Any = None) -> Told:
    """Return an answer of tool calls alone, a frame for each part."""
    whole = None if message is None else {"tool_calls": message}
    return Told([calls(part) for part in parts], whole, finish="tool_calls")


ZURICH = ("function_call", "call_zh", "get_weather", '{"city": "Zürich"}')
BERN = ("function_call", "call_be", "get_weather", '{"city": "Bern"}')

TEXT: dict[str, Case] = {
    "text": Case(HELLO, [("message", "Hello world")]),
    "one piece": Case(Told([text("Hi")], {"content": "Hi"}), [("message", "Hi")]),
    "any text": Case(
        Told(
            [text('Ü"\\\n'), text("世\u2028界 \U0001f30d\x00</s>")],
            {"content": 'Ü"\\\n世\u2028界 \U0001f30d\x00</s>'},
        ),
        [("message", 'Ü"\\\n世\u2028界 \U0001f30d\x00</s>')],
    ),
    "white space": Case(Told([text(" "), text("\n")], {"content": " \n"}), [("message", " \n")]),
    "reasoning_content": Case(
        THINKING, [("reasoning", "Let me think."), ("message", "Hello world")]
    ),
    "reasoning": Case(
        Told(
            [thought("Let me ", "reasoning"), thought("think.", "reasoning"), text("Hi")],
            {"reasoning": "Let me think.", "content": "Hi"},
        ),
        [("reasoning", "Let me think."), ("message", "Hi")],
    ),
    "reasoning alone": Case(
        Told([thought("Hm.")], {"reasoning_content": "Hm."}), [("reasoning", "Hm.")]
    ),
    "a refusal": Case(
        Told([refusal("I can"), refusal("not.")], {"refusal": "I cannot."}),
        [("message", "I cannot.")],
    ),
    "text and a refusal": Case(
        Told([text("Well. "), refusal("No.")], {"content": "Well. ", "refusal": "No."}),
        [("message", "Well. ", "No.")],
    ),
    "content in a list": Case(
        Told(
            [text([{"type": "text", "text": "Hel"}]), text([{"type": "text", "text": "lo"}])],
            {"content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        ),
        [("message", "Hello")],
    ),
    "null members": Case(
        Told(
            [
                {"delta": {"content": "Hi", "reasoning_content": None, "tool_calls": None}},
                {"delta": {"content": None, "refusal": None, "reasoning": None}},
            ],
            {"content": "Hi", "reasoning_content": None, "tool_calls": None, "refusal": None},
        ),
        [("message", "Hi")],
    ),
    "empty members": Case(
        Told(
            [{"delta": {"content": "", "reasoning_content": "", "tool_calls": []}}, text("Hi")],
            {"content": "Hi", "reasoning_content": "", "tool_calls": [], "refusal": ""},
        ),
        [("message", "Hi")],
    ),
}

CALLS: dict[str, Case] = {
    "calls at once": Case(
        TOOLS, [("reasoning", "Look it up."), ("message", "Just a moment."), ZURICH, BERN]
    ),
    "a call alone": Case(
        one_call(
            begun(0, "call_be", "get_weather"),
            more(0, '{"city": '),
            more(0, '"Bern"}'),
            message=[function_call("get_weather", '{"city": "Bern"}', "call_be")],
        ),
        [BERN],
    ),
    "a call in one piece": Case(
        one_call(
            begun(0, "call_be", "get_weather", '{"city": "Bern"}'),
            message=[function_call("get_weather", '{"city": "Bern"}', "call_be")],
        ),
        [BERN],
    ),
    "no arguments": Case(
        one_call(begun(0, "c", "f"), message=[function_call("f", "", "c")]),
        [("function_call", "c", "f", "")],
    ),
    "finished with stop": Case(
        one_call(begun(0, "c", "f", "{}"), message=[function_call("f", "{}", "c")]).but(
            finish="stop"
        ),
        [("function_call", "c", "f", "{}")],
    ),
    "reasoning, then a call": Case(
        Told(
            [thought("Hm."), calls(begun(0, "c", "f", "{}"))],
            {"reasoning_content": "Hm.", "tool_calls": [function_call("f", "{}", "c")]},
            finish="tool_calls",
        ),
        [("reasoning", "Hm."), ("function_call", "c", "f", "{}")],
    ),
    "text after calls": Case(
        Told(
            [
                text("One."),
                calls(begun(0, "c1", "f", '{"a"')),
                text("Two."),
                calls(more(0, ": 1}")),
                calls(begun(1, "c2", "f", "{}")),
                text("Thr"),
                text("ee."),
            ],
            finish="tool_calls",
        ),
        [
            ("message", "One."),
            ("function_call", "c1", "f", '{"a": 1}'),
            ("message", "Two."),
            ("function_call", "c2", "f", "{}"),
            ("message", "Three."),
        ],
    ),
    "reasoning again": Case(
        Told([thought("A."), text("One."), thought("B."), text("Two.")]),
        [("reasoning", "A."), ("message", "One."), ("reasoning", "B."), ("message", "Two.")],
    ),
    "indices by turns": Case(
        one_call(
            begun(1, "c2", "g"),
            begun(0, "c1", "f"),
            more(0, '{"a":'),
            more(1, '{"b":'),
            more(0, "1}"),
            more(1, "2}"),
        ),
        [("function_call", "c2", "g", '{"b":2}'), ("function_call", "c1", "f", '{"a":1}')],
    ),
    "indices with gaps": Case(
        one_call(begun(3, "c1", "f", "{}"), begun(7, "c2", "g", "{}")),
        [("function_call", "c1", "f", "{}"), ("function_call", "c2", "g", "{}")],
    ),
    "no index": Case(
        one_call(
            begun(None, "c1", "f", '{"a":'),
            more(None, "1}"),
            begun(None, "c2", "g", "{"),
            more(None, "}"),
        ),
        [("function_call", "c1", "f", '{"a":1}'), ("function_call", "c2", "g", "{}")],
    ),
    "the same index": Case(
        one_call(begun(0, "c1", "f", '{"a":1}'), begun(0, "c2", "g", "{"), more(0, "}")),
        [("function_call", "c1", "f", '{"a":1}'), ("function_call", "c2", "g", "{}")],
    ),
    "the same index at once": Case(
        Told(
            [calls(begun(0, "c1", "f", '{"a":1}'), begun(0, "c2", "f", '{"a":2}'))],
            finish="tool_calls",
        ),
        [("function_call", "c1", "f", '{"a":1}'), ("function_call", "c2", "f", '{"a":2}')],
    ),
    "the id in every part": Case(
        one_call(
            begun(0, "c1", "f", "{"),
            more(0, '"a":1', id="c1", type="function"),
            more(0, "}", id="c1"),
        ),
        [("function_call", "c1", "f", '{"a":1}')],
    ),
    "the name in every part": Case(
        one_call(begun(0, "c1", "f", "{"), begun(0, "c1", "f", "}")),
        [("function_call", "c1", "f", "{}")],
    ),
    "empty ids after the first": Case(
        one_call(begun(0, "c1", "f", "{"), more(0, "}", id="")),
        [("function_call", "c1", "f", "{}")],
    ),
    "null members": Case(
        Told(
            [
                {"delta": {"content": None, "tool_calls": [begun(0, "c1", "f", None)]}},
                {
                    "delta": {
                        "tool_calls": [
                            {"index": 0, "id": None, "function": {"name": None, "arguments": "{}"}}
                        ]
                    }
                },
            ],
            finish="tool_calls",
        ),
        [("function_call", "c1", "f", "{}")],
    ),
    "a custom tool": Case(
        one_call(
            begun(0, "c1", "patch", '{"inp'),
            more(0, 'ut": "a \\"b\\"'),
            more(0, '\\n\\u00e9"}'),
            message=[function_call("patch", '{"input": "a \\"b\\"\\n\\u00e9"}', "c1")],
        ),
        [("custom_tool_call", "c1", "patch", 'a "b"\né')],
        {"tools": [CUSTOM, FUNCTION]},
    ),
    "a custom tool and a function": Case(
        Told(
            [
                calls(begun(0, "c1", "patch", '{"input":'), begun(1, "c2", "f", "{")),
                calls(more(1, "}"), more(0, ' "x"}')),
            ],
            {
                "tool_calls": [
                    function_call("patch", '{"input": "x"}', "c1"),
                    function_call("f", "{}", "c2"),
                ]
            },
            finish="tool_calls",
        ),
        [("custom_tool_call", "c1", "patch", "x"), ("function_call", "c2", "f", "{}")],
        {"tools": [CUSTOM, FUNCTION]},
    ),
}

ENDS: dict[str, Case] = {
    "length": Case(
        HELLO.but(finish="length"),
        [("message", "Hello world")],
        None,
        "incomplete",
        "max_output_tokens",
        ["incomplete"],
    ),
    "content_filter": Case(
        HELLO.but(finish="content_filter"),
        [("message", "Hello world")],
        None,
        "incomplete",
        "content_filter",
        ["incomplete"],
    ),
    "length within a call": Case(
        Told(
            [text("Let me."), calls(begun(0, "c", "f", '{"a": '))],
            {"content": "Let me.", "tool_calls": [function_call("f", '{"a": ', "c")]},
            finish="length",
        ),
        [("message", "Let me."), ("function_call", "c", "f", '{"a": ')],
        None,
        "incomplete",
        "max_output_tokens",
    ),
    "length within reasoning": Case(
        Told([thought("Hm")], {"reasoning_content": "Hm"}, finish="length"),
        [("reasoning", "Hm")],
        None,
        "incomplete",
        "max_output_tokens",
    ),
}

CASES = {"text": TEXT, "calls": CALLS, "ends": ENDS}


@pytest.fixture
async def proxy(serve: Serve) -> Proxy:
    """A daemon whose upstream speaks chat completions alone."""
    return await serve(upstreams=chat_only())


def check_case(response: Fact, case: Case) -> None:
    """Assert that a response says what a case does."""
    assert items_of(response) == list(case.items)
    reason = None if case.reason is None else {"reason": case.reason}
    assert (response["status"], response["incomplete_details"]) == (case.status, reason)
    statuses = [item["status"] for item in response["output"] if "status" in item]
    if case.parts:
        assert statuses == list(case.parts)
    elif case.status == "completed":
        assert set(statuses) <= {"completed"}
    assert response["usage"] == Usage().responses()


@pytest.mark.parametrize("table", CASES)
async def test_what_is_told(proxy: Proxy, upstream: ScriptedUpstream, table: str) -> None:
    """Each answer becomes just these items, streamed and whole, and both are the same object."""
    for name, case in CASES[table].items():
        with row(name):
            await check_told(proxy, upstream, case)


async def check_told(proxy: Proxy, upstream: ScriptedUpstream, case: Case) -> None:
    """Assert what a client is told of a case's answer."""
    upstream.script(case.told.script(streamed=True))
    answer, streamed = await ask(proxy, streamed=True, **(case.asked or {}))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert b"[DONE]" not in answer.body
    check_case(streamed, case)
    if case.told.message is None:
        return
    upstream.script(case.told.script(streamed=False))
    answer, whole = await ask(proxy, streamed=False, **(case.asked or {}))
    assert answer.headers["content-type"] == "application/json"
    check_case(whole, case)
    assert timeless(whole) == timeless(streamed)


async def test_an_incomplete_item(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """The call that a limit cut is incomplete; the message that had ended before it is not."""
    upstream.script(ENDS["length within a call"].told.script(streamed=True))
    _, response = await ask(proxy, streamed=True)
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]


async def test_an_empty_answer(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """An upstream that says nothing gives a whole response, the same for both ways to ask."""
    told = Told([], {"content": ""})
    both = []
    for streamed in (True, False):
        upstream.script(told.script(streamed=streamed))
        _, response = await ask(proxy, streamed=streamed)
        assert response["status"] == "completed"
        assert "".join(part for _, *parts in items_of(response) for part in parts) == ""
        both.append(timeless(response))
    assert both[0] == both[1]


async def test_kinds_of_parts(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Text, refusals and reasoning are told as the API's own kinds of parts."""
    upstream.script(Told([thought("Hm."), text("Well. "), refusal("No.")]).script(streamed=True))
    _, response = await ask(proxy, streamed=True)
    reasoning, message = response["output"]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "Hm."}]
    assert message["content"] == [
        {"type": "output_text", "text": "Well. ", "annotations": [], "logprobs": []},
        {"type": "refusal", "refusal": "No."},
    ]
    assert message["role"] == "assistant"


async def test_ids(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Ids of items are aiproxy's own, all different in two answers; those of calls are not."""
    seen: list[str] = []
    for streamed in (True, False):
        upstream.script(TOOLS.script(streamed=streamed))
        _, response = await ask(proxy, streamed=streamed)
        assert response["id"].startswith("resp_")
        prefixes = [item["id"].partition("_")[0] for item in response["output"]]
        assert prefixes == ["rs", "msg", "fc", "fc"]
        seen += [response["id"], *(item["id"] for item in response["output"])]
    assert len(set(seen)) == len(seen)
    upstream.script(CALLS["a custom tool"].told.script(streamed=True))
    _, response = await ask(proxy, streamed=True, tools=[CUSTOM])
    assert response["output"][0]["id"].startswith("ctc_")


async def test_order_of_events(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """An item ends when the next begins, but calls, which end at the end; each in its order."""
    upstream.script(TOOLS.script(streamed=True))
    answer, _ = await ask(proxy, streamed=True)
    kinds = [
        (fact["type"].removeprefix("response."), fact["output_index"])
        for fact in facts_of(answer.body)
        if fact["type"].startswith("response.output_item.")
    ]
    added, done = "output_item.added", "output_item.done"
    assert kinds[:6] == [(added, 0), (done, 0), (added, 1), (done, 1), (added, 2), (added, 3)]
    assert sorted(kinds[6:]) == [(done, 2), (done, 3)]


async def test_deltas_are_the_upstreams(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Each piece of text, reasoning and arguments is one delta: none is joined or cut."""
    upstream.script(THINKING.script(streamed=True))
    answer, _ = await ask(proxy, streamed=True)
    deltas = [fact["delta"] for fact in facts_of(answer.body) if "delta" in fact]
    assert deltas == ["Let me ", "think.", "Hello ", "world"]
    upstream.script(CALLS["indices by turns"].told.script(streamed=True))
    answer, _ = await ask(proxy, streamed=True)
    told = [
        (fact["output_index"], fact["delta"])
        for fact in facts_of(answer.body)
        if fact["type"] == "response.function_call_arguments.delta" and fact["delta"]
    ]
    assert told == [(1, '{"a":'), (0, '{"b":'), (1, "1}"), (0, "2}")]


@pytest.mark.parametrize("streamed", [False, True])
async def test_calls_without_an_id(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """A call that the upstream gave no id gets one of its own, under which it can be answered."""
    names = [("f", '{"a":1}'), ("g", "{}")]
    functions = [{"function": {"name": name, "arguments": each}} for name, each in names]
    told = one_call(*(begun(at, None, *each) for at, each in enumerate(names)), message=functions)
    upstream.script(told.script(streamed=streamed))
    _, response = await ask(proxy, streamed=streamed)
    assert [(item["name"], item["arguments"]) for item in response["output"]] == names
    ids = [item["call_id"] for item in response["output"]]
    assert len(set(ids)) == 2
    assert all(ids)


@pytest.mark.parametrize("streamed", [False, True])
async def test_arguments_that_are_an_object(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """Arguments that came as an object are told as its JSON text."""
    value = {"a": [1, None, "ü"]}
    function: Any = {"id": "c", "type": "function", "function": {"name": "f", "arguments": value}}
    upstream.script(
        one_call(begun(0, "c", "f", value), message=[function]).script(streamed=streamed)
    )
    _, response = await ask(proxy, streamed=streamed)
    (item,) = response["output"]
    assert json.loads(item["arguments"]) == value


@pytest.mark.parametrize("arguments", ["plain text", "{", '{"other": 1}', '{"input": 7}', "[]", ""])
async def test_odd_input_of_a_custom_tool(
    proxy: Proxy, upstream: ScriptedUpstream, arguments: str
) -> None:
    """A model that does not keep to the form of a custom tool's call still makes a valid one."""
    both = []
    for streamed in (True, False):
        function = function_call("patch", arguments, "c")
        told = one_call(begun(0, "c", "patch", arguments), message=[function])
        upstream.script(told.script(streamed=streamed))
        _, response = await ask(proxy, streamed=streamed, tools=[CUSTOM])
        assert [item["type"] for item in response["output"]] == ["custom_tool_call"]
        both.append(items_of(response))
    assert both[0] == both[1]


def token(word: str, **members: Any) -> Fact:
    """Return the log probability of a token as chat has it."""
    value = {"token": word, "logprob": -0.5, "bytes": list(word.encode())}
    return {**value, "top_logprobs": [dict(value)], **members}


def weighed(*tokens: Fact) -> Fact:
    """Return the member of a choice."""
    return {"logprobs": {"content": list(tokens), "refusal": None}}


async def test_log_probabilities(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """The log probabilities come with their deltas, and all of them with the text."""
    words = [token("Hel"), token("lo")]
    told = Told(
        [text("Hel", **weighed(words[0])), text("lo", **weighed(words[1]))],
        {"content": "Hello"},
        choice=weighed(*words),
    )
    both = []
    for streamed in (True, False):
        upstream.script(told.script(streamed=streamed))
        _, response = await ask(proxy, streamed=streamed, top_logprobs=1)
        assert response["output"][0]["content"][0]["logprobs"] == words
        assert response["top_logprobs"] == 1
        both.append(timeless(response))
    assert both[0] == both[1]


@pytest.mark.parametrize("streamed", [False, True])
async def test_log_probabilities_without_bytes(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """Servers that leave out bytes or alternatives still give a valid list."""
    odd = [token("A", bytes=None), {"token": "B", "logprob": -1}]
    odd[0]["top_logprobs"][0]["bytes"] = None
    told = Told([text("AB", **weighed(*odd))], {"content": "AB"}, choice=weighed(*odd))
    upstream.script(told.script(streamed=streamed))
    _, response = await ask(proxy, streamed=streamed, top_logprobs=1)
    assert [each["token"] for each in response["output"][0]["content"][0]["logprobs"]] == ["A", "B"]


async def test_annotations(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Sources that the upstream cites are annotations of the text, in the API's flat form."""
    cited = {"start_index": 0, "end_index": 5, "title": "T", "url": "https://example.com"}
    given = [{"type": "url_citation", "url_citation": cited}]
    told = Told(
        [text("Hello"), {"delta": {"annotations": given}}],
        {"content": "Hello", "annotations": given},
    )
    both = []
    for streamed in (True, False):
        upstream.script(told.script(streamed=streamed))
        _, response = await ask(proxy, streamed=streamed)
        part = response["output"][0]["content"][0]
        assert part["annotations"] == [{"type": "url_citation", **cited}]
        both.append(timeless(response))
    assert both[0] == both[1]


USAGES: dict[str, tuple[Any, Any]] = {
    "whole": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "total_tokens": 150,
            "prompt_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 20},
            "completion_tokens_details": {"reasoning_tokens": 40},
        },
        (100, 30, 20, 50, 40),
    ),
    "bare": ({"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}, (9, 0, 0, 4, 0)),
    "no total": ({"prompt_tokens": 9, "completion_tokens": 4}, (9, 0, 0, 4, 0)),
    "null details": (
        {
            "prompt_tokens": 9,
            "completion_tokens": 4,
            "total_tokens": 13,
            "prompt_tokens_details": None,
            "completion_tokens_details": {"reasoning_tokens": None},
        },
        (9, 0, 0, 4, 0),
    ),
    "missing": (None, None),
    "a text": ("many", None),
    "negative": ({"prompt_tokens": -1, "completion_tokens": 4, "total_tokens": 3}, None),
    "too large": ({"prompt_tokens": 10**9, "completion_tokens": 4, "total_tokens": 1}, None),
    "fractions": ({"prompt_tokens": 1.5, "completion_tokens": 4, "total_tokens": 5.5}, None),
}


@pytest.mark.parametrize("name", USAGES)
@pytest.mark.parametrize("streamed", [False, True])
async def test_usage(
    proxy: Proxy, upstream: ScriptedUpstream, name: str, *, streamed: bool
) -> None:
    """Tokens are told with all details; a usage that is missing or bad is null."""
    given, numbers = USAGES[name]
    upstream.script(HELLO.but(usage=given).script(streamed=streamed))
    _, response = await ask(proxy, streamed=streamed)
    if numbers is None:
        assert response["usage"] is None
    else:
        count, cached, written, output, reasoning = numbers
        assert response["usage"] == Usage(count, cached, output, reasoning, written).responses()


async def test_usage_in_other_places(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Usage in the frame of the finish, and a running one in each frame: the last one counts."""
    early = {"prompt_tokens": 11, "completion_tokens": 1, "total_tokens": 12}
    last = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    counted = frame(last, usage=Usage().chat())
    for frames in (
        [piece_frame(text("Hi")), counted, DONE],
        [frame([{"index": 0, "delta": {"content": "Hi"}}], usage=early), counted, DONE],
        [piece_frame(text("Hi")), finish_frame(), usage_frame(early), usage_frame(Usage()), DONE],
    ):
        upstream.script(send(frames, EndChunks()))
        _, response = await ask(proxy, streamed=True)
        assert response["usage"] == Usage().responses()


ECHOED: Fact = {
    "instructions": "Be brief.",
    "max_output_tokens": 99,
    "max_tool_calls": 4,
    "metadata": {"a": "b"},
    "parallel_tool_calls": False,
    "prompt_cache_key": "k",
    "reasoning": {"effort": "low", "summary": "auto"},
    "safety_identifier": "s",
    "temperature": 0.5,
    "top_p": 0.25,
    "presence_penalty": 1.0,
    "frequency_penalty": 0.5,
    "top_logprobs": 2,
    "tool_choice": {"type": "function", "name": "f"},
    "store": False,
}
DEFAULTS: Fact = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "temperature": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "top_logprobs": 0,
    "tool_choice": "auto",
    "tools": [],
    "truncation": "disabled",
    "background": False,
    "store": True,
}


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_object_repeats_the_request(proxy: Proxy, *, streamed: bool) -> None:
    """The response has what was asked, and the API's defaults for all that was not."""
    tool = {**FUNCTION, "description": "d", "strict": True}
    schema = {"type": "object", "properties": {}}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    asked = {**ECHOED, "tools": [tool], "text": {"format": form, "verbosity": "low"}}
    _, response = await ask(proxy, streamed=streamed, **asked)
    assert {name: response[name] for name in ECHOED} == ECHOED
    assert response["tools"] == [tool]
    assert response["text"]["verbosity"] == "low"
    assert response["text"]["format"].items() >= form.items()
    _, response = await ask(proxy, streamed=streamed)
    assert {name: response[name] for name in DEFAULTS} == DEFAULTS
    assert response["text"]["format"] == {"type": "text"}
    assert response["model"] == "gpt-test"


async def test_a_renamed_model(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Whatever the upstream calls the model, the client reads its own name (traps, 48)."""
    for streamed in (True, False):
        answer, response = await ask(proxy, streamed=streamed, model="renamed")
        assert response["model"] == "renamed"
        assert b"upstream-model" not in answer.body


# Failures


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"message": "It broke.", "type": "server_error", "code": 500}, "server_error"),
        ({"message": "It broke.", "code": 429}, None),
        ({"message": "It broke.", "code": "rate_limit_exceeded"}, "rate_limit_exceeded"),
        ({"message": "It broke."}, "server_error"),
        ("It broke.", "server_error"),
    ],
)
async def test_an_error_within_a_stream(
    proxy: Proxy, upstream: ScriptedUpstream, error: Any, code: str | None
) -> None:
    """An error frame is `response.failed` with its message, after the items that were whole."""
    frames = [piece_frame(thought("Hm.")), piece_frame(text("Hel"))]
    upstream.script(send([*frames, frame(error=error), DONE], EndChunks()))
    _, response = await ask(proxy, streamed=True)
    assert response["status"] == "failed"
    assert code in {None, response["error"]["code"]}
    assert "It broke." in response["error"]["message"]
    assert items_of(response) == [("reasoning", "Hm.")]


async def test_an_error_before_anything(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """An error in the first frame fails the response; nothing is made up around it."""
    upstream.script(send([frame(error={"message": "It broke."})], EndChunks()))
    _, response = await ask(proxy, streamed=True)
    assert response["status"] == "failed"
    assert "It broke." in response["error"]["message"]
    assert response["output"] == []


async def test_a_finish_reason_of_error(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """The finish reason `error` fails the response."""
    upstream.script(HELLO.but(finish="error").script(streamed=True))
    _, response = await ask(proxy, streamed=True)
    assert response["status"] == "failed"


async def test_an_error_in_a_whole_answer(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """An answer of 200 that is an error is never a completed response."""
    upstream.script(json_answer({"error": {"message": "It broke.", "code": 500}}))
    upstream.script(HELLO.but(finish="error").script(streamed=False))
    for _ in range(2):
        answer = await proxy.post(PATH, prompt())
        if answer.status == 200:
            assert check_bridged(answer)["status"] == "failed"
        else:
            assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_error")


@pytest.mark.parametrize("streamed", [False, True])
async def test_refusals_of_the_upstream(
    serve: Serve, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """Before a stream starts an upstream's refusal is told as on every other endpoint."""
    proxy = await serve(upstreams=chat_only())
    body = prompt(stream=streamed)
    upstream.script(error_answer(400, "no good", code="odd", param="messages"))
    answer = await proxy.post(PATH, body)
    error = answer.json()["error"]
    assert (answer.status, error["message"], error["code"]) == (400, "no good", "odd")
    upstream.script(error_answer(429, "slow down", headers=[("retry-after", "7")]))
    answer = await proxy.post(PATH, body)
    assert (answer.status, answer.headers["retry-after"]) == (429, "7")
    for status, told, code in (
        (401, 502, "upstream_credential"),
        (500, 502, "upstream_error"),
        (503, 503, "upstream_overloaded"),
    ):
        for _ in range(3):  # the first attempt, and what is tried again
            proxy.calm()
        upstream.script(error_answer(status))
        answer = await proxy.post(PATH, body)
        upstream.heal()
        assert (answer.status, answer.json()["error"]["code"]) == (told, code)


@pytest.mark.parametrize(
    "value",
    [
        b"no json",
        [],
        {},
        {"choices": []},
        {"choices": 7},
        {"choices": [7]},
        {"choices": [{"index": 0, "finish_reason": "stop"}]},
        {"choices": [{"index": 0, "message": 7, "finish_reason": "stop"}]},
    ],
)
async def test_what_is_no_answer(proxy: Proxy, upstream: ScriptedUpstream, value: Any) -> None:
    """A body that is no chat completion is an upstream error, never an empty response."""
    upstream.script(json_answer(value))
    answer = await proxy.post(PATH, prompt())
    assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_error")


ODD_FRAMES: dict[str, bytes] = {
    "no json": b"data: not json\n\n",
    "a list": b"data: []\n\n",
    "choices of a number": frame(7),
    "a choice of a number": frame([7]),
    "a delta of a number": piece_frame({"delta": 7}),
    "content of a number": piece_frame({"delta": {"content": 7}}),
    "reasoning of an object": piece_frame({"delta": {"reasoning": {"a": 1}}}),
    "calls of a number": piece_frame({"delta": {"tool_calls": 7}}),
    "a call of a number": piece_frame({"delta": {"tool_calls": [7]}}),
    "a function of a number": piece_frame(calls({"index": 0, "id": "c", "function": 7})),
    "an index of a text": piece_frame(calls({"index": "0", "function": {"name": "f"}})),
    "a part of no call": piece_frame(calls(more(5, "{}"))),
    "annotations of a number": piece_frame({"delta": {"annotations": [7]}}),
    "log probabilities of a text": piece_frame({"delta": {}, "logprobs": "x"}),
    "a finish reason of a number": piece_frame({"delta": {}, "finish_reason": 7}),
    "lone surrogates": b'data: {"choices":[{"index":0,"delta":{"content":"\\ud800"}}]}\n\n',
    "bytes that are no UTF-8": b'data: {"choices":[{"index":0,"delta":{"content":"\xff"}}]}\n\n',
    "deep nesting": b'data: {"choices":' + b"[" * 5000 + b"]" * 5000 + b"}\n\n",
}


async def test_odd_frames(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Whatever a frame is, the stream is whole and valid: never cut, never an internal error."""
    for name, odd in ODD_FRAMES.items():
        with row(name):
            frames = [piece_frame(text("Hello")), odd, *HELLO.frames()[-3:]]
            upstream.script(send(frames, EndChunks()))
            answer = await proxy.post(PATH, prompt(stream=True))
            assert answer.status == 200
            final = check_stream(facts_of(answer.body))
            assert final["status"] in {"completed", "failed"}
            if final["status"] == "failed":
                assert "internal" not in final["error"]["message"].lower()


async def test_what_is_passed_over(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Comments, other choices, unknown members and event lines change nothing."""
    first, *rest = HELLO.frames()
    strange = [
        b": ping\n\n",
        b"event: ping\ndata: {}\n\n",
        frame([], prompt_filter_results=[]),
        frame([{"index": 0, "delta": {"content": "", "vendor": [1]}, "vendor": 1}], vendor={}),
        frame([{"index": 1, "delta": {"content": "another choice"}}]),
    ]
    upstream.script(
        send([first, *strange, *(b"event: message\n" + each for each in rest)], EndChunks())
    )
    _, response = await ask(proxy, streamed=True)
    assert items_of(response) == [("message", "Hello world")]
    assert response["usage"] == Usage().responses()
