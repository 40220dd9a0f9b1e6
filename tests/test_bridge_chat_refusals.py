"""What a chat upstream cannot be asked for is refused by name, or left out where told so."""

from typing import Any, NamedTuple

import pytest

from chat_upstream import FUNCTION, PATH, Fact, Serve, ask, chat_only, row
from rig import Proxy, routes
from test_bridge_chat_requests import (
    CUSTOM,
    CUSTOM_SENT,
    OTHER,
    TOOL,
    URL,
    USER,
    call,
    result,
    said,
    user,
    written,
)
from upstream import ScriptedUpstream

HOLDER = "replay"


@pytest.fixture
async def proxy(serve: Serve) -> Proxy:
    """A daemon whose upstream speaks chat completions alone."""
    return await serve(upstreams=chat_only())


class Refused(NamedTuple):
    """Fields that are refused, and the param that says so."""

    asked: Fact
    param: str


HOSTED: dict[str, Fact] = {
    "web_search": {"type": "web_search"},
    "web_search_preview": {"type": "web_search_preview"},
    "file_search": {"type": "file_search", "vector_store_ids": ["vs_1"]},
    "mcp:docs": {"type": "mcp", "server_label": "docs", "server_url": "https://example.com"},
    "code_interpreter": {"type": "code_interpreter", "container": {"type": "auto"}},
    "image_generation": {"type": "image_generation"},
    "computer_use_preview": {
        "type": "computer_use_preview",
        "display_width": 1,
        "display_height": 1,
        "environment": "linux",
    },
    "local_shell": {"type": "local_shell"},
    "tool_search": {"type": "tool_search"},
    "namespace:team": {
        "type": "namespace",
        "name": "team",
        "description": "d",
        "tools": [FUNCTION],
    },
    "custom:apply_patch": {
        "type": "custom",
        "name": "apply_patch",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: /a/"},
    },
    "vendor_tool": {"type": "vendor_tool"},
}

