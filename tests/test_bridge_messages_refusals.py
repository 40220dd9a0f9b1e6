"""What messages cannot express is refused by its place; tools may be dropped instead."""

from typing import NamedTuple

import pytest

from invariants import eventually
from messages_items import (
    FREE,
    GRAMMAR,
    MCP,
    NAMESPACE,
    PDF,
    SEARCH,
    SENT_BOTH,
    F,
    Fields,
    G,
    call,
    item,
    output,
    part,
)
from messages_upstream import Serve, ask, bridged, check_asked
from refusals import Refusal
from rig import TEAM_A, key_hash, routes, totals
from upstream import ScriptedUpstream
from validating import check_bridged

HOLDER = "replay"


# What cannot be said


class Refused(NamedTuple):
    """A request's own fields, and the parameter that is named."""

    fields: Fields
    param: str


def given(*items: Fields) -> Fields:
    """Return the field `input`."""
    return {"input": [item("user", "hi"), *items]}


def shown(content: Fields) -> Refused:
    """A row about one part of the user's, after a text."""
    parts = [part("input_text", text="see"), content]
    return Refused(given(item("user", parts)), "input[1].content[1]")


HOSTED: dict[str, Fields] = {
    "grammar": {**FREE, "format": GRAMMAR},
    "namespace": NAMESPACE,
    "web_search": SEARCH,
    "mcp": MCP,
    "file_search": {"type": "file_search", "vector_store_ids": ["vs_1"]},
    "code_interpreter": {"type": "code_interpreter", "container": {"type": "auto"}},
    "image_generation": {"type": "image_generation"},
    "unheard-of": {"type": "brand_new", "name": "x"},
}
TEXTUAL = {"type": "file_search_call", "id": "fs_1", "status": "completed", "queries": []}

