"""Odd JSON of upstreams: amended, kept and gathered it is still what it was, and still JSON."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from aiproxy import jsontext
from aiproxy.dialects import Asked, members_of
from aiproxy.dialects.responses_object import amended, produced, with_response
from aiproxy.dialects.responses_output import Output
from test_jsontext import Member, objects, text_of

NAMES = st.sampled_from(["id", "store", "model"])
ALIKE = st.sampled_from(["1", "12", "null", '"id"', '{"id":1}', '{ "store":null,"id":12}'])
MEMBERS = st.builds(
    lambda members, values: [
        member._replace(value=value) for member, value in zip(members, values, strict=False)
    ],
    st.lists(objects(keys=NAMES), min_size=1, max_size=1).map(lambda drawn: drawn[0][:4]),
    st.lists(ALIKE, min_size=4, max_size=4),
)
OWN = {"id": b'"resp_ours"', "previous_response_id": b"null", "store": b"true"}


def known_of(document: bytes) -> dict[str, bytes]:
    """Return the members as the dialects read them."""
    members = members_of(document)
    assert members is not None
    return {name: bytes(value) for name, value in members.items()}


@given(MEMBERS, st.dictionaries(NAMES, st.integers(0, 99)), st.booleans())
def test_amend_is_decoding_and_encoding(
    members: list[Member],
    new: dict[str, int],
    adds: bool,  # noqa: FBT001
) -> None:
    """Also where names come twice, with escapes, and where values begin alike."""
    document = text_of(members)
    values = {name: str(value).encode() for name, value in new.items()}
    done = jsontext.amend(document, known_of(document), values, tuple(new) if adds else ())
    old: dict[str, Any] = json.loads(document)
    assert json.loads(done) == old | {n: v for n, v in new.items() if adds or n in old}
    assert not adds or json.loads(done) == old | new


ODD = {
    b'{"\\u0069d":1,"a":{"id":1}}': b'{"\\u0069d":9,"a":{"id":1}}',
    b'{"id":1,"id":1}': b'{"id":9,"id":9}',
    b'{"id":12,"id":1}': b'{"id":9,"id":9}',
    b'{"id":1,"\\u0069d":1}': b'{"id":9,"\\u0069d":9}',
    b'{"a":{"id":1}}': b'{"a":{"id":1},"id":9}',
}


@pytest.mark.parametrize("document", ODD)
def test_odd_documents(document: bytes) -> None:
    """Names given twice or with escapes are told apart."""
    assert jsontext.amend(document, known_of(document), {"id": b"9"}, ("id",)) == ODD[document]


@pytest.mark.parametrize("response", [b'{"status":"completed","output":[]}', b"{}", b'{"x":1} '])
def test_a_response_without_any_of_our_members_gets_them(response: bytes) -> None:
    """It stays JSON, with all that it had."""
    done = amended(response, members_of(response) or {}, Asked("m", stream=True, own=OWN))
    expected = {"id": "resp_ours", "previous_response_id": None, "store": True}
    assert json.loads(done) == json.loads(response) | expected


@pytest.mark.parametrize(
    "response",
    [
        b'{"id":"r","text":{"output":[]}}',
        b'{"id":"r","\\u006futput":[],"text":{"output":[]}}',
        b'{"id":"r","\\ud800":1}',
        b'{"id":"r","output":[],"output":[]}',
    ],
)
def test_an_object_gets_what_was_gathered(response: bytes) -> None:
    """The output is the object's own, wherever others of that name stand."""
    gathered = Output()
    gathered.finish(Raw(b'{"type":"message"}'), 0)
    kept = produced(response, gathered)
    whole = json.loads(kept.before + kept.output + kept.after)
    assert whole == json.loads(response) | {"output": [{"type": "message"}]}


def test_text_after_items_without_indexes_comes_last() -> None:
    """A server without any index sends its items in their order."""
    gathered = Output()
    gathered.finish(Raw(b'{"type":"reasoning"}'), None)
    gathered.finish(Raw(b'{"type":"function_call"}'), None)
    gathered.text(b'{"type":"response.output_text.delta","delta":"x"}')
    kinds = [json.loads(item)["type"] for item in gathered.items()]
    assert kinds == ["reasoning", "function_call", "message"]


@pytest.mark.parametrize("text", [b"\\q", b"a\x01b", b"\xff", b"\\u12"])
def test_deltas_that_are_no_json_are_not_kept_as_json(text: bytes) -> None:
    """What is kept can be sent again, whatever the upstream wrote."""
    gathered = Output()
    gathered.text(b'{"type":"response.output_text.delta","delta":"%b","output_index":0}' % text)
    for item in gathered.items():
        json.loads(item)


@pytest.mark.parametrize(
    "data",
    [
        b'{"type":"x","response":{"id":"r1"}, "response":{"id":"r2"}}',
        b'{"type":"x","response":{"id":"r2"}, "response":{"id":"r2"}}',
        rb'{"type":"x","\u0072esponse":{"id":"r1"},"response":{"id":"r2"} }',
        rb'{"type":"\"response\":","x":{"response":{"id":"r3"}},"response":{"id":"r2"}}',
    ],
)
def test_no_reader_of_an_event_sees_another_response(data: bytes) -> None:
    """Whichever of two response objects a reader takes, it has what is ours in it."""
    event = members_of(data)
    assert event is not None
    told = with_response(data, event, b'{"id":"ours"}')
    found = [
        told[start:end]
        for key, start, end in jsontext.members(told)
        if jsontext.key_text(key) == "response"
    ]
    assert found == [b'{"id":"ours"}'] * (1 if b"r3" in data else 2)
    assert told.count(b"r3") == data.count(b"r3")