ITEMS: list[Fact] = [
    {"type": "web_search_call", "id": "ws_1", "status": "completed"},
    {"type": "file_search_call", "id": "fs_1", "status": "completed", "queries": []},
    {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": "AAAA"},
    {"type": "code_interpreter_call", "id": "ci_1", "status": "completed", "container_id": "c"},
    {"type": "computer_call", "id": "cu_1", "call_id": "c", "status": "completed"},
    {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot"}},
    {"type": "local_shell_call", "id": "ls_1", "call_id": "c", "status": "completed"},
    {"type": "local_shell_call_output", "id": "ls_1", "output": "x"},
    {"type": "mcp_call", "id": "mcp_1", "name": "n", "server_label": "s", "arguments": "{}"},
    {"type": "mcp_list_tools", "id": "mcpl_1", "server_label": "s", "tools": []},
    {"type": "mcp_approval_request", "id": "mcpr_1", "name": "n", "server_label": "s"},
    {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True},
    {"type": "compaction", "id": "cmp_1", "encrypted_content": "gAAA"},
    {"type": "vendor_item"},
]

REFUSED: dict[str, Refused] = {
    **{
        f"tool {name}": Refused({"tools": [FUNCTION, OTHER, tool]}, "tools[2]")
        for name, tool in HOSTED.items()
    },
    **{f"item {item['type']}": Refused(said(USER, item), "input[1]") for item in ITEMS},
    "an image by id": Refused(
        said(user({"type": "input_image", "file_id": "file-1"})), "input[0].content[0]"
    ),
    "a file by URL": Refused(
        said(USER, user(written("x"), {"type": "input_file", "file_url": URL})),
        "input[1].content[1]",
    ),
    "an unknown part": Refused(said(user({"type": "vendor_part"})), "input[0].content[0]"),
    "an image by id in a result": Refused(
        said(USER, call(), result(output=[written("x"), {"type": "input_image", "file_id": "f"}])),
        "input[2].output[1]",
    ),
    "choice of a hosted tool": Refused(
        {"tools": [FUNCTION], "tool_choice": {"type": "web_search"}}, "tool_choice"
    ),
    "choice of mcp": Refused(
        {"tools": [FUNCTION], "tool_choice": {"type": "mcp", "server_label": "s"}}, "tool_choice"
    ),
    "choice required without tools": Refused({"tool_choice": "required"}, "tool_choice"),
    "truncation auto": Refused({"truncation": "auto"}, "truncation"),
    "prompt": Refused({"prompt": {"id": "pmpt_1"}}, "prompt"),
    "background": Refused({"background": True}, "background"),
    "conversation": Refused({"conversation": "conv_1"}, "conversation"),
    "context_management": Refused(
        {"context_management": [{"type": "compaction", "compact_threshold": 9}]},
        "context_management",
    ),
    **{
        f"chat's own {name}": Refused({name: value}, name)
        for name, value in {
            "messages": [USER],
            "n": 2,
            "functions": [{"name": "f"}],
            "function_call": "auto",
            "response_format": {"type": "json_object"},
            "max_tokens": 5,
            "max_completion_tokens": 5,
            "logprobs": True,
        }.items()
    },
}

WINDOW = {"team-a": {"limits": {"requests": "1000/day", "tokens": "10000000/day"}}}


async def check_refused(
    proxy: Proxy, upstream: ScriptedUpstream, asked: Fact, param: str, *, streamed: bool
) -> str:
    """Assert an exact refusal that reached no upstream; return its message."""
    before = len(upstream.requests)
    body = {"model": "gpt-test", "input": "hi", **asked, "stream": streamed}
    answer = await proxy.post(PATH, body)
    error = answer.json()["error"]
    message = error.pop("message")
    assert answer.status == 400
    assert answer.headers["content-type"] == "application/json"
    kind = {"type": "invalid_request_error", "code": "unsupported_parameter", "param": param}
    assert error == kind
    assert len(upstream.requests) == before
    return str(message)


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_is_refused(proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool) -> None:
    """What chat cannot express is refused by its own name, and no upstream hears of it."""
    for name, (asked, param) in REFUSED.items():
        with row(name):
            message = await check_refused(proxy, upstream, asked, param, streamed=streamed)
            assert len(message) > 10


async def test_a_refusal_takes_nothing(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Whatever is refused, no request and no token is taken from the limits for it."""
    proxy = await serve(upstreams=chat_only(), keys=WINDOW)
    remaining = [f"x-ratelimit-remaining-{kind}" for kind in ("requests", "tokens")]
    first = await proxy.post(PATH, {"model": "gpt-test", "input": "hi"})
    left = [int(first.headers[name]) for name in remaining]
    assert left[0] == 999
    for asked, param in REFUSED.values():
        await check_refused(proxy, upstream, asked, param, streamed=True)
    last = await proxy.post(PATH, {"model": "gpt-test", "input": "hi", "background": True})
    assert int(last.headers[remaining[0]]) == left[0]
    metrics = await proxy.metrics()
    labels = frozenset({("key", "team-a"), ("limit", "tokens")})
    assert metrics["aiproxy_limit_remaining", labels] >= left[1]


MALFORMED: dict[str, Refused] = {
    "an item that is none": Refused(said(USER, 7), "input[1]"),
    "an unknown role": Refused(said({"role": "king", "content": "x"}), "input[0]"),
    "no role": Refused(said({"type": "message", "content": "x"}), "input[0]"),
    "content that is a number": Refused(said({"role": "user", "content": 7}), "input[0]"),
    "a part that is none": Refused(said(user(written("x"), 7)), "input[0].content[1]"),  # type: ignore[arg-type]
    "text that is a number": Refused(
        said(user({"type": "input_text", "text": 7})), "input[0].content[0]"
    ),
    "a URL that is a number": Refused(
        said(user({"type": "input_image", "image_url": 7})), "input[0].content[0]"
    ),
    "a call without its name": Refused(
        said(USER, {"type": "function_call", "call_id": "c", "arguments": "{}"}), "input[1]"
    ),
    "arguments that are an object": Refused(
        said(USER, {**call(), "arguments": {"a": 1}}), "input[1]"
    ),
    "a result of a number": Refused(said(USER, call(), result(output=7)), "input[2]"),
    "a result of no call": Refused(
        said(USER, {"type": "function_call_output", "output": "x"}), "input[1]"
    ),
    "tools that are an object": Refused({"tools": {"a": 1}}, "tools"),
    "a tool that is none": Refused({"tools": [FUNCTION, 7]}, "tools[1]"),
    "a function without a name": Refused({"tools": [{"type": "function"}]}, "tools[0]"),
    "a choice that is a number": Refused({"tools": [FUNCTION], "tool_choice": 7}, "tool_choice"),
    "text options that are a string": Refused({"text": "x"}, "text"),
    "a format that is a string": Refused({"text": {"format": "json"}}, "text"),
    "reasoning that is a string": Refused({"reasoning": "high"}, "reasoning"),
    "include that is a string": Refused({"include": "x"}, "include"),
    "instructions that are a number": Refused({"instructions": 7}, "instructions"),
}


async def test_what_is_malformed(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A field that cannot be read is 400 with its place, and no upstream hears of it."""
    for name, (asked, param) in MALFORMED.items():
        with row(name):
            answer = await proxy.post(PATH, {"model": "gpt-test", "input": "hi", **asked})
            assert answer.status == 400, answer
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert error["code"] in {"invalid_type", "invalid_value", "missing_required_parameter"}
            assert error["param"].startswith(param)
            assert upstream.requests == []


# Tools that are left out


@pytest.fixture
async def dropping(serve: Serve) -> Proxy:
    """A daemon whose route leaves out the tools that chat cannot express."""
    return await serve(upstreams=chat_only(), routes=routes(unsupported_tools="drop"))


@pytest.mark.parametrize("streamed", [False, True])
async def test_tools_that_are_dropped(
    dropping: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """With `unsupported_tools: drop` they are left out, and named in order in a header."""
    tools = [FUNCTION, *HOSTED.values(), CUSTOM]
    answer, _ = await ask(dropping, streamed=streamed, tools=tools, tool_choice="auto")
    assert answer.headers["x-aiproxy-dropped-tools"] == ", ".join(HOSTED)
    body = upstream.requests[-1].json()
    assert (body["tools"], body["tool_choice"]) == ([TOOL, CUSTOM_SENT], "auto")


async def test_no_tool_is_dropped(dropping: Proxy, upstream: ScriptedUpstream) -> None:
    """Where every tool can be expressed the header is not there."""
    answer, _ = await ask(dropping, streamed=False, tools=[FUNCTION, CUSTOM])
    assert "x-aiproxy-dropped-tools" not in answer.headers
    answer, _ = await ask(dropping, streamed=False)
    assert "x-aiproxy-dropped-tools" not in answer.headers


async def test_no_tool_is_left(dropping: Proxy, upstream: ScriptedUpstream) -> None:
    """Where all tools are left out, nothing is said to the upstream that is about tools."""
    tools = [HOSTED["web_search"]]
    fields: Fact = {"tools": tools, "tool_choice": "auto", "parallel_tool_calls": True}
    answer, _ = await ask(dropping, streamed=False, **fields)
    assert answer.headers["x-aiproxy-dropped-tools"] == "web_search"
    body = upstream.requests[-1].json()
    assert not {"tools", "tool_choice", "parallel_tool_calls"} & set(body)


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "web_search"}, {"type": "custom", "name": "apply_patch"}],
    ids=["required", "hosted", "custom"],
)
async def test_a_choice_of_what_is_dropped(
    dropping: Proxy, upstream: ScriptedUpstream, choice: Any
) -> None:
    """A choice that needs a tool that was left out is refused."""
    tools = [HOSTED["web_search"], HOSTED["custom:apply_patch"]]
    if choice != "required":
        tools = [FUNCTION, *tools]
    asked = {"tools": tools, "tool_choice": choice}
    await check_refused(dropping, upstream, asked, "tool_choice", streamed=False)


async def test_other_refusals_stay(dropping: Proxy, upstream: ScriptedUpstream) -> None:
    """To leave out tools is not to leave out anything else."""
    for name, (asked, param) in REFUSED.items():
        if not name.startswith("tool "):
            await check_refused(dropping, upstream, asked, param, streamed=False)
