"""What spans say of prompts and outputs: the three APIs, with contents and without."""

import json
from typing import Any

import pytest

from aiproxy.envelope import Envelope
from aiproxy.kept import Budget, Kept
from aiproxy.openinference import MOST_MESSAGES, MOST_PLAIN, MOST_TEXT, MOST_VALUES, attributes
from answers import sse

TOOL: dict[str, Any] = {"type": "function", "name": "look_up", "parameters": {"type": "object"}}
DATA = "data:image/png;base64,iVBORw0KGgo="
SECRET = "SECRET-TEXT"  # in every text of a request and its answer


def told(
    api: str,
    fields: dict[str, Any],
    said: bytes = b"",
    *,
    content: bool = True,
    streamed: bool = False,
) -> dict[str, Any]:
    """Return the attributes of a request and what its client was told."""
    kept = Kept(Budget(2**24), content=content)
    kept.request(api, Envelope.parse(json.dumps(fields).encode()))
    kept.answer(said, streamed=streamed)
    pairs = [*attributes(kept, answered=bool(said))]
    assert len(pairs) == len(dict(pairs)), "an attribute is told twice"
    return dict(pairs)


def messages(attributes: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    """Return the messages below a prefix, each by its attributes' names."""
    found: dict[int, dict[str, Any]] = {}
    for key, value in attributes.items():
        if key.startswith(f"{prefix}."):
            place, _, name = key.removeprefix(f"{prefix}.").partition(".")
            found.setdefault(int(place), {})[name.removeprefix("message.")] = value
    assert [*found] == [*range(len(found))], "places have no gaps"
    return [*found.values()]


def asked(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of the request."""
    return messages(attributes, "llm.input_messages")


def answered(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of the answer."""
    return messages(attributes, "llm.output_messages")


def parts(*given: tuple[str, str]) -> dict[str, str]:
    """Return parts of a message, of a kind and a text (or an address)."""
    found = {}
    for place, (kind, text) in enumerate(given):
        at = f"contents.{place}.message_content."
        found[f"{at}type"] = kind
        if text:
            found[f"{at}image.image.url" if kind == "image" else f"{at}text"] = text
    return found


def call(call_id: str, name: str, arguments: str, place: int = 0) -> dict[str, str]:
    """Return the call of a tool."""
    at = f"tool_calls.{place}.tool_call."
    return {f"{at}function.name": name, f"{at}id": call_id, f"{at}function.arguments": arguments}


RESPONSES = {
    "instructions": "Be brief.",
    "input": [
        {"role": "user", "content": "Hi"},
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "See"},
                {"type": "input_image", "image_url": DATA},
                {"type": "input_image", "image_url": "https://example.com/a.png"},
                {"type": "input_file", "file_id": "file-1"},
            ],
        },
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "look_up", "arguments": '{"a":1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "found"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "run", "input": "ls"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [
            {"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "item_reference", "id": "msg_1"},
    ],
}  # fmt: skip
RESPONSES_TOLD = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "user"} | parts(
        ("text", "See"),
        ("image", "data:image/png;base64,..."),
        ("image", "https://example.com/a.png"),
        ("input_file", ""),
    ),
    {"role": "assistant"} | parts(("reasoning", "Hm")),
    {"role": "assistant"} | call("c1", "look_up", '{"a":1}'),
    {"role": "tool", "tool_call_id": "c1", "content": "found"},
    {"role": "assistant"} | call("c2", "run", "ls"),
    {"role": "tool", "tool_call_id": "c2"} | parts(("text", "a"), ("text", "b")),
    {"role": "assistant"} | parts(("web_search_call", "")),
    {"role": "assistant"} | parts(("item_reference", "")),
]  # fmt: skip
CHAT = {
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "text", "text": "See"},
            {"type": "image_url", "image_url": {"url": DATA}},
        ]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"id": "c2", "type": "custom", "custom": {"name": "run", "input": "ls"}},
        ]},
        {"role": "tool", "tool_call_id": "c1", "content": "found"},
        {"role": "assistant", "reasoning_content": "Hm", "content": "So", "refusal": "No"},
    ],
}  # fmt: skip
CHAT_TOLD = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user"} | parts(("text", "See"), ("image", "data:image/png;base64,...")),
    {"role": "assistant"} | call("c1", "f", "{}") | call("c2", "run", "ls", 1),
    {"role": "tool", "tool_call_id": "c1", "content": "found"},
    {"role": "assistant"} | parts(("reasoning", "Hm"), ("text", "So"), ("text", "No")),
]
MESSAGES = {
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm", "signature": "s"},
            {"type": "text", "text": "Let me see."},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "found"},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c2", "content": [
                {"type": "text", "text": "more"}]},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}},
            {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
        ]},
    ],
}  # fmt: skip
MESSAGES_TOLD = [
    {"role": "system"} | parts(("text", "Be brief.")),
    {"role": "user", "content": "Hi"},
    {"role": "assistant"}
    | call("c1", "f", '{"a": 1}')
    | parts(("reasoning", "Hm"), ("text", "Let me see.")),
    {"role": "tool", "tool_call_id": "c1", "content": "found"},
    {"role": "tool", "tool_call_id": "c2"} | parts(("text", "more")),
    {"role": "user"}
    | parts(("image", "data:image/png;base64,..."), ("image", "https://example.com/a.png")),
]


