"""However the bytes of a chat upstream come, a client is told the same."""

import asyncio
import json
from itertools import pairwise

import uvloop
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chat_upstream import (
    DONE,
    PATH,
    TOOLS,
    Fact,
    Told,
    chat_only,
    refusal,
    text,
    thought,
)
from rig import Proxy, config_text, prompt
from steps import SSE_HEADERS, Chunk, EndChunks, Headers, Step
from upstream import ScriptedUpstream
from validating import check_stream, facts_of

NEWLINES = [b"\n", b"\r", b"\r\n"]
WORDS = 'Grüße, 世界 \U0001f30d "\\\u2028'
ANSWERS = [
    Told([thought(WORDS), *(text(each) for each in WORDS), refusal(WORDS)]),
    Told([*TOOLS.pieces, text(WORDS)], finish="length"),
]


def bytes_of(told: Told, newline: bytes) -> bytes:
    """Return a stream in UTF-8, not in escapes, with these line ends."""
    frames = []
    for each in told.frames():
        data = each.removeprefix(b"data: ").strip()
        raw = data if each == DONE else json.dumps(json.loads(data), ensure_ascii=False).encode()
        frames.append(b"data: " + raw + b"\n\n")
    return b"".join(frames).replace(b"\n", newline)


def pieces_of(data: bytes, cuts: list[float]) -> list[bytes]:
    """Cut bytes at fractions of their length."""
    places = sorted({0, len(data), *(int(cut * len(data)) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(places)]


def plain(facts: list[Fact]) -> str:
    """Return events without what is made anew for each response: its id and times."""
    made = facts[0]["response"]["id"].removeprefix("resp_")
    for fact in facts:
        if "response" in fact:
            fact["response"] |= {"created_at": 0, "completed_at": 0}
    names: dict[str, str] = {}
    told = json.dumps(facts, sort_keys=True).replace(made, "ID")
    for fact in facts:
        if fact["type"] == "response.output_item.added":
            names[fact["item"]["id"].replace(made, "ID")] = f"item {fact['output_index']}"
    for name, stable in names.items():
        told = told.replace(f'"{name}"', f'"{stable}"')
    return told


async def told_of(streams: list[list[bytes]]) -> list[list[Fact]]:
    """Play streams, in these pieces, through a daemon; return the events that came of each."""
    found = []
    async with ScriptedUpstream() as upstream:
        text = config_text(upstream.url, "replay", upstreams=chat_only())
        proxy = await Proxy.start(text)
        try:
            for pieces in streams:
                steps: list[Step] = [Headers(200, SSE_HEADERS), *map(Chunk, pieces), EndChunks()]
                upstream.script(steps)
                async with asyncio.timeout(20):
                    answer = await proxy.post(PATH, prompt(stream=True, store=False))
                found.append(facts_of(answer.body))
        finally:
            await proxy.stop()
    return found


@settings(max_examples=15)
@given(
    st.sampled_from(ANSWERS),
    st.sampled_from(NEWLINES),
    st.lists(st.lists(st.floats(0, 1), max_size=40), min_size=1, max_size=4),
)
@example(ANSWERS[0], b"\r\n", [[n / 997 for n in range(997)]])
@example(ANSWERS[1], b"\r", [[n / 997 for n in range(997)]])
def test_any_split_gives_the_same_events(
    told: Told, newline: bytes, splits: list[list[float]]
) -> None:
    """Wherever the upstream's bytes are cut, and whatever ends its lines, the events are the same.

    Only ids and times are not.
    """
    data = bytes_of(told, newline)
    streams = [[bytes_of(told, b"\n")], *(pieces_of(data, cuts) for cuts in splits)]
    first, *others = uvloop.run(told_of(streams))
    check_stream(first)
    expected = plain(first)
    for facts in others:
        assert plain(facts) == expected
