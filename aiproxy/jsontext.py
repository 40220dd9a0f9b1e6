"""JSON as text: what a document has at one level, and where.

A proxy that decodes and encodes again loses duplicate keys, number spellings and white space. These
functions look at a document without rebuilding it, so that one value can be read or replaced while
every other byte stays as it came (RFC 8259).
"""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import TYPE_CHECKING, NoReturn

import msgspec
from msgspec import Raw

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

MAX_DEPTH = 256

# Possessive, so that a string of megabytes leaves nothing to come back to.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\],:]|[^\s"{}\[\],:]+', re.DOTALL)
_NOT_STRUCTURE = bytes(c for c in range(256) if c not in b'[]{}"')
_ONE_KIND = bytes.maketrans(b"[]", b"{}")  # to count nesting, arrays and objects are alike
_HIDDEN = re.compile(rb"\\u00[4-7]")  # a letter of a name that is written as an escape
_ESCAPES = (rb"\u004", rb"\u005", rb"\u006", rb"\u007")  # each is searched far faster than all
_GAP = re.compile(rb"[\s,]*")  # between elements of an array
_ENDS = (b",", b"}", b" ", b"\n", b"\r", b"\t")  # what may follow a member
_STEP = {0x7B: 1, 0x7D: -1}
_PEEL = 32  # rounds of removing innermost pairs, each far cheaper than counting one by one
_BLOCK = 65536  # counted at a time, so that a document that only opens is given up early


def depth_exceeds(document: bytes, limit: int = MAX_DEPTH) -> bool:
    """Whether arrays and objects are nested deeper than `limit`. Linear in the document's size."""
    if document.count(b"[") + document.count(b"{") <= limit:
        return False
    # Without escapes every quote begins or ends a string; the even parts are outside of strings.
    bare = document.replace(b"\\\\", b"").replace(b'\\"', b"").translate(_ONE_KIND, _NOT_STRUCTURE)
    structure = b"".join(bare.split(b'"')[::2])
    depth = 0
    while structure and depth < _PEEL:
        peeled = structure.replace(b"{}", b"")
        if len(peeled) * 64 > len(structure) * 63:
            break  # hardly any pairs: peeling does not pay
        structure = peeled
        depth += 1
    for start in range(0, len(structure), _BLOCK):
        block = map(_STEP.__getitem__, structure[start : start + _BLOCK])
        depths = list(accumulate(block, initial=depth))
        if max(depths) > limit:
            return True
        depth = depths[-1]
    return depth > limit


def _parts(document: bytes) -> Iterator[tuple[bytes | None, int, int]]:  # noqa: C901 - a machine
    """Of each value at the first level: its key as written (None in an array), start and end."""
    depth = 0
    in_object = False
    key: bytes | None = None
    start = end = -1
    for token in _TOKEN.finditer(document):
        first = document[token.start()]
        if first in b"{[":
            depth += 1
            if depth == 1:
                in_object = first in b"{"
            elif depth == 2:  # noqa: PLR2004 - the first level's values begin at the second
                start = token.start()
        elif first in b"}]":
            depth -= 1
            if depth == 1:
                end = token.end()
            elif depth == 0 and start >= 0:
                yield key, start, end
        elif depth != 1 or first in b":":
            continue
        elif first in b",":
            yield key, start, end
            key, start = None, -1
        elif in_object and key is None:
            key = token.group()
        else:
            start, end = token.span()


def members(document: bytes) -> list[tuple[bytes, int, int]]:
    """The members of an object: the key as written (with its quotes), start and end of the value.

    The document is known to be valid JSON; anything else than an object has no members.
    """
    return [(key, start, end) for key, start, end in _parts(document) if key is not None]


_elements = msgspec.json.Decoder(list[Raw])


def cut(document: bytes) -> Sequence[Raw | bytes]:
    """The elements of an array, as written, in a document that is known to be valid JSON."""
    try:
        return _elements.decode(document)
    except (msgspec.DecodeError, RecursionError):  # a lone surrogate
        pass
    try:
        found = _elements.decode(masked(document))
    except (msgspec.DecodeError, RecursionError):
        return [document[start:end] for key, start, end in _parts(document) if key is None]
    whole, at = [], 1
    for each in found:
        start = _GAP.match(document, at).end()  # type: ignore[union-attr] # it matches nothing, too
        at = start + len(bytes(each))
        whole.append(document[start:at])
    return whole


def elements(document: bytes) -> list[bytes]:
    """The same, as bytes without space around them."""
    return [bytes(each).strip() for each in cut(document)]


