"""What a request and its answer say, as OpenInference's attributes name it (extra `otel`).

Requests and answers of all APIs become messages alike: a role, parts of content, calls of tools.
Without contents spans hold roles, names of tools, and the parameters that say how an answer is to
be made; never a text. Sources: OpenInference, "Semantic Conventions"; OpenTelemetry, "Semantic
conventions for generative AI" (`gen_ai.request.*`); the API references.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msgspec import Raw
from openinference.semconv.trace import (
    EmbeddingAttributes,
    ImageAttributes,
    MessageAttributes,
    MessageContentAttributes,
    SpanAttributes,
    ToolAttributes,
    ToolCallAttributes,
)

from aiproxy.answered import said_in
from aiproxy.dialects import value_of
from aiproxy.kept import MESSAGES, PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from aiproxy.kept import Kept

    Told = Iterator[tuple[str, str | int | float | bool]]

MOST_MESSAGES, MOST_PLAIN = 128, 8  # the newest of a request; so many without contents
MOST_TOOLS = 128
MOST_PARTS = 64  # of a message: parts, and calls
MOST_TEXT = 32 * 1024  # characters of one text
MOST_NAME = 128  # characters of a name that the client made
MOST_PARAMETER = 1024  # bytes of one parameter
MOST_WORD = 32  # bytes of one without contents
MOST_VALUES = 20_000  # brackets in a field: one with more takes too long to read

OMITTED = "aiproxy.input_messages.omitted"  # how many older messages are not told
CUT = "aiproxy.content.cut"  # there was no room for all of the request or the answer

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_KINDS = {"input_image": "image", "image_url": "image", "image": "image"}
_TEXTS = ("text", "refusal", "thinking", "output", "input")  # where a part may have its text
_QUOTED = {name: json.dumps(name).encode() for name in PARAMETERS}
_REQUESTED = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "max_output_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "max_tokens": "gen_ai.request.max_tokens",
    "stream": "gen_ai.request.stream",
}


@dataclass(slots=True)
class _Message:
    role: str
    parts: list[tuple[str, str]] = field(default_factory=list)  # kind; text, or an address
    calls: list[tuple[str, str, str]] = field(default_factory=list)  # id, name, arguments
    call_id: str = ""  # whose result it is
    plain: bool = False  # its content is one text


class _Fields:
    """A request's body.

    Attributes:
        cut: something of it is not told.
    """

    def __init__(self, kept: Kept) -> None:
        self._fields: Mapping[str, bytes] = kept.fields
        self._content = kept.content
        self.cut = kept.cut

    def value(self, name: str) -> Any:
        """A field, decoded; None if there is none, or if that would take too long."""
        raw = self._fields.get(name)
        if raw is None:
            return None
        if raw.count(b"{") + raw.count(b"[") > MOST_VALUES:
            self.cut = True
            return None
        return value_of(Raw(raw))

    def parameters(self) -> Told:
        """What says how the answer is to be made: as one JSON object, and one by one."""
        named = []
        for name, raw in self._fields.items():
            if name in MESSAGES or not (self._content or _is_plain(name, raw)):
                continue
            if len(raw) > MOST_PARAMETER:
                self.cut = True
                continue
            named.append((_QUOTED.get(name) or json.dumps(name).encode()) + b":" + raw)
            if (known := _REQUESTED.get(name)) is not None:
                value = value_of(Raw(raw))
                if isinstance(value, (int, float)):
                    yield known, value
        if named:
            yield SpanAttributes.LLM_INVOCATION_PARAMETERS, (b"{%b}" % b",".join(named)).decode()


def _is_plain(name: str, raw: bytes) -> bool:
    """Whether a parameter is a number, a boolean or a word; what is longer may be any text."""
    return name in PARAMETERS and raw[:1] not in b"{[" and len(raw) <= MOST_WORD


def attributes(kept: Kept, *, answered: bool) -> Told:
    """All that a request's body and its answer say; `answered`: whether there was one."""
    fields = _Fields(kept)
    told: Told = iter(())
    if kept.api == "embeddings":
        told = _embedding(fields, content=kept.content)
    elif kept.api:
        told = _model(fields, kept, answered=answered)
    cut = False
    for key, value in told:
        cut = cut or (isinstance(value, str) and len(value) >= MOST_TEXT)
        yield key, value
    if cut or fields.cut:
        yield CUT, True


