"""Upgrades under load, in a short form; the long one is the command `tests/upgrades.py`."""

import asyncio
import itertools
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import upgrades
from blocked import LONGEST, Blocker
from client import RawClient
from responses import responses_events
from upgrades import Report, Told, line_of, main, program, series
from upgrades_load import Client, Seen, is_whole


async def test_upgrades_lose_nothing(tmp_path: Path) -> None:
    """Of all requests and streams over three upgrades each is answered once, whole, by 200."""
    report = await series(
        tmp_path, upgrades=3, seconds=4.5, requests=900, streams=20, delay=1.0, longest=1.5
    )
    assert not any(report.failures.values()), str(report)
    assert (report.upgrades >= 3, report.seen["asked"] >= 900) == (True, True)
    seen = report.seen
    assert min(seen["kept"], seen["renewed"], len(seen["streams"])) > 0, str(report)
    assert sum(times >= 1 for times in report.lived) >= 20, str(report)


async def test_a_daemon_that_is_killed_is_seen(tmp_path: Path) -> None:
    """The proof can fail: with SIGKILL in the place of SIGTERM streams are cut, and more."""
    report = await series(
        tmp_path,
        upgrades=1,
        seconds=1,
        requests=50,
        streams=20,
        delay=0.1,
        longest=1.5,
        way=signal.SIGKILL,
    )
    failures = report.failures
    assert failures["streams cut"] > 0, str(report)
    assert failures["daemons that did not end well"] == 1, str(report)
    assert "exit code -9" in str(report)


# The clients see what goes wrong


@asynccontextmanager
async def answering(answer: Callable[[bytes], bytes]) -> AsyncIterator[int]:
    """Answer each connection's first request by the bytes made of its name, and close."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(head.partition(b"x-request-id: ")[2].partition(b"\r\n")[0]))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def whole(name: bytes, text: bytes = b"", head: bytes = b"200 OK", more: bytes = b"") -> bytes:
    """Return an answer of one message; by default it says what it must."""
    said = text or name + b" 1"
    body = b'{"id": "resp_1", "output": [{"content": [{"text": "%b"}]}]}' % said
    fields = b"content-length: %d\r\nx-request-id: %b\r\n" % (len(body), name)
    return b"HTTP/1.1 %b\r\n%b%b\r\n%b" % (head, fields, more, body)


def refusal(name: bytes, more: bytes) -> bytes:
    """Return a 503."""
    body = b'{"error": {"code": "shutting_down"}}'
    fields = b"content-length: %d\r\nx-request-id: %b\r\n" % (len(body), name)
    return b"HTTP/1.1 503 Service Unavailable\r\n%b%b\r\n%b" % (fields, more, body)


CLOSING = b"connection: close\r\nretry-after: 1\r\n"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (whole, {"200": 1}),
        (lambda name: whole(name, more=b"connection: close\r\n"), {"200": 1, "renewed": 1}),
        (lambda name: whole(name) * 2, {"200": 1, "twice": 1}),
        (lambda name: whole(name, more=CLOSING) + b"x", {"200": 1, "twice": 1, "renewed": 1}),
        (lambda name: whole(b"r0" + name), {"200": 1, "wrong": 1}),
        (lambda name: whole(name, b"r1-2 1"), {"200": 1, "wrong": 1}),
        (lambda name: whole(name, name + b" 3"), {"200": 1, "wrong": 1}),
        (lambda name: whole(name)[:-1], {"reset": 1}),
        (lambda _: b"", {"reset": 1}),
        (lambda name: refusal(name, CLOSING), {"503 shutting_down": 1, "renewed": 1}),
        (lambda name: refusal(name, b"retry-after: 1\r\n"), {"503 shutting_down bare": 1}),
    ],
)  # fmt: skip
async def test_a_client_sees(answer: Callable[[bytes], bytes], expected: dict[str, int]) -> None:
    """Each thing that can go wrong with a request is counted as what it is, and nothing else."""
    seen = Seen()
    async with answering(answer) as port:
        client = Client(port, seen, itertools.count())
        turn = await client.turn(None, 1, store=False)
        await asyncio.sleep(0.05)  # in which more could come
    assert (turn == "resp_1") == ("200" in expected and "wrong" not in expected)
    counted = {name: value for name, value in vars(seen).items() if isinstance(value, int)}
    assert Counter(seen.answers) + Counter(counted) == Counter(expected) + Counter(asked=1)


async def test_a_client_sees_that_nobody_listens() -> None:
    """A connection that is refused is counted as that."""
    async with answering(whole) as port:
        pass
    seen = Seen()
    await Client(port, seen, itertools.count()).stream()
    assert (seen.refused, seen.reset, seen.cut, seen.streams) == (1, 0, 0, [])


def test_a_stream_is_whole() -> None:
    """With all pieces in order, each event's number, and their sum in its one end: else it is not.

    What the upstream of the series sends is.
    """
    names = [b"r1:0 ", b"r1:1 ", b"r1:2"]
    events = responses_events("r1:0 r1:1 r1:2")
    assert is_whole("r1", b"".join(events))
    assert [name in event for name, event in zip(names, events[4:7], strict=True)] == [True] * 3
    assert not is_whole("r2", b"".join(events))
    assert not is_whole("r1", b"")
    for at in range(len(events)):
        assert not is_whole("r1", b"".join([*events[:at], *events[at + 1 :]]))
        assert not is_whole("r1", b"".join([*events[: at + 1], *events[at:]]))
    assert not is_whole("r1", b"".join(responses_events("r1:0 r1:1", terminal="failed")))


# The other parts


async def test_the_upstream_counts_by_id() -> None:
    """It says which request came more than once, and tells each its own name and items."""
    async with program("upgrades_upstream.py", "0.1", "0.1") as running:
        port = int((await line_of(running)).rpartition(":")[2].removesuffix("/v1"))
        for name, given, items in (("r1", "x", 1), ("r2", ["x"] * 3, 3), ("r1", "x", 1)):
            async with await RawClient.connect(port) as client:
                body = json.dumps({"model": "m", "input": given}).encode()
                await client.request("POST", "/v1/responses", {"x-client-request-id": name}, body)
                (output,) = (await client.answer()).json()["output"]
                assert output["content"][0]["text"] == f"{name} {items}"
        async with await RawClient.connect(port) as client:
            body = json.dumps({"model": "m", "input": "x", "stream": True}).encode()
            await client.request("POST", "/v1/responses", {"x-client-request-id": "r3"}, body)
            assert is_whole("r3", (await client.answer()).body)
        assert await Told(running).end() == {"ids": 3, "twice": ["r1"]}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_loop_is_blocked_for_its_share(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Over many blocks the loop sleeps for its share of the time, never longer than it may."""
    blocks: list[float] = []
    pauses: list[float] = []
    due: list[Callable[[], None]] = []

    class Loop:
        """A loop that does not wait."""

        @staticmethod
        def call_later(pause: float, do: Callable[[], None]) -> None:
            pauses.append(pause)
            due.append(do)

    monkeypatch.setattr("blocked.asyncio.get_running_loop", Loop)
    monkeypatch.setattr("blocked.time.sleep", blocks.append)
    Blocker("seed", share).start()
    for _ in range(400):
        due.pop()()
    assert 0 <= min(blocks) <= max(blocks) <= LONGEST
    assert sum(blocks) / (sum(blocks) + sum(pauses)) == pytest.approx(share, abs=0.05)
    Blocker("seed", 0).start()
    assert len(pauses) == 401


