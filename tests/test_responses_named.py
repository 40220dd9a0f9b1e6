"""What an input names of what was made before, however it is written, and what finding it costs."""

import json
from typing import Any

import pytest

from aiproxy import jsontext
from aiproxy.dialects import responses_named as rn
from aiproxy.dialects.responses_named import Reference
from aiproxy.errors import ProxyError
from cost import least

REFERENCES = {
    b'"text"': [],
    b"[]": [],
    b'[7,null,"id",{"x":{"id":"a"}}]': [],
    b'[{"type":"item_reference","id":"a"}]': [Reference(0, "a")],
    b'[7,{"type":"item_reference","id":"a"}]': [Reference(1, "a")],
    b'[{"role":"user","content":"x"},{"id":"a"}]': [Reference(1, "a")],
    b'[{"id":"a","type":null}]': [Reference(0, "a")],
    b'[{"id":"a","type":7,"role":null}]': [Reference(0, "a")],
    rb'[{"t\u0079pe":"item_reference","\u0069d":"\u0061"}]': [Reference(0, "a")],
    rb'[{"role":"user","content":"\ud800"}, {"type":"item_reference" , "id":"a","x":"\uD800"}]': [
        Reference(1, "a")
    ],
    b'[{"type":"item_reference"}]': [Reference(0, None)],
    b'[{"type":"item_reference","id":7}]': [Reference(0, None)],
    rb'[{"type":"item_reference","id":"\ud800"}]': [Reference(0, None)],
    b'[{"type":"message","id":"a","role":"user","content":"item_reference"}]': [],
    b'[{"type":"function_call","id":"a","call_id":"c","name":"n","arguments":"{}"}]': [],
}


@pytest.mark.parametrize("given", REFERENCES)
def test_references(given: bytes) -> None:
    """What any reader could take for a reference is one."""
    assert rn.named(given).references == REFERENCES[given]


@pytest.mark.parametrize("again", ["type", "id", "role", "t\\u0079pe", "\\u0069d"])
@pytest.mark.parametrize("first", [True, False])
def test_what_its_readers_would_read_differently(again: str, *, first: bool) -> None:
    """An item with two types, ids or roles is refused, by its place in the input."""
    twice = f'"{again}":"item_reference"'
    item = '"type":"message","id":"a","role":"user","content":"x"'
    both = f"{twice},{item}" if first else f"{item},{twice}"
    with pytest.raises(ProxyError) as caught:
        rn.named(f'[{{"id":"b","type":"x"}},{{ {both} }}]'.encode())
    assert (caught.value.status, caught.value.param) == (400, "input[1]")


