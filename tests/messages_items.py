"""Items of an input, and the blocks that messages have in their place; tools of both."""

import base64
from typing import Any

Fields = dict[str, Any]

PNG = "iVBORw0KGgo="
PDF = base64.b64encode(b"%PDF-1.7 scripted").decode()
NOTES = "Notes \u2013 eine Zeile\nund noch eine"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
EMPTY_SCHEMA = {"type": "object", "properties": {}}
INPUT_SCHEMA = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
F = {"type": "function", "name": "f", "description": "does f", "parameters": SCHEMA, "strict": True}
G = {"type": "function", "name": "g", "parameters": None, "strict": None}
FREE = {"type": "custom", "name": "free", "description": "takes text"}
SENT_F = {"name": "f", "description": "does f", "input_schema": SCHEMA, "strict": True}
SENT_G = {"name": "g", "input_schema": EMPTY_SCHEMA}
SENT_FREE = {"name": "free", "description": "takes text", "input_schema": INPUT_SCHEMA}
BOTH: Fields = {"tools": [F, G]}
SENT_BOTH: Fields = {"tools": [SENT_F, SENT_G]}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: /a/"}
NAMESPACE = {"type": "namespace", "name": "ns", "description": "d", "tools": [F]}
MCP = {"type": "mcp", "server_label": "srv", "server_url": "https://example.org"}
SEARCH = {"type": "web_search"}


def said(value: str) -> Fields:
    """Return a block of text."""
    return {"type": "text", "text": value}


def user(*blocks: Any) -> Fields:
    """Return a message of the user; a string stands for a block of text."""
    return _message("user", blocks)


def assistant(*blocks: Any) -> Fields:
    """Return a message of the assistant."""
    return _message("assistant", blocks)


def _message(role: str, blocks: Any) -> Fields:
    return {"role": role, "content": [said(b) if isinstance(b, str) else b for b in blocks]}


def item(role: str, content: Any) -> Fields:
    """Return an item of the input; as many clients do, without its type."""
    return {"role": role, "content": content}


def told(role: str, content: Any) -> Fields:
    """Return the same with its type, and an id."""
    return {"type": "message", "id": f"msg_{role}", "role": role, "content": content}


def part(kind: str, **members: Any) -> Fields:
    """Return one part of a content."""
    return {"type": kind, **members}


def call(name: str, arguments: str, call_id: str = "call_1", **members: Any) -> Fields:
    """Return a function call."""
    kind = "function_call"
    return {"type": kind, "call_id": call_id, "name": name, "arguments": arguments, **members}


def output(value: Any, call_id: str = "call_1", kind: str = "function_call_output") -> Fields:
    """Return the output of a call."""
    return {"type": kind, "call_id": call_id, "output": value}


def used(name: str, given: Any, call_id: str = "call_1") -> Fields:
    """Return the block of a call."""
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def result(*blocks: Any, call_id: str = "call_1") -> Fields:
    """Return the block of its result."""
    content = [said(b) if isinstance(b, str) else b for b in blocks]
    return {"type": "tool_result", "tool_use_id": call_id, "content": content}


def reasoning(encrypted: str | None, *summary: str, **members: Any) -> Fields:
    """Return a reasoning item."""
    parts = [{"type": "summary_text", "text": each} for each in summary]
    whole: Fields = {"type": "reasoning", "id": "rs_1", "summary": parts, **members}
    return whole if encrypted is None else {**whole, "encrypted_content": encrypted}


def image(url: str, **members: Any) -> Fields:
    """Return a part with an image."""
    return part("input_image", image_url=url, **members)


def source(kind: str, **members: Any) -> Fields:
    """Return an image block."""
    return {"type": "image", "source": {"type": kind, **members}}


SENT_PNG = source("base64", media_type="image/png", data=PNG)
HI = [user("hi")]
