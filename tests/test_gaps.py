"""What a mutated line of the daemon would break and no other test would see."""

import asyncio
import gzip
import json

import pytest

from aiproxy.call import Call
from aiproxy.sse import COMMENT
from answers import sse
from faults import Serve, asked, events_of, json_of, results_of
from invariants import eventually
from rig import CREDENTIAL, Proxy, prompt, routes
from steps import SSE_HEADERS, rechunk
from upstream import (
    Chunk,
    EndChunks,
    Finish,
    Headers,
    PausedRead,
    ScriptedUpstream,
    Send,
    Sleep,
    Stall,
    Wait,
    json_answer,
)

LARGE = 24 * 2**20  # bytes of a request body that no kernel buffer on loopback takes


def large_prompt(size: int) -> dict[str, object]:
    """Return a request for JSON whose body has over `size` bytes."""
    return prompt(input="x" * size)


def delta(text: str, number: int) -> dict[str, object]:
    """Return an event of output."""
    return {"type": "response.output_text.delta", "sequence_number": number, "delta": text}


async def behind(proxy: Proxy, size: int, *, blocked: bool = True) -> Call:
    """Wait until `size` bytes of the one answer are written, and `blocked` ones wait."""

    async def holds() -> None:
        (call,) = proxy.daemon._proxy.live
        assert call.reply.bytes_out >= size
        assert call.reply.blocked is blocked

    await eventually(holds)
    (call,) = proxy.daemon._proxy.live
    return call


async def logged(proxy: Proxy, requests: int) -> None:
    """Assert that so many requests have ended."""
    assert len(proxy.request_logs()) == requests


