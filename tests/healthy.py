"""What the real APIs would answer to a request: the scripted upstream's first default."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from answers import (
    Usage,
    chat_events,
    chat_json,
    embeddings_json,
    messages_events,
    messages_json,
)
from responses import responses_events, responses_json
from steps import Step, error_answer, json_answer, stream

Body = Mapping[str, Any]
Script = Sequence[Step]


def healthy_answer(path: str, payload: bytes, text: str, usage: Usage) -> Script:
    """Answer with `text`, whole or streamed, under the model that the request names."""
    try:
        body = json.loads(payload)
    except ValueError:
        return error_answer(400, "the body is no JSON")
    if not isinstance(body, dict):
        return error_answer(400, "the body is no object")
    for end, answer in _ANSWERS.items():
        if path.endswith(end):
            return answer(body, str(body.get("model")), text, usage)
    return error_answer(404, f"no such path: {path}", code="unknown_url")


def _responses(body: Body, model: str, text: str, usage: Usage) -> Script:
    if body.get("stream") is True:
        return stream(responses_events(text, model=model, usage=usage, request=body))
    return json_answer(responses_json(text, model=model, usage=usage, request=body))


def _chat(body: Body, model: str, text: str, usage: Usage) -> Script:
    if body.get("stream") is not True:
        return json_answer(chat_json(text, model=model, usage=usage))
    asked = (body.get("stream_options") or {}).get("include_usage") is True
    return stream(chat_events(text, model=model, usage=usage, include_usage=asked))


def _messages(body: Body, model: str, text: str, usage: Usage) -> Script:
    if body.get("stream") is True:
        return stream(messages_events(text, model=model, usage=usage))
    return json_answer(messages_json(text, model=model, usage=usage))


def _embeddings(body: Body, model: str, _text: str, usage: Usage) -> Script:
    given = body.get("input")
    inputs = len(given) if isinstance(given, list) else 1
    encoding = str(body.get("encoding_format", "float"))
    return json_answer(embeddings_json(inputs, model=model, usage=usage, encoding=encoding))


_ANSWERS: dict[str, Callable[[Body, str, str, Usage], Script]] = {
    "/responses": _responses,
    "/chat/completions": _chat,
    "/messages": _messages,
    "/embeddings": _embeddings,
}
