r"""Server-sent events: bytes <-> frames.

Source: WHATWG HTML, "Server-sent events". A line ends with LF, CR or CRLF; an empty line ends a
frame. A frame is the bytes of one event with the empty line that ends it, exactly as they came: the
concatenation of what `feed` returns is the concatenation of what was fed, less the unfinished tail.

The splitter either returns complete frames or holds an unfinished one back, so that a stream which
breaks off never shows a client half an event as a whole one. A frame that grows beyond MAX_FRAME is
let through in parts that nobody parses, so memory stays bounded.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Bound of a frame that is held and parsed. A terminal event carries the whole response, base64
# images included, so it is larger than any delta.
MAX_FRAME = 8 * 1024 * 1024

BOM = b"\xef\xbb\xbf"

# Two line ends in a row. `\r` not followed by `\n` keeps a CRLF from counting as two.
_FRAME_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n?|\n)")
_OVERLAP = 3  # bytes at the end of a buffer that may begin a frame's end


class Frame(NamedTuple):
    """`raw` as it came.

    `whole` is False for a part of a frame beyond the bound; `ends` says whether a frame ends with
    it.
    """

    raw: bytes
    whole: bool
    ends: bool = True


class Splitter:
    """Cuts a byte stream into frames, under any chunking."""

    __slots__ = ("_max", "_pending_lf", "_scanned", "_spilling", "_tail")

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self._max = max_frame
        self._tail = bytearray()
        self._scanned = 0  # bytes of the tail in which no frame end begins
        self._spilling = False
        self._pending_lf = False

    @property
    def at_boundary(self) -> bool:
        """Whether all that was returned so far ends with a frame's end."""
        return not self._spilling

    @property
    def held(self) -> int:
        """Bytes of an unfinished frame, not returned yet."""
        return len(self._tail)

    def feed(self, chunk: bytes) -> list[Frame]:
        """The frames that `chunk` completes, in order."""
        frames: list[Frame] = []
        if not chunk:
            return frames
        if self._pending_lf:
            self._pending_lf = False
            if chunk.startswith(b"\n"):
                # The second half of a CRLF whose CR already ended a frame.
                frames.append(Frame(b"\n", whole=True))
                chunk = chunk[1:]
        buffer: bytes | bytearray = chunk
        search = 0
        if self._tail:
            search = max(0, self._scanned - _OVERLAP)
            self._tail += chunk
            buffer = self._tail
        start = 0
        for end in _FRAME_END.finditer(buffer, search):
            frames.append(Frame(bytes(buffer[start : end.end()]), not self._spilling))
            self._spilling = False
            start = end.end()
        if start == len(buffer):
            self._tail = bytearray()
            self._scanned = 0
            self._pending_lf = start > 0 and buffer[-1:] == b"\r"
            return frames
        if start or buffer is chunk:
            self._tail = bytearray(buffer[start:])
        self._scanned = len(self._tail)
        if self._spilling or len(self._tail) > self._max:
            frames.extend(self._spill())
        return frames

    def _spill(self) -> list[Frame]:
        """Let an oversized frame through, but for the bytes that may begin its end."""
        cut = len(self._tail) - _OVERLAP
        if cut <= 0:
            return []
        part = bytes(self._tail[:cut])
        del self._tail[:cut]
        self._scanned = 0
        self._spilling = True
        return [Frame(part, whole=False, ends=False)]

    def rest(self) -> bytes:
        """The unfinished frame, given up; the splitter is empty afterwards."""
        rest = bytes(self._tail)
        self._tail = bytearray()
        self._scanned = 0
        return rest


def parse(raw: bytes) -> tuple[bytes, bytes | None]:
    """A whole frame's event name (empty when it has none) and data (None when it has none)."""
    name = b""
    data: list[bytes] = []
    for line in raw.removeprefix(BOM).splitlines():
        field, _, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    if not data:
        return name, None
    return name, data[0] if len(data) == 1 else b"\n".join(data)


def replace_data(raw: bytes, data: bytes) -> bytes:
    """The frame with its data lines replaced; every other line keeps its bytes."""
    out: list[bytes] = []
    written = False
    for line in raw.splitlines(keepends=True):
        bare = line.removeprefix(BOM)
        field = bare.split(b":", 1)[0].rstrip(b"\r\n")
        if field != b"data":
            out.append(line)
            continue
        if written:
            continue
        written = True
        body = line.rstrip(b"\r\n")
        end = line[len(body) :]
        prefix = b"data: " if bare.startswith(b"data: ") else b"data:"
        out.append(line[: len(line) - len(bare)])
        out.extend(prefix + part + end for part in data.split(b"\n"))
    return b"".join(out)


def with_data(raw: bytes, old: bytes, new: bytes) -> bytes:
    """The frame, whose data is `old`, with `new` in its place; every other byte stays."""
    if b"\n" not in new and raw.count(old) == 1:
        return raw.replace(old, new)
    return replace_data(raw, new)


def event(data: bytes, name: str = "") -> bytes:
    """A frame of our own. `data` has no line end in it."""
    if name:
        return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
    return b"data: " + data + b"\n\n"


COMMENT = b": keepalive\n\n"
