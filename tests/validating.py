"""Answers of the Responses API, held to the types of the `openai` package and to Open Responses.

`openresponses.json` is what is used here of the specification's schema (openresponses.org): without
its prose, and with any schema in a `json_schema` format, where the original allows but null.
"""

import functools
import importlib
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from client import Answer, parse_sse

jsonschema: Any = importlib.import_module("jsonschema")  # it has no types of its own

Fact = dict[str, Any]

TERMINAL = ("response.completed", "response.incomplete", "response.failed")
LIFECYCLE = ("response.created", "response.queued", "response.in_progress")
_ITEMS = {"message", "function_call", "function_call_output", "reasoning"}  # of the schema

# The kinds of text: how its events begin, the member of its done event, its index, and the
# events of the part that it is in.
_TEXTS = {
    "response.output_text": ("text", "content_index", "response.content_part"),
    "response.refusal": ("refusal", "content_index", "response.content_part"),
    "response.reasoning_text": ("text", "content_index", "response.content_part"),
    "response.reasoning_summary_text": (
        "text",
        "summary_index",
        "response.reasoning_summary_part",
    ),
    "response.function_call_arguments": ("arguments", None, None),
    "response.custom_tool_call_input": ("input", None, None),
}


@functools.cache
def _models() -> dict[str, type[BaseModel]]:
    """Return the type of each event by its name."""
    union = typing.get_args(ResponseStreamEvent)[0]
    models: dict[str, type[BaseModel]] = {}
    for model in typing.get_args(union):
        for name in typing.get_args(model.model_fields["type"].annotation):
            models[name] = model
    return models


@functools.cache
def _schema() -> Fact:
    text = (Path(__file__).parent / "openresponses.json").read_text()
    return typing.cast("Fact", json.loads(text))


@functools.cache
def _schema_names() -> dict[str, str]:
    """Return the name of each event's schema by the event's own."""
    schemas = _schema()["components"]["schemas"]
    return {
        schema["properties"]["type"]["enum"][0]: name
        for name, schema in schemas.items()
        if name.endswith("StreamingEvent")
    }


@functools.cache
def _validator(name: str) -> Any:
    whole = {"$ref": f"#/components/schemas/{name}", **_schema()}
    return jsonschema.Draft202012Validator(whole)


def _told(response: Fact) -> Fact:
    """Return a response without the items, tools and choices that the schema does not know."""
    choice = response.get("tool_choice")
    odd = isinstance(choice, dict) and any(
        each.get("type") not in {"function", "allowed_tools"}
        for each in (choice, *choice.get("tools", ()))
    )
    return {
        **response,
        "output": [item for item in response["output"] if item["type"] in _ITEMS],
        "tools": [tool for tool in response["tools"] if tool["type"] == "function"],
        "tool_choice": "auto" if odd else choice,
    }


def _check_schema(name: str, fact: Fact) -> None:
    wrong = jsonschema.exceptions.best_match(_validator(name).iter_errors(fact))
    assert wrong is None, f"{name}: {wrong.json_path}: {wrong.message}"


def check_response(response: Fact) -> None:
    """Assert that a response object is whole and right, by the package and by the schema."""
    Response.model_validate(response, strict=True)
    _check_schema("ResponseResource", _told(response))
    check_state(response)


def check_event(event: Fact) -> None:
    """Assert that an event is whole and right, by the package and by the schema."""
    kind = event["type"]
    assert kind in _models(), f"the package knows no {kind}"
    _models()[kind].model_validate(event, strict=True)
    if "response" in event:
        check_response(event["response"])
        event = {**event, "response": _told(event["response"])}
    known = "item" not in event or event["item"]["type"] in _ITEMS
    if known and kind in _schema_names():
        _check_schema(_schema_names()[kind], event)


