"""Arrays of items as text: cut, joined and counted without changing a byte of an item."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
from msgspec import Raw

from aiproxy import jsontext
from aiproxy.prompt_size import measure
from aiproxy.sessions.turn import Item
from aiproxy.usage import BYTES_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from aiproxy.sessions.turn import Found


_EMPTY = re.compile(rb"\[\s*\]")
LONGEST_ID = 256  # characters: an item with a longer one cannot be referred to


class _Identified(msgspec.Struct):
    id: str | None = None


_raw = msgspec.json.Decoder(list[Raw])
_identified = msgspec.json.Decoder(list[_Identified])


def elements(array: bytes) -> list[bytes]:
    """The elements of a JSON array, as written."""
    try:
        return [bytes(raw).strip() for raw in _raw.decode(array)]
    except (msgspec.DecodeError, RecursionError):  # a lone surrogate
        return [array[start:end] for start, end in jsontext.elements(array)]


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
    """The id of one item, if it has one."""
    for key, start, end in reversed(jsontext.members(item)):  # of two the last one counts
        if jsontext.key_text(key) == "id":
            value = item[start:end]
            text = jsontext.key_text(value) if value[:1] == b'"' else ""
            return None if any("\ud800" <= c <= "\udfff" for c in text) else text
    return None