def masked(document: bytes) -> bytes:
    """The same JSON without lone surrogates, which a strict decoder refuses.

    Every byte stays in its place; what is written with escapes may become other letters, but none
    of ASCII.
    """
    return document.replace(b"\\ud", b"\\u8").replace(b"\\uD", b"\\u8")


def hides(document: bytes) -> bool:
    """Whether a letter of ASCII may be written as an escape."""
    return b"\\u00" in document and any(escape in document for escape in _ESCAPES)


def distinct(document: bytes, members: Mapping[str, bytes | Raw]) -> bool:
    """Whether an object has just these members: none is given twice, none has a quote in its name.

    A name that is given twice shows in the quotes outside of the values that count.
    """
    inside = sum(bytes(value).count(b'"') for value in members.values())
    return document.count(b'"') - inside == 2 * len(members)


def key_text(key: bytes) -> str:
    """A key as `members` returns it, decoded."""
    if b"\\" not in key:
        return key[1:-1].decode("utf-8", "replace")
    text: str = json.loads(key)
    return text


def replace(document: bytes, path: Sequence[str], values: Mapping[str, bytes]) -> bytes:
    """The document with the values of some members of the object at `path` replaced.

    Every member of that name is replaced, also one that is given twice; members that are not there
    are not added. All other bytes stay.
    """
    spans = members(document)
    if path:
        head, rest = path[0], path[1:]
        edits = [
            (start, end, replace(document[start:end], rest, values))
            for key, start, end in spans
            if key_text(key) == head
        ]
    else:
        edits = [
            (start, end, values[text])
            for key, start, end in spans
            if (text := key_text(key)) in values
        ]
    return _spliced(document, edits) if edits else document


def span(document: bytes, name: str, value: bytes) -> tuple[int, int] | None:
    """Start and end of the value of a top-level member, without looking at the others.

    Args:
        document: an object.
        name: of the member, which may be written with escapes.
        value: as it is written there.

    Returns:
        None where it cannot be told at a glance which of several it is.
    """
    key = b'"%b"' % name.encode()
    at = document.find(key)
    if at < 0 or (b"\\u00" in document and _HIDDEN.search(document)):
        return None
    begin = at + len(key)
    start = document.find(value, begin)
    end = start + len(value)
    if start < 0 or document[begin:start].strip() != b":" or document[end : end + 1] not in _ENDS:
        return None
    if document.find(key, begin) >= 0 and (
        # Of several the first is it if nothing but the outermost object is open before it; unless
        # it is given twice, as the value may be.
        document.count(b"{", 0, at) != 1 or document.find(value, end) >= 0
    ):
        return None
    return start, end


def amend(
    document: bytes,
    known: Mapping[str, bytes],
    values: Mapping[str, bytes],
    add: Container[str] = (),
) -> bytes:
    """The document with the values of some top-level members replaced, all other bytes as they are.

    Args:
        document: an object.
        known: those of its members that are replaced, values as written.
        values: the new ones.
        add: the names of those that are added at the end where they are missing.
    """
    added = [
        b'"%b":%b' % (name.encode(), value)
        for name, value in values.items()
        if name in add and name not in known
    ]
    spans: list[tuple[int, int, bytes]] = []
    for name, value in values.items():
        if (old := known.get(name)) is None:
            continue
        found = span(document, name, old)
        if found is None:
            return _append(replace(document, (), values), added)
        spans.append((*found, value))
    spans.sort()
    return _append(_spliced(document, spans), added)


def _spliced(document: bytes, edits: Iterable[tuple[int, int, bytes]]) -> bytes:
    out: list[bytes] = []
    position = 0
    for start, end, value in edits:
        out += (document[position:start], value)
        position = end
    out.append(document[position:])
    return b"".join(out)


def _append(document: bytes, members: list[bytes]) -> bytes:
    """The object with further members at its end."""
    if not members:
        return document
    end = document.rindex(b"}")
    comma = b"" if document[:end].rstrip().endswith(b"{") else b","
    return b"".join((document[:end], comma, b",".join(members), document[end:]))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def split(document: bytes) -> dict[str, bytes]:
    """Top-level members by decoded key, the last of a name winning; values as written.

    The patient way, for documents that a strict decoder refuses although the grammar allows them
    (a lone surrogate in a string, RFC 8259 section 8.2).

    Raises:
        ValueError: not one JSON object in UTF-8. A RecursionError cannot happen at a depth that
            `depth_exceeds` allows.
    """
    value = json.loads(
        document.decode(), parse_constant=_refuse_constant, parse_int=len, parse_float=len
    )
    if not isinstance(value, dict):
        raise ValueError("not an object")  # noqa: TRY004 - one kind of error for the caller
    return {key_text(key): document[start:end] for key, start, end in members(document)}
