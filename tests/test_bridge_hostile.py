"""Upstreams that answer with values of any type anywhere: the readers of bridges never break.

Pure: every value in the documents of a stream, and of a JSON answer, is put in turn by odd ones.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from aiproxy.dialects import Asked, Dialect
from aiproxy.dialects.chat_bridge import ChatBridge
from aiproxy.dialects.messages_bridge import MessagesBridge
from aiproxy.dialects.responses import Responses
from aiproxy.dialects.responses_repair import RepairedResponses
from aiproxy.envelope import Envelope
from aiproxy.errors import ProxyError
from client import parse_sse
from responses import function_item, message_item, reasoning_item, responses_events, responses_json

ODD: list[Any] = [
    None, True, 0, -1, 1.5, "", "x", "\ud800", [], [[]], [None], [{}], ["x"], {}, {"a": 1},
    {"type": {}}, [{"type": []}], 10**30, float("inf"), float("nan"),
]  # fmt: skip
TERMINAL = {"response.completed", "response.incomplete", "response.failed"}

LOGPROBS = {
    "content": [
        {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": [{"token": "b"}]},
    ]
}
CITED = {"type": "url_citation", "url_citation": {"url": "u", "title": "t", "start_index": 0}}
CALLS = [
    {"index": 0, "id": "c0", "function": {"name": "f", "arguments": '{"a":1}'}},
    {"index": 1, "id": "c1", "function": {"name": "g", "arguments": '{"input":"x"}'}},
]
CHAT_USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 1},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
MESSAGE = {
    "content": "hi", "refusal": "no", "reasoning_content": "hm", "annotations": [CITED],
    "tool_calls": CALLS,
}  # fmt: skip
CHAT: list[Any] = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"index": 0, "delta": {"reasoning": "hm"}}]},
    {"choices": [{"index": 0, "delta": {"content": "hi"}, "logprobs": LOGPROBS}]},
    {"choices": [{"index": 0, "delta": MESSAGE}]},
    {"choices": [{"index": 0, "delta": {"content": [{"type": "text", "text": "x"}]}}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": CHAT_USAGE},
]
CHAT_JSON = {
    "choices": [{"index": 0, "message": MESSAGE, "logprobs": LOGPROBS, "finish_reason": "length"}],
    "usage": CHAT_USAGE,
    "service_tier": "default",
}
BLOCKS: list[Any] = [
    {"type": "thinking", "thinking": "hm", "signature": "s"},
    {"type": "redacted_thinking", "data": "d"},
    {"type": "text", "text": "x", "citations": [{"type": "web_search_result_location"}]},
    {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
    {"type": "tool_use", "id": "u", "name": "g", "input": {"input": "x"}},
]
MESSAGES_USAGE = {"input_tokens": 5, "output_tokens": 2, "cache_creation_input_tokens": 1}
MESSAGES: list[Any] = [
    {"type": "message_start", "message": {"usage": MESSAGES_USAGE}},
    *(
        event
        for index, block in enumerate(BLOCKS)
        for event in (
            {"type": "content_block_start", "index": index, "content_block": block},
            {
                "type": "content_block_delta",
                "index": index,
                "delta": {"type": "input_json_delta", "partial_json": '{"input":"y"}'},
            },
            {
                "type": "content_block_delta",
                "index": index,
                "delta": {"type": "text_delta", "text": "y"},
            },
            {"type": "content_block_stop", "index": index},
        )
    ),
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": MESSAGES_USAGE},
    {"type": "message_stop"},
]
MESSAGES_JSON = {"content": BLOCKS, "stop_reason": "max_tokens", "usage": MESSAGES_USAGE}
ITEMS = [reasoning_item("E"), message_item("hi there"), function_item("f", "{}")]
NATIVE = [json.loads(data) for _, data in parse_sse(b"".join(responses_events(items=ITEMS)))]

CASES: dict[str, tuple[Dialect, list[Any], Any]] = {
    "chat": (ChatBridge(), CHAT, CHAT_JSON),
    "messages": (MessagesBridge(), MESSAGES, MESSAGES_JSON),
    "normalize": (RepairedResponses(), NATIVE, responses_json(items=ITEMS)),
}
every_case = pytest.mark.parametrize("case", CASES)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value within."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inner:
        yield (*path, key)
        if isinstance(each, dict | list):
            yield from places(each, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return it with another value at a path."""
    found = copy.deepcopy(document)
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return found


def asked(*, stream: bool) -> Asked:
    """Return what a client asked, who wants it kept."""
    envelope = Envelope.parse(b'{"model":"m","input":"x","max_output_tokens":64}')
    found = Responses().request(envelope)
    found.stream, found.envelope, found.keep = stream, envelope, True
    found.custom = frozenset({"g"})
    found.own = {"id": b'"resp_A"', "previous_response_id": b"null", "store": b"true"}
    return found


def refused(name: str) -> None:
    """Refuse what is no JSON."""
    raise ValueError(name)


def check_stream(dialect: Dialect, documents: list[Any]) -> None:
    """Assert that a stream is told in numbered events, with one terminal event at its end."""
    reader = dialect.stream(asked(stream=True))
    out = b""
    for document in documents:
        out += reader.feed(b"data: %b\n\n" % json.dumps(document).encode())
        if reader.produced is not None:
            out += reader.end()
        if reader.error is not None or reader.over:
            break
    if reader.error is None and not reader.over:
        out += reader.close()
        out += reader.end() if reader.produced is not None else b""
    if not reader.over:
        error = reader.error or reader.cut() or ProxyError(502, "server_error", None, "cut")
        out += reader.fail(error, 1)
    told = []
    for _, data in parse_sse(out):
        try:
            event = json.loads(data, parse_constant=refused)
        except ValueError:  # what is no JSON, with NaN in it, passes a loose server's stream
            continue
        if isinstance(event, dict):
            told.append(event)
    numbered = [event for event in told if "sequence_number" in event]
    assert [event["sequence_number"] for event in numbered] == list(range(len(numbered)))
    assert [event["type"] for event in numbered if event["type"] in TERMINAL] == [
        numbered[-1]["type"]
    ]


@every_case
def test_streams(case: str) -> None:
    """Whatever stands anywhere in a stream, it is told properly to its end."""
    dialect, documents, _ = CASES[case]
    check_stream(dialect, documents)
    for path in places(documents):
        for value in ODD:
            check_stream(dialect, changed(documents, path, value))


@every_case
def test_answers(case: str) -> None:
    """Whatever stands anywhere in a JSON answer, it is told, or is an upstream's error."""
    dialect, _, document = CASES[case]
    for path in [(), *places(document)]:
        for value in ODD:
            body = json.dumps(changed(document, path, value) if path else value).encode()
            with contextlib.suppress(ProxyError):
                answer = dialect.answer(body, asked(stream=False))
                assert json.loads(answer.body)["object"] == "response"
