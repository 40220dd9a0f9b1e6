"""What the soak's daemon stands before: its configuration, and an upstream that plays by request.

A prompt names its play and has a number of its own, which the upstream finds wherever a bridge or
a conversation has put it.
"""

import asyncio
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from answers import chat_events, chat_json, embeddings_json, messages_events, messages_json
from responses import message_item, responses_events, responses_json
from steps import (
    SSE_HEADERS,
    Chunk,
    EndChunks,
    Headers,
    Reset,
    Send,
    Stall,
    Step,
    Wait,
    error_answer,
    json_answer,
)
from upstream import Recorded, ScriptedUpstream

Api = Literal["responses", "chat", "messages", "embeddings"]
Play = Literal[
    "whole", "nothing", "some", "most", "reset", "cut", "failed", "declared", "later", "busy",
    "broken", "refused",
]  # fmt: skip

BREAKS = 40  # failures in a row, more than fail at the same time elsewhere

PATHS: dict[Api, str] = {
    "responses": "/v1/responses",
    "chat": "/v1/chat/completions",
    "messages": "/v1/messages",
    "embeddings": "/v1/embeddings",
}
KEYS = {name: f"sk-aip-of-the-soak-{name}" for name in ("team", "free", "small", "one")}
AMPLE = {"requests": "900000000/min", "tokens": "900000000000/min", "concurrent": 900000000}


def config_text(url: str, store: str) -> str:
    """Return the configuration, as JSON, which is YAML.

    Caches are small so that they are full after the warm-up, and what is pooled is gone soon.

    Args:
        url: of the upstream, `/v1` at its end.
        store: of sessions.
    """
    base = url.removesuffix("/v1")
    every = ["responses", "chat", "messages", "embeddings"]
    apis = {"main": every, "chatty": ["chat"], "wordy": ["messages"], "keeper": ["responses"]}
    upstreams: dict[str, dict[str, Any]] = {
        name: {"url": f"{base}/{name}/v1", "apis": spoken, "idle_connections": "150ms"}
        for name, spoken in {**apis, "broken": ["responses"]}.items()
    }
    upstreams["keeper"]["sessions"] = "upstream"
    routes = [{"model": name, "upstreams": [name]} for name in upstreams]
    limits = {
        "team": AMPLE,
        "free": {},
        "small": {"requests": "1/day"},
        "one": {**AMPLE, "concurrent": 1},
    }
    return json.dumps(
        {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "client_keepalive": "1h",  # as long as any round
            "upstreams": upstreams,
            "routes": [
                *routes,
                {"model": "both", "upstreams": ["main", "chatty"]},
                {"model": "any-*", "upstreams": ["main"]},
            ],
            "keys": {
                name: {"sha256": hashlib.sha256(key.encode()).hexdigest(), "limits": limits[name]}
                for name, key in KEYS.items()
            },
            "sessions": {"store": store, "max_bytes": "128KiB"},
            "retries": 1,
            "breaker": {"failures": BREAKS, "cooldown": "300ms", "max_cooldown": "300ms"},
            "drain": {"delay": "0s", "timeout": "5s"},
            "log": {"level": "info", "format": "json"},
        },
        indent=1,
    )


# The upstream


_NUMBER = b"#NUMBER##"  # as long as what it stands for
_PLAY = re.compile(rb"play=([a-z]+) n=(\d{9})")


class _Told(NamedTuple):
    """An answer in the parts in which it is sent, without what ends it."""

    some: bytes  # to the first delta
    most: bytes  # to the terminal event
    last: bytes  # that, and the end
    failed: bytes = b""  # instead of the last part

    def numbered(self, number: bytes) -> "_Told":
        """Return it with ids of its own."""
        return _Told(*(part.replace(_NUMBER, number) for part in self))


def _encoded(*steps: Step) -> bytes:
    return b"".join(step.encode() for step in steps if isinstance(step, Headers | Send | Chunk))


def _streamed(frames: Sequence[bytes], last: int, failed: bytes = b"") -> _Told:
    begun = next(at for at, frame in enumerate(frames) if b"Hello" in frame) + 1
    chunks = [Chunk(frame) for frame in frames]
    end = EndChunks().encode()
    return _Told(
        _encoded(Headers(200, SSE_HEADERS), *chunks[:begun]),
        _encoded(*chunks[begun:-last]),
        _encoded(*chunks[-last:]) + end,
        Chunk(failed).encode() + end,
    )


