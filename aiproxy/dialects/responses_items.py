"""Items of the Responses API, as they stand in an `input` (API reference, "Create a response").

What an upstream cannot take is known here: references to items that it does not hold, reasoning
that it cannot read.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import Raw

from aiproxy import jsontext
from aiproxy.dialects import members_of, value_of

if TYPE_CHECKING:
    from collections.abc import Sequence

ENCRYPTED = "reasoning.encrypted_content"


def as_array(given: bytes | None) -> bytes:
    """An `input` as an array of items; a text is a message of the user."""
    if given is None:
        return b"[]"
    if given[:1] == b"[":
        return given
    return b'[{"type":"message","role":"user","content":%b}]' % given


def reference(item_id: str) -> bytes:
    """A reference that every reader takes for the same."""
    return msgspec.json.encode({"type": "item_reference", "id": item_id})


class _Kind(msgspec.Struct):
    type: Any = None
    encrypted_content: Any = None


_kinds = msgspec.json.Decoder(list[_Kind])


class Replayed(NamedTuple):
    """What of some items can be sent to an upstream again."""

    items: bytes  # an array
    foreign: int  # reasoning that another upstream encrypted, left out


def may_reason(*arrays: bytes) -> bool:
    """Whether there may be reasoning among these items, without reading them."""
    return any(b'"reasoning"' in array or b"\\u" in array for array in arrays)


def replayed(array: bytes, *, same_origin: bool, plain: bool = False) -> Replayed:
    """Leave out the reasoning that an upstream cannot read.

    An upstream that keeps nothing (`store: false`) takes reasoning only with its encrypted content,
    and only from itself.

    Args:
        array: of items.
        same_origin: the upstream is the one that made them.
        plain: reasoning that is not encrypted may stay.
    """
    if not may_reason(array):
        return Replayed(array, 0)
    kinds = _kinds_of(array)
    if not any(kind.type == "reasoning" for kind in kinds):
        return Replayed(array, 0)
    kept, foreign = [], 0
    for item, kind in zip(jsontext.elements(array), kinds, strict=True):
        stays = same_origin if kind.encrypted_content else plain
        if kind.type != "reasoning" or stays:
            kept.append(item)
        elif kind.encrypted_content:
            foreign += 1
    if len(kept) == len(kinds):
        return Replayed(array, 0)
    return Replayed(b"".join((b"[", b",".join(kept), b"]")), foreign)


def _kinds_of(array: bytes) -> Sequence[_Kind]:
    try:
        return _kinds.decode(array)
    except (msgspec.DecodeError, ValueError, RecursionError):  # a lone surrogate
        items = (members_of(each) or {} for each in jsontext.elements(array))
        return [
            _Kind(value_of(item.get("type")), value_of(item.get("encrypted_content")))
            for item in items
        ]


def included(given: bytes | None) -> list[Any]:
    """What an `include` asks for; empty where it is no list."""
    value = value_of(None if given is None else Raw(given))
    return value if isinstance(value, list) else []


# -- as they are listed (API reference, "List input items")


def listed_id(response_id: str, position: int, kind: str) -> str:
    """An id for an item that came without one: the same at every listing."""
    prefix = "msg" if kind == "message" else "item"
    return f"{prefix}_{response_id.removeprefix('resp_')}_{position}"


def listed(array: bytes, response_id: str) -> list[tuple[str, bytes]]:
    """The items of an input, as a client is shown them, with their ids."""
    found = []
    for position, each in enumerate(jsontext.elements(array)):
        item, members = each, members_of(each) or {}
        kind = _text(value_of(members.get("type"))) or "message"
        item_id = _text(value_of(members.get("id")))
        add: dict[str, bytes] = {}
        if item_id is None:
            item_id = listed_id(response_id, position, kind)
            add["id"] = json.dumps(item_id).encode()
        if kind == "message":
            add["type"] = b'"message"'
            content = members.get("content")
            if content is not None and bytes(content)[:1] == b'"':
                own = value_of(members.get("role")) == "assistant"
                part = b"output_text" if own else b"input_text"
                add["content"] = b'[{"type":"%b","text":%b}]' % (part, bytes(content))
        if add:
            known = {name: bytes(value) for name, value in members.items()}
            item = jsontext.amend(item, known, add, add=("id", "type"))
        found.append((item_id, item))
    return found


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