def check_state(response: Fact) -> None:
    """Assert that the status of a response and what explains it fit together."""
    status = response["status"]
    assert status in {"queued", "in_progress", "completed", "incomplete", "failed"}
    assert (response["completed_at"] is not None) is (status == "completed")
    assert (response["incomplete_details"] is not None) is (status == "incomplete")
    assert (response["error"] is not None) is (status == "failed")
    usage = response["usage"]
    if usage is not None:
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@dataclass
class _Text:
    """A text that is being told."""

    kind: str | None = None
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    annotations: list[Any] = field(default_factory=list)
    done: bool = False
    closed: bool = False


@dataclass
class _Item:
    """An item that is being told; its texts by member and place."""

    added: Fact
    texts: dict[tuple[str, int], _Text] = field(default_factory=dict)
    done: Fact | None = None


class _Story:
    """What a stream has told so far."""

    def __init__(self, *, native: bool) -> None:
        self.native = native
        self.items: list[_Item] = []

    def read(self, event: Fact) -> None:
        """Take one event that is neither of the lifecycle nor terminal."""
        kind = event["type"]
        if kind == "response.output_item.added":
            self._added(event)
        elif kind == "response.output_item.done":
            self._done(event)
        elif kind in {f"{part}.{step}" for part in _PARTS for step in ("added", "done")}:
            self._part(event, kind.endswith("added"))
        elif kind == "response.output_text.annotation.added":
            text = self._text(event, "response.output_text")
            assert event["annotation_index"] == len(text.annotations)
            text.annotations.append(event["annotation"])
        elif kind.rpartition(".")[0] in _TEXTS:
            self._said(event, *kind.rpartition(".")[::2])
        else:
            assert self.native, f"a bridge sends no {kind}"

    def _added(self, event: Fact) -> None:
        item = event["item"]
        assert event["output_index"] == len(self.items), "items come in order of arrival"
        assert item["id"] not in {each.added["id"] for each in self.items}
        assert item.get("status", "in_progress") == "in_progress"
        for member in ("content", "summary", "arguments", "input"):
            assert not item.get(member), f"an item begins without its {member}"
        self.items.append(_Item(item))

    def _done(self, event: Fact) -> None:
        item, told = self._item(event["output_index"]), event["item"]
        assert told["id"] == item.added["id"]
        assert told["type"] == item.added["type"]
        assert told.get("status") != "in_progress"
        for name in ("role", "name", "call_id"):
            assert told.get(name) == item.added.get(name), name
        for member in ("content", "summary"):
            parts = told.get(member) or []
            mine = {at: text for (name, at), text in item.texts.items() if name == member}
            assert list(mine) == list(range(len(parts))), f"{member} of {told}"
            for at, part in enumerate(parts):
                assert mine[at].closed, f"{member}[{at}] is not done"
                _check_part(part, mine[at])
        for member in ("arguments", "input"):
            if member in told:
                text = item.texts.get((member, 0), _Text())
                assert (told[member], text.done) == (text.text, True), member
        item.done = told

    def _item(self, index: int, item_id: str | None = None) -> _Item:
        item = self.items[index]
        assert item.done is None, f"item {index} is done already"
        assert item_id in {None, item.added["id"]}, f"{item_id} is not item {index}"
        return item

    def _text(self, event: Fact, kind: str) -> _Text:
        """Find the text that an event is about: it is there once its part was added."""
        member, index, part = _TEXTS[kind]
        item = self._item(event["output_index"], event["item_id"])
        if index is None or part is None:
            return item.texts.setdefault((member, 0), _Text(kind))
        text = item.texts[index.partition("_")[0], event[index]]
        assert text.kind == kind, "an event of another kind of text than its part"
        assert not text.closed
        return text

    def _part(self, event: Fact, added: bool) -> None:  # noqa: FBT001 - of two steps
        item = self._item(event["output_index"], event["item_id"])
        index = "summary_index" if "summary_index" in event else "content_index"
        where = (index.partition("_")[0], event[index])
        if not added:
            text = item.texts[where]
            assert text.done, "a part ends after its text"
            _check_part(event["part"], text)
            text.closed = True
            return
        assert where[1] == sum(name == where[0] for name, _ in item.texts), "parts come in order"
        part = event["part"]
        kinds = {"output_text": "output_text", "summary_text": "reasoning_summary_text"}
        kind = f"response.{kinds.get(part['type'], part['type'])}"
        item.texts[where] = text = _Text(kind)
        _check_part(part, text)

    def _said(self, event: Fact, kind: str, step: str) -> None:
        text = self._text(event, kind)
        assert not text.done, "nothing follows the end of a text"
        if step == "delta":
            text.text += event["delta"]
            text.logprobs += event.get("logprobs") or []
            return
        assert event[_TEXTS[kind][0]] == text.text, "the deltas are the text"
        assert (event.get("logprobs") or []) == text.logprobs
        text.done = True


