"""What a request and its answer say, as OpenInference's attributes name it (extra `otel`).

Requests and answers of all APIs become messages alike: a role, parts of content, calls of tools.
Without `content` spans hold roles, names of tools, and the parameters that say how an answer is to
be made; never a text. Sources: OpenInference, "Semantic Conventions"; the API references.
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

from aiproxy.answered import output_of
from aiproxy.dialects import value_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from aiproxy.trace import Trace

MOST_MESSAGES = 128  # the newest of a request
MOST_TOOLS = 128
MOST_PARTS = 64  # of a message: parts, and calls
MOST_TEXT = 32 * 1024  # characters of one text
MOST_NAME = 128  # characters of a name that the client made
MOST_PARAMETER = 1024  # bytes of one parameter

OMITTED = "aiproxy.input_messages.omitted"  # how many older messages are not told
CUT = "aiproxy.content.cut"  # there was no room for all of the request or the answer

# What says how an answer is to be made, and is no text of the client's.
_PARAMETERS = {
    name: b'"%b":' % name.encode()
    for name in (
        "background", "dimensions", "encoding_format", "frequency_penalty", "include", "logprobs",
        "max_completion_tokens", "max_output_tokens", "max_tokens", "max_tool_calls", "modalities",
        "n", "parallel_tool_calls", "presence_penalty", "prompt_cache_retention", "reasoning",
        "reasoning_effort", "seed", "service_tier", "store", "stream", "stream_options",
        "temperature", "thinking", "top_k", "top_logprobs", "top_p", "truncation", "verbosity",
    )
}  # fmt: skip
_TOLD_AS_MESSAGES = frozenset({"input", "instructions", "messages", "model", "system", "tools"})
_KINDS = {"input_image": "image", "image_url": "image", "image": "image"}
_TEXTS = ("text", "refusal", "thinking", "output", "input")  # where a part may have its text


@dataclass(slots=True)
class _Message:
    role: str
    parts: list[tuple[str, str]] = field(default_factory=list)  # kind; text, or an address
    calls: list[tuple[str, str, str]] = field(default_factory=list)  # id, name, arguments
    call_id: str = ""  # whose result it is
    plain: bool = False  # its content is one text


def attributes(trace: Trace, *, answered: bool) -> Iterator[tuple[str, str | int | bool]]:
    """All that a request's body and its answer say; `answered`: whether there was one."""
    told: Iterable[tuple[str, str | int]] = ()
    if trace.api == "embeddings":
        told = _embedding(trace)
    elif trace.api:
        told = _model(trace, answered=answered)
    cut = trace.cut
    for key, value in told:
        cut = cut or (isinstance(value, str) and len(value) >= MOST_TEXT)
        yield key, value
    if cut:
        yield CUT, True


def _embedding(trace: Trace) -> Iterator[tuple[str, str]]:
    if parameters := _parameters(trace.fields, content=trace.content):
        yield SpanAttributes.EMBEDDING_INVOCATION_PARAMETERS, parameters
    given = value_of(_raw(trace.fields, "input")) if trace.content else None
    for place, text in enumerate((given if isinstance(given, list) else [given])[:MOST_MESSAGES]):
        if isinstance(text, str):
            at = f"{SpanAttributes.EMBEDDING_EMBEDDINGS}.{place}."
            yield f"{at}{EmbeddingAttributes.EMBEDDING_TEXT}", text[:MOST_TEXT]


def _model(trace: Trace, *, answered: bool) -> Iterator[tuple[str, str | int]]:
    fields, content = trace.fields, trace.content
    if parameters := _parameters(fields, content=content):
        yield SpanAttributes.LLM_INVOCATION_PARAMETERS, parameters
    yield from _tools(value_of(_raw(fields, "tools")), content=content)
    asked = [*_asked(fields)]
    if len(asked) > MOST_MESSAGES:
        yield OMITTED, len(asked) - MOST_MESSAGES
    prefix = SpanAttributes.LLM_INPUT_MESSAGES
    yield from _all_told(prefix, asked[-MOST_MESSAGES:], content=content)
    answer = _answer(trace)[:MOST_MESSAGES] if answered or trace.said else []
    yield from _all_told(SpanAttributes.LLM_OUTPUT_MESSAGES, answer, content=content)
    if content:  # what lists of spans show
        yield SpanAttributes.INPUT_VALUE, _text(asked[-1:])
        yield SpanAttributes.OUTPUT_VALUE, _text(answer)


