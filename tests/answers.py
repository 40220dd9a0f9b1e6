"""Healthy answers of chat completions, messages and embeddings, as the real servers give them.

Those of the Responses API are in `responses`. Events are `bytes`, one server-sent event each,
with LF line ends; `steps.stream` sends them. Each answer is accepted by the types of the
SDKs (test_rig.py).
"""

import base64
import itertools
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CREATED_AT = 1_790_000_000
TEXT = "Hello world"

_numbers = itertools.count(1)


def fresh_id(prefix: str) -> str:
    """Make an id that no other answer of this process has."""
    return f"{prefix}_up{next(_numbers):06d}"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer. `cached` and `cache_write` are parts of `input`, as is `reasoning` of
    `output`; each API counts them in its own way.
    """  # noqa: D205 - one sentence does not fit the line

    input: int = 11
    cached: int = 3
    output: int = 7
    reasoning: int = 2
    cache_write: int = 0

    def responses(self) -> dict[str, Any]:
        """Return it as the Responses API does."""
        return {
            "input_tokens": self.input,
            "input_tokens_details": {
                "cached_tokens": self.cached,
                "cache_write_tokens": self.cache_write,
            },
            "output_tokens": self.output,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.input + self.output,
        }

    def chat(self) -> dict[str, Any]:
        """Return it as chat completions do."""
        return {
            "prompt_tokens": self.input,
            "prompt_tokens_details": {"cached_tokens": self.cached, "audio_tokens": 0},
            "completion_tokens": self.output,
            "completion_tokens_details": {"reasoning_tokens": self.reasoning, "audio_tokens": 0},
            "total_tokens": self.input + self.output,
        }

    def messages(self) -> dict[str, Any]:
        """Return it as messages do: there `input_tokens` leaves out both cache fields."""
        return {
            "input_tokens": self.input - self.cached - self.cache_write,
            "cache_creation_input_tokens": self.cache_write,
            "cache_read_input_tokens": self.cached,
            "output_tokens": self.output,
            "output_tokens_details": {"thinking_tokens": self.reasoning},
        }

    def embeddings(self) -> dict[str, Any]:
        """Return it as embeddings do: input alone."""
        return {"prompt_tokens": self.input, "total_tokens": self.input}

    def disjoint(self) -> dict[str, int]:
        """Return it as aiproxy counts it (contract 9): four types that add up."""
        return {
            "input": self.input - self.cached,
            "input_cached": self.cached,
            "output": self.output - self.reasoning,
            "output_reasoning": self.reasoning,
        }


USAGE = Usage()


def sse(data: Mapping[str, Any] | str, *, event: str | None = None) -> bytes:
    """Encode one server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data)
    head = "" if event is None else f"event: {event}\n"
    return f"{head}data: {text}\n\n".encode()


