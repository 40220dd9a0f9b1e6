"""An upstream that speaks only messages, and what it answers: one plan, whole or streamed.

A plan is a list of content blocks as a whole answer has them. `whole` and `events` tell the same
plan, so that what a bridge makes of both can be compared.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from answers import USAGE, Usage, deltas_of, fresh_id, sse
from client import Answer
from messages_items import FREE, F, Fields, G
from rig import Proxy, prompt
from steps import Step, json_answer, stream
from validating import check_bridged, timeless

if TYPE_CHECKING:
    from upstream import Recorded, ScriptedUpstream

Serve = Callable[..., Awaitable[Proxy]]
Block = dict[str, Any]
Fact = dict[str, Any]

PATH = "/v1/responses"
SIGNATURE = "EqQBCgIYAhIM+/sig=="
DEFAULT_MAX = 4096  # of a route that says nothing


def text(value: str, **members: Any) -> Block:
    """Build a text block."""
    return {"type": "text", "text": value, "citations": None, **members}


def thinking(value: str, signature: str = SIGNATURE) -> Block:
    """Build a block of thoughts."""
    return {"type": "thinking", "thinking": value, "signature": signature}


def redacted(data: str) -> Block:
    """Build a block of thoughts that are not shown."""
    return {"type": "redacted_thinking", "data": data}


def tool_use(name: str, given: Mapping[str, Any], call_id: str | None = None) -> Block:
    """Build a call of a tool."""
    return {
        "type": "tool_use",
        "id": call_id or fresh_id("toolu"),
        "name": name,
        "input": dict(given),
    }


@dataclass(frozen=True)
class Plan:
    """One answer; `stop` is its stop reason."""

    blocks: Sequence[Block]
    stop: str = "end_turn"
    stop_sequence: str | None = None
    usage: Usage = USAGE
    model: str = "gpt-test"
    answer_id: str = field(default_factory=lambda: fresh_id("msg"))

    def whole(self, **members: Any) -> Fact:
        """Tell it as a JSON answer."""
        return {
            "id": self.answer_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": list(self.blocks),
            "stop_reason": self.stop,
            "stop_sequence": self.stop_sequence,
            "usage": self.usage.messages(),
            **members,
        }

    def facts(self, pieces: int | None = None, *, in_start: bool = False) -> list[Fact]:
        """Tell it as events, not encoded yet.

        Args:
            pieces: of each text (default: its words) and each input (default: two).
            in_start: the inputs of tools are whole in the start of their blocks.
        """
        totals = self.usage.messages()
        early = totals | {"output_tokens": 1}
        early.pop("output_tokens_details")
        opened = self.whole(content=[], stop_reason=None, stop_sequence=None, usage=early)
        facts: list[Fact] = [{"type": "message_start", "message": opened}, {"type": "ping"}]
        for index, block in enumerate(self.blocks):
            start, deltas = _told(block, pieces, in_start=in_start)
            facts.append({"type": "content_block_start", "index": index, "content_block": start})
            facts += [
                {"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas
            ]
            facts.append({"type": "content_block_stop", "index": index})
        end = {"stop_reason": self.stop, "stop_sequence": self.stop_sequence}
        facts.append({"type": "message_delta", "delta": end, "usage": totals})
        return [*facts, {"type": "message_stop"}]

    def events(self, pieces: int | None = None, *, in_start: bool = False) -> list[bytes]:
        """Tell it as a stream."""
        return frames(self.facts(pieces, in_start=in_start))

    def script(self, *, streamed: bool, pieces: int | None = None) -> list[Step]:
        """Tell it either way."""
        return stream(self.events(pieces)) if streamed else json_answer(self.whole())


def _told(block: Block, pieces: int | None, *, in_start: bool) -> tuple[Block, list[Fact]]:
    """Return the start of a block, and its deltas."""
    match block["type"]:
        case "text":
            said = deltas_of(block["text"], pieces) if block["text"] else []
            deltas: list[Fact] = [{"type": "text_delta", "text": piece} for piece in said]
            deltas += [
                {"type": "citations_delta", "citation": each} for each in block["citations"] or ()
            ]
            return block | {"text": "", "citations": None}, deltas
        case "thinking":
            said = deltas_of(block["thinking"], pieces)
            deltas = [{"type": "thinking_delta", "thinking": piece} for piece in said]
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
            return block | {"thinking": "", "signature": ""}, deltas
        case "tool_use" if not in_start:
            value = json.dumps(block["input"]) if block["input"] else ""
            said = deltas_of(value, pieces or 2)
            deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in said]
            return block | {"input": {}}, deltas
        case _:
            return block, []


def frames(facts: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Encode events under their types."""
    return [sse(fact, event=fact["type"]) for fact in facts]


