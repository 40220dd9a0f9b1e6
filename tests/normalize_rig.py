"""Servers of the Responses API that leave things out, and what `normalize: true` makes of them.

Each tells one answer in its own way, as seen on the wire: llama.cpp, transformers serve, mocks.
"""

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from answers import CREATED_AT, deltas_of, fresh_id, sse
from client import Answer
from responses import function_item, message_item, reasoning_item
from rig import Proxy, prompt
from steps import Step, json_answer, stream
from validating import LIFECYCLE, TERMINAL, Fact, check_event, check_response, check_stream

Serve = Callable[..., Awaitable[Proxy]]

PATH = "/v1/responses"
MODES = ("replay", "upstream")


@dataclass(frozen=True)
class Said:
    """One answer: thoughts, a text, and calls by name, arguments and id."""

    text: str = ""
    thought: str = ""
    calls: Sequence[tuple[str, str, str]] = ()
    input: int = 11
    output: int = 7
    model: str = "gpt-test"
    answer_id: str = field(default_factory=lambda: fresh_id("resp"))

    def short(self) -> list[Any]:
        """Return what each of its items says; as `short` does of a response."""
        thought = [("reasoning", self.thought)] if self.thought else []
        text = [("message", self.text)] if self.text else []
        return [*thought, *text, *self.calls]

    @property
    def usage(self) -> Fact:
        """Its usage without any details."""
        total = self.input + self.output
        return {
            "input_tokens": self.input,
            "output_tokens": self.output,
            "total_tokens": total,
        }


def short(response: Fact) -> list[Any]:
    """Return what each item of a response says."""
    return [_short(item) for item in response["output"]]


def _short(item: Fact) -> Any:
    match item["type"]:
        case "message":
            return ("message", "".join(part["text"] for part in item["content"]))
        case "reasoning":
            parts = [*(item.get("content") or ()), *item["summary"]]
            return ("reasoning", "".join(part["text"] for part in parts))
        case "function_call":
            return (item["name"], item["arguments"], item["call_id"])
        case kind:
            return (kind,)