@pytest.mark.parametrize(
    ("api", "fields", "expected"),
    [
        ("responses", {"input": "Hi"}, [{"role": "user", "content": "Hi"}]),
        ("responses", RESPONSES, RESPONSES_TOLD),
        ("chat", CHAT, CHAT_TOLD),
        ("messages", MESSAGES, MESSAGES_TOLD),
        ("responses", {"input": 7}, []),
        ("chat", {"messages": ["no message", None, 7]}, []),
        ("chat", {"messages": [{"role": 7, "content": 8}]}, [{"role": "unknown"}]),
    ],
    ids=["text", "responses", "chat", "messages", "odd", "odder", "oddest"],
)
def test_a_request_is_told_message_by_message(
    api: str, fields: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    """Roles, parts, calls and results of every API come under OpenInference's names."""
    assert asked(told(api, fields)) == expected


@pytest.mark.parametrize("api", ["responses", "chat", "messages"])
def test_without_content_there_is_no_text(api: str) -> None:
    """Roles and the names of tools remain; no text, argument, result, address or description."""
    given: dict[str, Any] = {"responses": RESPONSES, "chat": CHAT, "messages": MESSAGES}
    tools = [TOOL | {"description": SECRET}]
    more = {"tools": tools, "metadata": {"a": SECRET}, "stop": [SECRET], "temperature": 0.5}
    found = told(api, {**given[api], **more}, b"{}", content=False)
    roles = [message.pop("role") for message in asked(found)]
    expected = {"responses": RESPONSES_TOLD, "chat": CHAT_TOLD, "messages": MESSAGES_TOLD}[api]
    assert roles == [message["role"] for message in expected][-MOST_PLAIN:]
    assert answered(found) == [{"role": "assistant"}]
    texts = set(found.values())
    assert texts <= {
        "system", "developer", "user", "assistant", "tool", "look_up", "run", "f", 0.5,
        '{"temperature":0.5}', max(0, len(expected) - MOST_PLAIN),
    }, texts  # fmt: skip


def test_parameters_are_what_is_neither_message_nor_tool() -> None:
    """All with content, the known ones without; a long one is left out."""
    fields = {"input": "x", "model": "m", "top_p": 1, "metadata": {"a": "b"}, "reasoning": {}}
    fields["user"] = "u" * 2000
    with_content = told("responses", fields)["llm.invocation_parameters"]
    assert json.loads(with_content) == {"top_p": 1, "metadata": {"a": "b"}, "reasoning": {}}
    without = told("responses", fields, content=False)["llm.invocation_parameters"]
    assert json.loads(without) == {"top_p": 1}


def test_tools_have_their_names_and_with_content_their_schema() -> None:
    """Functions of both shapes, and built-in tools by their type."""
    chat = {"type": "function", "function": {"name": "g", "parameters": {}}}
    given = {"tools": [TOOL, chat, {"type": "web_search"}]}
    found = told("responses", given)
    names = [found[f"llm.tools.{place}.tool.name"] for place in range(3)]
    assert names == ["look_up", "g", "web_search"]
    assert json.loads(found["llm.tools.0.tool.json_schema"]) == TOOL
    plain = told("responses", given, content=False)
    assert {key for key in plain if "tools" in key} == {
        f"llm.tools.{place}.tool.name" for place in range(3)
    }


def test_lists_of_spans_show_what_was_asked_and_answered() -> None:
    """The newest message's text and the answer's, with content alone."""
    body = json.dumps({"status": "completed", "output": [DONE_ITEM]}).encode()
    fields = {"input": [{"role": "user", "content": "old"}, {"role": "user", "content": "new"}]}
    found = told("responses", fields, body)
    assert (found["input.value"], found["output.value"]) == ("new", "one\ntwo")
    assert (
        not {"input.value", "output.value"} & told("responses", fields, body, content=False).keys()
    )


def test_embeddings_have_texts_of_their_own() -> None:
    """An embedding's input is no message."""
    found = told("embeddings", {"input": ["a", "b", 7], "dimensions": 5})
    assert found == {
        "embedding.invocation_parameters": '{"dimensions":5}',
        "embedding.embeddings.0.embedding.text": "a",
        "embedding.embeddings.1.embedding.text": "b",
    }
    assert "embedding.embeddings" not in str(told("embeddings", {"input": "a"}, content=False))


def test_the_newest_of_many_messages_are_told() -> None:
    """A long conversation is told from its end, and how much is not is said."""
    many = [{"role": "user", "content": str(n)} for n in range(MOST_MESSAGES + 5)]
    found = told("chat", {"messages": many})
    assert [m["content"] for m in asked(found)] == [str(n) for n in range(5, MOST_MESSAGES + 5)]
    assert found["aiproxy.input_messages.omitted"] == 5


def test_a_long_text_is_cut() -> None:
    """One text has a bound."""
    found = told("responses", {"input": "x" * (MOST_TEXT + 1)})
    assert asked(found) == [{"role": "user", "content": "x" * MOST_TEXT}]
    assert found["aiproxy.content.cut"] is True
    assert "aiproxy.content.cut" not in told("responses", {"input": "x"})


def test_what_was_not_kept_is_said() -> None:
    """A request that is larger than what is kept says that it is not whole."""
    found = told("responses", {"input": "x" * 2**20})
    assert asked(found) == []
    assert found["aiproxy.content.cut"] is True


# -- answers

DONE_ITEM = {"type": "message", "role": "assistant", "content": [
    {"type": "output_text", "text": "one", "annotations": []},
    {"type": "output_text", "text": "two", "annotations": []},
]}  # fmt: skip


def events(*given: dict[str, Any]) -> bytes:
    """Return a stream."""
    return b"".join(sse(each) for each in given)


def delta(output: int, content: int, text: str) -> dict[str, Any]:
    """Return a piece of text."""
    kind = "response.output_text.delta"
    return {"type": kind, "output_index": output, "content_index": content, "delta": text}


def test_an_answer_is_told_part_by_part() -> None:
    """Parts of one message are not merged, and its finished item counts, not its pieces."""
    body = events(
        delta(0, 0, "o"),
        {"type": "response.output_item.done", "output_index": 0, "item": DONE_ITEM},
        {"type": "response.completed", "response": {"output": []}},
    )
    found = told("responses", {"input": "x"}, body, streamed=True)
    expected = [{"role": "assistant"} | parts(("text", "one"), ("text", "two"))]
    assert answered(found) == expected
    whole = json.dumps({"status": "completed", "output": [DONE_ITEM]}).encode()
    assert answered(told("responses", {"input": "x"}, whole)) == expected


def test_an_answer_that_broke_off_is_told_as_far_as_it_came() -> None:
    """Pieces without an end are told by their places, half an event is not."""
    body = events(delta(0, 1, "sec"), delta(0, 0, "fir"), delta(0, 1, "ond"), delta(0, 0, "st"))
    found = told("responses", {"input": "x"}, body + b'data: {"type":"resp', streamed=True)
    assert answered(found) == [{"role": "assistant"} | parts(("text", "first"), ("text", "second"))]


def chunk(said: dict[str, Any], finish: str | None = None) -> bytes:
    """Return a chunk of a chat stream."""
    return sse({"choices": [{"index": 0, "delta": said, "finish_reason": finish}]})


CALL = {"index": 0, "id": "c1", "function": {"name": "f", "arguments": '{"a":1}'}}


@pytest.mark.parametrize(
    "end", [chunk({}, "tool_calls") + sse("[DONE]"), b""], ids=["whole", "cut"]
)
def test_an_answer_of_chat_completions_is_told(end: bytes) -> None:
    """By the reader of the bridge: text, then a call, whether or not the stream came to its end."""
    body = chunk({"content": "Hel"}) + chunk({"content": "lo"}) + chunk({"tool_calls": [CALL]})
    found = told("chat", {"messages": []}, body + end, streamed=True)
    assert answered(found) == [
        {"role": "assistant"} | parts(("text", "Hello")),
        {"role": "assistant"} | call("c1", "f", '{"a":1}'),
    ]


def test_an_answer_of_messages_is_told() -> None:
    """Thoughts, text and a call of one message."""
    body = {
        "type": "message",
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Hm", "signature": "s"},
            {"type": "text", "text": "Hello"},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
        ],
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }
    found = told("messages", {"messages": []}, json.dumps(body).encode())
    assert answered(found) == [
        {"role": "assistant"}
        | call("c1", "f", '{"a": 1}')
        | parts(("reasoning", "Hm"), ("text", "Hello")),
    ]