async def test_a_large_body_is_not_redirected(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A body that is sent piece by piece is not sent to where the upstream redirects either."""
    async with ScriptedUpstream() as other:
        proxy = await serve()
        to = ("location", f"{other.url}/responses")
        upstream.script(Headers(302, [to, ("content-length", "0")]))
        answer = await proxy.post(body=large_prompt(2 * 2**20))
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_error")
        assert (other.accepted, len(upstream.requests)) == (0, 1)


async def test_an_upstreams_cookie_is_not_kept(serve: Serve, upstream: ScriptedUpstream) -> None:
    """What an upstream sets for one client is not sent with another client's request."""
    proxy = await serve(upstreams={"scripted": {"url": f"http://localhost:{upstream.port}/v1"}})
    upstream.script(
        json_answer(json_of("responses"), headers=[("set-cookie", "session=team-a; Path=/")])
    )
    assert (await proxy.post()).status == 200
    assert (await proxy.post(key=proxy.other_key)).status == 200
    assert [request.header("cookie") for request in upstream.requests] == [None, None]


async def test_a_proxy_of_the_environment_is_not_used(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`HTTP_PROXY` in the daemon's environment leads neither prompt nor credential elsewhere."""
    async with ScriptedUpstream() as other:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{other.port}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        proxy = await serve()
        assert (await proxy.post()).status == 200
        assert other.accepted == 0
        assert upstream.requests[0].header("authorization") == f"Bearer {CREDENTIAL}"


async def test_many_requests_wait_for_one_upstream_at_once(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """The 120th request goes upstream while the first 119 are still without an answer."""
    proxy = await serve()
    gate = asyncio.Event()
    upstream.default = lambda request: [Wait(gate), *upstream.healthy(request)]
    clients = [await proxy.send() for _ in range(120)]
    await upstream.wait_request(120)
    gate.set()
    assert {(await client.answer()).status for client in clients} == {200}


async def test_no_idle_connection_is_kept_where_none_may_be(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """With `idle_connections: 0s` the connection to the upstream closes after its answer."""
    proxy = await serve(upstreams={"scripted": {"idle_connections": "0s"}})
    assert (await proxy.post()).status == 200

    async def closed() -> None:
        assert upstream.connections == 0

    await eventually(closed)


async def test_a_long_field_of_an_answer_passes(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A header field of 24 KiB, more than the HTTP library takes by itself, reaches the client."""
    proxy = await serve()
    upstream.script(
        json_answer(json_of("responses"), headers=[("x-codex-state", "s" * 24 * 2**10)])
    )
    answer = await proxy.post()
    assert (answer.status, len(answer.headers["x-codex-state"])) == (200, 24 * 2**10)


async def test_an_upload_counts_neither_as_connecting_nor_as_the_answers_delay(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """`connect` ends with the connection, and `first_byte` begins with the body's last byte."""
    # Each wait is longer than `connect`, both together are longer than `first_byte`, and each
    # leaves it most of a second, for a slow machine.
    times = {"connect": "300ms", "first_byte": "2s"}
    proxy = await serve(timeouts=times)
    gate = asyncio.Event()
    upstream.script(PausedRead(), Wait(gate), *json_answer(json_of("responses")))
    client = await proxy.send(body=large_prompt(LARGE))
    await upstream.wait_request()
    await asyncio.sleep(1.1)
    for link in upstream._links:
        link._transport.resume_reading()
    await asyncio.sleep(1.1)
    gate.set()
    async with asyncio.timeout(5):
        assert (await client.answer()).status == 200


async def test_what_came_while_the_client_was_behind_is_relayed_before_the_failure(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """An upstream that breaks off behind a slow client's back takes no whole event with it."""
    proxy = await serve()
    gate = asyncio.Event()
    before, large = events_of("responses")[:4], sse(delta("x" * 4 * 2**20, 4))
    last = sse(delta("the last words", 5))
    frames = b"".join([*before, large])
    upstream.script(Headers(200, SSE_HEADERS), Chunk(frames), Wait(gate), Chunk(last), Finish())
    client = await proxy.send(body=asked("responses", streamed=True), rcvbuf=2**14)
    await client.read_head()
    client.pause()

    async def broken_off() -> None:
        assert upstream.connections == 0

    await behind(proxy, len(frames))
    gate.set()
    await eventually(broken_off)
    async with asyncio.timeout(5):
        body = await client.read_body()
    assert body.startswith(frames + last)
    assert body.count(b"event: response.failed\n") == 1


async def test_the_heartbeats_silence_begins_with_the_last_event(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A comment comes no sooner than `keepalive` after what was last relayed."""
    proxy = await serve(streams={"keepalive": "500ms"})
    gate = asyncio.Event()
    first, second, *rest = events_of("responses")
    end = asyncio.Event()
    upstream.script(
        Headers(200, SSE_HEADERS),
        Chunk(first),
        Wait(gate),
        Chunk(second),
        Wait(end),
        Chunk(b"".join(rest)),
        EndChunks(),
    )
    client = await proxy.send("/v1/responses", asked("responses", streamed=True))
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5):
        await client.read_head()
        await client.read_until(first)
        await asyncio.sleep(0.25)
        sent_at = loop.time()
        gate.set()
        await client.read_until(second)
        await client.read_until(COMMENT)
        assert loop.time() - sent_at >= 0.5
        end.set()
        assert (await client.read_body()).endswith(rest[-1])


async def test_no_heartbeat_to_a_client_that_is_behind(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """While data waits for the client nothing is added to it."""
    proxy = await serve(streams={"keepalive": "20ms"})
    large = sse(delta("x" * 4 * 2**20, 0))
    upstream.script(Headers(200, SSE_HEADERS), Chunk(large), Stall())
    client = await proxy.send(body=asked("responses", streamed=True), rcvbuf=2**14)
    await client.read_head()
    client.pause()
    call = await behind(proxy, len(large))
    written = call.reply.bytes_out
    await asyncio.sleep(0.2)
    assert call.reply.blocked
    assert call.reply.bytes_out == written


async def test_a_stuck_clients_connection_is_dropped_at_once(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Once `client_write` has passed its connection is not given the same time again to close."""
    proxy = await serve(timeouts={"client_write": "1s"})
    large = sse(delta("x" * 4 * 2**20, 0))
    upstream.script(Headers(200, SSE_HEADERS), Chunk(large), Stall())
    client = await proxy.send(body=asked("responses", streamed=True), rcvbuf=2**14)
    await client.read_head()
    client.pause()

    async def dropped() -> None:
        assert proxy.daemon.clients.listener.count == 0

    await eventually(lambda: logged(proxy, 1), 5)
    await eventually(dropped, 0.5)
    async with asyncio.timeout(5):
        with pytest.raises(ConnectionResetError):
            await client.read_body()


async def test_a_kept_connection_whose_client_takes_nothing_is_dropped(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """The end of a complete answer waits for a stuck client `client_write` long, not for ever."""
    proxy = await serve(client_keepalive="100ms", timeouts={"client_write": "300ms"})
    gate = asyncio.Event()
    first, *rest = events_of("responses")
    upstream.script(
        Headers(200, SSE_HEADERS), Chunk(first), Wait(gate), Chunk(b"".join(rest)), EndChunks()
    )
    client = await proxy.send(body=asked("responses", streamed=True), rcvbuf=2**14)
    await client.read_head()
    client.pause()
    call = await behind(proxy, len(first), blocked=False)
    async with asyncio.timeout(5):
        while not proxy.daemon.clients.listener.unsent():  # until all that the kernel takes is full
            call.reply.write(COMMENT * 500)
            await asyncio.sleep(0.001)
    gate.set()

    async def dropped() -> None:
        assert [line["outcome"] for line in proxy.request_logs()] == ["completed"]
        assert proxy.daemon.clients.listener.count == 0

    await eventually(dropped)


async def test_a_heads_bound_is_not_its_answers(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A request whose head came in time is not cut when `client_header` has passed."""
    proxy = await serve(timeouts={"client_header": "300ms"})
    gate = asyncio.Event()
    upstream.script(Wait(gate), *json_answer(json_of("responses")))
    client = await proxy.send()
    await upstream.wait_request()
    await asyncio.sleep(0.4)
    gate.set()
    assert (await client.answer()).status == 200


async def test_inflated_bytes_count_as_held(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Small bodies that inflate to more than `max_buffered` together are refused."""
    proxy = await serve(max_body="64KiB", max_buffered="64KiB")
    packed = gzip.compress(json.dumps(large_prompt(40 * 2**10)).encode())
    upstream.script(Stall())
    await proxy.send(body=packed, headers={"content-encoding": "gzip"})
    await upstream.wait_request()
    answer = await proxy.post(body=packed, headers={"content-encoding": "gzip"})
    assert answer.status == 503


async def test_who_leaves_is_charged_by_the_targets_own_pace(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """After one whole answer of a quick model, a request that was left costs at its pace."""
    proxy = await serve()
    answer = {**json_of("responses"), "usage": {"input_tokens": 1, "output_tokens": 10_000_000}}
    upstream.script(Sleep(0.1), *json_answer(answer))
    assert (await proxy.post()).status == 200
    upstream.script(Stall())
    await proxy.send()
    await upstream.wait_request(2)
    await asyncio.sleep(0.1)
    await proxy.close_clients()

    await eventually(lambda: logged(proxy, 2))
    line = proxy.request_logs()[-1]
    assert line["outcome"] == "client_disconnected"
    assert line["output_tokens"] > 10_000  # at the pace of an unknown target it would be a few


async def test_a_slow_upload_is_no_overhead(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Own time before the upstream is asked does not grow with a client's slow upload."""
    proxy = await serve()
    body = json.dumps(prompt()).encode()
    client = await proxy.client()
    fields = [*proxy.headers(), ("content-length", str(len(body)))]
    await client.request("POST", "/v1/responses", fields)
    await client.send(body[:10])
    await asyncio.sleep(0.5)
    await client.send(body[10:])
    assert (await client.answer()).status == 200

    await eventually(lambda: logged(proxy, 1))
    (line,) = proxy.request_logs()
    assert line["duration_s"] >= 0.5
    assert line["overhead_s"] < 0.4


async def test_who_came_during_the_drains_delay_is_counted_as_drained(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """The log says of a request that began within `drain.delay` and ended after it: drained 1."""
    proxy = await serve(drain={"delay": "300ms"})
    gate = asyncio.Event()
    upstream.script(Wait(gate), *json_answer(json_of("responses")))
    drain = asyncio.ensure_future(proxy.daemon.drain())
    await asyncio.sleep(0)
    client = await proxy.send()
    await upstream.wait_request()
    while proxy.daemon.clients.listener.serves != "none":  # noqa: ASYNC110 - the daemon has no event for it
        await asyncio.sleep(0.01)
    gate.set()
    assert (await client.answer()).status == 200
    await drain
    assert "drained 1, cut 0" in [line["event"] for line in proxy.logs()]


async def test_who_leaves_is_not_charged_more_than_the_route_allows(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Where the client declared no largest output, the route's bounds what time alone says."""
    proxy = await serve(routes=routes(max_output_tokens=3))
    upstream.script(Stall())
    await proxy.send()
    await upstream.wait_request()
    await asyncio.sleep(0.3)  # 9 tokens at the pace of a target that is not known
    await proxy.close_clients()
    await eventually(lambda: logged(proxy, 1))
    assert proxy.request_logs()[0]["output_tokens"] == 3


async def test_a_json_answer_that_comes_slowly_is_not_silent(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """`idle` is the time between two parts of a JSON answer, not the time for all of it."""
    proxy = await serve(timeouts={"idle": "400ms"})
    head, whole = json_answer(json_of("responses"))
    assert isinstance(whole, Send)
    pieces = rechunk(whole.data, len(whole.data) // 6)
    paced = [step for piece in pieces for step in (Send(piece), Sleep(0.1))]
    upstream.script(head, paced)
    answer = await proxy.post()
    assert (answer.status, answer.body) == (200, whole.data)


async def test_a_late_connection_is_counted(serve: Serve, upstream: ScriptedUpstream) -> None:
    """An attempt whose TLS handshake does not end within `connect` has the result `connect`."""
    url = upstream.url.replace("http:", "https:")  # it takes the hello for the start of a head
    proxy = await serve(upstreams={"scripted": {"url": url}}, timeouts={"connect": "200ms"})
    assert (await proxy.post()).status == 502
    assert await results_of(proxy) == {"connect": 1}