def _answers() -> dict[tuple[str, bool], _Told]:
    number = _NUMBER.decode()
    items = [message_item(item_id=f"msg_{number}")]
    facts: Any = {"model": "m", "items": items, "response_id": f"resp_{number}"}
    failed = responses_events(**facts, terminal="failed")[-1]
    whole = {
        "responses": responses_json(**facts),
        "chat": chat_json(model="m"),
        "messages": messages_json(model="m"),
        "embeddings": embeddings_json(1, model="m"),
    }
    found = {}
    for api, answer in whole.items():
        said = _encoded(*json_answer(answer))
        found[api, False] = _Told(said[:-99], b"", said[-99:])
    found["responses", True] = _streamed(responses_events(**facts), 1, failed)
    found["chat", True] = _streamed(chat_events(model="m", include_usage=True), 1)
    found["messages", True] = _streamed(messages_events(model="m"), 1)
    return found


def _declared() -> _Told:
    """Return a stream that fails before any output."""
    *_, failed = responses_events(items=[], terminal="failed", usage=None)
    opened = responses_events(items=[], terminal=None)
    chunks = [Chunk(frame) for frame in (*opened, failed)]
    return _Told(_encoded(Headers(200, SSE_HEADERS), *chunks) + EndChunks().encode(), b"", b"")


class Plays:
    """Plays what a request asks for by its prompt: its play, and a number of its own."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self._upstream = upstream
        self._answers = _answers()
        self._declared = _declared()
        self._numbers = itertools.count(1)
        self._once: set[bytes] = set()  # have been refused once
        self._came: dict[bytes, asyncio.Event] = {}
        self._go_on: dict[bytes, asyncio.Event] = {}

    def begin(self, play: Play) -> "Prompt":
        """Make a prompt."""
        number = b"%09d" % next(self._numbers)
        came = self._came[number] = asyncio.Event()
        go_on = self._go_on[number] = asyncio.Event()
        return Prompt(f"Say hello. play={play} n={number.decode()}", number, came, go_on)

    def end(self, prompt: "Prompt") -> None:
        """Forget it."""
        del self._came[prompt.number], self._go_on[prompt.number]
        self._once.discard(prompt.number)

    def __call__(self, request: Recorded) -> Sequence[Step]:
        """Answer one request."""
        self._upstream.requests.clear()
        name, number = _PLAY.findall(request.body)[-1]  # those before are of earlier turns
        if number not in self._came:  # its client is gone, and it was tried again
            return [Stall()]
        self._came[number].set()
        api = request.path.rpartition("/v1/")[2].removesuffix("/completions")
        streamed = json.loads(request.body).get("stream") is True
        told = self._answers[api, streamed]
        again = number in self._once
        self._once.add(number)
        play = name.decode()
        if again and play in {"later", "declared"}:
            play = "whole"
        told = told.numbered(number) if play != "declared" else self._declared
        return _PLAYED[play](told, self._go_on[number])


# What each comes to. What "declared" tells is only that it has failed.
_PLAYED: dict[str, Callable[[_Told, asyncio.Event], list[Step]]] = {
    "whole": lambda told, _: [Send(told.some), Send(told.most + told.last)],
    "declared": lambda told, _: [Send(told.some)],
    "nothing": lambda *_: [Stall()],
    "some": lambda told, _: [Send(told.some), Stall()],
    "most": lambda told, _: [Send(told.some), Send(told.most), Stall()],
    "reset": lambda told, go_on: [Send(told.some), Wait(go_on), Reset()],
    "cut": lambda told, _: [Send(told.some), EndChunks()],
    "failed": lambda told, _: [Send(told.some), Send(told.most), Send(told.failed)],
    "later": lambda *_: error_answer(503, kind="server_error"),
    "busy": lambda *_: error_answer(429, headers=[("retry-after", "0")]),
    "broken": lambda *_: error_answer(500, kind="server_error"),
    "refused": lambda *_: error_answer(400),
}


class Prompt(NamedTuple):
    """A prompt that is known to the upstream.

    Attributes:
        came: the upstream has got it.
        go_on: set it to let the upstream go on.
    """

    text: str
    number: bytes
    came: asyncio.Event
    go_on: asyncio.Event
