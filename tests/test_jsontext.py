"""JSON as text: what is found in a document, and what stays as it came when a part is replaced."""

import json
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy import jsontext

SPACE = st.sampled_from(["", "", " ", "\n", "\t", "\r\n  "])
ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
# As different writers spell them: escaped or not, in one line or in many.
WRITTEN = st.builds(
    json.dumps, VALUES, ensure_ascii=st.booleans(), indent=st.sampled_from([None, 0, 2])
)


class Member(NamedTuple):
    """A member of an object, and all that is written around it."""

    key: str
    before: str  # up to the value: space, the key, space, colon, space
    value: str
    after: str


@st.composite
def objects(draw: st.DrawFn, keys: "st.SearchStrategy[str] | None" = None) -> list[Member]:
    """Draw an object's members; keys may come twice."""
    found = []
    for key in draw(st.lists(st.text(max_size=4) if keys is None else keys, max_size=5)):
        spelt = json.dumps(key, ensure_ascii=draw(st.booleans()))
        before = f"{draw(SPACE)}{spelt}{draw(SPACE)}:{draw(SPACE)}"
        found.append(Member(key, before, draw(WRITTEN), draw(SPACE)))
    return found


def text_of(members: list[Member]) -> bytes:
    """Write an object."""
    return f"{{{','.join(m.before + m.value + m.after for m in members)}}}".encode()


def naive_depth(document: bytes) -> int:
    """Count the deepest nesting, one byte after another."""
    deepest = depth = 0
    inside = escaped = False
    for byte in document:
        if inside:
            inside = escaped or byte != ord('"')
            escaped = byte == ord("\\") and not escaped
        elif byte == ord('"'):
            inside = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


@given(WRITTEN, st.integers(0, 8))
def test_depth_is_what_a_naive_count_finds(document: str, limit: int) -> None:
    """Of any JSON document, strings full of brackets and escapes included."""
    raw = document.encode()
    assert jsontext.depth_exceeds(raw, limit) == (naive_depth(raw) > limit)


@given(st.lists(st.sampled_from(["[", "]", "{", "}", '"', "\\", '\\"', "\\\\", "a"])), SPACE)
def test_brackets_in_strings_do_not_nest(parts: list[str], space: str) -> None:
    """A string of brackets, quotes and backslashes counts as nothing, whatever is in it."""
    document = json.dumps([space, "".join(parts), {"".join(parts): 1}]).encode()
    assert not jsontext.depth_exceeds(document, 2)
    assert jsontext.depth_exceeds(document, 1)


@pytest.mark.parametrize("shape", ["[{}]", '{{"a":{}}}'], ids=["arrays", "objects"])
@pytest.mark.parametrize("beside", [0, 5000])
def test_the_limit_is_256(shape: str, beside: int) -> None:
    """256 levels pass and 257 do not, beside many shallow pairs too."""

    def nested(levels: int) -> bytes:
        document = "0"
        for _ in range(levels - 1):
            document = shape.format(document)
        return f"[{'[],' * beside}{document}]".encode()

    assert not jsontext.depth_exceeds(nested(256))
    assert jsontext.depth_exceeds(nested(257))


@pytest.mark.parametrize("only", [b"[", b'{"a":', b"[[],"])
def test_a_million_opening_brackets_are_deep(only: bytes) -> None:
    """What only opens is too deep, and is told so without recursion."""
    assert jsontext.depth_exceeds(only * 1_000_000)


@given(objects())
def test_members_are_where_they_stand(members: list[Member]) -> None:
    """Each member's key as written, and the exact span of its value."""
    document = text_of(members)
    found = jsontext.members(document)
    spans = [document[start:end].decode() for _, start, end in found]
    assert spans == [member.value for member in members]
    assert [jsontext.key_text(key) for key, _, _ in found] == [member.key for member in members]


@pytest.mark.parametrize("document", [b"[]", b'[{"a":1}]', b"1", b'"{}"', b"null", b"{}", b" { } "])
def test_what_is_no_object_has_no_members(document: bytes) -> None:
    """Arrays, also of objects, atoms and the empty object have none."""
    assert jsontext.members(document) == []


@given(objects(keys=st.sampled_from(["model", "id", 'q"', "\u00fc"])), WRITTEN)
def test_replace_keeps_every_other_byte(members: list[Member], value: str) -> None:
    """Every member of the name gets the new value; all else stays as it was, byte for byte."""
    expected = [m._replace(value=value) if m.key == 'q"' else m for m in members]
    assert jsontext.replace(text_of(members), (), {'q"': value.encode()}) == text_of(expected)


@given(objects(keys=st.sampled_from(["a", "b"])), objects(keys=st.sampled_from(["a", "b"])))
def test_replace_follows_a_path(outer: list[Member], inner: list[Member]) -> None:
    """Only members of the object at the path are replaced, wherever the name stands besides."""
    nested = text_of(inner).decode()
    expected = text_of([m._replace(value="7") if m.key == "b" else m for m in inner]).decode()
    document = text_of([m._replace(value=nested) if m.key == "a" else m for m in outer])
    replaced = text_of([m._replace(value=expected) if m.key == "a" else m for m in outer])
    assert jsontext.replace(document, ("a",), {"b": b"7"}) == replaced


def test_replace_without_such_a_member_returns_the_document() -> None:
    """Nothing is added, and the very same object comes back."""
    document = b'{"a": {"b": 1}}'
    assert jsontext.replace(document, (), {"b": b"2"}) is document
    assert jsontext.replace(document, ("x",), {"b": b"2"}) is document


@given(objects())
def test_split_reads_what_a_decoder_reads(members: list[Member]) -> None:
    """Decoded values are those of `json.loads`, the last of a name winning; spellings stay."""
    document = text_of(members)
    parts = jsontext.split(document)
    assert {key: json.loads(value) for key, value in parts.items()} == json.loads(document)
    assert parts == {member.key: member.value.encode() for member in members}


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        (rb'{"a":"\ud800"}', {"a": rb'"\ud800"'}),
        (rb'{"a":1,"\u0061": "\ud83d\ude00" }', {"a": rb'"\ud83d\ude00"'}),
        (rb'{"\ud800":[ 1 ]}', {"\ud800": b"[ 1 ]"}),
        (b'{"a":' + b"9" * 5000 + b"}", {"a": b"9" * 5000}),
    ],
)
def test_split_takes_what_the_grammar_allows(document: bytes, parts: dict[str, bytes]) -> None:
    """Lone surrogates and numbers of any length are JSON (RFC 8259, sections 6 and 8.2)."""
    assert jsontext.split(document) == parts


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"1",
        b'{"a":NaN}',
        b'{"a":[-Infinity]}',
        b'{"a":1}}',
        b'{"a":1}{}',
        b"{'a':1}",
        b'{"a":1,}',
        '{"a":1}'.encode("utf-16-le"),
        '{"a":1}'.encode("utf-16-be"),
        '{"a":1}'.encode("utf-32-le"),
    ],
)
def test_split_refuses_what_is_no_object_in_utf_8(document: bytes) -> None:
    """NaN, trailing data, other values and other encodings raise ValueError."""
    with pytest.raises(ValueError):  # noqa: PT011 - that it is one is what is promised
        jsontext.split(document)


@given(st.binary() | WRITTEN.map(lambda text: text.encode()[:-1]))
def test_split_raises_nothing_else(document: bytes) -> None:
    """Of any bytes, split makes the members of an object or a ValueError."""
    try:
        found: Any = jsontext.split(document)
    except ValueError:
        return
    assert isinstance(found, dict)
