"""Members of an object replaced and added, every other byte as it was."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy import jsontext
from aiproxy.dialects import members_of

NAMES = st.sampled_from(["id", "store", "model", "a", "response"])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["id", '"id":', "{", "\\", "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : "), (",", " :\t")])


def amend(document: bytes, values: dict[str, bytes], add: tuple[str, ...] = ()) -> bytes:
    """Amend a document whose members are read as the dialects do."""
    members = members_of(document)
    assert members is not None
    known = {name: bytes(value) for name, value in members.items()}
    return jsontext.amend(document, known, values, add)


@given(st.dictionaries(NAMES, VALUES, max_size=5), SEPARATORS, st.sets(NAMES), st.booleans())
def test_it_is_what_decoding_and_encoding_would_make(
    document: dict[str, Any],
    separators: tuple[str, str],
    names: set[str],
    adds: bool,  # noqa: FBT001
) -> None:
    """The members named have their new values, also where others look like them; and back again."""
    raw = json.dumps(document, separators=separators, ensure_ascii=False).encode()
    values = {name: json.dumps(f"new {name}").encode() for name in names}
    amended = amend(raw, values, tuple(names) if adds else ())
    expected = document | {n: f"new {n}" for n in names if adds or n in document}
    assert json.loads(amended) == expected
    if not adds:
        old = {name: bytes(value) for name, value in (members_of(raw) or {}).items()}
        assert amend(amended, {name: old[name] for name in names if name in old}) == raw


ODD = {
    b'{"id":1,"id":2}': b'{"id":9,"id":9}',
    b'{"\\u0069d":1}': b'{"\\u0069d":9}',
    b'{"a":{"id":1},"id":1}': b'{"a":{"id":1},"id":9}',
    b'{"a":"id","id" \n: 1 }': b'{"a":"id","id" \n: 9 }',
    b'{"a":["id",{"id":1}],"\\u0069d":1}': b'{"a":["id",{"id":1}],"\\u0069d":9}',
    b'{"a":"\\"id\\":1","id":1,"z":1.0e1}': b'{"a":"\\"id\\":1","id":9,"z":1.0e1}',
    b"{}": b'{"id":9}',
    b'{ "a" : 1 } ': b'{ "a" : 1 ,"id":9} ',
}


@pytest.mark.parametrize("document", ODD)
def test_odd_documents(document: bytes) -> None:
    """Names given twice, nested, in texts, or with escapes are told apart."""
    assert amend(document, {"id": b"9"}, ("id",)) == ODD[document]


def test_a_span_that_is_not_certain_is_none() -> None:
    """Where a glance does not tell, nothing is guessed."""
    assert jsontext.span(b'{"a":{"id":1},"id":1}', "id", b"1") is None
    assert jsontext.span(b'{"\\u0069d":1}', "id", b"1") is None
    assert jsontext.span(b'{"id":1,"id":2}', "id", b"2") is None
    assert jsontext.span(b'{"id": 12,"a":{"id":1}}', "id", b"12") == (7, 9)
