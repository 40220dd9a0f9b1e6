"""Healthy answers of the Responses API with every field that its specification requires."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from answers import CREATED_AT, TEXT, USAGE, Usage, deltas_of, fresh_id, sse

Item = dict[str, Any]
Terminal = Literal["completed", "incomplete", "failed"]

# what the answer repeats from the request, with the server's own defaults
_ECHOED: dict[str, Any] = {
    "background": False,
    "frequency_penalty": 0,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
}


def message_item(text: str = TEXT, *, item_id: str | None = None) -> Item:
    """Build a finished message of the assistant with one text part."""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "id": item_id or fresh_id("msg"),
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [part],
    }


def function_item(
    name: str = "get_weather",
    arguments: str = '{"city": "Bern"}',
    *,
    call_id: str | None = None,
    item_id: str | None = None,
) -> Item:
    """Build a finished function call."""
    return {
        "id": item_id or fresh_id("fc"),
        "type": "function_call",
        "status": "completed",
        "call_id": call_id or fresh_id("call"),
        "name": name,
        "arguments": arguments,
    }


def reasoning_item(
    encrypted_content: str | None = "ENCRYPTED-REASONING",
    *,
    summary: str | None = "Thought about it.",
    item_id: str | None = None,
) -> Item:
    """Build a finished reasoning item; without a summary its list is empty."""
    item: Item = {
        "id": item_id or fresh_id("rs"),
        "type": "reasoning",
        "summary": [] if summary is None else [{"type": "summary_text", "text": summary}],
    }
    return item if encrypted_content is None else item | {"encrypted_content": encrypted_content}


def responses_object(
    *,
    model: str = "gpt-test",
    status: str = "completed",
    output: Sequence[Item] = (),
    usage: Usage | None = None,
    response_id: str | None = None,
    request: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
    incomplete_reason: str | None = None,
) -> dict[str, Any]:
    """Build the response object; what `request` gave is repeated in it."""
    given = {name: value for name, value in (request or {}).items() if name in _ECHOED}
    reason = None if incomplete_reason is None else {"reason": incomplete_reason}
    return {
        "id": response_id or fresh_id("resp"),
        "object": "response",
        "created_at": CREATED_AT,
        "completed_at": CREATED_AT + 1 if status == "completed" else None,
        "status": status,
        "error": error,
        "incomplete_details": reason,
        "model": model,
        "output": list(output),
        "service_tier": "default",
        "usage": None if usage is None else usage.responses(),
        **_ECHOED,
        **given,
    }


def responses_json(
    text: str = TEXT,
    *,
    model: str = "gpt-test",
    items: Sequence[Item] | None = None,
    usage: Usage | None = USAGE,
    response_id: str | None = None,
    request: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build a whole completed answer; `items` stand in for the one message."""
    return responses_object(
        model=model,
        output=[message_item(text)] if items is None else items,
        usage=usage,
        response_id=response_id,
        request=request,
    )


def _message_events(item: Item, at: int, deltas: int | None) -> Iterator[dict[str, Any]]:
    place = {"item_id": item["id"], "output_index": at}
    yield _item_event("added", at, item | {"status": "in_progress", "content": []})
    for index, part in enumerate(item["content"]):
        here = place | {"content_index": index}
        yield {"type": "response.content_part.added", **here, "part": part | {"text": ""}}
        for piece in deltas_of(part["text"], deltas):
            yield {"type": "response.output_text.delta", **here, "delta": piece, "logprobs": []}
        text = part["text"]
        yield {"type": "response.output_text.done", **here, "text": text, "logprobs": []}
        yield {"type": "response.content_part.done", **here, "part": part}
    yield _item_event("done", at, item)


def _function_events(item: Item, at: int, deltas: int | None) -> Iterator[dict[str, Any]]:
    place = {"item_id": item["id"], "output_index": at}
    prefix = "response.function_call_arguments"
    yield _item_event("added", at, item | {"status": "in_progress", "arguments": ""})
    for piece in deltas_of(item["arguments"], deltas):
        yield {"type": f"{prefix}.delta", **place, "delta": piece}
    name, arguments = item["name"], item["arguments"]
    yield {"type": f"{prefix}.done", **place, "name": name, "arguments": arguments}
    yield _item_event("done", at, item)


def _reasoning_events(item: Item, at: int, deltas: int | None) -> Iterator[dict[str, Any]]:
    place = {"item_id": item["id"], "output_index": at}
    prefix = "response.reasoning_summary"
    yield _item_event("added", at, item | {"summary": []})
    for index, part in enumerate(item["summary"]):
        here = place | {"summary_index": index}
        yield {"type": f"{prefix}_part.added", **here, "part": part | {"text": ""}}
        for piece in deltas_of(part["text"], deltas):
            yield {"type": f"{prefix}_text.delta", **here, "delta": piece}
        yield {"type": f"{prefix}_text.done", **here, "text": part["text"]}
        yield {"type": f"{prefix}_part.done", **here, "part": part}
    yield _item_event("done", at, item)


def _item_event(step: str, at: int, item: Item) -> dict[str, Any]:
    return {"type": f"response.output_item.{step}", "output_index": at, "item": item}


def _plain_events(item: Item, at: int, _deltas: int | None) -> Iterator[dict[str, Any]]:
    yield _item_event("added", at, item)
    yield _item_event("done", at, item)


_EVENTS_OF: dict[str, Callable[[Item, int, int | None], Iterator[dict[str, Any]]]] = {
    "message": _message_events,
    "function_call": _function_events,
    "reasoning": _reasoning_events,
}


def responses_events(
    text: str = TEXT,
    *,
    model: str = "gpt-test",
    items: Sequence[Item] | None = None,
    usage: Usage | None = USAGE,
    deltas: int | None = None,
    response_id: str | None = None,
    request: Mapping[str, Any] | None = None,
    terminal: Terminal | None = "completed",
    error: Mapping[str, Any] | None = None,
    done: bool = False,
) -> list[bytes]:
    """Build the events of a streamed answer, numbered from 0.

    `items` stand in for the one message; `deltas` is the number of pieces of each text (default:
    its words); `terminal=None` leaves the stream without its end; `done` adds `[DONE]`.
    """
    output = [message_item(text)] if items is None else list(items)
    response_id = response_id or fresh_id("resp")

    def lifecycle(name: str, **facts: Any) -> dict[str, Any]:
        whole = responses_object(
            model=model, response_id=response_id, request=request, status=name, **facts
        )
        return {"type": f"response.{name}", "response": whole}

    opened = lifecycle("in_progress")
    events = [opened | {"type": "response.created"}, opened]
    for at, item in enumerate(output):
        events += _EVENTS_OF.get(item["type"], _plain_events)(item, at, deltas)
    if terminal == "completed":
        events.append(lifecycle(terminal, output=output, usage=usage))
    elif terminal == "incomplete":
        reason = "max_output_tokens"
        facts: dict[str, Any] = {"output": output, "usage": usage, "incomplete_reason": reason}
        events.append(lifecycle(terminal, **facts))
    elif terminal == "failed":
        cause = error or {"code": "server_error", "message": "scripted failure"}
        events.append(lifecycle(terminal, output=output, usage=usage, error=cause))
    numbered = [event | {"sequence_number": number} for number, event in enumerate(events)]
    frames = [sse(event, event=event["type"]) for event in numbered]
    return [*frames, sse("[DONE]")] if done else frames