def _raw(fields: Mapping[str, bytes], name: str) -> Raw | None:
    value = fields.get(name)
    return None if value is None else Raw(value)


def _parameters(fields: Mapping[str, bytes], *, content: bool) -> str:
    """A JSON object of the parameters; empty without any."""
    named = []
    for name, value in fields.items():
        quoted = _PARAMETERS.get(name)
        if quoted is None:
            if not content or name in _TOLD_AS_MESSAGES:
                continue
            quoted = json.dumps(name).encode() + b":"
        if len(value) <= MOST_PARAMETER:
            named.append(quoted + value)
    return (b"{%b}" % b",".join(named)).decode() if named else ""


def _tools(tools: Any, *, content: bool) -> Iterator[tuple[str, str]]:
    for place, tool in enumerate(_objects(tools)[:MOST_TOOLS]):
        at = f"{SpanAttributes.LLM_TOOLS}.{place}."
        function = tool.get("function")
        name = (function if isinstance(function, dict) else tool).get("name") or tool.get("type")
        yield f"{at}{ToolAttributes.TOOL_NAME}", str(name)[:MOST_NAME]
        if content and len(schema := json.dumps(tool)) <= MOST_TEXT:  # cut it is no JSON
            yield f"{at}{ToolAttributes.TOOL_JSON_SCHEMA}", schema


# -- messages


def _asked(fields: Mapping[str, bytes]) -> Iterator[_Message]:
    """The messages of a request, whichever API it is of."""
    for name in ("instructions", "system"):
        if (given := value_of(_raw(fields, name))) is not None:
            yield from _messages({"role": "system", "content": given})
    given = value_of(_raw(fields, "input"))
    if isinstance(given, str):
        yield _Message("user", [("text", given)], plain=True)
    for item in _objects(given if given is not None else value_of(_raw(fields, "messages"))):
        yield from _messages(item)


def _answer(trace: Trace) -> list[_Message]:
    """The messages of an answer: its items, or without `content` that there was one."""
    if not trace.content:
        return [_Message("assistant")]
    items = output_of(trace.api, trace.said, streamed=trace.streamed)
    return [message for item in items for message in _messages(item)]


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
    return text.partition(",")[0] + ",..." if text.startswith("data:") else text


def _name(value: Any) -> str:
    return value[:MOST_NAME] if isinstance(value, str) else ""


def _objects(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


# -- as attributes


def _all_told(prefix: str, messages: list[_Message], *, content: bool) -> Iterator[tuple[str, str]]:
    for place, message in enumerate(messages):
        yield from _told(f"{prefix}.{place}.", message, content=content)


def _text(messages: list[_Message]) -> str:
    """The texts of messages, as they are read."""
    texts = [text for each in messages for kind, text in each.parts if kind == "text"]
    return "\n".join(texts)[:MOST_TEXT]


def _told(at: str, message: _Message, *, content: bool) -> Iterator[tuple[str, str]]:
    yield f"{at}{MessageAttributes.MESSAGE_ROLE}", message.role
    if message.call_id:
        yield f"{at}{MessageAttributes.MESSAGE_TOOL_CALL_ID}", message.call_id
    for place, (call_id, name, arguments) in enumerate(message.calls[:MOST_PARTS]):
        call = f"{at}{MessageAttributes.MESSAGE_TOOL_CALLS}.{place}."
        yield f"{call}{ToolCallAttributes.TOOL_CALL_FUNCTION_NAME}", name
        if call_id:
            yield f"{call}{ToolCallAttributes.TOOL_CALL_ID}", call_id
        if content:
            named = ToolCallAttributes.TOOL_CALL_FUNCTION_ARGUMENTS_JSON
            yield f"{call}{named}", arguments[:MOST_TEXT]
    if not content:
        return
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
