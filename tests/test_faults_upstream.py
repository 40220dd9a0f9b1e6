"""Faults of upstreams, F01 to F05, F13, F15 to F20: what clients see, and what is charged."""

import asyncio
import itertools
import json
import re
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pytest

from answers import USAGE, Usage, sse
from certificates import Pair, issue
from client import IncompleteBody, parse_sse
from faults import (
    FIRST_DELTA,
    HEARTBEAT,
    PATHS,
    STREAMED,
    Api,
    Charge,
    Script,
    Seen,
    Serve,
    ask,
    begin,
    check_charge,
    check_closed,
    check_error,
    check_failure,
    delivered,
    events_of,
    json_of,
    results_of,
)
from invariants import check_invariants, check_terminal
from responses import function_item, message_item, reasoning_item, responses_events
from rig import CREDENTIAL, PROMPT_CANARY, Proxy, prompt, totals
from steps import Step, body_of
from upstream import (
    Chunk,
    EndChunks,
    Finish,
    Garbage,
    Headers,
    Repeat,
    Reset,
    ScriptedUpstream,
    Send,
    Sleep,
    Stall,
    error_answer,
    json_answer,
    stream,
)

CHUNKED = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
ALL_ITEMS = [reasoning_item(), message_item("Hello, dear world"), function_item()]
BOTH = pytest.mark.parametrize("streamed", [False, True], ids=["json", "stream"])
ALL: tuple[Api, ...] = (*STREAMED, "embeddings")
EACH = pytest.mark.parametrize("api", STREAMED)


def frames_of(api: Api) -> list[bytes]:
    """Return a stream with several items where the API has them."""
    return responses_events(items=ALL_ITEMS) if api == "responses" else events_of(api)


# F01, F02: the upstream's stream breaks off


def cut(way: str, sent: bytes, whole: bytes) -> Script:
    """Send a part of a stream and end it in a way."""
    chunked: list[Step] = [Headers(200, CHUNKED), Chunk(sent)]
    match way:
        case "reset":
            return [*chunked, Reset()]
        case "fin":
            return [*chunked, Finish()]
        case "short":
            length = ("content-length", str(len(whole) + 1))
            return [Headers(200, [CHUNKED[0], length]), Send(sent), Finish()]
        case _:
            return [*chunked, EndChunks()]