def _embedding(fields: _Fields, *, content: bool) -> Told:
    for key, value in fields.parameters():
        if key == SpanAttributes.LLM_INVOCATION_PARAMETERS:
            yield SpanAttributes.EMBEDDING_INVOCATION_PARAMETERS, value
    given = fields.value("input") if content else None
    for place, text in enumerate((given if isinstance(given, list) else [given])[:MOST_MESSAGES]):
        if isinstance(text, str):
            at = f"{SpanAttributes.EMBEDDING_EMBEDDINGS}.{place}."
            yield f"{at}{EmbeddingAttributes.EMBEDDING_TEXT}", text[:MOST_TEXT]


def _model(fields: _Fields, kept: Kept, *, answered: bool) -> Told:
    content = kept.content
    yield from fields.parameters()
    yield from _tools(fields.value("tools"), content=content)
    asked, omitted = _asked(fields, kept.api, MOST_MESSAGES if content else MOST_PLAIN)
    if omitted:
        yield OMITTED, omitted
    yield from _all_told(SpanAttributes.LLM_INPUT_MESSAGES, asked, content=content)
    if not content:
        answer = [_Message("assistant")] if answered else []
    else:
        items, whole = said_in(kept.api, kept.said, streamed=kept.streamed)
        answer = [message for item in items for message in _messages(item)]
        fields.cut = fields.cut or not whole or len(answer) > MOST_MESSAGES
    yield from _all_told(
        SpanAttributes.LLM_OUTPUT_MESSAGES, answer[:MOST_MESSAGES], content=content
    )
    if not content:
        return
    for key, messages in (
        (SpanAttributes.INPUT_VALUE, asked[-1:]),
        (SpanAttributes.OUTPUT_VALUE, answer),
    ):
        if text := _text(messages):  # what lists of spans show
            yield key, text


def _tools(tools: Any, *, content: bool) -> Told:
    for place, tool in enumerate(_objects(tools)[: MOST_TOOLS if content else MOST_PLAIN]):
        at = f"{SpanAttributes.LLM_TOOLS}.{place}."
        function = tool.get("function")
        name = (function if isinstance(function, dict) else tool).get("name") or tool.get("type")
        yield f"{at}{ToolAttributes.TOOL_NAME}", _name(name)
        if content and len(schema := json.dumps(tool)) <= MOST_TEXT:  # cut it is no JSON
            yield f"{at}{ToolAttributes.TOOL_JSON_SCHEMA}", schema


# -- messages


def _asked(fields: _Fields, api: str, most: int) -> tuple[list[_Message], int]:
    """The newest messages of a request, and how many older ones there are."""
    head = fields.value("instructions" if api == "responses" else "system")
    first = [] if head is None else [*_messages({"role": "system", "content": head})]
    given = fields.value("input" if api == "responses" else "messages")
    if isinstance(given, str):
        return [*first, _Message("user", [("text", given)], plain=True)], 0
    items = _objects(given)
    asked = [message for item in items[-most:] for message in _messages(item)]
    told = [*first, *asked][-most:]
    return told, max(0, len(items) - most) + len(first) + len(asked) - len(told)


def _messages(item: dict[str, Any]) -> Iterator[_Message]:
    """What one message or item says; results of tools within it are messages of their own."""
    kind = _name(item.get("type"))
    if kind.endswith("_output"):
        yield _result(item.get("call_id"), item.get("output"))
    elif not item.get("role"):
        yield _item(kind, item)
    else:
        message = _Message(
            _name(item["role"]) or "unknown", call_id=_name(item.get("tool_call_id"))
        )
        if isinstance(thought := item.get("reasoning_content"), str):
            message.parts.append(("reasoning", thought))
        results = _add(message, item.get("content"))
        if isinstance(refusal := item.get("refusal"), str):
            message.parts.append(("text", refusal))
        for call in _objects(item.get("tool_calls")):
            function = call.get("function") or call.get("custom")
            message.calls.append(_call(call.get("id"), function))
        if isinstance(item.get("function_call"), dict):  # of older clients
            message.calls.append(_call(None, item["function_call"]))
        yield from (_result(each.get("tool_use_id"), each.get("content")) for each in results)
        if message.parts or message.calls or not results:
            yield message


def _result(call_id: Any, content: Any) -> _Message:
    """The result of a call."""
    message = _Message("tool", call_id=_name(call_id))
    _add(message, content)
    return message


def _item(kind: str, item: dict[str, Any]) -> _Message:
    """An item that is no message: a call, reasoning, a search, an image, ..."""
    message = _Message("assistant")
    if isinstance(item.get("name"), str):
        message.calls.append(_call(item.get("call_id"), item))
        return message
    _add(message, item.get("summary") or item.get("content"), kind=kind)
    message.parts = message.parts or [(kind, "")]
    return message


