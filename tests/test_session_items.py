"""Items as text: cut, joined, counted, replayed and listed without changing a byte of one."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy import jsontext
from aiproxy.dialects import responses_items as ri
from aiproxy.dialects.responses_items import Replayed
from aiproxy.sessions.items import LONGEST_ID, array, elements, identified, ids_of, item_id, joined
from cost import least

SPACE = st.sampled_from(["", " ", "\n\t ", "\r\n"])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ITEMS = st.lists(st.dictionaries(st.sampled_from(["id", "type", "x", "\ud800"]), VALUES))


@given(ITEMS, SPACE, st.booleans())
def test_an_array_is_cut_and_joined_again(items: Any, space: str, escaped: bool) -> None:  # noqa: FBT001
    """Whatever the spelling, each item keeps its bytes, and nothing comes between them."""
    written = [
        json.dumps(item, ensure_ascii=escaped or "\\ud800" in json.dumps(item)).encode(
            "utf-8", "replace"
        )
        for item in items
    ]
    inner = f"{space},{space}".encode().join(written)
    whole = b"[" + space.encode() + inner + space.encode() + b"]"
    assert elements(whole) == written
    assert elements(joined([whole, b"[ ]", whole])) == written * 2
    assert elements(array(written)) == written


def test_ids_are_found_however_they_are_written() -> None:
    """Items with an id are known by it; without one, or with an endless one, they are not."""
    given_ = (
        b'[{"id":"a"},{"x":1},{"i\\u0064":"b"},{"id":7},{"id":""},{"id":null},{"id":"\\ud800"}]'
    )
    made = b'[ {"id":"c","lone":"\\ud800"} , {"id":"%b"}]' % (b"x" * (LONGEST_ID + 1))
    found = identified(given_, made)
    assert [(item.id, item.output, item.position) for item in found] == [
        ("a", False, 0), ("b", False, 2), ("c", True, 0),
    ]  # fmt: skip
    assert [item.size for item in found] == [10, 15, 26]
    assert ids_of(given_, made) >= {"a", "b", "c"}


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (b'{"id":"a"}', "a"),
        (b'{"id":"a","id":"b"}', "b"),
        (rb'{"\u0069d":"\u0061"}', "a"),
        (rb'{"x":"\ud800","id":"a"}', "a"),
        (rb'{"x":"\ud800","id":"\u8800\ud83d\ude00"}', "\u8800\U0001f600"),
        (rb'{"x":"\uD800","id":"\ud800"}', None),
        (rb'{"id":"\ud800"}', None),
        (rb'{"id":"\ud800","id":null}', None),
        (b'{"id":7}', None),
        (b'{"id":["a"]}', None),
        (b'"id"', None),
        (b"7", None),
        (b"{}", None),
    ],
)
def test_the_id_of_an_item(item: bytes, expected: str | None) -> None:
    """It is a text of Unicode, whatever else is in the item."""
    assert item_id(item) == expected


def test_odd_ids_do_not_make_all_others_costly() -> None:
    """One item with an id of another kind leaves the work as small as what JSON itself costs."""
    whole = array([b'{"id":7}', *[b'{"id":"a","x":[%b]}' % (b"1," * 400 + b"1")] * 1000])
    assert least(lambda: ids_of(whole)) < 5 * least(lambda: json.loads(whole))


def test_an_image_weighs_as_its_tokens() -> None:
    """The data of an item counts by what it costs, not by its length."""
    data = "A" * 400_000
    item = {"id": "ig_1", "type": "image_generation_call", "result": data}
    (found,) = identified(b"[]", json.dumps([item]).encode())
    assert found.size > 400_000
    assert 4 * 1000 < found.weight < 10_000  # an image is 1,000 tokens at least


def test_reasoning_goes_back_to_its_origin_alone() -> None:
    """Without its encrypted content it goes nowhere; all else keeps its bytes."""
    ours = b'{ "type":"reasoning","id":"rs_1","encrypted_content":"gA" }'
    bare = b'{"type":"reasoning","id":"rs_2","encrypted_content":null}'
    text = b'{"type":"message" , "content":"reasoning: \\u00e9\\ud800"}'
    whole = array([ours, bare, text])
    assert ri.replayed(whole, same_origin=True) == Replayed(array([ours, text]), 0)
    assert ri.replayed(whole, same_origin=False) == Replayed(array([text]), 1)
    for kept in (array([text]), b"[ ]", array([b'{"type":"message","content":"\\u00e9"}'])):
        assert ri.replayed(kept, same_origin=False).items is kept
    hidden = array([b'{"type":"re\\u0061soning","encrypted_content":"gA"}'])
    assert ri.replayed(hidden, same_origin=False) == Replayed(b"[]", 1)


def test_a_listing_completes_messages() -> None:
    """A text is one message; ids are made where none came, the same each time; all else stays."""
    listed = ri.listed(ri.as_array(b'"Hi \\u00e9"'), "resp_x")
    ((item_id, item),) = listed
    assert item_id == "msg_x_0"
    assert jsontext.key_text(b'"id"') in json.loads(item)
    content = [{"type": "input_text", "text": "Hi é"}]
    assert json.loads(item) == {
        "id": "msg_x_0", "type": "message", "role": "user", "content": content,
    }  # fmt: skip
    other = b'{"type":"function_call_output","call_id":"c","output":"1.50"}'
    whole = b'{"id":"msg_a","type":"message","role":"assistant","content":[]}'
    easy = b'{"role":"assistant","content":"yes"}'
    (first, listed_other), (second, as_it_was), (_, said) = ri.listed(
        array([other, whole, easy]), "resp_x"
    )
    assert (first, second) == ("item_x_0", "msg_a")
    assert listed_other == other[:-1] + b',"id":"item_x_0"}'
    assert as_it_was == whole
    assert json.loads(said)["content"] == [{"type": "output_text", "text": "yes"}]