def test_what_no_bridge_can_tell_is_told() -> None:
    """Blocks of tools that run at the server, and all choices of a completion."""
    blocks = [
        {"type": "text", "text": "I look."},
        {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
        {"type": "text", "text": "Found."},
    ]
    body = json.dumps({"role": "assistant", "content": blocks}).encode()
    (message,) = answered(told("messages", {"messages": []}, body))
    texts = [value for key, value in message.items() if key.endswith(".text")]
    assert texts == ["I look.", "Found."]
    choices = [{"message": {"role": "assistant", "content": text}} for text in ("one", "two")]
    found = told("chat", {"messages": []}, json.dumps({"choices": choices}).encode())
    assert [each["content"] for each in answered(found)] == ["one", "two"]


def test_a_stream_that_no_bridge_can_tell_says_so() -> None:
    """As far as it goes, and that there is more."""
    start = {"type": "content_block_start", "index": 0}
    body = events(
        {"type": "message_start", "message": {"usage": {"input_tokens": 1}}},
        start | {"content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
        {"type": "content_block_stop", "index": 0},
        start | {"index": 1, "content_block": {"type": "server_tool_use", "id": "s1", "name": "x"}},
    )
    found = told("messages", {"messages": []}, body, streamed=True)
    assert answered(found) == [{"role": "assistant"} | parts(("text", "Hi"))]
    assert found["aiproxy.content.cut"] is True


@pytest.mark.parametrize(
    ("role", "told_as"), [("user", "user"), ("SECRET-TEXT", "other"), (7, "other")]
)
def test_a_role_is_no_way_for_a_text(role: Any, told_as: str) -> None:
    """Without contents a role is one of the APIs', and a call has no id."""
    message = {"role": role, "content": "x", "tool_call_id": SECRET}
    found = told("chat", {"messages": [message]}, content=False)
    assert asked(found) == [{"role": told_as}]


@pytest.mark.parametrize("value", [{"effort": SECRET}, SECRET * 4, [SECRET]])
def test_a_parameter_is_no_way_for_a_text(value: Any) -> None:
    """Without contents only numbers, booleans and words are told."""
    assert SECRET not in str(told("responses", {"service_tier": value}, content=False))


def test_a_field_that_takes_long_to_read_is_not_read() -> None:
    """A million empty objects would hold the interpreter's lock for long; that is said."""
    found = told("chat", {"messages": [{}] * (MOST_VALUES + 1)})
    assert asked(found) == []
    assert found["aiproxy.content.cut"] is True


def test_parameters_have_opentelemetrys_names_too() -> None:
    """The three names of an output maximum are one."""
    fields = {"temperature": 0.5, "top_p": 1, "max_tokens": 7, "stream": True}
    found = told("chat", {"messages": [], **fields}, content=False)
    named = {key: value for key, value in found.items() if key.startswith("gen_ai")}
    assert named == {
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.stream": True,
    }


@pytest.mark.parametrize("api", ["responses", "chat", "messages"])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("said", [b"", b"{", b"[]", b"data: x\n\n", b"\xff\xfe", b"data: {}\n\n"])
def test_garbage_is_no_error(api: str, said: bytes, streamed: bool) -> None:  # noqa: FBT001 - a table's column
    """Whatever the client was told, spans are made."""
    found = answered(told(api, {"input": "x"}, said, streamed=streamed))
    assert found in ([], [{"role": "assistant"}])