def places(frames: Sequence[bytes]) -> list[tuple[int, int]]:
    """Return (bytes, complete events) of every boundary and of three places inside each event."""
    found, start = [(0, 0)], 0
    for number, frame in enumerate(frames):
        size = len(frame)
        found += [(start + at, number) for at in sorted({1, size // 2, size - 1})]
        start += size
        found.append((start, number + 1))
    return found


def is_whole(api: Api, frames: Sequence[bytes]) -> bool:
    """Tell whether these frames are a complete answer: contract 6.3."""
    if api == "chat":
        return any(b'"finish_reason": "stop"' in frame for frame in frames)
    last = {"responses": b"event: response.completed\n", "messages": b"event: message_stop\n"}[api]
    return bool(frames) and frames[-1].startswith(last)


@EACH
@pytest.mark.parametrize("way", ["reset", "fin", "short", "end"])
async def test_f01_f02_a_stream_that_breaks_off_fails_in_band(
    serve: Serve, upstream: ScriptedUpstream, api: Api, way: str
) -> None:
    """Cut anywhere in any way, what came whole is relayed, then the failure; it is paid for."""
    proxy, baseline = await begin(serve, upstream)
    frames = frames_of(api)
    whole = b"".join(frames)
    for at, complete in places(frames):
        upstream.script(cut(way, whole[:at], whole))
        seen = await ask(proxy, api, streamed=True)
        request = upstream.requests[-1]
        prefix = b"".join(frames[:complete])
        assert seen.answer.status == 200
        if is_whole(api, frames[:complete]):
            assert seen.answer.body == prefix
            assert seen.line["outcome"] == "completed"
            counted = api != "chat" or b'"choices": []' in prefix
            charge: Charge = "usage" if counted else "delivered"
        else:
            check_failure(api, prefix, seen.answer.body, "upstream_error")
            await check_closed(seen.client)
            assert seen.line["outcome"] == "upstream_error"
            counted = b"event: message_delta\n" in prefix  # the usage of messages comes early
            charge = "usage" if counted else "delivered"
        check_charge(seen.line, charge, request, made=delivered(prefix))
        if api == "responses":
            check_terminal(seen.answer.body, completed=complete == len(frames))
        await proxy.close_clients()
    await check_invariants(proxy, upstream, baseline=baseline)


@EACH
async def test_f01_a_cut_on_the_wire_shows_no_half_event(
    serve: Serve, upstream: ScriptedUpstream, api: Api
) -> None:
    """Reset at any byte of the head or the framing, the client sees whole events or a 502."""
    proxy, baseline = await begin(serve, upstream)
    frames = events_of(api)
    steps = stream(frames)
    wire = b"".join(step.encode() for step in steps if isinstance(step, Headers | Chunk))
    head = wire.index(b"\r\n\r\n") + 4
    for at in {1, 9, head - 1, *range(head, len(wire), 37)}:
        upstream.script(Send(wire[:at]), Reset())
        seen = await ask(proxy, api, streamed=True)
        if at < head:
            check_error(seen.answer, 502, "upstream_error", api)
            check_charge(seen.line, "nothing")
        else:
            frames_seen = re.findall(rb".+?\n\n", seen.answer.body, re.DOTALL)
            complete = next(
                n for n, frame in enumerate([*frames_seen, b""]) if frame not in frames[n : n + 1]
            )
            prefix = b"".join(frames[:complete])
            decoded = b"".join(
                step.data for step in steps if isinstance(step, Chunk) if step.encode() in wire[:at]
            )
            assert prefix.startswith(decoded), "a complete event was lost"
            if not is_whole(api, frames[:complete]):
                check_failure(api, prefix, seen.answer.body, "upstream_error")
        await proxy.close_clients()
    await check_invariants(proxy, upstream, baseline=baseline)


async def test_f02_an_error_event_gives_the_failure_its_message(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """An upstream's `error` event is passed on, and the failure after it repeats its message."""
    proxy, baseline = await begin(serve, upstream)
    frames = events_of("responses")[:3]
    error = {"type": "error", "code": "x", "message": "The GPU is on fire.", "param": None}
    frames.append(sse(error | {"sequence_number": 3}, event="error"))
    upstream.script(stream(frames))
    seen = await ask(proxy, "responses", streamed=True)
    failure = check_failure("responses", b"".join(frames), seen.answer.body, "upstream_error")
    assert failure[0]["response"]["error"]["message"] == "[upstream_error] The GPU is on fire."
    await check_invariants(proxy, upstream, baseline=baseline, stream=seen.answer.body)


@pytest.mark.parametrize("way", [Reset(), Finish()], ids=["reset", "fin"])
async def test_f01_a_json_answer_that_breaks_off_is_a_502(
    serve: Serve, upstream: ScriptedUpstream, way: Reset | Finish
) -> None:
    """Nothing of a JSON answer is given out before it is whole, and nothing is charged for it."""
    proxy, baseline = await begin(serve, upstream)
    for api in ALL:
        body = json.dumps(json_of(api)).encode()
        fields = [("content-type", "application/json"), ("content-length", str(len(body) + 1))]
        for size in (0, len(body) // 2, len(body)):
            upstream.script(Headers(200, fields), Send(body[:size]), way)
            seen = await ask(proxy, api, streamed=False)
            check_error(seen.answer, 502, "upstream_error", api)
            check_charge(seen.line, "nothing")
    assert (await results_of(proxy))["reset"] == 12
    await check_invariants(proxy, upstream, baseline=baseline, bodies=[seen.answer.body])


# F03, F04, F05: the upstream is late


@dataclass(frozen=True)
class Late:
    """An upstream that takes too long: what it does, what it is given, what comes of it."""

    fault: str
    script: Script  # after the events
    timeouts: dict[str, str]
    keepalive: str
    seen: str  # a status, or "in-band"
    beats: bool
    charge: Charge
    begun: bool = False  # with the head, and with events where some are delivered
    own: bool = False  # the timeouts are the upstream's own


LATE = [
    Late("F03 silent", [Stall()], {"first_byte": "600ms"}, "15s", "504", False, "input"),
    Late("F03 own", [Stall()], {"first_byte": "600ms"}, "15s", "504", False, "input", own=True),
    Late("F03 beats", [Stall()], {"first_byte": "600ms"}, "50ms", "in-band", True, "input"),
    Late("F03 total", [Stall()], {"total": "600ms"}, "15s", "504", False, "input"),
    Late("F03 own total", [Stall()], {"total": "600ms"}, "15s", "504", False, "input", own=True),
    Late("F04", [Stall()], {"idle": "300ms"}, "50ms", "in-band", True, "delivered", True),
    Late("F04 quiet", [Stall()], {"idle": "200ms"}, "15s", "in-band", False, "delivered", True),
    Late("F04 no event", [Stall()], {"idle": "200ms"}, "15s", "in-band", False, "input", True),
    Late(
        "F04 inside an event",
        [Chunk(b"event: response.output_text.delta\nda"), Stall()],
        {"idle": "300ms"}, "50ms", "in-band", True, "delivered", True,
    ),
    Late(
        "F05 drips",
        [Repeat(b": drip\n\n", 100, 0.02)],
        {"idle": "300ms", "total": "800ms"}, "15s", "in-band", False, "delivered", True,
    ),
    Late(
        "F05 own total",
        [Repeat(b": drip\n\n", 100, 0.02)],
        {"idle": "300ms", "total": "800ms"}, "15s", "in-band", False, "delivered", True, True,
    ),
]  # fmt: skip


@EACH
@pytest.mark.parametrize("case", LATE, ids=lambda case: case.fault)
async def test_f03_f04_f05_a_late_stream_ends_at_its_deadline(
    serve: Serve, upstream: ScriptedUpstream, api: Api, case: Late
) -> None:
    """A stream is 504 before its head, else fails in-band; it beats between events alone."""
    limits: dict[str, Any] = {"timeouts": case.timeouts}
    changes = {"upstreams": {"scripted": limits}} if case.own else limits
    proxy, baseline = await begin(serve, upstream, streams={"keepalive": case.keepalive}, **changes)
    frames = events_of(api)[: FIRST_DELTA[api] if case.charge == "delivered" else 0]
    opened: list[Step] = [Headers(200, CHUNKED), *map(Chunk, frames)] if case.begun else []
    upstream.script(opened, case.script)
    seen = await ask(proxy, api, streamed=True)
    request = upstream.requests[-1]
    if case.seen == "504":
        check_error(seen.answer, 504, "upstream_timeout", api)
        assert seen.answer.headers["x-should-retry"] == "false"
    else:
        body = seen.body.replace(b": drip\n\n", b"")
        check_failure(api, b"".join(frames), body, "upstream_timeout")
        await check_closed(seen.client)
    assert (HEARTBEAT in seen.answer.body) == case.beats
    assert seen.line["outcome"] == "upstream_timeout"
    assert seen.line["duration_s"] < 3
    check_charge(seen.line, case.charge, request, made=delivered(b"".join(frames)))
    assert (await results_of(proxy))["timeout"] == 1
    await check_invariants(proxy, upstream, baseline=baseline)


@pytest.mark.parametrize(
    ("timeouts", "begun"),
    [({"first_byte": "600ms"}, False), ({"idle": "600ms"}, True), ({"total": "600ms"}, True)],
    ids=["F03", "F04", "F05"],
)
async def test_f03_f04_f05_a_late_json_answer_is_a_504(
    serve: Serve,
    upstream: ScriptedUpstream,
    timeouts: dict[str, str],
    begun: bool,  # noqa: FBT001 - a column of the table
) -> None:
    """A JSON answer that does not come or stops coming is 504, and its input is charged."""
    proxy, baseline = await begin(serve, upstream, timeouts=timeouts, streams={"keepalive": "50ms"})
    for api in ALL:
        half = json_answer(json_of(api))[0], Send(b'{"id": ')
        upstream.script(half if begun else [], Stall())
        seen = await ask(proxy, api, streamed=False)
        check_error(seen.answer, 504, "upstream_timeout", api)
        assert seen.answer.headers["x-should-retry"] == "false"
        check_charge(seen.line, "input", upstream.requests[-1])
    await check_invariants(proxy, upstream, baseline=baseline, bodies=[seen.answer.body])


async def test_f04_comments_of_the_upstream_are_signs_of_life(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """An upstream that sends comments only, below `idle`, is waited for, and they pass."""
    proxy, baseline = await begin(serve, upstream, timeouts={"idle": "200ms"})
    frames = events_of("responses")
    opened, rest = stream(frames[:2])[:-1], map(Chunk, frames[2:])
    upstream.script(opened, Repeat(b": drip\n\n", 12, 0.03), *rest, EndChunks())
    seen = await ask(proxy, "responses", streamed=True)
    assert seen.answer.body.replace(b": drip\n\n", b"") == b"".join(frames)
    assert seen.answer.body.count(b": drip\n\n") == 12
    check_charge(seen.line, "usage")
    await check_invariants(
        proxy, upstream, baseline=baseline, stream=seen.answer.body, completed=True
    )


async def test_f04_no_heartbeat_inside_an_event_that_is_let_through(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """While a part of an event over the bound is out, no heartbeat and no frame of ours follows."""
    proxy, baseline = await begin(
        serve, upstream, timeouts={"idle": "300ms"}, streams={"keepalive": "50ms"}
    )
    part = b"data: " + b"x" * (9 * 2**20)
    upstream.script(Headers(200, CHUNKED), Chunk(part), Stall())
    client = await proxy.send(
        PATHS["responses"], prompt(stream=True), {"x-request-id": "over"}, limit=2**20
    )
    await client.read_head()
    with pytest.raises(IncompleteBody) as broken:
        await client.read_body()
    beats, began, event = broken.value.partial.partition(b"data: ")
    assert beats.replace(HEARTBEAT, b"") == b""
    assert part.startswith(began + event)
    assert len(event) > 2**20
    await check_invariants(proxy, upstream, baseline=baseline)


# F13, F15, F16: another place than the one that was meant, or none


async def test_f13_a_name_that_does_not_resolve_is_a_502(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """An unknown host fails within `connect`, uncharged; other routes go on meanwhile."""
    proxy, baseline = await begin(
        serve, upstream, **_elsewhere("http://no-such-host.invalid/v1"), timeouts={"connect": "1s"}
    )
    for api in STREAMED:
        for streamed in (False, True):
            seen = await ask(proxy, api, streamed=streamed, fields={"model": "away"})
            check_error(seen.answer, 502, "upstream_error", api)
            check_charge(seen.line, "nothing")
            assert seen.line["duration_s"] < 1.5
    assert (await results_of(proxy))["connect"] == 6
    await check_invariants(proxy, upstream, baseline=baseline, bodies=[seen.answer.body])


async def test_f13_a_resolver_that_hangs_is_given_up_within_connect(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look-up without an answer is a 502 after `connect`, and holds up no other route."""
    given_up = asyncio.Event()

    loop = asyncio.get_running_loop()
    look_up = loop.getaddrinfo

    async def hang(host: Any, *args: Any, **options: Any) -> Any:
        if host != "slow.invalid":
            return await look_up(host, *args, **options)
        await given_up.wait()
        raise OSError

    proxy, baseline = await begin(
        serve, upstream, **_elsewhere("http://slow.invalid/v1"), timeouts={"connect": "200ms"}
    )
    monkeypatch.setattr(loop, "getaddrinfo", hang)
    waiting = asyncio.create_task(ask(proxy, "responses", streamed=True, fields={"model": "away"}))
    other = await ask(proxy, "responses", streamed=True)
    assert not waiting.done()
    assert other.line["outcome"] == "completed"
    seen = await waiting
    check_error(seen.answer, 502, "upstream_error", "responses")
    check_charge(seen.line, "nothing")
    assert 0.15 < seen.line["duration_s"] < 1
    given_up.set()
    await check_invariants(proxy, upstream, baseline=baseline)


async def test_f13_a_refused_connection_is_a_502(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A port that nobody listens on is 502, and nothing is charged."""
    async with ScriptedUpstream() as closed:
        url = closed.url
    proxy, baseline = await begin(serve, upstream, **_elsewhere(url))
    for streamed in (False, True):
        seen = await ask(proxy, "responses", streamed=streamed, fields={"model": "away"})
        check_error(seen.answer, 502, "upstream_error", "responses")
        check_charge(seen.line, "nothing")
    await check_invariants(proxy, upstream, baseline=baseline, bodies=[seen.answer.body])


def _elsewhere(url: str, **facts: Any) -> dict[str, Any]:
    """Return changes that add a second upstream, under the model `away`."""
    stanza = {
        "url": url,
        "credential": {"env": "UPSTREAM_KEY"},
        "apis": ["responses", "chat", "messages"],
        **facts,
    }
    models = [("gpt-test", "scripted"), ("away", "elsewhere")]
    routes = [{"model": model, "upstreams": [name]} for model, name in models]
    return {"upstreams": {"elsewhere": stanza}, "routes": routes}


class Tap:
    """A relay that keeps what aiproxy sent, ends TLS if told to, and alone answers plainly."""

    def __init__(self, port: int | None, context: ssl.SSLContext | None = None) -> None:
        self.raw = b""
        self._context = context
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
        try:
            if self._port is None:
                self.raw += await reader.read(2**16)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                return
            inner, outer = await asyncio.open_connection("127.0.0.1", self._port)
            back = asyncio.create_task(self._copy(inner, writer))
            while data := await reader.read(2**16):
                self.raw += data
                outer.write(data)
            outer.close()
            await back
        except OSError:
            pass
        finally:
            writer.close()

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
        writer.close()


@pytest.mark.parametrize(
    "kind", ["good", "expired", "wrong host", "self-signed", "unknown authority", "plain text"]
)
async def test_f15_only_a_good_certificate_gets_the_request(
    serve: Serve, upstream: ScriptedUpstream, tmp_path: Path, kind: str
) -> None:
    """A server whose certificate is not good gets TLS hellos alone, and the client a 502."""
    authority = issue(name="authority.invalid", authority=True)
    (tmp_path / "ca.pem").write_bytes(authority.pem())
    kinds: dict[str, Callable[[], Pair]] = {
        "good": lambda: issue(authority),
        "expired": lambda: issue(authority, days=(-9, -1)),
        "wrong host": lambda: issue(authority, name="other.invalid"),
        "self-signed": issue,
        "unknown authority": lambda: issue(issue(name="x.invalid", authority=True)),
        "plain text": lambda: issue(authority),
    }
    async with (
        ScriptedUpstream() as secret,
        Tap(secret.port, kinds[kind]().context(tmp_path)) as ending,
        Tap(None if kind == "plain text" else ending.port) as tap,
    ):
        url = f"https://127.0.0.1:{tap.port}/v1"
        proxy, baseline = await begin(
            serve, upstream, **_elsewhere(url, ca_file=str(tmp_path / "ca.pem"))
        )
        for streamed in (False, True):
            seen = await ask(proxy, "responses", streamed=streamed, fields={"model": "away"})
            if kind == "good":
                assert (seen.answer.status, seen.line["outcome"]) == (200, "completed")
                continue
            check_error(seen.answer, 502, "upstream_error", "responses")
            check_charge(seen.line, "nothing")
        assert len(secret.requests) == (2 if kind == "good" else 0)
        assert tap.raw[:2] == b"\x16\x03", "no TLS record"
        assert not [s for s in (CREDENTIAL, PROMPT_CANARY, "/v1/resp") if s.encode() in tap.raw]
        if kind != "good":
            assert (await results_of(proxy))["connect"] == 2
            await check_invariants(proxy, upstream, baseline=baseline, bodies=[seen.answer.body])


async def test_f15_the_systems_authorities_do_not_know_a_private_one(
    serve: Serve, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """Without `ca_file` a certificate of a private authority is refused."""
    context: ssl.SSLContext = issue(issue(name="x.invalid", authority=True)).context(tmp_path)
    async with ScriptedUpstream(context) as secret:
        proxy, baseline = await begin(serve, upstream, **_elsewhere(secret.url))
        seen = await ask(proxy, "responses", streamed=True, fields={"model": "away"})
        check_error(seen.answer, 502, "upstream_error", "responses")
        check_charge(seen.line, "nothing")
        assert secret.requests == []
        await check_invariants(proxy, upstream, baseline=baseline)


@BOTH
async def test_f16_a_redirect_is_not_followed(
    serve: Serve,
    upstream: ScriptedUpstream,
    streamed: bool,  # noqa: FBT001
) -> None:
    """A redirect is 502, uncharged, and the other host sees not even a connection."""
    async with ScriptedUpstream() as other:
        proxy, baseline = await begin(serve, upstream)
        for api, status in itertools.product(STREAMED, (301, 302, 303, 307, 308)):
            to = ("location", other.url + PATHS[api].removeprefix("/v1"))
            upstream.script(Headers(status, [to, ("content-length", "0")]))
            seen = await ask(proxy, api, streamed=streamed)
            check_error(seen.answer, 502, "upstream_error", api)
            assert "location" not in seen.answer.headers
            check_charge(seen.line, "nothing")
        assert (other.accepted, other.requests) == (0, [])
        assert (await results_of(proxy))["protocol"] == 15
        await check_invariants(proxy, upstream, baseline=baseline, bodies=[seen.answer.body])


# F17: the upstream says no


@dataclass(frozen=True)
class Refusal:
    """A status of an upstream: what the client gets, and how the attempt counts."""

    status: int
    seen: int
    code: str | None  # None: the upstream's own body
    result: str
    outcome: str
    retry: str | None = None  # x-should-retry


REFUSALS = [
    *(Refusal(s, s, None, "status_4xx", "upstream_rejected") for s in (400, 404, 409, 413, 422)),
    Refusal(429, 429, None, "status_429", "upstream_rejected"),
    *(
        Refusal(s, 502, "upstream_credential", "status_4xx", "upstream_error", "false")
        for s in (401, 403)
    ),
    *(
        Refusal(s, 502, "upstream_error", "status_4xx", "upstream_error")
        for s in (402, 405, 406, 408, 415, 418, 426, 451)
    ),
    *(Refusal(s, 502, "upstream_error", "status_5xx", "upstream_error") for s in (500, 502, 504)),
    *(Refusal(s, 503, "upstream_overloaded", "status_5xx", "upstream_error") for s in (503, 529)),
]


def refusal(api: Api, status: int) -> Script:
    """Refuse in the API's own shape, and ask for patience."""
    after = [("retry-after", "17"), ("retry-after-ms", "16500"), ("set-cookie", "a=b")]
    if api != "messages":
        return error_answer(status, "scripted error", code="scripted", param="x", headers=after)
    inner = {"type": "invalid_request_error", "message": "scripted error"}
    return json_answer({"type": "error", "error": inner, "request_id": "r"}, status, after)


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: str(case.status))
async def test_f17_a_refusal_is_passed_on_or_named_and_never_charged(
    serve: Serve, upstream: ScriptedUpstream, case: Refusal
) -> None:
    """Section 5 of the contract, row by row: status, body, Retry-After, no charge."""
    proxy, baseline = await begin(serve, upstream)
    bodies = []
    for api, streamed in itertools.product(STREAMED, (False, True)):
        script = refusal(api, case.status)
        upstream.script(script)
        seen = await ask(proxy, api, streamed=streamed)
        proxy.calm()
        bodies.append(seen.answer.body)
        if case.code is None:
            assert (seen.answer.status, seen.answer.body) == (case.seen, body_of(script))
        else:
            check_error(seen.answer, case.seen, case.code, api)
        patient = case.code in (None, "upstream_overloaded")
        assert seen.answer.headers.get("retry-after") == ("17" if patient else None)
        assert seen.answer.headers.get("x-should-retry") == case.retry
        assert "set-cookie" not in seen.answer.headers
        check_charge(seen.line, "nothing")
        assert (seen.line["outcome"], seen.line["status"]) == (case.outcome, case.seen)
    results = await results_of(proxy)
    assert results[case.result] == 6
    assert "reset" not in results
    await check_invariants(proxy, upstream, baseline=baseline, bodies=bodies)


@EACH
@pytest.mark.parametrize(
    ("status", "code"),
    [(429, "rate_limit_exceeded"), (400, "invalid_prompt"), (500, "server_error")],
)
async def test_f17_after_a_heartbeat_a_refusal_is_in_band(
    serve: Serve, upstream: ScriptedUpstream, api: Api, status: int, code: str
) -> None:
    """Once the head is out a refusal is a failure of the stream, with its code, uncharged."""
    proxy, baseline = await begin(serve, upstream, streams={"keepalive": "50ms"})
    upstream.script(Sleep(0.15), refusal(api, status))
    seen = await ask(proxy, api, streamed=True)
    assert seen.answer.status == 200
    assert HEARTBEAT in seen.answer.body
    ours = "upstream_error" if status == 500 else "scripted"
    failure = check_failure(api, b"", seen.body, ours)
    if api == "responses":
        assert failure[-1]["response"]["error"]["code"] == code
    check_charge(seen.line, "nothing")
    await check_closed(seen.client)
    await check_invariants(proxy, upstream, baseline=baseline)


async def test_f17_an_overload_without_retry_after_gets_one(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A 503 without a time to wait in seconds is passed on with one."""
    proxy, baseline = await begin(serve, upstream)
    waits = {"": "1", "1": "1", "16500": "17", "soon": "1", "9" * 30: "1000000"}
    for given, wanted in waits.items():
        after = [("retry-after-ms", given)] if given else []
        upstream.script(json_answer({}, 503, after))
        seen = await ask(proxy, "responses", streamed=False)
        check_error(seen.answer, 503, "upstream_overloaded", "responses")
        assert seen.answer.headers["retry-after"] == wanted
        assert seen.answer.headers.get("retry-after-ms", "") == given
    await check_invariants(proxy, upstream, baseline=baseline, bodies=[seen.answer.body])


# What is no answer at all, F18

JSON = ("content-type", "application/json")
EVENTS = ("content-type", "text/event-stream")
CODED = ("transfer-encoding", "chunked")


def _typed(streamed: bool) -> tuple[str, str]:  # noqa: FBT001
    return EVENTS if streamed else JSON


def _good(streamed: bool) -> bytes:  # noqa: FBT001
    if streamed:
        return b"".join(events_of("responses"))
    return json.dumps(json_of("responses")).encode()


@dataclass(frozen=True)
class Nonsense:
    """An answer that is none. `body`: its head was good, so that a stream fails in-band."""

    fault: str
    json: Script
    stream: Script
    body: bool = False
    result: str = "protocol"


def both(fault: str, *steps: Any, body: bool = False, result: str = "protocol") -> Nonsense:
    """Make a row in which JSON and stream differ by their content type alone."""

    def typed(kind: tuple[str, str]) -> Script:
        return [
            replace(step, pairs=[*step.pairs, kind]) if isinstance(step, Headers) else step
            for step in steps
        ]

    return Nonsense(fault, typed(JSON), typed(EVENTS), body, result)


def sized(body: bytes) -> tuple[str, str]:
    """Return the length of a body as a header field."""
    return ("content-length", str(len(body)))


def framed(streamed: bool, *fields: tuple[str, str]) -> Script:  # noqa: FBT001
    """Return a good body under a bad head."""
    body = _good(streamed)
    pairs = [_typed(streamed), sized(body), *fields]
    return [Headers(200, pairs), Send(body), Finish()]


HTML = b"<html><body>Welcome to the captive portal</body></html>"
NONSENSE = [
    both("gzip garbage", Headers(200, [("content-encoding", "gzip"), ("content-length", "40")]),
         Garbage(40), body=True),
    both("br garbage", Headers(200, [("content-encoding", "br"), ("content-length", "40")]),
         Garbage(40), body=True),
    both("bad chunk size", Headers(200, [CODED]), Send(b"xyz\r\nabc\r\n0\r\n\r\n"), body=True),
    both("chunk longer than said", Headers(200, [CODED]), Send(b"1\r\nabc\r\n0\r\n\r\n"),
         body=True),
    Nonsense("10 MB header", framed(False, ("x-big", "a" * 10_000_000)),
             framed(True, ("x-big", "a" * 10_000_000))),
    Nonsense("10,000 fields", framed(False, *[("x-a", "b")] * 10_000),
             framed(True, *[("x-a", "b")] * 10_000)),
    Nonsense("CL and TE", framed(False, CODED), framed(True, CODED)),
    Nonsense("two lengths", framed(False, ("content-length", "5")),
             framed(True, ("content-length", "5"))),
    both("HTTP/0.9", Send(HTML), Finish()),
    both("binary", Garbage(300), Finish()),
    both("status line without a number", Send(b"HTTP/1.1 OK\r\n\r\n"), Finish()),
    both("101", Headers(101, [("upgrade", "websocket"), ("connection", "upgrade")]), Finish()),
    both("100 and the end", Headers(100), Finish(), result="reset"),
    both("204", Headers(204)),
    Nonsense("HTML", [Headers(200, [("content-type", "text/html"), sized(HTML)]), Send(HTML)],
             [Headers(200, [("content-type", "text/html"), sized(HTML)]), Send(HTML)]),
    Nonsense("the other kind", stream(events_of("responses")), json_answer(json_of("responses"))),
    Nonsense("an array", json_answer([]), json_answer([])),
    Nonsense("no object of the API", json_answer({"a": 1}), json_answer({"a": 1})),
    Nonsense("half a JSON", json_answer(b'{"id": '), json_answer(b'{"id": ')),
    Nonsense("nothing", json_answer(b""), json_answer(b"")),
]  # fmt: skip


@pytest.mark.parametrize("case", NONSENSE, ids=lambda case: case.fault)
async def test_f18_garbage_is_a_502_that_says_nothing_of_it(
    serve: Serve, upstream: ScriptedUpstream, case: Nonsense
) -> None:
    """What is no answer becomes a 502, uncharged; after a good head it is as F01 without events."""
    proxy, baseline = await begin(serve, upstream)
    for api, streamed in itertools.product(STREAMED, (False, True)):
        upstream.script(case.stream if streamed else case.json)
        seen = await ask(proxy, api, streamed=streamed)
        if case.body and streamed and seen.answer.status == 200:
            check_failure(api, b"", seen.answer.body, "upstream_error")
            check_charge(seen.line, "input", upstream.requests[-1])
        else:
            check_error(seen.answer, 502, "upstream_error", api)
            check_charge(seen.line, "nothing")
        assert not {"x-a", "x-big", "content-encoding", "upgrade"} & set(seen.answer.headers)
        await proxy.close_clients()
    assert (await results_of(proxy))[case.result] == 6
    await check_invariants(proxy, upstream, baseline=baseline, bodies=[seen.answer.body])


FIELDS = [
    b"openai-version: a\x01b",
    b"openai-version: a\x00b",
    b"openai-version: a\rset-cookie: stolen=1",
    b"openai-version: a\nset-cookie: stolen=1",
    b"openai-version: a\r\n set-cookie: folded",
    b"openai-version: \xff\xfe",
    b"openai version: a",
    b"openai-version : a",
    b"set-cookie: stolen=1",
    b"connection: x-aiproxy-upstream",
    b"x-request-id: theirs",
    b"x-aiproxy-upstream: theirs",
]


@BOTH
async def test_f18_no_header_is_smuggled_to_the_client(
    serve: Serve,
    upstream: ScriptedUpstream,
    streamed: bool,  # noqa: FBT001
) -> None:
    """A field with control characters or of another name is left out, or the answer is a 502."""
    proxy, baseline = await begin(serve, upstream)
    body = _good(streamed)
    kind = ": ".join(_typed(streamed)).encode()
    for given in FIELDS:
        fields = b"\r\n".join([kind, given, b"content-length: %d" % len(body)])
        upstream.script(Send(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n\r\n" + body))
        seen = await ask(proxy, "responses", streamed=streamed)
        assert seen.answer.status in (200, 502), given
        assert seen.answer.headers["x-request-id"].startswith("fault-")
        assert seen.answer.headers["x-aiproxy-upstream"] == "scripted"
        assert "set-cookie" not in seen.answer.headers
        value = seen.answer.headers.get("openai-version", "")
        assert value.isprintable()
        assert "stolen" not in value
        if seen.answer.status == 200:
            assert seen.answer.body == body
        else:
            check_charge(seen.line, "nothing")
    await check_invariants(proxy, upstream, baseline=baseline)


# F19: odd bytes


def oddly(frames: Sequence[bytes], way: str) -> bytes:
    """Return a stream in an odd but right spelling."""
    whole = b"".join(frames)
    match way:
        case "CR":
            return whole.replace(b"\n", b"\r")
        case "CRLF":
            return whole.replace(b"\n", b"\r\n")
        case "mixed":
            ends = [b"\n", b"\r\n", b"\r"]
            return b"".join(
                frame.replace(b"\n", ends[number % 3]) for number, frame in enumerate(frames)
            )
        case "BOM":
            return b"\xef\xbb\xbf" + whole
        case "no space":
            return whole.replace(b"\ndata: ", b"\ndata:").replace(b"event: ", b"event:")
        case "comments":
            return b": hello\n\n" + whole.replace(b"data: ", b": inside\nid: 7\ndata: ")
        case "no event lines":
            return re.sub(rb"event: [a-z_.]+\n", b"", whole)
        case _:
            return whole


@EACH
@pytest.mark.parametrize(
    "way", ["LF", "CR", "CRLF", "mixed", "BOM", "no space", "comments", "no event lines"]
)
async def test_f19_odd_streams_arrive_byte_for_byte(
    serve: Serve, upstream: ScriptedUpstream, api: Api, way: str
) -> None:
    """Any line end, a BOM, no spaces, comments, split anywhere: the same bytes, the right usage."""
    if api == "chat" and way == "no space":
        frames = [frame.replace(b"data: ", b"data:") for frame in events_of(api, "Grüße 🦀 x")]
    else:
        frames = events_of(api, "Grüße 🦀 x")
    proxy, baseline = await begin(serve, upstream)
    body = oddly(frames, way)
    for split in (1, 2, 7, 4096):
        upstream.script(stream([body], split=split))
        seen = await ask(proxy, api, streamed=True)
        assert seen.answer.body == body
        assert seen.line["outcome"] == "completed"
        check_charge(seen.line, "usage")
    await check_invariants(proxy, upstream, baseline=baseline)


@EACH
async def test_f19_an_event_over_the_bound_is_relayed_byte_for_byte(
    serve: Serve, upstream: ScriptedUpstream, api: Api
) -> None:
    """A line of 24 MB in the middle is not parsed, not held, not changed; the usage is right."""
    proxy, baseline = await begin(serve, upstream)
    frames = events_of(api)
    frames.insert(3, b'event: x\ndata: {"type": "x", "y": "%b"}\n\n' % (b"z" * 24 * 2**20))
    upstream.script(stream(frames, split=2**20))
    client = await proxy.send(
        PATHS[api],
        prompt(PATHS[api], stream=True, **_with_usage(api)),
        {"x-request-id": f"big-{api}"},
        limit=2**20,
    )
    answer = await client.answer()
    assert answer.body == b"".join(frames)
    line = next(x for x in proxy.request_logs() if x["request_id"] == f"big-{api}")
    assert line["outcome"] == "completed"
    check_charge(line, "usage")
    await check_invariants(proxy, upstream, baseline=baseline)


def _with_usage(api: Api) -> dict[str, Any]:
    return {"stream_options": {"include_usage": True}} if api == "chat" else {}


async def test_f19_after_an_event_over_the_bound_the_numbers_go_on(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A failure right after an event that was not parsed has the next sequence number."""
    proxy, baseline = await begin(serve, upstream)
    frames = responses_events("a " * 3 + "b" * (9 * 2**20))[:8]
    upstream.script(stream(frames, split=2**20))
    seen = await ask(proxy, "responses", streamed=True, limit=2**20)
    assert len(frames[-1]) > 2**23
    check_failure("responses", b"".join(frames), seen.answer.body, "upstream_error")
    await check_invariants(proxy, upstream, baseline=baseline)


async def test_f19_a_terminal_event_over_the_bound_is_the_only_one(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A `response.completed` of 9 MB ends the stream: no failure is put after it."""
    proxy, baseline = await begin(serve, upstream)
    frames = responses_events(items=[message_item("b" * (9 * 2**20))], deltas=20)
    assert len(frames[-1]) > 2**23
    upstream.script(stream(frames, split=2**20))
    seen = await ask(proxy, "responses", streamed=True, limit=2**20)
    assert seen.answer.body.startswith(b"".join(frames))
    await check_invariants(
        proxy, upstream, baseline=baseline, stream=seen.answer.body, completed=True
    )


# F20: bad usage

OUTPUT = {"responses": "output_tokens", "chat": "completion_tokens", "messages": "output_tokens"}
INPUT = {"responses": "input_tokens", "chat": "prompt_tokens", "messages": "input_tokens"}


def count_of(api: Api, usage: Usage = USAGE) -> dict[str, Any]:
    """Return a usage in the API's own form."""
    return {"responses": usage.responses, "chat": usage.chat, "messages": usage.messages}[api]()


def counted(api: Api, usage: Any, streamed: bool) -> bytes:  # noqa: FBT001
    """Return a whole answer whose final usage is this; JSON `null` stands for none."""
    final = json.dumps(count_of(api)).encode()
    given = json.dumps(usage).encode()
    body = b"".join(events_of(api)) if streamed else json.dumps(json_of(api)).encode()
    assert body.count(final) == 1
    return body.replace(final, given)


WRONG: list[tuple[str, Any]] = [
    ("negative", -1),
    ("above the bound", 100_000_001),
    ("far above it", 10**30),
    ("text", "7"),
    ("float", 7.5),
    ("whole float", 7.0),
    ("boolean", True),
    ("list", [7]),
    ("object", {"a": 7}),
]


@BOTH
@pytest.mark.parametrize("value", [value for _, value in WRONG], ids=[kind for kind, _ in WRONG])
async def test_f20_a_bad_count_is_relayed_but_not_believed(
    serve: Serve,
    upstream: ScriptedUpstream,
    value: Any,
    streamed: bool,  # noqa: FBT001
) -> None:
    """A bad count of input or output changes no byte; the charge is an estimate that says so."""
    proxy, baseline = await begin(serve, upstream)
    for api in STREAMED:
        for name in (INPUT[api], OUTPUT[api]):
            body = counted(api, {**count_of(api), name: value}, streamed)
            seen = await _answered(proxy, upstream, api, body, streamed)
            check_charge(seen.line, "estimate", upstream.requests[-1])
            assert seen.line["output_tokens"] < 10_000
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_usage_estimated_total", "reason") == {"bad": 6}
    await check_invariants(proxy, upstream, baseline=baseline)


async def _answered(
    proxy: Proxy,
    upstream: ScriptedUpstream,
    api: Api,
    body: bytes,
    streamed: bool,  # noqa: FBT001
) -> Seen:
    upstream.script(stream([body]) if streamed else json_answer(body))
    seen = await ask(proxy, api, streamed=streamed)
    assert (seen.answer.status, seen.answer.body) == (200, body)
    assert seen.line["outcome"] == "completed"
    return seen


@BOTH
@pytest.mark.parametrize(
    ("usage", "reason"), [(None, "missing"), ({}, "bad"), ([], "bad"), ("none", "bad")]
)
async def test_f20_without_a_usage_the_charge_is_an_estimate(
    serve: Serve,
    upstream: ScriptedUpstream,
    streamed: bool,  # noqa: FBT001
    usage: Any,
    reason: str,
) -> None:
    """A usage that is missing or no object is estimated; the metric says why."""
    proxy, baseline = await begin(serve, upstream)
    # On a messages stream the usage of its start stands for what its end leaves out.
    apis = [api for api in STREAMED if not (streamed and api == "messages")]
    for api in apis:
        seen = await _answered(proxy, upstream, api, counted(api, usage, streamed), streamed)
        check_charge(seen.line, "estimate", upstream.requests[-1])
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_usage_estimated_total", "reason") == {reason: len(apis)}
    await check_invariants(proxy, upstream, baseline=baseline)


async def test_f20_messages_without_any_usage_are_estimated(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A messages stream without a usage at its start and end is estimated as missing."""
    proxy, baseline = await begin(serve, upstream)
    frames = []
    for name, data in parse_sse(b"".join(events_of("messages"))):
        event = json.loads(data)
        for place in (event, event.get("message", {})):
            place.pop("usage", None)
        frames.append(sse(event, event=name))
    seen = await _answered(proxy, upstream, "messages", b"".join(frames), streamed=True)
    check_charge(seen.line, "estimate", upstream.requests[-1])
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_usage_estimated_total", "reason") == {"missing": 1}
    await check_invariants(proxy, upstream, baseline=baseline)


LATER = Usage(input=21, cached=4, output=19, reasoning=5)


async def _twice(
    proxy: Proxy, upstream: ScriptedUpstream, api: Api, first: dict[str, Any], last: dict[str, Any]
) -> Seen:
    """Give a usage twice: in two events, on Responses by one key twice."""
    frames = events_of(api)
    final = json.dumps(count_of(api)).encode()
    at = next(n for n, frame in enumerate(frames) if final in frame)
    old, one, two = frames[at], json.dumps(first).encode(), json.dumps(last).encode()
    if api == "responses":
        frames[at] = old.replace(final, one + b', "usage": ' + two)
    else:
        frames[at : at + 1] = [old.replace(final, one), old.replace(final, two)]
    return await _answered(proxy, upstream, api, b"".join(frames), streamed=True)


async def test_f20_a_usage_given_twice_is_the_last_or_an_estimate(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Counts that grow and a key given twice say the last; two final chat frames say nothing."""
    proxy, baseline = await begin(serve, upstream)
    for api in STREAMED:
        good, later = count_of(api), count_of(api, LATER)
        seen = await _twice(proxy, upstream, api, good, later)
        if api == "chat":
            check_charge(seen.line, "estimate", upstream.requests[-1])
        else:
            check_charge(seen.line, "usage", usage=LATER)
        seen = await _twice(proxy, upstream, api, good, {**later, OUTPUT[api]: -7})
        check_charge(seen.line, "estimate", upstream.requests[-1])
    await check_invariants(proxy, upstream, baseline=baseline)
