"""What a streamed answer of the Responses API produced, gathered as it passes.

Its finished items, and text that came only as deltas: some servers finish no item, or end with an
empty `output`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from msgspec import Raw

_TEXT = re.compile(rb'"type"\s*:\s*"response\.(output_text|refusal)\.(delta|done)"')
_INDEX = re.compile(rb'"(output|content)_index"\s*:\s*(\d{1,6})')
_ITEM_ID = re.compile(rb'"item_id"\s*:\s*("[^"\\]{1,256}")')
_STRING = rb'"%b"\s*:\s*"([^"\\]*+(?:\\.[^"\\]*+)*+)"'
_DELTA = re.compile(_STRING % b"delta", re.DOTALL)
_WHOLE = {
    b"output_text": re.compile(_STRING % b"text", re.DOTALL),
    b"refusal": re.compile(_STRING % b"refusal", re.DOTALL),
}


class _Part:
    """A part of a message that is not finished."""

    __slots__ = ("item_id", "kind", "pieces")

    def __init__(self, kind: bytes) -> None:
        self.kind = kind
        self.item_id = b""
        self.pieces: list[bytes] = []  # of a JSON string, without its quotes

    def encode(self) -> bytes:
        text = b"".join(self.pieces)
        try:
            json.loads(b'"%b"' % text)
        except ValueError:  # some piece was no JSON: it is kept by its letters
            text = json.dumps(text.decode("utf-8", "replace")).encode()[1:-1]
        if self.kind == b"refusal":
            return b'{"type":"refusal","refusal":"%b"}' % text
        return b'{"type":"output_text","text":"%b","annotations":[]}' % text


class Output:
    """The output of one stream."""

    def __init__(self) -> None:
        self.finished: list[Raw] = []  # in the order in which they came
        self._places: list[int] = []  # of these
        self._parts: dict[tuple[int, int], _Part] = {}  # by output and content index

    def finish(self, item: Raw, place: object) -> None:
        """An item came whole; what came of it before does not count any more."""
        self.finished.append(item)
        index = place if type(place) is int else None
        self._places.append(len(self._places) if index is None else index)
        for key in [key for key in self._parts if index in (None, key[0])]:
            del self._parts[key]

    def text(self, raw: bytes) -> None:
        """An event that may carry text."""
        named = _TEXT.search(raw)
        if named is None:
            return
        kind, event = named.groups()
        at = {name: int(index) for name, index in _INDEX.findall(raw)}
        key = at.get(b"output", len(self._places)), at.get(b"content", 0)
        if key[0] in self._places and at:
            return
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = _Part(kind)
            if (item_id := _ITEM_ID.search(raw)) is not None:
                part.item_id = item_id.group(1)
        if event == b"delta":
            if (delta := _DELTA.search(raw)) is not None:
                part.pieces.append(delta.group(1))
        elif (whole := _WHOLE[kind].search(raw)) is not None:
            part.pieces = [whole.group(1)]

    def items(self) -> list[bytes]:
        """All items, in their places."""
        finished = map(bytes, self.finished)
        found = list(zip(self._places, finished, strict=True))
        by_place: dict[int, list[tuple[int, _Part]]] = {}
        for (place, content), part in self._parts.items():
            by_place.setdefault(place, []).append((content, part))
        found += [(place, _message(parts)) for place, parts in by_place.items()]
        found.sort(key=lambda pair: pair[0])
        return [item for _, item in found]


def _message(parts: Iterable[tuple[int, _Part]]) -> bytes:
    in_order = [part for _, part in sorted(parts, key=lambda pair: pair[0])]
    item_id = next((part.item_id for part in in_order if part.item_id), b"")
    content = b",".join(part.encode() for part in in_order)
    named = b'"id":%b,' % item_id if item_id else b""
    return b'{%b"type":"message","status":"completed","role":"assistant","content":[%b]}' % (
        named,
        content,
    )
