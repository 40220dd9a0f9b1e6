"""What bridges cost per event: `python tests/bench/bridges.py`.

The readers alone, without sockets: frames of an upstream in, events of the Responses API out.
Beside them, in the same run, the native reader, which lets most frames pass as they are.
"""
# ruff: noqa: T201 - a program for a terminal prints

import json
import statistics
import time
from collections.abc import Callable

from aiproxy.dialects import Asked, Stream
from aiproxy.dialects.chat_bridge import ChatBridge
from aiproxy.dialects.messages_bridge import MessagesBridge
from aiproxy.dialects.responses import Responses
from aiproxy.dialects.responses_repair import RepairedResponses
from aiproxy.envelope import Envelope

DELTAS, ROUNDS = 2000, 15
TEXT = "of the sea, in plain words "


def frame(document: object) -> bytes:
    """Return one event."""
    return b"data: %b\n\n" % json.dumps(document).encode()


def chat() -> list[bytes]:
    """Return a stream of Chat Completions."""
    about = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def chunk(delta: object, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return frame({**about, "choices": [choice]})

    deltas = [chunk({"content": TEXT}) for _ in range(DELTAS)]
    return [chunk({"role": "assistant"}), *deltas, chunk({}, "stop"), b"data: [DONE]\n\n"]


def messages() -> list[bytes]:
    """Return a stream of Messages."""
    block = {"type": "text", "text": ""}
    delta = {"type": "text_delta", "text": TEXT}
    return [
        frame({"type": "message_start", "message": {"usage": {"input_tokens": 1}}}),
        frame({"type": "content_block_start", "index": 0, "content_block": block}),
        *[frame({"type": "content_block_delta", "index": 0, "delta": delta})] * DELTAS,
        frame({"type": "content_block_stop", "index": 0}),
        frame({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {}}),
        frame({"type": "message_stop"}),
    ]


def responses() -> list[bytes]:
    """Return a stream of the Responses API."""
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
    kind = "response.output_text.delta"
    deltas = [
        frame({"type": kind, "sequence_number": n, **place, "delta": TEXT}) for n in range(DELTAS)
    ]
    end = {"type": "response.completed", "response": {"id": "resp_1", "output": []}}
    return [*deltas, frame(end)]


def asked() -> Asked:
    """Return what a client asked."""
    envelope = Envelope.parse(b'{"model":"m","input":"x","stream":true}')
    found = Responses().request(envelope)
    found.envelope = envelope
    found.own = {"id": b'"resp_1"', "store": b"false"}
    return found


CASES: dict[str, tuple[list[bytes], Callable[[Asked], Stream]]] = {
    "native": (responses(), Responses().stream),
    "normalize": (responses(), RepairedResponses().stream),
    "chat": (chat(), ChatBridge().stream),
    "messages": (messages(), MessagesBridge().stream),
}


def spent(frames: list[bytes], reader: Callable[[Asked], Stream]) -> float:
    """Return the microseconds of CPU per delta of one stream."""
    stream = reader(asked())
    began = time.process_time()
    for raw in frames:
        stream.feed(raw)
    return (time.process_time() - began) / DELTAS * 1e6


def main() -> None:
    """Measure all, interleaved; print the medians and their ratio to the native reader."""
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, (frames, reader) in CASES.items():
            found[name].append(spent(frames, reader))
    native = statistics.median(found["native"])
    for name, times in found.items():
        middle = statistics.median(times)
        print(f"{name:10} {middle:6.1f} us/event {middle / native:5.2f} x native")


if __name__ == "__main__":
    main()
