"""How much of a body reaches the model."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy.prompt_size import BYTES_PER_MEDIA_TOKEN, PART, Size, measure

DATA = "QUJD" * 5000  # 20,000 characters of base64
URL = f"data:image/png;base64,{DATA}"


def body(**fields: Any) -> bytes:
    """A request with these fields."""
    return json.dumps({"model": "m", **fields}).encode()


def of_parts(*parts: Any) -> bytes:
    """A request of the Responses API whose message has these parts."""
    return body(input=[{"role": "user", "content": list(parts)}])


IMAGES: list[Any] = [
    {"type": "input_image", "image_url": URL},
    {"type": "image_url", "image_url": {"url": URL}},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}},
    {"type": "image_generation_call", "id": "ig_1", "result": DATA},
]
FILES: list[Any] = [
    {"type": "input_file", "filename": "a.pdf", "file_data": DATA},
    {"type": "file", "file": {"filename": "a.pdf", "file_data": DATA}},
    {"type": "document", "source": {"type": "base64", "data": DATA}},
    {"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}},
]


def test_text_is_all_of_the_body() -> None:
    """Without media every byte counts, tools and instructions included."""
    tools = [{"type": "function", "name": "f", "parameters": {"properties": {"file": {}}}}]
    given_body = body(input="Hello", instructions="Be brief.", tools=tools)
    assert measure(given_body) == Size(len(given_body), 0)


@pytest.mark.parametrize("part", IMAGES + FILES, ids=lambda part: part["type"])
def test_media_are_counted_apiece(part: Any) -> None:
    """The base64 of a part is no text; the part counts a thousand tokens."""
    whole = of_parts({"type": "input_text", "text": "What is this?"}, part)
    assert measure(whole).media == PART
    assert 0 < measure(whole).text < 300


@pytest.mark.parametrize("place", ["input", "messages", "system", "prompt"])
def test_media_are_found_wherever_they_can_stand(place: str) -> None:
    """In the input, in messages, in the output of a tool within them."""
    nested = [{"type": "function_call_output", "output": [{"deep": [IMAGES[0], FILES[0]]}]}]
    assert measure(body(**{place: nested})).media == 2 * PART


def test_media_by_reference_count_as_much() -> None:
    """A file id and an address are short, but what they stand for is not."""
    parts = [{"type": "input_file", "file_id": "file-1"},
             {"type": "input_image", "image_url": "https://example.org/cat.png"}]  # fmt: skip
    assert measure(of_parts(*parts)).media == 2 * PART


def test_a_large_file_counts_more_and_a_large_image_does_not() -> None:
    """A file has as many pages as it is long; an image has its pixels."""
    data = "A" * (4000 * BYTES_PER_MEDIA_TOKEN)
    assert measure(of_parts({"type": "input_file", "file_data": data})).media == 4000
    assert measure(of_parts({"type": "input_image", "image_url": data})).media == PART


def test_a_document_of_text_is_text() -> None:
    """Text that comes as a document is read as text by the model."""
    part = {"type": "document", "source": {"type": "text", "data": "word " * 4000}}
    whole = body(messages=[{"role": "user", "content": [part]}])
    assert measure(whole) == Size(len(whole), PART)


def test_text_in_a_media_part_is_text() -> None:
    """Calling text an image makes it no cheaper."""
    whole = of_parts({"type": "input_image", "image_url": "x", "text": "word " * 4000})
    assert measure(whole).text >= 20_000


@pytest.mark.parametrize("kind", ["input\\u005fimage", "\\u0069nput_image", "input_imag\\u0065"])
def test_an_escape_hides_nothing(kind: str) -> None:
    """A type that is spelt with escapes is read as upstream reads it."""
    whole = of_parts(IMAGES[0]).replace(b"input_image", kind.encode())
    assert measure(whole).media == PART


def test_a_quoted_example_is_text() -> None:
    """JSON within a text is text."""
    whole = body(input=json.dumps(IMAGES[0]))
    assert measure(whole) == Size(len(whole), 0)


DEEP: Any = {"type": "input_image", "image_url": "x"}
for _ in range(200):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b'"type": "image"',
        b'["type", {"type": "image"}]',
        b'{"input": {"type": "image"}, "input": 5}',
        b'{"input": "\\ud800", "x": {"type": "image"}}',
        b'{"type": "image", "input": null, "messages": 7}',
        b'{"input": [{"type": ["image"]}, {"type": "image", "source": [1]}]}',
        json.dumps({"input": DEEP}).encode(),
        b'{"input": {"type": "image", "n": ' + b"9" * 5000 + b"}}",
    ],
)
def test_p14_nothing_raises(raw: bytes) -> None:
    """P14: whatever a body is, it has a size."""
    size = measure(raw)
    assert 0 <= size.text <= len(raw)
    assert size.media >= 0


values = st.recursive(
    st.none() | st.text(max_size=8) | st.sampled_from(["image", "input_file", URL[:60]]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "source", "data", "url", "image_url", "file", "text"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(values, values)
def test_more_is_never_less(one: Any, other: Any) -> None:
    """P13: a part more in the input never makes it cheaper."""
    less, more = (measure(body(input=parts)) for parts in ([one], [one, other]))
    assert more.media >= less.media
    assert more.text >= less.text
