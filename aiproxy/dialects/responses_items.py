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
from aiproxy.dialects import elements_of, members_of, value_of

if TYPE_CHECKING:
    from collections.abc import Sequence

ENCRYPTED = "reasoning.encrypted_content"

# What an item has that says nothing: with nothing else it stands for what its id names.
_NAMES = frozenset({"id", "type", "status", "role"})
_EMPTY = (b"null", b"[]", b"{}", b'""')
_SHORT = 64  # bytes, white space included


def as_array(given: bytes | None) -> bytes:
    """An `input` as an array of items; a text is a message of the user."""
    if given is None:
        return b"[]"
    if given[:1] == b"[":
        return given
    return b'[{"type":"message","role":"user","content":%b}]' % given


class Reference(NamedTuple):
    """An item that stands for another one, by its id."""

    position: int
    id: str | None  # None: it names none


def references(given: bytes | None) -> list[Reference]:
    """The references in an `input`: whatever any reader of it could take for one."""
    if given is None or given[:1] != b"[":
        return []
    return [
        Reference(position, _text(value_of((members_of(bytes(raw)) or {}).get("id"))))
        for position, raw in enumerate(elements_of(given))
        if is_reference(bytes(raw))
    ]


def is_reference(item: bytes) -> bool:
    """Whether any reader of an item could take it for a reference."""
    if b"item_reference" not in item and b"\\u" not in item:
        members = members_of(item) or {"role": Raw()}
        return "id" in members and not ("role" in members or value_of(members.get("type")))
    kinds: list[object] = []
    names = set()
    for key, start, end in jsontext.members(item):
        name = jsontext.key_text(key)
        names.add(name)
        if name == "type":  # which of two counts is its reader's choice
            kinds.append(value_of(Raw(item[start:end])))
    if "item_reference" in kinds:
        return True
    # `type` may be left out (API reference, "Item reference"); a message then has a role.
    return not any(kinds) and "role" not in names and "id" in names


def reference(item_id: str) -> bytes:
    """A reference that every reader takes for the same."""
    return msgspec.json.encode({"type": "item_reference", "id": item_id})


def needs_lookup(given: bytes | None) -> list[str]:
    """The ids in an `input`, besides references, that the upstream may look up.

    An image that was generated, a search or reasoning may be sent back by its id alone; then who
    knows the id of another client's item would get at it.
    """
    if given is None or given[:1] != b"[" or (b'"id"' not in given and b"\\u" not in given):
        return []
    found = []
    for raw in elements_of(given):
        item = members_of(bytes(raw)) or {}
        item_id = _text(value_of(item.get("id")))
        if item_id is not None and _is_bare(item) and not is_reference(bytes(raw)):
            found.append(item_id)
    return found


def _is_bare(item: dict[str, Raw]) -> bool:
    """Whether an item says nothing itself; a summary does not say what was thought."""
    says = {name for name, value in item.items() if not _is_empty(bytes(value))}
    if value_of(item.get("type")) == "reasoning":
        return not says & {"encrypted_content", "content"}
    return says <= _NAMES


def _is_empty(value: bytes) -> bool:
    return len(value) <= _SHORT and b"".join(value.split()) in _EMPTY


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
    for raw, kind in zip(elements_of(array), kinds, strict=True):
        stays = same_origin if kind.encrypted_content else plain
        if kind.type != "reasoning" or stays:
            kept.append(bytes(raw).strip())
        elif kind.encrypted_content:
            foreign += 1
    if len(kept) == len(kinds):
        return Replayed(array, 0)
    return Replayed(b"".join((b"[", b",".join(kept), b"]")), foreign)


def _kinds_of(array: bytes) -> Sequence[_Kind]:
    try:
        return _kinds.decode(array)
    except (msgspec.DecodeError, ValueError, RecursionError):  # a lone surrogate
        items = (members_of(bytes(raw)) or {} for raw in elements_of(array))
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
    for position, raw in enumerate(elements_of(array)):
        item = bytes(raw).strip()
        members = members_of(item) or {}
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
