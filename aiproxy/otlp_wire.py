"""OTLP's messages of spans, as protobuf writes them.

Source: opentelemetry-proto, trace.proto and common.proto; only what aiproxy says is here. By the
classes that protobuf generates the same bytes cost several times as much, which is most of what
tracing costs a request; tests read them by those classes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Value = str | int | float | bool

SERVER, CLIENT = b"\x30\x02", b"\x30\x03"  # Span.kind
FAILED = b"\x7a\x02\x18\x02"  # Span.status: STATUS_CODE_ERROR
# Span.flags: the parent's flags, that it is known whether the parent is remote, and whether it is.
_HAS_IS_REMOTE, _IS_REMOTE = 0x100, 0x200

_FIXED64, _FIXED32 = struct.Struct("<Q").pack, struct.Struct("<I").pack
_DOUBLE = struct.Struct("<d").pack
_MASK = 2**64 - 1  # a negative integer is written as its two's complement


def _make(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:  # noqa: PLR2004 - seven bits to a byte
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_SMALL = [_make(number) for number in range(16384)]


def _varint(number: int) -> bytes:
    return _SMALL[number] if number < 16384 else _make(number)  # noqa: PLR2004 - of _SMALL


def _part(tag: bytes, data: bytes) -> bytes:
    return b"%b%b%b" % (tag, _varint(len(data)), data)


def attribute(key: str, value: Value, tag: bytes = b"\x4a") -> bytes:
    """An attribute of a span (`tag`: of another message). Lone surrogates become `?`."""
    name = key.encode("utf-8", "replace")
    if isinstance(value, str):
        # A header that is no UTF-8 comes with surrogates, which no string of protobuf may have.
        text = value.encode("utf-8", "replace")
        any_value = b"\x0a%b%b" % (_varint(len(text)), text)
    elif isinstance(value, bool):
        any_value = b"\x10\x01" if value else b"\x10\x00"
    elif isinstance(value, int):
        any_value = b"\x18%b" % _varint(value & _MASK)
    else:
        any_value = b"\x21%b" % _DOUBLE(value)
    body = b"\x0a%b%b\x12%b%b" % (_varint(len(name)), name, _varint(len(any_value)), any_value)
    return b"%b%b%b" % (tag, _varint(len(body)), body)


_known: dict[tuple[str, str | int], bytes] = {}
_MOST_KNOWN, _SHORT = 8192, 64


def attributes(given: Mapping[str, Value]) -> bytes:
    """Attributes of a span. Short ones are remembered: most are the same in the next one."""
    known = _known
    out = []
    for key, value in given.items():
        # By its class, since True is equal to 1, and a long text does not come twice.
        if value.__class__ is int or (value.__class__ is str and len(value) <= _SHORT):
            encoded = known.get((key, value))
            if encoded is None:
                if len(known) >= _MOST_KNOWN:
                    known.clear()
                encoded = known[key, value] = attribute(key, value)
        else:
            encoded = attribute(key, value)
        out.append(encoded)
    return b"".join(out)


def event(name: str, at: int) -> bytes:
    """An event of a span; `at`: nanoseconds since the epoch."""
    return _part(b"\x5a", b"\x09%b%b" % (_FIXED64(at), _part(b"\x12", name.encode())))


def span(
    *,
    trace_id: int,
    span_id: int,
    parent_id: int,
    remote: bool,
    state: str,
    name: str,
    times: tuple[int, int],
    rest: bytes,
) -> bytes:
    """A span, as a part of a scope's.

    Args:
        trace_id: of all its spans.
        span_id: its own.
        parent_id: its parent's; 0: it has none.
        remote: whether that is of another process.
        state: the tracestate.
        name: of the span.
        times: its begin and its end, nanoseconds since the epoch.
        rest: kind, attributes, events and status, encoded.
    """
    flags = _HAS_IS_REMOTE | 1 | (_IS_REMOTE if remote else 0)  # it is sampled: else it is not told
    parent = b"\x22\x08%b" % parent_id.to_bytes(8, "big") if parent_id else b""
    data = b"\x0a\x10%b\x12\x08%b%b%b%b\x39%b\x41%b%b\x85\x01%b" % (
        trace_id.to_bytes(16, "big"),
        span_id.to_bytes(8, "big"),
        _part(b"\x1a", state.encode()) if state else b"",
        parent,
        _part(b"\x2a", name.encode("utf-8", "replace")),
        _FIXED64(times[0]),
        _FIXED64(times[1]),
        rest,
        _FIXED32(flags),
    )
    return b"\x12%b%b" % (_varint(len(data)), data)


class ExportRequest:
    """Around the spans of one body: who exports them.

    Args:
        resource: its attributes.
        scope: name and version of the instrumentation.
    """

    def __init__(self, resource: Mapping[str, Value], scope: tuple[str, str]) -> None:
        told = b"".join(attribute(key, value, b"\x0a") for key, value in resource.items())
        self._resource = _part(b"\x0a", told)
        name, version = scope
        self._scope = _part(
            b"\x0a", _part(b"\x0a", name.encode()) + _part(b"\x12", version.encode())
        )

    def body(self, spans: Iterable[bytes]) -> bytes:
        """An ExportTraceServiceRequest."""
        scoped = _part(b"\x12", self._scope + b"".join(spans))
        return _part(b"\x0a", self._resource + scoped)
