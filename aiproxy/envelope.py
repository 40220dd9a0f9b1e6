"""A request's body, split at its top level only.

`model`, `stream` and their like are read and replaced; every other value stays as it came. What is
checked is what is sent: a key that is given twice goes upstream once, with the value that was read
(the last, as JSON decoders do).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import Raw

from aiproxy import errors, jsontext

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_NUMBER = 400  # characters of a number in a field that is read

_members = msgspec.json.Decoder(dict[str, Raw])
_NULL = Raw(b"null")


class Envelope:
    """The body of one request.

    Reading a field of a wrong type raises ProxyError `invalid_type` with the field as `param`; a
    field that is null counts as not given, as in the OpenAI API.
    """

    __slots__ = ("_members", "size")

    def __init__(self, members: dict[str, Raw], size: int) -> None:
        self._members = members
        self.size = size  # bytes of the body as it was read, after decompression

    @classmethod
    def parse(cls, body: bytes) -> Envelope:
        """Check the whole body, split its top level.

        Raises:
            ProxyError: `invalid_json` unless the body is exactly one JSON object in UTF-8, without
                NaN or Infinity, nested at most 256 levels.
        """
        if not body.isascii():
            try:
                body.decode()
            except UnicodeDecodeError as error:
                raise errors.invalid_json(
                    f"The request body is not UTF-8 (byte {error.start})."
                ) from None
        if jsontext.depth_exceeds(body):
            raise errors.invalid_json(
                f"The request body is nested over {jsontext.MAX_DEPTH} levels."
            )
        try:
            members = _members.decode(body)
        except msgspec.ValidationError:
            raise errors.invalid_json("The request body must be one JSON object.") from None
        except (msgspec.DecodeError, RecursionError) as error:
            try:
                members = {key: Raw(value) for key, value in jsontext.split(body).items()}
                msgspec.json.encode(members)  # a key that cannot be written again
            except (ValueError, RecursionError):
                raise errors.invalid_json(
                    f"The request body is not valid JSON: {_reason(error)}."
                ) from None
        return cls(members, len(body))

    def copy(self) -> Envelope:
        """Another one with the same values, which can be replaced on its own."""
        return Envelope(dict(self._members), self.size)

    def encode(self) -> bytes:
        """The body to send."""
        return msgspec.json.encode(self._members)

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __contains__(self, name: str) -> bool:
        raw = self._members.get(name)
        return raw is not None and bytes(raw).strip() != b"null"

    def raw(self, name: str, most: int | None = None) -> bytes | None:
        """A value as it was written, without space around it; None when not given or null.

        `most`: None also when it has more bytes; then it is not copied.
        """
        raw = self._members.get(name)
        if raw is None or (most is not None and memoryview(raw).nbytes > most):
            return None
        value = bytes(raw).strip()
        return None if value == b"null" else value

    def put(self, name: str, value: object) -> None:
        """Replace a value, or add it at the end."""
        self._members[name] = Raw(msgspec.json.encode(value))

    def put_raw(self, name: str, value: bytes) -> None:
        """Replace a value, or add it at the end, by its JSON."""
        self._members[name] = Raw(value)

    def drop(self, name: str) -> None:
        """Leave a field out."""
        self._members.pop(name, None)

    def text(self, name: str) -> str | None:
        """A string field."""
        value = self.raw(name)
        if value is None:
            return None
        if value[:1] != b'"':
            raise errors.invalid_type(name, "a string")
        try:
            return msgspec.json.decode(value, type=str)
        except msgspec.DecodeError:  # a lone surrogate
            raise errors.invalid_type(name, "a string of Unicode characters") from None

    def boolean(self, name: str) -> bool | None:
        """A true or false field."""
        value = self.raw(name)
        if value is None:
            return None
        if value not in (b"true", b"false"):
            raise errors.invalid_type(name, "a boolean")
        return value == b"true"

    def integer(self, name: str) -> int | None:
        """An integer field. A number of over 400 characters is refused, whatever its value."""
        value = self.raw(name)
        if value is None:
            return None
        digits = value.removeprefix(b"-")
        if len(value) > MAX_NUMBER or not digits.isdigit():
            raise errors.invalid_type(name, "an integer")
        return int(value)

    def object(self, name: str) -> dict[str, Raw] | None:
        """An object field, split at its top level."""
        value = self.raw(name)
        if value is None:
            return None
        if value[:1] != b"{":
            raise errors.invalid_type(name, "an object")
        try:
            return _members.decode(value)
        except msgspec.DecodeError:  # a lone surrogate
            members = {key: Raw(part) for key, part in jsontext.split(value).items()}
            if not all(_is_text(key) for key in members):
                raise errors.invalid_type(name, "an object with names of Unicode") from None
            return members

    def require_one_of(self, name: str, starts: Sequence[bytes], expected: str) -> None:
        """Refuse a field that does not begin like one of the expected JSON types."""
        value = self.raw(name)
        if value is not None and not value.startswith(tuple(starts)):
            raise errors.invalid_type(name, expected)


def _is_text(text: str) -> bool:
    """Whether it can be encoded: a lone surrogate cannot."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _reason(error: Exception) -> str:
    text = str(error).removeprefix("JSON is malformed: ")
    return text if isinstance(error, msgspec.DecodeError) and text else "it cannot be decoded"