def deltas_of(text: str, count: int | None) -> list[str]:
    """Cut a text into `count` pieces, or into its words; never into none."""
    if count is None:
        return re.findall(r"[^ ]* +|[^ ]+$", text) or [""]
    size = max(1, -(-len(text) // count))
    return [text[at : at + size] for at in range(0, len(text), size)] or [""]


def tool_call(name: str, arguments: str, call_id: str | None = None) -> dict[str, Any]:
    """Build a function call of chat completions."""
    function = {"name": name, "arguments": arguments}
    return {"id": call_id or fresh_id("call"), "type": "function", "function": function}


def chat_json(
    text: str | None = TEXT,
    *,
    model: str = "gpt-test",
    usage: Usage | None = USAGE,
    finish_reason: str = "stop",
    tool_calls: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Build a whole chat completion."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "annotations": [],
    }
    if tool_calls:
        message["tool_calls"] = list(tool_calls)
        finish_reason = "tool_calls"
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
    answer = {
        "id": fresh_id("chatcmpl"),
        "object": "chat.completion",
        "created": CREATED_AT,
        "model": model,
        "choices": [choice],
        "service_tier": "default",
        "system_fingerprint": "fp_scripted",
    }
    return answer if usage is None else answer | {"usage": usage.chat()}


def chat_events(
    text: str = TEXT,
    *,
    model: str = "gpt-test",
    include_usage: bool = False,
    usage: Usage = USAGE,
    deltas: int | None = None,
    finish_reason: str = "stop",
    tool_calls: Sequence[Mapping[str, Any]] = (),
    done: bool = True,
) -> list[bytes]:
    """Build the frames of a streamed chat completion.

    With `include_usage` a frame without choices carries the usage, and all others say null.
    """
    head = {
        "id": fresh_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": CREATED_AT,
        "model": model,
        "service_tier": "default",
        "system_fingerprint": "fp_scripted",
    }

    def frame(delta: Mapping[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage_field = {"usage": None} if include_usage else {}
        return sse(head | {"choices": [choice]} | usage_field)

    frames = [frame({"role": "assistant", "content": "", "refusal": None})]
    if text:
        frames += [frame({"content": piece}) for piece in deltas_of(text, deltas)]
    for index, call in enumerate(tool_calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        opened = {"name": name, "arguments": ""}
        start = {"index": index, "id": call["id"], "type": "function", "function": opened}
        frames.append(frame({"tool_calls": [start]}))
        for piece in deltas_of(arguments, 2):
            part = {"index": index, "function": {"arguments": piece}}
            frames.append(frame({"tool_calls": [part]}))
    frames.append(frame({}, "tool_calls" if tool_calls else finish_reason))
    if include_usage:
        frames.append(sse(head | {"choices": [], "usage": usage.chat()}))
    return [*frames, sse("[DONE]")] if done else frames


def messages_json(
    text: str = TEXT,
    *,
    model: str = "gpt-test",
    usage: Usage = USAGE,
    stop_reason: str = "end_turn",
    tool_uses: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> dict[str, Any]:
    """Build a whole message; `tool_uses` are names with their input."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text, "citations": None}]
    content += [
        {"type": "tool_use", "id": fresh_id("toolu"), "name": name, "input": value}
        for name, value in tool_uses
    ]
    return {
        "id": fresh_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": "tool_use" if tool_uses else stop_reason,
        "stop_sequence": None,
        "usage": usage.messages(),
    }


def messages_events(
    text: str = TEXT,
    *,
    model: str = "gpt-test",
    usage: Usage = USAGE,
    deltas: int | None = None,
    stop_reason: str = "end_turn",
    tool_uses: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> list[bytes]:
    """Build the events of a streamed message."""
    whole = messages_json(text, model=model, stop_reason=stop_reason, tool_uses=tool_uses)
    totals = usage.messages()
    early = totals | {"output_tokens": 1}
    early.pop("output_tokens_details")
    opened = whole | {"content": [], "stop_reason": None, "usage": early}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": opened}]
    for index, block in enumerate(whole["content"]):
        if block["type"] == "text":
            start = block | {"text": ""}
            pieces = [{"type": "text_delta", "text": t} for t in deltas_of(text, deltas)]
        else:
            start = block | {"input": {}}
            value = json.dumps(block["input"])
            pieces = [
                {"type": "input_json_delta", "partial_json": piece} for piece in deltas_of(value, 2)
            ]
        events.append({"type": "content_block_start", "index": index, "content_block": start})
        if index == 0:
            events.append({"type": "ping"})
        events += [
            {"type": "content_block_delta", "index": index, "delta": piece} for piece in pieces
        ]
        events.append({"type": "content_block_stop", "index": index})
    stop = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    events.append({"type": "message_delta", "delta": stop, "usage": totals})
    events.append({"type": "message_stop"})
    return [sse(event, event=event["type"]) for event in events]


def embeddings_json(
    inputs: int = 1,
    *,
    model: str = "gpt-test",
    usage: Usage = USAGE,
    dimensions: int = 3,
    encoding: str = "float",
) -> dict[str, Any]:
    """Build the vectors of `inputs` texts, as numbers or as `encoding="base64"`."""

    def vector(index: int) -> list[float] | str:
        numbers = [index + place / 8 for place in range(dimensions)]
        if encoding != "base64":
            return numbers
        return base64.b64encode(struct.pack(f"<{dimensions}f", *numbers)).decode()

    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": vector(index)}
            for index in range(inputs)
        ],
        "usage": usage.embeddings(),
    }
