"""The sample upstream of `aiproxy demo`: a small, honest server of the Responses API on loopback.

It is no model. It counts the words of the conversation that it was sent and says so, word by word;
a word is a token. Its events and its response object have every field that the specification
requires, and it refuses whoever does not know its credential, if it has one.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from typing import TYPE_CHECKING, Any, Self

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from types import TracebackType

PAUSE = 0.03  # seconds before each word
MOST_BYTES = 32 * 1024 * 1024  # of a request
QUOTED = 60  # characters of the first message that the answer repeats

# What the response object repeats from the request, with this server's own defaults.
_ECHO: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "reasoning": None,
    "safety_identifier": None,
    "store": False,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
}


class SampleUpstream:
    """The server: `async with SampleUpstream(credential) as upstream`.

    Args:
        credential: the Bearer token that callers must send; None: everybody is answered.
        pause: seconds before each word of a stream.
        port: where it listens; 0: where the kernel picks.

    Attributes:
        url: the base of its API, once entered.
    """

    def __init__(self, credential: str | None, *, pause: float = PAUSE, port: int = 0) -> None:
        self.url = ""
        self._credential = credential
        self._port = port
        self._pause = pause
        app = web.Application(client_max_size=MOST_BYTES)
        app.router.add_post("/v1/responses", self._responses)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        try:
            await site.start()
        except OSError:
            await self._runner.cleanup()
            raise
        self.url = f"http://127.0.0.1:{site.port}/v1"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the port and every connection."""
        await self._runner.cleanup()

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        if not self._knows(request.headers.get("Authorization", "")):
            return _refusal(401, "Incorrect API key provided.", "invalid_api_key")
        try:
            body = await request.json()
            turn = _Turn(body, int(time.time()))
        except (ValueError, TypeError, RecursionError) as error:
            return _refusal(400, f"The request cannot be read: {error}", None)
        if body.get("stream") is not True:
            return web.json_response(turn.whole())
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        async for event in self._paced(turn):
            await answer.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
        await answer.write_eof()
        return answer

    def _knows(self, given: str) -> bool:
        wanted = self._credential
        return wanted is None or hmac.compare_digest(given.encode(), f"Bearer {wanted}".encode())

    async def _paced(self, turn: _Turn) -> AsyncIterator[dict[str, Any]]:
        for number, event in enumerate(turn.events()):
            if event["type"] == "response.output_text.delta":
                await asyncio.sleep(self._pause)
            yield {**event, "sequence_number": number}


def _refusal(status: int, message: str, code: str | None) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status)


class _Turn:
    """One request and the answer to it.

    Raises:
        TypeError, ValueError: the request is not one that this server understands.
    """

    def __init__(self, body: Any, now: int) -> None:
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            raise TypeError("it has no model")
        most = body.get("max_output_tokens")
        if most is not None and (not isinstance(most, int) or most < 1):
            raise ValueError("max_output_tokens is not a positive integer")
        messages = list(_messages(body.get("input")))
        self._heard = sum(len(text.split()) for _, text in messages)
        words = _reply([text for role, text in messages if role == "user"], self._heard).split()
        self._words = words[:most]
        self._complete = len(words) == len(self._words)
        self._now = now
        self._request = body
        self._id = f"resp_{secrets.token_hex(16)}"
        self._item_id = f"msg_{secrets.token_hex(16)}"

    def whole(self) -> dict[str, Any]:
        """The response object at its end."""
        status = "completed" if self._complete else "incomplete"
        return self._response(status) | {
            "completed_at": int(time.time()) if self._complete else None,
            "incomplete_details": None if self._complete else {"reason": "max_output_tokens"},
            "output": [self._item(status, [self._part(" ".join(self._words))])],
            "usage": {
                "input_tokens": self._heard,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": len(self._words),
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self._heard + len(self._words),
            },
        }

    def events(self) -> Iterator[dict[str, Any]]:
        """All events of the stream, not numbered yet."""
        started, text = self._response("in_progress"), " ".join(self._words)
        at = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        whole = self.whole()
        item = whole["output"][0]
        yield {"type": "response.created", "response": started}
        yield {"type": "response.in_progress", "response": started}
        begun = self._item("in_progress", [])
        yield {"type": "response.output_item.added", "output_index": 0, "item": begun}
        yield {"type": "response.content_part.added", **at, "part": self._part("")}
        for number, word in enumerate(self._words):
            delta = word if number == 0 else f" {word}"
            yield {"type": "response.output_text.delta", **at, "delta": delta, "logprobs": []}
        yield {"type": "response.output_text.done", **at, "text": text, "logprobs": []}
        yield {"type": "response.content_part.done", **at, "part": self._part(text)}
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
        yield {"type": f"response.{whole['status']}", "response": whole}

    def _response(self, status: str) -> dict[str, Any]:
        given = {name: self._request[name] for name in _ECHO if self._request.get(name) is not None}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._now,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._request["model"],
            "output": [],
            "previous_response_id": None,
            "background": False,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "service_tier": "default",
            "top_logprobs": 0,
            "usage": None,
            **_ECHO,
            **given,
            "store": False,  # it keeps nothing, whatever it was asked
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _messages(given: object) -> Iterator[tuple[str, str]]:
    """Role and text of every message of the conversation.

    Raises:
        TypeError: the input is neither a text nor a list of items.
    """
    if isinstance(given, str):
        yield "user", given
        return
    if not isinstance(given, list):
        raise TypeError("input is neither a string nor an array")
    for item in given:
        if not isinstance(item, dict):
            raise TypeError("an item of input is not an object")
        if item.get("type", "message") == "message":
            yield str(item.get("role")), _text(item.get("content"))


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    parts: list[Mapping[str, Any]] = (
        [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    )
    return " ".join(str(part["text"]) for part in parts if "text" in part)


def _reply(said: list[str], heard: int) -> str:
    """What there is to say about a conversation of `heard` words, of which the user `said` some."""
    if not said:
        return "You have not said anything yet."
    begun = said[0] if len(said[0]) <= QUOTED else f"{said[0][:QUOTED]}..."
    if len(said) == 1:
        return f'You said: "{begun}" That makes {heard} words so far.'
    return (
        f'You have spoken {len(said)} times, and began with: "{begun}"'
        f" With my own answers that makes {heard} words so far."
    )