class Server:
    """A kind of server; `named` says whether its frames have `event:` lines."""

    name: str
    named = True
    done = False  # [DONE] at the end
    texts_only = False

    def facts(self, said: Said) -> list[Fact]:
        """Return its events, not encoded yet."""
        raise NotImplementedError

    def whole(self, said: Said) -> Fact:
        """Return its JSON answer."""
        raise NotImplementedError

    def frames(self, said: Said) -> list[bytes]:
        """Return its events as it sends them."""
        return self.framed(self.facts(said))

    def framed(self, facts: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Encode events as it does."""
        sent = [sse(fact, event=fact["type"] if self.named else None) for fact in facts]
        return [*sent, sse("[DONE]")] if self.done else sent

    def script(self, said: Said, *, streamed: bool) -> list[Step]:
        """Answer either way."""
        return stream(self.frames(said)) if streamed else json_answer(self.whole(said))


class LlamaCpp(Server):
    """No indices, no numbers, no logprobs, bare responses; all items end last."""

    name = "llama.cpp"

    def whole(self, said: Said) -> Fact:
        """See `Server`."""
        output = self._items(said)
        for item in output:
            item["status"] = "completed"
        return {
            "completed_at": CREATED_AT,
            "created_at": CREATED_AT,
            "id": said.answer_id,
            "model": said.model,
            "object": "response",
            "output": output,
            "status": "completed",
            "usage": said.usage,
        }

    def _items(self, said: Said) -> list[Fact]:
        items: list[Fact] = []
        if said.thought:
            items.append({
                "id": fresh_id("rs"), "summary": [], "type": "reasoning",
                "content": [{"text": said.thought, "type": "reasoning_text"}],
                "encrypted_content": "",
            })  # fmt: skip
        if said.text:
            part = {"type": "output_text", "annotations": [], "logprobs": [], "text": said.text}
            items.append({
                "type": "message", "status": "completed", "id": fresh_id("msg"), "content": [part],
                "role": "assistant",
            })  # fmt: skip
        items += [
            {"type": "function_call", "status": "completed", "arguments": arguments,
             "call_id": call_id, "name": name}
            for name, arguments, call_id in said.calls
        ]  # fmt: skip
        return items

    def facts(self, said: Said) -> list[Fact]:
        """See `Server`."""
        bare = {"id": said.answer_id, "object": "response", "status": "in_progress"}
        facts: list[Fact] = [
            {"type": "response.created", "response": bare},
            {"type": "response.in_progress", "response": bare},
        ]
        items, ends = self._items(said), list[Fact]()
        for item in items:
            opened, closed = self._told(item)
            facts += opened
            ends += closed
            ends.append({"type": "response.output_item.done", "item": item})
        whole = {
            "id": said.answer_id, "object": "response", "created_at": CREATED_AT,
            "status": "completed", "model": said.model, "output": items, "usage": said.usage,
        }  # fmt: skip
        return [*facts, *ends, {"type": "response.completed", "response": whole}]

    def _told(self, item: Fact) -> tuple[list[Fact], list[Fact]]:
        added = "response.output_item.added"
        if item["type"] == "function_call":
            opened = item | {"arguments": "", "status": "in_progress"}
            kind = "response.function_call_arguments.delta"
            return [
                {"type": added, "item": opened},
                *(
                    {"type": kind, "delta": piece, "item_id": item["call_id"]}
                    for piece in deltas_of(item["arguments"], 2)
                ),
            ], []
        here = {"item_id": item["id"]}
        part = item["content"][0]
        opened = item | {"content": [], "status": "in_progress"}
        told: list[Fact] = [{"type": added, "item": opened}]
        if item["type"] == "message":
            empty = {"type": "output_text", "text": ""}
            told.append({"type": "response.content_part.added", **here, "part": empty})
            ends = [
                {"type": "response.output_text.done", **here, "text": part["text"]},
                {"type": "response.content_part.done", **here, "part": part},
            ]
        else:
            ends = []
        kind = "output_text" if item["type"] == "message" else "reasoning_text"
        told += [
            {"type": f"response.{kind}.delta", "delta": piece, **here}
            for piece in deltas_of(part["text"], None)
        ]
        return told, ends


class Transformers(Server):
    """No `event:` lines, no `[DONE]`, times with a fraction; text alone."""

    name = "transformers"
    named = False
    texts_only = True

    def _base(self, said: Said) -> Fact:
        return {
            "id": said.answer_id, "created_at": CREATED_AT + 0.1234, "model": f"{said.model}@main",
            "object": "response", "tools": [], "parallel_tool_calls": False, "tool_choice": "auto",
        }  # fmt: skip

    def _item(self, said: Said) -> Fact:
        part = {"type": "output_text", "text": said.text, "annotations": []}
        return {
            "id": f"msg_{said.answer_id}", "type": "message", "status": "completed",
            "role": "assistant", "content": [part], "annotations": [],
        }  # fmt: skip

    def whole(self, said: Said) -> Fact:
        """See `Server`."""
        usage = {
            **said.usage,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        ended = {"status": "completed", "output": [self._item(said)], "usage": usage}
        return {**self._base(said), **ended}

    def facts(self, said: Said) -> list[Fact]:
        """See `Server`."""
        item = self._item(said)
        part = item["content"][0]
        place = {"output_index": 0, "item_id": item["id"], "content_index": 0}
        opened = {name: value for name, value in item.items() if name != "annotations"}
        base = {**self._base(said), "output": []}
        facts: list[Fact] = [
            {"type": "response.created", "response": {**base, "status": "queued"}},
            {"type": "response.in_progress", "response": {**base, "status": "in_progress"}},
            {"type": "response.output_item.added", "output_index": 0,
             "item": {**opened, "status": "in_progress", "content": []}},
            {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
            *({"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
              for piece in deltas_of(said.text, None)),
            {"type": "response.output_text.done", **place, "text": said.text, "logprobs": []},
            {"type": "response.content_part.done", **place, "part": part},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed", "response": self.whole(said)},
        ]  # fmt: skip
        return [{**fact, "sequence_number": number} for number, fact in enumerate(facts)]


class Mock(Server):
    """No sequence numbers, responses without tools, usage without details."""

    name = "mock"
    done = True

    def _items(self, said: Said) -> list[Fact]:
        items: list[Fact] = [reasoning_item(None, summary=said.thought)] if said.thought else []
        items += [message_item(said.text)] if said.text else []
        items += [function_item(name, given, call_id=each) for name, given, each in said.calls]
        for item in items:
            for part in item.get("content", ()):
                del part["logprobs"], part["annotations"]
        return items

    def _whole(self, said: Said, items: Sequence[Fact]) -> Fact:
        return {
            "id": said.answer_id, "object": "response", "created_at": CREATED_AT,
            "model": said.model, "status": "completed", "output": list(items), "usage": said.usage,
        }  # fmt: skip

    def whole(self, said: Said) -> Fact:
        """See `Server`."""
        return self._whole(said, self._items(said))

    def facts(self, said: Said) -> list[Fact]:
        """See `Server`."""
        items = self._items(said)
        begun = self._whole(said, [])
        del begun["usage"]
        begun["status"] = "in_progress"
        facts: list[Fact] = [
            {"type": "response.created", "response": begun},
            {"type": "response.in_progress", "response": begun},
        ]
        for at, item in enumerate(items):
            facts += self._told(item, {"output_index": at})
        return [*facts, {"type": "response.completed", "response": self._whole(said, items)}]

    def _told(self, item: Fact, place: Fact) -> list[Fact]:
        empty: Fact = {name: [] for name in ("content", "summary") if name in item}
        if "arguments" in item:
            empty["arguments"] = ""
        opened = {**item, **empty, "status": "in_progress"}
        here = {**place, "item_id": item["id"]}
        added = {"type": "response.output_item.added", **place, "item": opened}
        return [
            added, *self._text(item, here),
            {"type": "response.output_item.done", **place, "item": item},
        ]  # fmt: skip

    def _text(self, item: Fact, here: Fact) -> list[Fact]:
        match item["type"]:
            case "function_call":
                kind, told, tail = "function_call_arguments", "arguments", item["arguments"]
                part: Fact | None = None
            case "message":
                kind, told, part = "output_text", "text", item["content"][0]
                here = {**here, "content_index": 0}
                tail = item["content"][0]["text"]
            case _:
                kind, told, part = "reasoning_summary_text", "text", item["summary"][0]
                here = {**here, "summary_index": 0}
                tail = item["summary"][0]["text"]
        facts = [
            {"type": f"response.{kind}.delta", **here, "delta": piece}
            for piece in deltas_of(tail, None)
        ]
        facts.append({"type": f"response.{kind}.done", **here, told: tail})
        if part is None:
            return facts
        name = "content_part" if item["type"] == "message" else "reasoning_summary_part"
        opened = {"type": f"response.{name}.added", **here, "part": {**part, "text": ""}}
        return [opened, *facts, {"type": f"response.{name}.done", **here, "part": part}]


class Bare(Mock):
    """The least that some gateways send: items, deltas, and the end."""

    name = "bare"
    done = False

    def whole(self, said: Said) -> Fact:
        """See `Server`."""
        whole = super().whole(said)
        return {name: whole[name] for name in ("id", "status", "output", "usage")}

    def facts(self, said: Said) -> list[Fact]:
        """See `Server`."""
        kept = []
        for fact in super().facts(said):
            kind = fact["type"]
            if "part" in kind or kind.endswith((".in_progress", "_text.done", "arguments.done")):
                continue
            shown = {k: v for k, v in fact.items() if k not in ("item_id", "content_index")}
            if "response" in fact:
                names = ("id", "status", "output", "usage")
                shown["response"] = {n: v for n, v in fact["response"].items() if n in names}
            kept.append(shown)
        return kept


SERVERS: dict[str, Server] = {
    each.name: each for each in (LlamaCpp(), Transformers(), Mock(), Bare())
}

TALK = Said(
    "Grüße, 世界 und mehr", "Let me think.", [("f", '{"a": 1}', "call_1"), ("g", "{}", "call_2")]
)


def told_by(server: Server, said: Said = TALK) -> Said:
    """Return what of an answer a server can tell."""
    return Said(said.text, input=said.input, output=said.output) if server.texts_only else said


# The daemon before them


async def normalizing(serve: Serve, mode: str = "replay", **changes: Any) -> Proxy:
    """Start a daemon that completes what its upstream, of the Responses API alone, sends."""
    members = {"apis": ["responses"], "normalize": True, "sessions": mode}
    return await serve(upstreams={"scripted": members}, **changes)


async def ask(proxy: Proxy, *, streamed: bool, **fields: Any) -> Answer:
    """Ask for an answer."""
    body = prompt(**fields)
    return await proxy.post(PATH, body | ({"stream": True} if streamed else {}))


def facts_of(body: bytes) -> list[Fact]:
    """Return the events of a stream; `event:` lines, where they are, tell their types."""
    facts = []
    for name, data in Answer(200, {}, body).events():
        if data == "[DONE]":
            continue
        fact = json.loads(data)
        assert name in {"message", fact.get("type")}
        facts.append(fact)
    return facts


def check_native(body: bytes) -> Fact:
    """Assert that every event of a normalized stream is valid; return its response.

    The package and the schema differ in `error` events: there the package's form counts. What the
    server said of itself at its end alone could not be told before.
    """
    facts = facts_of(body)
    last = ended(facts)["response"]
    final = check_stream([_known(fact, last) for fact in facts], native=True, valid=False)
    for fact in facts:
        if fact["type"] == "error":
            assert isinstance(fact["message"], str)
            assert isinstance(fact.get("code"), str | None)
            assert isinstance(fact.get("param"), str | None)
        elif fact["type"] not in OTHERS:
            check_once(fact, check_event)
    return final


_ID = re.compile(r'"([a-z]+)_[A-Za-z0-9_-]{6,}"')
_TIME = re.compile(r'_at": \d+')
_right: set[str] = set()  # what was found to be right, without ids and times


def check_once(fact: Fact, check: Callable[[Fact], None]) -> None:
    """Assert that a fact is right, unless one that differs by ids and times alone was."""
    shape = _TIME.sub('_at": 1', _ID.sub(r'"\1_"', json.dumps(fact)))
    if shape not in _right:
        check(fact)
        _right.add(shape)


def _known(fact: Fact, last: Fact) -> Fact:
    """Return a lifecycle event with what could not be known yet as it turned out to be."""
    if fact["type"] not in LIFECYCLE:
        return fact
    early = {name: fact["response"][name] for name in EARLY}
    return {**fact, "response": {**last, **early}}


# Of a response: what is known from its beginning, and what changes.
EARLY = ("id", "object", "model", "previous_response_id", "store", "status", "output", "usage",
         "completed_at", "incomplete_details", "error")  # fmt: skip
OTHERS = {"response.vendor.thing", "vendor"}  # events that nobody knows


def check_normalized(answer: Answer) -> Fact:
    """Assert that an answer, whole or streamed, is valid; return its response."""
    assert answer.status == 200, answer
    if answer.headers["content-type"].startswith("text/event-stream"):
        return check_native(answer.body)
    response: Fact = answer.json()
    check_once(response, check_response)
    return response


def ended(facts: Sequence[Fact]) -> Fact:
    """Return the terminal event, which must be the last and the only one."""
    assert [fact.get("type") in TERMINAL for fact in facts].index(True) == len(facts) - 1
    return facts[-1]