def llama_facts(plan: Plan, *, started: bool = True, signed: str = "") -> list[Fact]:
    """Tell a plan as llama.cpp does: all blocks end last, starts are bare, usage in two halves.

    Args:
        plan: its blocks.
        started: whether `message_start` comes, which that server leaves out at times.
        signed: the signature of its thoughts, which comes after all text.
    """
    usage = plan.usage
    opened = plan.whole(content=[], stop_reason=None)
    opened["usage"] = {"input_tokens": usage.input, "output_tokens": 0}
    facts: list[Fact] = [{"type": "message_start", "message": opened}] if started else []
    ends: list[Fact] = []
    for index, block in enumerate(plan.blocks):
        start, deltas = _told(block, 2, in_start=False)
        bare: Block = {name: start[name] for name in ("type", "id", "name") if name in start}
        shown = {"text": "text", "thinking": "thinking"}.get(block["type"])
        if shown is not None:
            bare[shown] = ""
        facts.append({"type": "content_block_start", "index": index, "content_block": bare})
        for delta in deltas:
            told = {"type": "content_block_delta", "index": index, "delta": delta}
            if delta["type"] == "signature_delta":
                ends.append({**told, "delta": {**delta, "signature": signed}})
            else:
                facts.append(told)
        ends.append({"type": "content_block_stop", "index": index})
    stop = {"stop_reason": plan.stop, "stop_sequence": None}
    count = {"output_tokens": usage.output}
    ends.append({"type": "message_delta", "delta": stop, "usage": count})
    return [*facts, *ends, {"type": "message_stop"}]


# The daemon before it


def speaking(*apis: str, **members: Any) -> dict[str, Any]:
    """Return `upstreams` in which the usual one speaks these APIs."""
    return {"scripted": {"apis": list(apis), **members}}


async def bridged(serve: Serve, members: Mapping[str, Any] | None = None, **changes: Any) -> Proxy:
    """Start a daemon whose upstream speaks messages alone; `members` are that upstream's."""
    return await serve(upstreams=speaking("messages", **(members or {})), **changes)


async def ask(proxy: Proxy, given: Any = "hi", **fields: Any) -> Answer:
    """Ask for a response; its `input` is this one."""
    return await proxy.post(PATH, prompt(**{"input": given, **fields}))


def plain(body: Mapping[str, Any]) -> Fact:
    """Return a request for messages in one form: contents are always lists of blocks."""
    return {**body, "messages": [_plain_message(each) for each in body["messages"]]}


def _plain_message(message: Mapping[str, Any]) -> Fact:
    return {**message, "content": _plain_content(message["content"])}


def _plain_content(content: Any) -> list[Block]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [_plain_block(each) for each in content]


def _plain_block(block: Block) -> Block:
    if block["type"] == "tool_result":
        return {**block, "content": _plain_content(block.get("content", ""))}
    if block["type"] == "document":
        return {name: value for name, value in block.items() if name != "title"}
    return block


def heard(request: "Recorded") -> list[Fact]:
    """Return the messages that an upstream was sent, in one form."""
    told: list[Fact] = plain(request.json())["messages"]
    return told


def check_asked(upstream: "ScriptedUpstream") -> Fact:
    """Assert that the last request is one for messages; return its body in one form."""
    request = upstream.requests[-1]
    assert (request.method, request.target) == ("POST", "/v1/messages")
    return plain(request.json())


# What it makes of answers

TOOLS: Fields = {"tools": [F, G, FREE]}
F1 = tool_use("f", {"a": 1}, "call_1")
F2 = tool_use("f", {"a": [1, {"b": "é\n"}]}, "call_2")
EMPTY = tool_use("g", {}, "call_3")
FREELY = tool_use("free", {"input": 'any *text*\n"{'}, "call_4")
SAID_F1, SAID_F2 = ("f", "call_1", {"a": 1}), ("f", "call_2", {"a": [1, {"b": "é\n"}]})
HM = ("Hm.", SIGNATURE)


async def answered(proxy: Proxy, *, streamed: bool, **fields: Any) -> Fact:
    """Ask for an answer, with every check of it; return its response."""
    return check_bridged(await ask(proxy, stream=streamed, **{**TOOLS, **fields}))


def meant(response: Fact) -> Fact:
    """Return a response without ids and times, and with arguments as what they mean."""
    fact: Fact = timeless(response)
    for item in fact["output"]:
        if item["type"] == "function_call":
            item["arguments"] = json.loads(item["arguments"])
    return fact


def short(response: Fact) -> list[Any]:
    """Return what each item of an answer says; items cut short have a `~` before."""
    return [_short(item) for item in meant(response)["output"]]


def _short(item: Fact) -> Any:
    cut = "~" if item.get("status") == "incomplete" else ""
    match item["type"]:
        case "message":
            assert item["role"] == "assistant"
            assert {part["type"] for part in item["content"]} <= {"output_text"}
            return cut + "".join(part["text"] for part in item["content"])
        case "function_call":
            return (cut + item["name"], item["call_id"], item["arguments"])
        case "custom_tool_call":
            return (cut + item["name"], item["call_id"], item["input"])
        case "reasoning":
            said = "".join(part["text"] for part in item["summary"])
            return (said, item.get("encrypted_content") or None)
        case kind:
            raise AssertionError(kind)
