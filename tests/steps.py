"""What an upstream does with one request, step by step: plain data, played by `upstream`.

A script is a sequence of steps. Nothing here checks that they make sense together, since
nonsense on the wire is what most scripts are for.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

__all__ = [
    "Chunk",
    "EndChunks",
    "Finish",
    "Garbage",
    "Headers",
    "PausedRead",
    "Repeat",
    "Reset",
    "Send",
    "Sleep",
    "Stall",
    "Step",
    "Wait",
    "body_of",
    "error_answer",
    "json_answer",
    "rechunk",
    "stream",
]

Pairs = Sequence[tuple[str, str]]

SSE_HEADERS: Pairs = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))


@dataclass(frozen=True, slots=True)
class Send:
    """Write these bytes as they are."""

    data: bytes

    def encode(self) -> bytes:
        """Return them."""
        return self.data


@dataclass(frozen=True, slots=True)
class Headers:
    """Write the status line and exactly these header fields."""

    status: int = 200
    pairs: Pairs = ()

    def encode(self) -> bytes:
        """Return the head of the answer, its empty line included."""
        try:
            reason = HTTPStatus(self.status).phrase
        except ValueError:
            reason = "Unknown"
        lines = [f"HTTP/1.1 {self.status} {reason}", *(f"{n}: {v}" for n, v in self.pairs)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Write one chunk of a chunked body; an empty one writes nothing, since it would end it."""

    data: bytes

    def encode(self) -> bytes:
        """Return the chunk with its size line."""
        return b"%x\r\n%b\r\n" % (len(self.data), self.data) if self.data else b""


@dataclass(frozen=True, slots=True)
class EndChunks:
    """Write the last chunk."""

    def encode(self) -> bytes:
        """Return it."""
        return b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Sleep:
    """Be silent for a time, in seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Be silent until the test sets the event: order without a guess at time."""

    event: "asyncio.Event"


@dataclass(frozen=True, slots=True)
class Reset:
    """Close with RST, after what was written has left."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Close with FIN, after what was written has left."""


@dataclass(frozen=True, slots=True)
class Stall:
    """Be silent until the peer goes."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """Write `n` bytes that are no HTTP, the same for the same `n`."""

    n: int

    def encode(self) -> bytes:
        """Return them."""
        return random.Random(self.n).randbytes(self.n)  # noqa: S311 - no secret is made of it


@dataclass(frozen=True, slots=True)
class Repeat:
    """Write a chunk of a chunked body `n` times, with a pause in seconds after each."""

    data: bytes
    n: int
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class PausedRead:
    """As the first step: begin before the request's body came, and never read it.

    The peer's going is not noticed while nothing is read. The connection ends with the script.
    """


Step = (
    Send
    | Headers
    | Chunk
    | EndChunks
    | Sleep
    | Wait
    | Reset
    | Finish
    | Stall
    | Garbage
    | Repeat
    | PausedRead
)


def rechunk(data: bytes, size: int) -> list[bytes]:
    """Cut bytes into pieces of `size`, the last one shorter."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def stream(
    events: Iterable[bytes],
    *,
    newline: bytes = b"\n",
    pause: float = 0.0,
    split: int | None = None,
    headers: Pairs = (),
) -> list[Step]:
    r"""Send events as a healthy stream: one chunk each, or chunks of `split` bytes.

    `newline` replaces the `\n` of the events (b"\r", b"\r\n"); `pause` in seconds comes before
    every chunk but the first; `headers` come after the usual two.
    """
    frames = [event.replace(b"\n", newline) for event in events]
    pieces = frames if split is None else rechunk(b"".join(frames), split)
    steps: list[Step] = [Headers(200, [*SSE_HEADERS, *headers])]
    for number, piece in enumerate(pieces):
        if pause and number:
            steps.append(Sleep(pause))
        steps.append(Chunk(piece))
    return [*steps, EndChunks()]


def json_answer(value: Any, status: int = 200, headers: Pairs = ()) -> list[Step]:
    """Send a whole JSON answer with its length; bytes are taken as the body itself."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    fields = [("content-type", "application/json"), ("content-length", str(len(body))), *headers]
    return [Headers(status, fields), Send(body)]


def error_answer(
    status: int,
    message: str = "scripted error",
    *,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    headers: Pairs = (),
) -> list[Step]:
    """Send an error in the shape of the OpenAI API."""
    error: Mapping[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    return json_answer({"error": error}, status, headers)


def body_of(steps: Iterable[Step]) -> bytes:
    """Return the decoded body that these steps send: what must arrive byte for byte."""
    pieces: list[bytes] = []
    for step in steps:
        match step:
            case Chunk(data) | Send(data):
                pieces.append(data)
            case Repeat(data, n):
                pieces.append(data * n)
            case _:
                pass
    return b"".join(pieces)
