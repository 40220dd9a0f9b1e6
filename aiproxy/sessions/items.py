"""Arrays of items as text: cut, joined and counted without changing a byte of an item."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
from msgspec import Raw

from aiproxy import jsontext
from aiproxy.jsontext import elements
from aiproxy.prompt_size import measure
from aiproxy.sessions.turn import Item
from aiproxy.usage import BYTES_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from aiproxy.sessions.turn import Found

__all__ = ["LONGEST_ID", "array", "elements", "identified", "ids_of", "item_id", "joined"]

_EMPTY = re.compile(rb"\[\s*\]")
LONGEST_ID = 256  # characters: an item with a longer one cannot be referred to


class _Identified(msgspec.Struct):
    id: str | None = None


_identified = msgspec.json.Decoder(list[_Identified])

_NONE = Raw(b"null")


class _Id(msgspec.Struct):
    id: Raw = _NONE


_id = msgspec.json.Decoder(_Id)


def joined(arrays: Iterable[bytes]) -> bytes:
    """One array of the elements of all; there is no space around them."""
    # Views, since a conversation may have megabytes.
    inner = [memoryview(array)[1:-1] for array in arrays if not _EMPTY.fullmatch(array)]
    return b"".join((b"[", b",".join(inner), b"]"))


def array(items: Iterable[bytes]) -> bytes:
    """An array of these items."""
    return b"".join((b"[", b",".join(items), b"]"))


def picked(arrays: Mapping[tuple[int, bool], bytes], found: Sequence[Found]) -> list[bytes]:
    """These items, of arrays by turn and whether it is the output; each of them is cut once."""
    cut = {place: elements(array) for place, array in arrays.items()}
    return [cut[each.turn, each.output][each.position] for each in found]


def identified(given: bytes, made: bytes) -> tuple[Item, ...]:
    """The items with an id, of the input and of the output of a turn."""
    return (*_with_ids(given, output=False), *_with_ids(made, output=True))


def ids_of(*arrays: bytes) -> set[str]:
    """The ids of all items in these."""
    return {
        item_id
        for array in arrays
        if b'"id"' in array or b"\\u" in array
        for item_id in _ids(array, elements(array))
        if item_id
    }


def _with_ids(array: bytes, *, output: bool) -> Iterable[Item]:
    if b'"id"' not in array and b"\\u" not in array:  # a letter of `id` may be an escape
        return
    whole = elements(array)
    for position, (item, item_id) in enumerate(zip(whole, _ids(array, whole), strict=True)):
        if item_id and len(item_id) <= LONGEST_ID:
            size = measure(b'{"input":[%b]}' % item)
            weight = size.text + size.media * BYTES_PER_TOKEN
            yield Item(item_id, output, position, len(item), weight)


def _ids(array: bytes, whole: list[bytes]) -> list[str | None]:
    try:
        return [item.id for item in _identified.decode(array)]
    except (msgspec.DecodeError, ValueError, RecursionError):
        return [item_id(item) for item in whole]


def item_id(item: bytes) -> str | None:
    """The id of one item, if it has one; of two the last one counts."""
    try:
        raw = _id.decode(item).id
    except msgspec.ValidationError:
        return None
    except (msgspec.DecodeError, ValueError, RecursionError):  # a lone surrogate
        raw = _masked_id(item)
    if bytes(raw)[:1] != b'"':
        return None
    try:
        return msgspec.json.decode(raw, type=str)
    except (msgspec.DecodeError, ValueError):  # it is in the id
        return None


def _masked_id(item: bytes) -> Raw:
    try:
        raw = _id.decode(jsontext.masked(item)).id
    except (msgspec.DecodeError, ValueError, RecursionError):
        return _NONE
    if b"\\u8" not in bytes(raw):
        return raw
    for key, start, end in reversed(jsontext.members(item)):  # it may have been masked itself
        if jsontext.key_text(key) == "id":
            return Raw(item[start:end])
    return _NONE
