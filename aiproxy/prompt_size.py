"""How much of a request's body reaches the model: its text in bytes, its media in tokens.

Images, files and sounds stand in a body as base64, whose length says little about their tokens:
they are taken out of the text and counted apiece. All else counts as text, tools and instructions
included, names and punctuation of the JSON too: what that costs is part of the ratio of tokens to
bytes that answers show.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

PART = 1000  # tokens that an image, a file or a sound counts at least
BYTES_PER_MEDIA_TOKEN = 256  # of the base64 of a file or a sound; an image costs by its pixels

_IMAGES = frozenset(
    {"input_image", "image_url", "image", "computer_screenshot", "image_generation_call"}
)
_OTHERS = frozenset(
    {"input_file", "file", "document", "input_audio", "audio", "audio_url", "input_video"}
    | {"video", "video_url"}
)
_MEDIA = re.compile(rb'"type"\s*:\s*"(?:' + "|".join(sorted(_IMAGES | _OTHERS)).encode() + rb')"')
# A letter that is written as an escape may hide one of these words.
_HIDDEN = re.compile(rb"\\u00[4-7]")
# Where media can stand in a request of any of the APIs, and where their data does.
_PLACES = ("input", "messages", "system", "prompt")
_DATA = frozenset(
    {"image_url", "video_url", "audio_url", "url", "file_url", "file_data", "data", "result"}
)
_DEEPEST = 64  # levels of content that are looked through


class Size(NamedTuple):
    """What reaches the model."""

    text: int  # bytes
    media: int  # tokens, as estimated


def measure(body: bytes) -> Size:
    """The size of a body that is valid JSON; of anything else it is all text. Never raises."""
    if _MEDIA.search(body) is None and (b"\\u00" not in body or _HIDDEN.search(body) is None):
        return Size(len(body), 0)
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return Size(len(body), 0)
    if not isinstance(document, dict):
        return Size(len(body), 0)
    data = media = 0
    for place in _PLACES:
        for part in _parts(document.get(place), _DEEPEST):
            size = _data(part)
            data += size
            image = part["type"] in _IMAGES
            media += PART if image else max(PART, size // BYTES_PER_MEDIA_TOKEN)
    return Size(max(0, len(body) - data), media)


def _parts(value: Any, depth: int) -> list[dict[str, Any]]:
    """The outermost media parts within a value."""
    if depth == 0:
        return []
    if isinstance(value, list):
        return [part for each in value for part in _parts(each, depth - 1)]
    if not isinstance(value, dict):
        return []
    kind = value.get("type")
    if isinstance(kind, str) and (kind in _IMAGES or kind in _OTHERS):
        return [value]
    return [part for each in value.values() for part in _parts(each, depth - 1)]


def _data(part: dict[str, Any]) -> int:
    """Bytes of a part that are no text: base64, or an address. A document of text is text."""
    if part.get("type") in ("text", "content"):
        return 0
    found = 0
    for name, value in part.items():
        if name in _DATA and isinstance(value, str):
            found += len(value)
        elif isinstance(value, dict) and name in (_DATA | _OTHERS | {"source"}):
            found += _data(value)
    return found
