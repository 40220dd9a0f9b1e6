"""Objects of the upstream's account, which a route can refuse."""
# ruff: noqa: E501 - a case is one line, as a request is

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from aiproxy import account_objects
from aiproxy.errors import ProxyError
from invariants import check_invariants
from rig import Proxy, config_text, prompt, routes
from upstream import ScriptedUpstream

R, C, M = "/v1/responses", "/v1/chat/completions", "/v1/messages"
Serve = Callable[..., Awaitable[Proxy]]


@pytest.fixture
async def serve(upstream: ScriptedUpstream) -> AsyncIterator[Serve]:
    """Start a daemon whose route refuses them, unless told otherwise."""
    proxies: list[Proxy] = []

    async def start(**route: Any) -> Proxy:
        given = {"account_objects": "refuse", **route}
        proxies.append(await Proxy.start(config_text(upstream.url, routes=routes(**given))))
        return proxies[-1]

    yield start
    for proxy in proxies:
        await proxy.stop()


def said(*content: Any) -> list[Any]:
    """Return the messages of one user."""
    return [{"role": "user", "content": list(content)}]


NAMED: list[tuple[str, dict[str, Any], str]] = [
    (R, {"input": said({"type": "input_file", "file_id": "file-1"})}, "input[0].content[0].file_id"),
    (R, {"input": said({"type": "input_image", "file_id": "file-1"})}, "input[0].content[0].file_id"),
    (R, {"tools": [{"type": "file_search", "vector_store_ids": ["vs_1"]}]}, "tools[0].vector_store_ids"),
    (R, {"tools": [{"type": "code_interpreter", "container": "cntr_1"}]}, "tools[0].container"),
    (R, {"tools": [{"type": "code_interpreter", "container": {"type": "auto", "file_ids": ["f"]}}]},
     "tools[0].container.file_ids"),
    (R, {"tools": [{"type": "shell", "environment": {"type": "container_reference", "container_id": "c"}}]},
     "tools[0].environment.container_id"),
    (R, {"prompt": {"id": "pmpt_1"}}, "prompt"),
    (R, {"input": [{"type": "code_interpreter_call", "code": "1", "container_id": "cntr_1"}]},
     "input[0].container_id"),
    (R, {"input": [{"type": "function_call_output", "call_id": "c",
                    "output": [{"type": "input_file", "file_id": "file-1"}]}]}, "input[0].output[0].file_id"),
    (C, {"messages": said({"type": "file", "file": {"file_id": "file-1"}})}, "messages[0].content[0].file.file_id"),
    (M, {"messages": said({"type": "document", "source": {"type": "file", "file_id": "f"}})},
     "messages[0].content[0].source.file_id"),
    (M, {"container": "cont_1"}, "container"),
    (M, {"container": {"skills": [{"skill_id": "pdf"}]}}, "container.skills[0].skill_id"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "param"), NAMED)
async def test_what_is_refused(
    serve: Serve, upstream: ScriptedUpstream, path: str, fields: dict[str, Any], param: str
) -> None:
    """Each place in which an id of the account can stand is a 400 that names it."""
    proxy = await serve()
    answer = await proxy.post(path, {**prompt(path), **fields})
    assert answer.status == 400
    error = answer.json()["error"]
    if path != M:
        assert (error["code"], error["param"]) == ("unsupported_parameter", param)
    assert param in error["message"]
    assert upstream.requests == []
    await check_invariants(proxy, upstream)


@pytest.mark.parametrize(
    "path", ["/v1/responses/input_tokens", "/v1/messages/count_tokens"]
)  # fmt: skip
async def test_counting_is_no_way_around(
    serve: Serve, upstream: ScriptedUpstream, path: str
) -> None:
    """Counting tokens would read the file, too."""
    proxy = await serve()
    content = said({"type": "input_file", "file_id": "file-1"})
    body = {"model": "gpt-test", "input": content, "messages": content}
    assert (await proxy.post(path, body)).status == 400
    assert upstream.requests == []


OWN: list[tuple[str, dict[str, Any]]] = [
    (R, {"tools": [{"type": "function", "name": "f", "strict": False, "parameters": {
        "type": "object", "properties": {"file_id": {"type": "string"}, "container": {"const": "c"}}}}]}),
    (R, {"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}),
    (R, {"metadata": {"file_id": "mine"}}),
    (R, {"input": said({"type": "input_file", "file_id": None, "file_url": "https://host/x"})}),
    (R, {"input": said({"type": "input_text", "text": '"file_id": "file-1"'})}),
    (M, {"messages": [*said({"type": "text", "text": "x"}), {"role": "assistant", "content": [
        {"type": "tool_use", "id": "t", "name": "open", "input": {"file_id": "of its own"}}]}]}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields"), OWN)
async def test_what_is_the_clients_own(serve: Serve, path: str, fields: dict[str, Any]) -> None:
    """The same names in schemas, arguments, notes and texts name nothing."""
    proxy = await serve()
    assert (await proxy.post(path, {**prompt(path), **fields})).status == 200


async def test_by_default_all_is_allowed(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Without the option the upstream decides."""
    proxy = await serve(account_objects="allow")
    answer = await proxy.post(R, {**prompt(R), "prompt": {"id": "pmpt_1"}})
    assert answer.status == 200
    assert upstream.requests[0].json()["prompt"] == {"id": "pmpt_1"}


@pytest.mark.parametrize(
    "part",
    [
        b'{"file_id": null, "file_id": "f"}',
        b'{"file_id": "f", "file_id": null}',
        b'{"\\u0066ile_id": "f"}',
        b'{"file\\u005fid": "f"}',
        b'{"type": "tool_use", "type": "x", "a": {"file_id": "f"}}',
        b'{"x": "\\ud800", "file_id": "\\ud800"}',
        b'{"file_id": ["f"]}',
        b'{"file_id": 1' + b"0" * 5000 + b"}",
        b"[" * 200 + b'{"file_id": "f"}' + b"]" * 200,
    ],
)
def test_whatever_a_reader_could_read(part: bytes) -> None:
    """Twice the name, letters as escapes, numbers and depths of any size: it is found."""
    body = b'{"input": [%b]}' % part
    assert account_objects.marked(body)
    with pytest.raises(ProxyError, match="names an object of the upstream's account"):
        account_objects.refuse(body)


def test_a_body_without_them_is_not_read_twice() -> None:
    """Usual bodies have no mark, and cost a search alone."""
    assert not account_objects.marked(json.dumps(prompt(R)).encode())
