"""What is kept of a Responses stream: its output gathered, its object ours, its end held back."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from msgspec import Raw

from aiproxy import errors
from aiproxy.dialects import Asked
from aiproxy.dialects.responses import ResponsesStream
from aiproxy.dialects.responses_object import produced
from aiproxy.dialects.responses_output import Output
from answers import sse as encoded
from client import parse_sse
from responses import message_item, responses_events, responses_object

OURS = {
    "id": b'"resp_ours"', "previous_response_id": b'"resp_before"', "store": b"true",
}  # fmt: skip


def delta(text: str, output: int | None = 0, content: int | None = 0, **fields: Any) -> bytes:
    """Return a delta event; an index is left out if None."""
    fact: dict[str, Any] = {"type": "response.output_text.delta", "delta": text, **fields}
    if output is not None:
        fact["output_index"] = output
    if content is not None:
        fact["content_index"] = content
    return json.dumps(fact).encode()


def gathered(events: Iterable[bytes], finished: Iterable[tuple[Any, object]] = ()) -> Any:
    """Return the items that come of events, then of finished items with their places."""
    output = Output()
    for event in events:
        output.text(event)
    for item, place in finished:
        output.finish(Raw(json.dumps(item).encode()), place)
    return [json.loads(item) for item in output.items()]


def texts(items: Any) -> list[list[str]]:
    """Return the texts of the parts of each item."""
    return [[part.get("text", part.get("refusal")) for part in item["content"]] for item in items]


def test_text_is_gathered_by_its_indexes() -> None:
    """Parts of one message and texts of two are kept apart, in the order of their places."""
    events = [delta("b1", 1, 0), delta("a1", 0, 0), delta("a3", 0, 1), delta("a2", 0, 0)]
    assert texts(gathered(events)) == [["a1a2", "a3"], ["b1"]]


def test_escapes_split_over_deltas_stay_json() -> None:
    """A character that is cut between two deltas is whole again."""
    events = [
        b'{"type":"response.output_text.delta","delta":"\\ud83d","output_index":0}',
        b'{"type":"response.output_text.delta","delta":"\\ude00 \\"q\\"","output_index":0}',
    ]
    assert texts(gathered(events)) == [['\U0001f600 "q"']]


def test_finished_items_win() -> None:
    """An item that came whole is kept as it came; its deltas do not count, others' do."""
    item = message_item("whole")
    assert gathered([delta("who", 1), delta("other", 0)], [(item, 1)])[1] == item
    assert texts(gathered([delta("who", 1), delta("other", 0)], [(item, 1)])) == [
        ["other"], ["whole"],
    ]  # fmt: skip


def test_servers_without_indexes() -> None:
    """Without an index what came before an item is that item's."""
    events = [delta("a", None, None), delta("b", None, None)]
    assert texts(gathered(events)) == [["ab"]]
    assert texts(gathered(events, [(message_item("ab"), None)])) == [["ab"]]


def test_texts_that_come_only_at_their_end() -> None:
    """A `.done` event says the whole text, with deltas before it or without; refusals, too."""
    done = {"type": "response.output_text.done", "text": "all", "output_index": 0}
    refused = {"type": "response.refusal.done", "refusal": "no", "output_index": 1}
    events = [delta("al", 0, None, item_id="msg_1"), json.dumps(done).encode()]
    items = gathered([*events, json.dumps(refused).encode()])
    assert texts(items) == [["all"], ["no"]]
    assert items[0]["id"] == "msg_1"
    assert items[1]["content"][0]["type"] == "refusal"


@pytest.mark.parametrize(
    "response",
    [b'{"id":"r","output":[],"x":1}', b'{"id":"r","x":1}', b'{"id":"r","output":null}',
     b'{"x":{"output":[1]},"id":"r","output":[ ]}', b'{"\\u006futput":[],"id":"r"}'],
)  # fmt: skip
def test_an_object_without_its_output_gets_what_was_gathered(response: bytes) -> None:
    """The object that is kept has the output, wherever it stood, and all else it had."""
    output = Output()
    output.finish(Raw(b'{"type":"message"}'), 0)
    kept = produced(response, output)
    assert kept.id == "r"
    whole = json.loads(kept.before + kept.output + kept.after)
    assert whole == json.loads(response) | {"output": [{"type": "message"}]}


