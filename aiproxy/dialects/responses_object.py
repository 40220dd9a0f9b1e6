"""The response object (API reference, "The response object"): what of it is ours, what is kept.

Of an upstream's object only the members that are ours change; every other byte is its own.
"""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import Raw

from aiproxy import jsontext
from aiproxy.dialects import members_of, value_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiproxy.dialects import Asked
    from aiproxy.dialects.responses_output import Output
    from aiproxy.envelope import Envelope

# Fields of the request that the response object repeats.
_ECHO = (
    "previous_response_id", "instructions", "tools", "tool_choice", "truncation",
    "parallel_tool_calls", "text", "top_p", "presence_penalty", "frequency_penalty",
    "top_logprobs", "temperature", "reasoning", "max_output_tokens", "max_tool_calls", "store",
    "service_tier", "metadata", "safety_identifier", "prompt_cache_key",
)  # fmt: skip


class Produced(NamedTuple):
    """A whole answer as it is kept: the response object around its output.

    Attributes:
        id: of the response, as it says; None: it says none.
        before, output, after: together the response object, as the client gets it; the output is
            an array.
    """

    id: str | None
    before: bytes
    output: bytes
    after: bytes


def amended(response: bytes, members: dict[str, Raw], asked: Asked) -> bytes:
    """The response object with what is ours in it."""
    own = asked.own
    if asked.renamed:
        own = {**own, "model": msgspec.json.encode(asked.model)}
    if not own:
        return response
    known = {name: bytes(members[name]) for name in own if name in members}
    # `model` is restored where it is, and not added where a server leaves it out.
    return jsontext.amend(response, known, own, add=asked.own)


def with_response(data: bytes, event: dict[str, Raw], ours: bytes) -> bytes:
    """An event's data with another response object; of two, as of one, in the place of each."""
    theirs = bytes(event["response"])
    if data.count(theirs) == 1 and jsontext.distinct(data, event):
        return data.replace(theirs, ours)
    return jsontext.replace(data, (), {"response": ours})


def produced(response: bytes, gathered: Output | None = None) -> Produced:
    """What is kept of an answer.

    Args:
        response: its object, as the client gets it.
        gathered: what passed of its output before, for an object whose own is empty.
    """
    members = members_of(response) or {}
    raw = members.pop("output", None)
    output = b"" if raw is None else bytes(raw)
    found = jsontext.span(response, "output", output) if output else None
    if found is not None:
        before, after = response[: found[0]], response[found[1] :]
    else:  # it has none, or another member that looks like it
        # By json, since a name may be one that cannot be encoded.
        rest = [b",%b:%b" % (json.dumps(name).encode(), value) for name, value in members.items()]
        before, after = b'{"output":', b"".join((*rest, b"}"))
    array = output.strip()
    if array[:1] != b"[" or not array[1:-1].strip():
        items = [] if gathered is None else gathered.items()
        array = b"".join((b"[", b",".join(items), b"]"))
    response_id = value_of(members.get("id"))
    return Produced(
        response_id if isinstance(response_id, str) else None,
        before,
        array,
        after,
    )


def only_ids(response_id: bytes, gathered: Output) -> Produced:
    """Of an answer whose object is too large to be read: its id (as JSON), and its items."""
    output = b"".join((b"[", b",".join(gathered.items()), b"]"))
    return Produced(value_of(Raw(response_id)), b"", output, b"")


def on_one_line(raw: bytes | Raw) -> Raw:
    """A JSON value fit for one data line: its line ends can only stand between tokens."""
    return Raw(bytes(raw).replace(b"\r", b" ").replace(b"\n", b" "))


def skeleton(asked: Asked, now: int) -> dict[str, Any]:
    """A response object with every field of the specification, nothing produced yet."""
    response: dict[str, Any] = {
        "id": f"resp_{secrets.token_urlsafe(24)}",
        "object": "response",
        "created_at": now,
        "completed_at": None,
        "status": "in_progress",
        "incomplete_details": None,
        "model": asked.model,
        "previous_response_id": None,
        "instructions": None,
        "output": [],
        "error": None,
        "tools": [],
        "tool_choice": "auto",
        "truncation": "disabled",
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}},
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_logprobs": 0,
        "temperature": 1.0,
        "reasoning": None,
        "usage": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "store": True,
        "background": False,
        "service_tier": "default",
        "metadata": {},
        "safety_identifier": None,
        "prompt_cache_key": None,
    }
    if asked.echo is not None:
        response.update(asked.echo)
    elif asked.envelope is not None:
        response.update(repeated(asked.envelope))
    return response


def repeated(envelope: Envelope) -> dict[str, Raw]:
    """What a response repeats of its request, as JSON on one line.

    It may be large: whoever reads a body beside the event loop makes it there, too.
    """
    return {name: _repeated(name, raw) for name in _ECHO if (raw := envelope.raw(name)) is not None}


def _repeated(name: str, raw: bytes) -> Raw:
    """A field of the request as the response has it: what was left out there is told here."""
    complete = COMPLETE.get(name)
    value = None if complete is None else value_of(Raw(raw))
    if complete is None or value is None:
        return on_one_line(raw)
    return Raw(msgspec.json.encode(complete(value)))


def _tools(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [
        {**_FUNCTION, **each} if isinstance(each, dict) and each.get("type") == "function" else each
        for each in value
    ]


def _text_options(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    form = value.get("format") or {"type": "text"}
    if isinstance(form, dict) and form.get("type") == "json_schema":
        form = {**_SCHEMA, **{name: each for name, each in form.items() if each is not None}}
    return {**value, "format": form}


def _reasoning(value: Any) -> Any:
    return {"effort": None, "summary": None, **value} if isinstance(value, dict) else value


_FUNCTION = {"description": None, "parameters": None, "strict": None}
_SCHEMA = {"description": None, "schema": None, "strict": False}
COMPLETE: dict[str, Callable[[Any], Any]] = {
    "tools": _tools,
    "text": _text_options,
    "reasoning": _reasoning,
}