REFUSED: dict[str, Refused] = {
    "an image by id": shown(part("input_image", file_id="file-1", detail="auto")),
    "a file by id": shown(part("input_file", file_id="file-1")),
    "a file of a type that has no document": shown(
        part("input_file", filename="a.doc", file_data=f"data:application/msword;base64,{PDF}")
    ),
    "audio": shown(part("input_audio", input_audio={"data": "AAAA", "format": "wav"})),
    "an unheard-of part": shown(part("input_hologram", text="x")),
    "an image by id in an output": Refused(
        given(call("f", "{}"), output([part("input_text", text="x"),
                                       part("input_image", file_id="file-1")])),
        "input[2].output[1]",
    ),
    "a hosted call": Refused(given(TEXTUAL), "input[1]"),
    "an unheard-of item": Refused(given({"type": "vendor_thing", "id": "v"}), "input[1]"),
    "a compaction": Refused(given({"type": "compaction", "encrypted_content": "x"}), "input[1]"),
    **{
        f"a tool: {name}": Refused({"tools": [F, G, tool]}, "tools[2]")
        for name, tool in HOSTED.items()
    },
    "choice of a hosted tool": Refused(
        {"tools": [F], "tool_choice": {"type": "web_search"}}, "tool_choice"
    ),
    "choice of a tool that is not there": Refused(
        {"tools": [F], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"
    ),
    "choice required without tools": Refused({"tool_choice": "required"}, "tool_choice"),
    "json_object": Refused({"text": {"format": {"type": "json_object"}}}, "text.format"),
    "verbosity low": Refused({"text": {"verbosity": "low"}}, "text.verbosity"),
    "verbosity high": Refused({"text": {"verbosity": "high"}}, "text.verbosity"),
    "top_logprobs": Refused({"top_logprobs": 2}, "top_logprobs"),
    "include logprobs": Refused(
        {"include": ["reasoning.encrypted_content", "message.output_text.logprobs"]}, "include[1]"
    ),
    "presence_penalty": Refused({"presence_penalty": 0.5}, "presence_penalty"),
    "frequency_penalty": Refused({"frequency_penalty": -1}, "frequency_penalty"),
    "tier flex": Refused({"service_tier": "flex"}, "service_tier"),
    "tier priority": Refused({"service_tier": "priority"}, "service_tier"),
    "truncation auto": Refused({"truncation": "auto"}, "truncation"),
    "prompt": Refused({"prompt": {"id": "pmpt_1"}}, "prompt"),
    "background": Refused({"background": True}, "background"),
    "conversation": Refused({"conversation": "conv_1"}, "conversation"),
    "context_management": Refused(
        {"context_management": [{"type": "compaction", "compact_threshold": 1000}]},
        "context_management",
    ),
    **{
        name: Refused({name: value}, name)
        for name, value in {
            "messages": [{"role": "user", "content": "x"}],
            "system": "x",
            "max_tokens": 5,
            "max_completion_tokens": 5,
            "n": 2,
            "functions": [],
            "function_call": "auto",
            "response_format": {"type": "text"},
            "logprobs": True,
        }.items()
    },
}  # fmt: skip

ONCE = {
    "requests": {"rate": "1/day", "burst": 1},
    "tokens": {"rate": "100000/day", "burst": 100000},
    "concurrent": 1,
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_said_is_refused(
    serve: Serve, upstream: ScriptedUpstream, name: str
) -> None:
    """It is named by its place, reaches no upstream and takes nothing: never silently dropped."""
    proxy = await bridged(serve, keys={"team-a": {"sha256": key_hash(TEAM_A), "limits": ONCE}})
    fields, param = REFUSED[name]
    refusal = Refusal(400, "unsupported_parameter", param=param)
    for streamed in (False, True):
        answer = await ask(proxy, **{"input": "hi", **fields, "stream": streamed})
        refusal.check(answer, upstream=answer.headers.get("x-aiproxy-upstream"))
    assert not upstream.requests
    answer = await ask(proxy, "hi", max_output_tokens=10)
    assert answer.status == 200, "a refusal took something"
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) > 99_900
    assert len(upstream.requests) == 1


MALFORMED: dict[str, Refused] = {
    "an item that is no object": Refused({"input": [item("user", "hi"), 7]}, "input[1]"),
    "an unknown role": Refused(given(item("robot", "x")), "input[1]"),
    "content of a wrong type": Refused(given(item("user", 5)), "input[1]"),
    "a part that is no object": Refused(given(item("user", ["x"])), "input[1].content[0]"),
    "text of a wrong type": Refused(
        given(item("user", [part("input_text", text=5)])), "input[1].content[0]"
    ),
    "arguments of a wrong type": Refused(
        given({"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}),
        "input[1]",
    ),
    "a call without an id": Refused(
        given({"type": "function_call", "name": "f", "arguments": "{}"}), "input[1]"
    ),
    "output of a wrong type": Refused(given(call("f", "{}"), output(5)), "input[2]"),
    "tools of a wrong type": Refused({"tools": {}}, "tools"),
    "a tool that is no object": Refused({"tools": [F, "g"]}, "tools[1]"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_what_is_malformed_is_refused(
    serve: Serve, upstream: ScriptedUpstream, name: str
) -> None:
    """An item or tool that cannot be read is 400 with its place, and goes nowhere."""
    proxy = await bridged(serve)
    fields, param = MALFORMED[name]
    answer = await ask(proxy, **{"input": "hi", **fields})
    assert answer.status == 400, answer
    error = answer.json()["error"]
    assert error["code"] in {"invalid_type", "invalid_value"}
    assert error["param"].startswith(param)
    refusal = Refusal(400, error["code"], param=error["param"])
    refusal.check(answer, upstream=answer.headers.get("x-aiproxy-upstream"))
    assert not upstream.requests


async def test_a_refusal_is_counted_as_one(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Log and metrics say that the request was invalid, and no upstream was tried."""
    proxy = await bridged(serve)
    await ask(proxy, truncation="auto")

    async def counted() -> None:
        assert [line["outcome"] for line in proxy.request_logs()] == ["rejected_invalid"]

    await eventually(counted)
    assert proxy.request_logs()[0]["error_code"] == "unsupported_parameter"
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_requests_total", "outcome") == {"rejected_invalid": 1}
    assert not totals(metrics, "aiproxy_upstream_attempts_total", "result")


# Tools that are left out


async def test_tools_may_be_left_out(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Where the route says so they are dropped, and the answer's head names each, in order."""
    proxy = await bridged(serve, routes=routes(unsupported_tools="drop"))
    tools = [SEARCH, F, NAMESPACE, {**FREE, "format": GRAMMAR}, MCP, G]
    for streamed in (False, True):
        answer = await ask(proxy, tools=tools, tool_choice="auto", stream=streamed)
        check_bridged(answer)
        asked = check_asked(upstream)
        assert asked["tools"] == SENT_BOTH["tools"]
        assert asked["tool_choice"] == {"type": "auto"}
        left_out = "web_search, namespace:ns, custom:free, mcp:srv"
        assert answer.headers["x-aiproxy-dropped-tools"] == left_out


async def test_all_tools_may_be_left_out(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Then there is no choice either, and one that wants a tool is refused."""
    proxy = await bridged(serve, routes=routes(unsupported_tools="drop"))
    fields: Fields = {"tools": [SEARCH], "parallel_tool_calls": False}
    answer = await ask(proxy, **fields, tool_choice="auto")
    check_bridged(answer)
    assert answer.headers["x-aiproxy-dropped-tools"] == "web_search"
    asked = check_asked(upstream)
    assert not asked.keys() & {"tools", "tool_choice"}
    refusal = Refusal(400, "unsupported_parameter", param="tool_choice")
    for choice in ("required", {"type": "web_search"}):
        answer = await ask(proxy, **fields, tool_choice=choice)
        refusal.check(answer, upstream=answer.headers.get("x-aiproxy-upstream"))
    assert len(upstream.requests) == 1


async def test_a_choice_of_a_tool_that_was_left_out(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """It is refused: the model would not do what it was told to."""
    proxy = await bridged(serve, routes=routes(unsupported_tools="drop"))
    tools = [F, {**FREE, "format": GRAMMAR}]
    answer = await ask(proxy, tools=tools, tool_choice={"type": "custom", "name": "free"})
    refusal = Refusal(400, "unsupported_parameter", param="tool_choice")
    refusal.check(answer, upstream=answer.headers.get("x-aiproxy-upstream"))
    assert not upstream.requests