def _add(message: _Message, content: Any, kind: str = "") -> list[dict[str, Any]]:
    """Add content; the results of tools in it (of the Messages API) are returned."""
    if isinstance(content, str):
        message.plain = not message.parts and not kind
        message.parts.append((kind or "text", content))
        return []
    results = []
    for part in _objects(content):
        named = _name(part.get("type"))
        if named == "tool_result":
            results.append(part)
        elif named == "tool_use":
            message.calls.append(_call(part.get("id"), part))
        elif named in _KINDS:
            message.parts.append((_KINDS[named], _address(part)))
        else:
            text = next((part[at] for at in _TEXTS if isinstance(part.get(at), str)), "")
            known = named in ("input_text", "output_text", "text", "refusal", "")
            shown = "reasoning" if named == "thinking" else "text" if known else named
            message.parts.append((kind or shown, text))
    return results


def _call(call_id: Any, called: Any) -> tuple[str, str, str]:
    """A call of a tool: whose name and arguments (or input) `called` has."""
    function = called if isinstance(called, dict) else {}
    arguments = function.get("arguments", function.get("input"))
    if arguments is not None and not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    return _name(call_id), _name(function.get("name")), arguments or ""


def _address(part: dict[str, Any]) -> str:
    """Where an image is; of one that is in the request itself only what it is."""
    given = part.get("image_url") or part.get("source") or ""
    if isinstance(given, dict):
        given = given.get("url") or f"data:{_name(given.get('media_type'))};base64,"
    text = given if isinstance(given, str) else ""
    if text.startswith(("http://", "https://")) or not text:
        return text
    return f"{text[:MOST_NAME].partition(',')[0]},..." if text.startswith("data:") else "..."


def _name(value: Any) -> str:
    return value[:MOST_NAME] if isinstance(value, str) else ""


def _objects(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


# -- as attributes


def _all_told(prefix: str, messages: Iterable[_Message], *, content: bool) -> Told:
    for place, message in enumerate(messages):
        at = f"{prefix}.{place}."
        if content:
            yield from _told(at, message)
            continue
        role = message.role if message.role in _ROLES else "other"
        yield f"{at}{MessageAttributes.MESSAGE_ROLE}", role
        for number, (_, name, _) in enumerate(message.calls[:MOST_PLAIN]):
            call = f"{at}{MessageAttributes.MESSAGE_TOOL_CALLS}.{number}."
            yield f"{call}{ToolCallAttributes.TOOL_CALL_FUNCTION_NAME}", name


def _text(messages: list[_Message]) -> str:
    """The texts of messages, as they are read."""
    texts = [text for each in messages for kind, text in each.parts if kind == "text"]
    return "\n".join(texts)[:MOST_TEXT]


def _told(at: str, message: _Message) -> Told:
    yield f"{at}{MessageAttributes.MESSAGE_ROLE}", message.role
    if message.call_id:
        yield f"{at}{MessageAttributes.MESSAGE_TOOL_CALL_ID}", message.call_id
    for place, (call_id, name, arguments) in enumerate(message.calls[:MOST_PARTS]):
        call = f"{at}{MessageAttributes.MESSAGE_TOOL_CALLS}.{place}."
        yield f"{call}{ToolCallAttributes.TOOL_CALL_FUNCTION_NAME}", name
        if call_id:
            yield f"{call}{ToolCallAttributes.TOOL_CALL_ID}", call_id
        named = ToolCallAttributes.TOOL_CALL_FUNCTION_ARGUMENTS_JSON
        yield f"{call}{named}", arguments[:MOST_TEXT]
    if message.plain and len(message.parts) == 1:
        yield f"{at}{MessageAttributes.MESSAGE_CONTENT}", message.parts[0][1][:MOST_TEXT]
        return
    for place, (kind, text) in enumerate(message.parts[:MOST_PARTS]):
        part = f"{at}{MessageAttributes.MESSAGE_CONTENTS}.{place}."
        yield f"{part}{MessageContentAttributes.MESSAGE_CONTENT_TYPE}", kind
        if kind == "image":
            named = f"{MessageContentAttributes.MESSAGE_CONTENT_IMAGE}.{ImageAttributes.IMAGE_URL}"
            yield f"{part}{named}", text[:MOST_TEXT]
        elif text:
            yield f"{part}{MessageContentAttributes.MESSAGE_CONTENT_TEXT}", text[:MOST_TEXT]