def streaming(*, keep: bool = True, own: dict[str, bytes] | None = None) -> ResponsesStream:
    """Return a stream whose answer is kept."""
    return ResponsesStream(Asked("gpt-test", stream=True, keep=keep, own=own or dict(OURS)))


def test_the_end_is_held_back() -> None:
    """The terminal event waits until its turn is kept, then the stream is over."""
    stream = streaming()
    frames = responses_events("Hello")
    out = [stream.feed(frame) for frame in frames]
    assert out[-1] == b""
    assert (stream.over, stream.whole, stream.outcome) == (False, False, "completed")
    assert stream.produced is not None
    kept = json.loads(stream.produced.before + stream.produced.output + stream.produced.after)
    last = stream.end()
    told = json.loads(parse_sse(last)[0][1])["response"]
    assert kept == told
    assert (told["id"], told["store"], told["previous_response_id"]) == (
        "resp_ours", True, "resp_before",
    )  # fmt: skip
    assert stream.whole
    assert stream.feed(encoded("[DONE]")) == encoded("[DONE]")


def test_a_turn_that_cannot_be_kept_ends_as_failed() -> None:
    """The failure takes the number of the event that was held back, and our id."""
    stream = streaming()
    frames = responses_events("Hello")
    for frame in frames:
        stream.feed(frame)
    usage = stream.usage
    ((kind, data),) = parse_sse(stream.fail(errors.store_unavailable(), 1_790_000_000))
    fact = json.loads(data)
    assert (kind, fact["sequence_number"]) == ("response.failed", len(frames) - 1)
    assert fact["response"]["id"] == "resp_ours"
    assert fact["response"]["error"]["message"].startswith("[store_unavailable]")
    assert usage is not None


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_an_end_too_large_to_be_read_is_no_end(status: str) -> None:
    """What cannot be read cannot be kept: the client is told, and how to get it all the same."""
    stream = streaming()
    for frame in responses_events("Hello", terminal=None):
        stream.feed(frame)
    whole = responses_object(status="completed", response_id="resp_theirs", output=[])
    large = encoded({"type": f"response.{status}", "response": whole}, event=f"response.{status}")
    assert stream.spill(large, ends=False) == b""
    assert stream.error is not None
    assert "'store': false" in stream.error.message
    assert not stream.over


def test_an_end_too_large_to_be_read_is_none_wherever_its_id_stands() -> None:
    """It is not let through for that its id cannot be seen."""
    stream = streaming()
    large = b'data: {"type":"response.completed","response":{"output":[{"id":"x"}'
    assert stream.spill(large, ends=False) == b""
    assert stream.error is not None


def test_a_large_end_that_is_not_kept_has_our_id() -> None:
    """With `store: false` a large terminal event passes, under the id that was told before."""
    stream = streaming(keep=False)
    frames = responses_events("Hello", response_id="resp_theirs")
    for frame in frames[:-1]:
        stream.feed(frame)
    out = stream.spill(frames[-1], ends=False)
    assert out == frames[-1].replace(b"resp_theirs", b"resp_ours", 1)
    assert stream.spill(b"...\n\n", ends=True) == b"...\n\n"
    assert (stream.over, stream.error) == (True, None)


def test_of_what_the_upstream_holds_the_id_is_enough() -> None:
    """A large terminal event is held back for its id, then passes in all its parts."""
    stream = streaming(own={"previous_response_id": b"null"})
    frames = responses_events("Hello", response_id="resp_theirs")
    for frame in frames[:-1]:
        stream.feed(frame)
    assert stream.spill(frames[-1], ends=False) == b""
    assert stream.produced is not None
    assert stream.produced.id == "resp_theirs"
    assert (stream.end(), stream.over) == (frames[-1], False)
    assert (stream.spill(b"\n\n", ends=True), stream.over) == (b"\n\n", True)