def found(**changes: Any) -> Report:
    """Return the report of a good series of two requests, with changes."""
    facts: dict[str, Any] = {**vars(Seen()), "asked": 2, "answers": {"200": 2}, **changes}
    made = {name: facts.pop(name) for name in ("sent", "logged", "ends") if name in facts}
    sent = made.get("sent", {"ids": 2, "twice": []})
    logged = made.get("logged", Counter({"r1": 1, "r2": 1}))
    return Report(3, 9.0, facts, sent, [], logged, made.get("ends", []))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"refused": 1},
        {"reset": 1},
        {"answers": {"200": 1, "503 shutting_down": 1}},
        {"twice": 1},
        {"wrong": 1},
        {"sent": {"ids": 2, "twice": ["r1"]}},
        {"sent": {"ids": 3, "twice": []}},
        {"logged": Counter({"r1": 2, "r2": 1})},
        {"logged": Counter({"r1": 1})},
        {"cut": 1},
        {"ends": ["daemon 1: exit code 1"]},
    ],
    ids=str,
)
def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    """It prints a table, and ends with 1 for each thing that must not be, else with 0."""
    asked: dict[str, Any] = {}

    async def series(folder: Path, **options: Any) -> Report:
        asked.update(options)
        return found(**changes)

    monkeypatch.setattr(upgrades, "series", series)
    assert main(["--upgrades", "3", "--seconds", "9"]) == (1 if changes else 0)
    assert asked == {
        "upgrades": 3, "seconds": 9.0, "requests": 50_000, "streams": 100, "delay": 1.0,
        "block": 0.1,
    }  # fmt: skip
    table = capsys.readouterr().out
    assert "upgrades                                     3\n" in table
    assert ("daemon 1: exit code 1" in table) == ("ends" in changes)
