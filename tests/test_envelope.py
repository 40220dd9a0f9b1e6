"""A request's body, split at its top level: what is accepted, what is read, what is sent."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy.envelope import Envelope
from aiproxy.errors import ProxyError

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
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=5)
WRITTEN = st.builds(
    json.dumps, OBJECTS, ensure_ascii=st.booleans(), indent=st.sampled_from([None, 1])
)


def code_of(act: Callable[[], object]) -> tuple[int, str | None, str | None]:
    """Return status, code and param of the ProxyError that this raises."""
    with pytest.raises(ProxyError) as caught:
        act()
    return caught.value.status, caught.value.code, caught.value.param


def assert_envelope_or_refusal(body: bytes) -> None:
    """Parse raises invalid_json or nothing; what it accepts is written as JSON again."""
    try:
        envelope = Envelope.parse(body)
    except ProxyError as refused:
        error = refused
    else:
        assert isinstance(json.loads(envelope.encode()), dict)
        return
    assert (error.status, error.code) == (400, "invalid_json")


def nested(levels: int) -> bytes:
    """Write an object that is nested so deep, itself included."""
    return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


REFUSED = {
    "empty": b"",
    "space": b" \n",
    "array": b'[{"a":1}]',
    "null": b"null",
    "number": b"1",
    "string": b'"{}"',
    "unfinished": b'{"a":1',
    "trailing text": b'{"a":1} x',
    "trailing object": b'{"a":1}{"b":2}',
    "trailing zero byte": b'{"a":1}\0',
    "trailing comma": b'{"a":1,}',
    "comment": b'{"a":1/**/}',
    "single quotes": b"{'a':1}",
    "bare key": b"{a:1}",
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":[1,Infinity]}',
    "-Infinity beside a lone surrogate": rb'{"a":-Infinity,"b":"\ud800"}',
    "leading zero": b'{"a":01}',
    "number without digits": b'{"a":-}',
    "number ends in a point": b'{"a":[1.]}',
    "control character in a string": b'{"a":"\x01"}',
    "unknown escape": rb'{"a":"\q"}',
    "short escape": rb'{"a":"\u12"}',
    "no UTF-8 in a value": b'{"a":"\xff"}',
    "no UTF-8 in a key": b'{"\xc3":1}',
    "no UTF-8 deep inside": b'{"a":[{"b":"\xed\xa0\x80"}]}',
    "overlong UTF-8": b'{"a":"\xc0\xaf"}',
    "UTF-16 little-endian": '{"a":1}'.encode("utf-16-le"),
    "UTF-16 big-endian": '{"a":1}'.encode("utf-16-be"),
    "UTF-16 with a mark": '{"a":1}'.encode("utf-16"),
    "UTF-32": '{"a":1}'.encode("utf-32-le"),
    "257 levels": nested(257),
    "100,000 levels": nested(100_000),
    "100,000 opening brackets": b'{"a":' + b"[" * 100_000,
}

ACCEPTED = {
    "256 levels": nested(256),
    "empty object": b" {} ",
    "lone surrogate": rb'{"a":"\ud800","b":["\udfff"]}',
    "surrogate pair": rb'{"a":"\ud83d\ude00"}',
    "number of 5,000 digits": b'{"a":' + b"9" * 5000 + b"}",
    "nested number of 5,000 digits": b'{"a":[{"b":' + b"9" * 5000 + b"}]}",
    "both of them": rb'{"a":"\ud800","b":[' + b"9" * 5000 + b"]}",
    "number beyond a double": b'{"a":1e999,"b":-1E-999}',
    "spellings of numbers": b'{"a":1.50,"b":1E2,"c":-0,"d":[10e-1]}',
    "nested duplicates": b'{"a":{"x":1,"x":2}}',
    "UTF-8": '{"ü":"😀"}'.encode(),
    "delete character": b'{"a":"\x7f"}',
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_what_is_not_one_json_object_is_refused(body: bytes) -> None:
    """Anything but one strict JSON object in UTF-8 of at most 256 levels is 400 invalid_json."""
    assert code_of(lambda: Envelope.parse(body)) == (400, "invalid_json", None)


@pytest.mark.parametrize("body", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_json_is_sent_as_it_came(body: bytes) -> None:
    """All that the grammar allows goes upstream, the values spelt as they came."""
    assert Envelope.parse(body).encode().replace(b" ", b"") == body.replace(b" ", b"")
    assert Envelope.parse(body).size == len(body)


@given(st.binary() | WRITTEN.map(lambda text: text.encode()[:-1]))
def test_any_bytes_make_an_envelope_or_a_refusal(body: bytes) -> None:
    """Whatever comes, parse raises nothing but ProxyError; what it accepts is valid JSON again."""
    assert_envelope_or_refusal(body)


@given(st.text(alphabet='{}[]",:\\ue180d-+.\x00\ufeffN '))
def test_json_like_text_makes_an_envelope_or_a_refusal(text: str) -> None:
    """The same for text of the characters that JSON is made of."""
    assert_envelope_or_refusal(f'{{"a":{text}}}'.encode())


@given(WRITTEN)
def test_an_envelope_changes_no_value(text: str) -> None:
    """What is sent decodes to what was received."""
    assert json.loads(Envelope.parse(text.encode()).encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("body", "read"),
    [
        (b'{"a":"x","a":"y"}', "y"),
        (rb'{"a":"x","\u0061":"y"}', "y"),
        (rb'{"\u0061":"x","a":"y"}', "y"),
        (rb'{"a":"x","b":"\ud800","a":"y"}', "y"),
        (b'{"a":1,"a":"y"}', "y"),
    ],
)
def test_of_a_key_given_twice_the_last_is_read_and_sent(body: bytes, read: str) -> None:
    """What is checked is what is sent: once, with the value that was read."""
    envelope = Envelope.parse(body)
    assert envelope.text("a") == read
    pairs = json.loads(envelope.encode(), object_pairs_hook=list)
    assert [value for key, value in pairs if key == "a"] == [read]


def read(value: str) -> Envelope:
    """Return an envelope with this value as its field `a`."""
    return Envelope.parse(f'{{"a": {value} }}'.encode())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ('"x"', "x"),
        ('""', ""),
        (r'"\u0067pt\n"', "gpt\n"),
        ('"ü"', "ü"),
        (r'"\ud83d\ude00"', "😀"),
        ("null", None),
    ],
)
def test_text(value: str, text: str | None) -> None:
    """A string is decoded; null counts as not given."""
    assert read(value).text("a") == text


@pytest.mark.parametrize("value", ["1", "true", "[]", "{}", r'"\ud800"', r'"x\udc00y"'])
def test_what_is_no_text_is_a_wrong_type(value: str) -> None:
    """Another type, or a string that is no Unicode, names the field."""
    assert code_of(lambda: read(value).text("a")) == (400, "invalid_type", "a")


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("false", False), ("null", None)])
def test_boolean(value: str, *, expected: bool | None) -> None:
    """True and false are read; null counts as not given."""
    assert read(value).boolean("a") is expected


@pytest.mark.parametrize("value", ["1", "0", '"true"', "[]", "{}"])
def test_what_is_no_boolean_is_a_wrong_type(value: str) -> None:
    """Nothing is taken for true or false that is not."""
    assert code_of(lambda: read(value).boolean("a")) == (400, "invalid_type", "a")


@pytest.mark.parametrize(
    ("value", "number"),
    [("0", 0), ("12", 12), ("-3", -3), ("null", None), ("9" * 400, int("9" * 400))],
)
def test_integer(value: str, number: int | None) -> None:
    """Integers of up to 400 characters are read."""
    assert read(value).integer("a") == number


@pytest.mark.parametrize(
    "value", ["1.5", "1e3", "1.0", '"1"', "true", "[]", "{}", "9" * 401, "-" + "9" * 400]
)
def test_what_is_no_integer_is_a_wrong_type(value: str) -> None:
    """Other numbers, other types, and numbers of over 400 characters are refused."""
    assert code_of(lambda: read(value).integer("a")) == (400, "invalid_type", "a")


def test_object() -> None:
    """An object is split at its top level, its values as written, lone surrogates too."""
    found = read(r'{"x": 1.50, "y": [ ], "z": "\ud800"}').object("a")
    assert found is not None
    assert {key: bytes(raw) for key, raw in found.items()} == {
        "x": b"1.50",
        "y": b"[ ]",
        "z": rb'"\ud800"',
    }
    assert read("null").object("a") is None


@pytest.mark.parametrize("value", ["[]", "1", '"{}"', "true"])
def test_what_is_no_object_is_a_wrong_type(value: str) -> None:
    """Another type names the field."""
    assert code_of(lambda: read(value).object("a")) == (400, "invalid_type", "a")


@pytest.mark.parametrize(
    ("value", "good"),
    [('"x"', True), ("[1]", True), ("null", True), ("1", False), ("{}", False), ("true", False)],
)
def test_require_one_of(value: str, *, good: bool) -> None:
    """A field must begin like one of the expected types, or be null."""

    def require() -> None:
        read(value).require_one_of("a", (b'"', b"["), "a string or an array")

    if good:
        require()
    else:
        assert code_of(require) == (400, "invalid_type", "a")


@pytest.mark.parametrize(
    ("body", "given"), [(b"{}", False), (b'{"a":null}', False), (b'{"a":{}}', True)]
)
def test_null_is_not_given(body: bytes, *, given: bool) -> None:
    """A field that is null is as good as absent."""
    assert ("a" in Envelope.parse(body)) is given


@given(OBJECTS, st.text(max_size=3), VALUES)
def test_put_changes_one_value(whole: dict[str, Any], name: str, value: object) -> None:
    """A value is replaced where it stands, or added; all others stay."""
    envelope = Envelope.parse(json.dumps(whole).encode())
    envelope.put(name, value)
    assert json.loads(envelope.encode()) == {**whole, name: value}
    assert list(json.loads(envelope.encode())) == list({**whole, name: value})