# Whole items as clients send them back that keep nothing at the upstream.
TEXT = [{"type": "output_text", "text": "x", "annotations": []}]
WHOLE: list[dict[str, Any]] = [
    {"type": "message", "role": "user", "content": "x"},
    {"role": "user", "content": "x"},
    {"type": None, "role": "assistant", "content": TEXT},
    {"type": "message", "role": "assistant", "status": "completed", "content": TEXT},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": ""}]},
    {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    {"type": "message", "role": "user", "content": [{"type": "input_file", "file_id": "f"}]},
    {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": "u"}]},
    {"type": "message", "role": "user",
     "content": [{"type": "input_audio", "input_audio": {"data": "A", "format": "mp3"}}]},
    {"type": "reasoning", "summary": [], "encrypted_content": "gA"},
    {"type": "compaction", "encrypted_content": "gA"},
    {"type": "function_call", "call_id": "c", "name": "n", "arguments": ""},
    {"type": "function_call_output", "call_id": "c", "output": ""},
    {"type": "function_call_output", "output": [{"type": "input_text", "text": "x"}]},
    {"type": "custom_tool_call", "call_id": "c", "name": "n", "input": ""},
    {"type": "custom_tool_call_output", "call_id": "c", "output": "x"},
    {"type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "q"}},
    {"type": "web_search_call", "status": "completed", "action": {"type": "search"}},
    {"type": "file_search_call", "status": "completed", "queries": ["q"], "results": None},
    {"type": "image_generation_call", "status": "completed", "result": "AAAA"},
    {"type": "code_interpreter_call", "code": "1", "container_id": "c", "outputs": None},
    {"type": "computer_call", "call_id": "c", "action": {"type": "click", "x": 1, "y": 2}},
    {"type": "computer_call", "call_id": "c", "actions": [{"type": "type", "text": "x"}]},
    {"type": "computer_call_output", "call_id": "c",
     "output": {"type": "computer_screenshot", "image_url": "u"}},
    {"type": "local_shell_call", "call_id": "c", "action": {"type": "exec", "command": ["ls"]}},
    {"type": "local_shell_call_output", "output": "x"},
    {"type": "shell_call", "call_id": "c", "action": {"commands": ["ls"]}},
    {"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "x", "stderr": ""}]},
    {"type": "apply_patch_call", "call_id": "c", "operation": {"type": "delete_file", "path": "p"}},
    {"type": "apply_patch_call_output", "call_id": "c", "status": "completed"},
    {"type": "mcp_list_tools", "server_label": "s", "tools": [{"name": "n", "input_schema": {}}]},
    {"type": "mcp_call", "server_label": "s", "name": "n", "arguments": "{}", "output": None},
    {"type": "mcp_approval_request", "server_label": "s", "name": "n", "arguments": "{}"},
    {"type": "mcp_approval_response", "approval_request_id": "r", "approve": True},
    {"type": "tool_search_call", "call_id": None, "arguments": {"query": "x"}},
    {"type": "tool_search_output", "call_id": None, "tools": [{"type": "function", "name": "n"}]},
]  # fmt: skip


@pytest.mark.parametrize("item", WHOLE, ids=lambda item: str(item.get("type")))
@pytest.mark.parametrize("separators", [(",", ":"), (" ,\n", " : ")])
def test_whole_items_pass(item: dict[str, Any], separators: tuple[str, str]) -> None:
    """An item that speaks for itself may have any id: nothing is looked up for it."""
    for whole in ({"id": "x_1", **item}, {**item, "id": "x_1"}, {**item, "id": None}):
        given = json.dumps([whole], separators=separators).encode()
        assert rn.named(given) == rn.NONE


SPACE = b" \n" * 5000
# Items that say nothing but their id `a`, or nothing that is known to be enough.
BARE = [
    b'"type":"image_generation_call"',
    b'"type":"image_generation_call","result":null,"status":"completed"',
    b'"type":"image_generation_call","result":false',
    b'"type":"image_generation_call","result":["x"]',
    b'"type":"image_generation_call","result":""',
    b'"type":"image_generation_call","x":1,"y":"z"',
    rb'"type":"image\u005fgeneration_call","status":"completed"',
    b'"type":"reasoning","summary":[]',
    b'"type":"reasoning","summary":[],"encrypted_content":[' + SPACE + b"]",
    b'"type":"reasoning","summary":[],"content":[' + SPACE + b"]",
    b'"type":"reasoning","summary":[],"encrypted_content":"","x":1',
    b'"type":"reasoning","encrypted_content":{"x":"y"}',
    b'"type":"reasoning","summary":[{"type":"summary_text","text":"x"}]',
    b'"type":"reasoning","summary":[],"content":[{"type":"reasoning_text","text":"x"}]',
    b'"type":"message","role":"assistant","content":[]',
    b'"type":"message","role":"assistant","content":[' + SPACE + b"]",
    b'"type":"message","role":"assistant","content":[{"type":"output_text"}]',
    b'"type":"message","role":"assistant","content":[{},[],0,false]',
    b'"type":"message","role":"assistant","content":""',
    b'"type":"message","role":"assistant"',
    b'"role":"assistant"',
    b'"type":7,"role":"assistant","content":"x"',
    b'"type":"web_search_call","status":"completed","action":{}',
    b'"type":"web_search_call","status":"completed","action":{"query":""}',
    b'"type":"web_search_call","status":"completed","query":"x"',
    b'"type":"function_call","call_id":"c","name":"n"',
    b'"type":"function_call","call_id":"c","name":"","arguments":""',
    b'"type":"function_call_output","output":""',
    b'"type":"code_interpreter_call","code":"","container_id":"c","outputs":[]',
    b'"type":"what comes next","content":"x"',
]


@pytest.mark.parametrize("item", BARE, ids=lambda item: item[:60].decode())
def test_what_an_upstream_may_look_up(item: bytes) -> None:
    """An item that does not say itself what it is stands for what the upstream knows of it."""
    for given in (
        b'[{"id":"a",%b}]',
        b'[{%b,"id":"a"}]',
        b'[{}, { %b , "\\u0069d" : "\\u0061" } ]',
    ):
        assert rn.named(given % item) == ([], ["a"], None)


UNCLEAR = {
    b'{"type":"image_generation_call","id":"a","result":"A","result":null}': "input[1]",
    b'{"type":"message","id":"a","role":"user","content":[],"content":"x"}': "input[1]",
    b'{"type":"message","id":"a","role":"user","content":"x","y":1,"y":1}': "input[1]",
    rb'{"type":"image_generation_call","id":"\ud800"}': "input[1].id",
    b'{"type":"image_generation_call","id":7}': "input[1].id",
    b'{"type":"image_generation_call","id":["a"]}': "input[1].id",
}


@pytest.mark.parametrize("item", UNCLEAR)
def test_what_may_be_anything(item: bytes) -> None:
    """An item with a name given twice, or an id that is none, is told by its place."""
    found = rn.named(b'[{"type":"x","id":"b"},%b]' % item)
    assert found.unclear is not None
    assert (found.unclear.status, found.unclear.param) == (400, UNCLEAR[item])


def test_too_many_are_not_looked_at() -> None:
    """The number of items that a request may name is bounded, also of the same one."""
    item = b'{"type":"item_reference","id":"a"}'
    few = b",".join([item] * rn.MOST)
    assert len(rn.named(b"[%b]" % few).references) == rn.MOST
    with pytest.raises(ProxyError) as caught:
        rn.named(b"[%b,%b]" % (few, item))
    assert (caught.value.status, caught.value.param) == (400, "input")


LARGE = 1024 * 1024
# What takes the longest to look at, a byte.
COSTLY = {
    "escapes": rb'{"type":"message","role":"user","content":"\u0061\u00e9"}',
    "escaped types": rb'{"id":null,"type":"m\u0065ssage","role":"user","content":"x"}',
    "ids": b'{"type":"message","id":"msg_1","role":"user","content":"x"}',
    "surrogates": rb'{"type":"message","id":"msg_1","role":"user","content":"\ud800"}',
    "twice": b'{"type":"message","id":"a","role":"user","content":"x","x":1,"x":1}',
    "bare": b'{"id":"a","type":"x"}',
    "numbers": rb'7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,{"\u0061":7}',
    "one": rb'{"type":"message","id":"a","content":[' + b"7," * 2_000_000 + rb'"\u0061"]}',
}


@pytest.mark.parametrize("kind", COSTLY)
def test_the_work_is_linear(kind: str) -> None:
    """It costs a few times what any reader of JSON needs for the same bytes, whatever they are."""
    item = COSTLY[kind]
    given = b"[" + b",".join([item] * max(1, LARGE // len(item))) + b"]"
    assert least(lambda: rn.named(given)) < 15 * least(lambda: json.loads(given))


def test_quotes_tell_whether_names_are_distinct() -> None:
    """A name that is given twice is found, whatever the other names and values are."""
    for document, expected in {
        b"{}": True,
        b'{"a":"\\"x\\"","b":[{"c":1,"c":2}], "d" : "e"}': True,
        b'{"a":1,"a":1}': False,
        rb'{"a":1,"\u0061":1}': False,
        rb'{"a\"":1}': False,  # it cannot be told
    }.items():
        members = {key: value.encode() for key, value in _members(document).items()}
        assert jsontext.distinct(document, members) is expected


def _members(document: bytes) -> dict[str, str]:
    return {
        jsontext.key_text(key): document[start:end].decode()
        for key, start, end in jsontext.members(document)
    }