_PARTS = {part for _, _, part in _TEXTS.values() if part is not None}


def _check_part(part: Fact, text: _Text) -> None:
    """Assert that a part is what was told of it."""
    assert part["refusal" if part["type"] == "refusal" else "text"] == text.text
    if part["type"] == "output_text":
        assert part["annotations"] == text.annotations
        assert (part.get("logprobs") or []) == text.logprobs


def check_stream(events: Sequence[Fact], *, native: bool = False, valid: bool = True) -> Fact:
    """Assert that events are one whole and right stream; return the final response.

    Args:
        events: decoded, without `[DONE]`.
        native: an upstream's own stream, in which events may be that a bridge does not send.
        valid: check each event with `check_event` too; `native` ones of unknown types are not.
    """
    kinds = [event["type"] for event in events]
    for event in events:
        if valid and (not native or event["type"] in _models()):
            check_event(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [kind for kind in kinds if kind in TERMINAL] == [kinds[-1]], kinds
    assert kinds[0] == "response.created"
    lifecycle = [kind for kind in kinds if kind in LIFECYCLE]
    assert lifecycle == kinds[: len(lifecycle)], "events of the lifecycle come first"
    if not native and kinds[1] != "response.failed":
        assert lifecycle == ["response.created", "response.in_progress"]
    story = _Story(native=native)
    for event in events[len(lifecycle) : -1]:
        story.read(event)
    return _check_end(events, story, len(lifecycle))


def _check_end(events: Sequence[Fact], story: _Story, opened: int) -> Fact:
    final: Fact = events[-1]["response"]
    assert events[-1]["type"] == f"response.{final['status']}"
    done = [item.done for item in story.items]
    assert final["output"] == [item for item in done if item is not None]
    if final["status"] != "failed":
        assert None not in done, "an item was not ended"
    for event in events[:opened]:
        first = event["response"]
        assert first["status"] in {"in_progress", "queued"}
        assert first["output"] == []
        assert first["usage"] is None
        ends = ("status", "output", "usage", "completed_at", "incomplete_details", "error")
        for name in final:
            if name not in (*ends, "service_tier"):
                assert first[name] == final[name], name
    return final


def facts_of(body: bytes) -> list[Fact]:
    """Return the events of a stream that a bridge made, whose names must be their types."""
    facts = []
    for name, data in parse_sse(body):
        fact = json.loads(data)
        assert fact["type"] == name
        facts.append(fact)
    return facts


def check_bridged(answer: Answer) -> Fact:
    """Assert that an answer, whole or streamed, is right; return its response."""
    assert answer.status == 200, answer
    if answer.headers["content-type"].startswith("text/event-stream"):
        return check_stream(facts_of(answer.body))
    response: Fact = answer.json()
    check_response(response)
    return response


_MADE = {"id", "item_id", "created_at", "completed_at"}


def timeless(value: Any) -> Any:
    """Return plain data without ids and times: what two answers to one request share."""
    if isinstance(value, Mapping):
        return {name: timeless(each) for name, each in value.items() if name not in _MADE}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [timeless(each) for each in value]
    return value
