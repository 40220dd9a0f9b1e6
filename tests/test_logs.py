"""The log: one line per request, with exactly its fields and nothing secret."""

import json
import re
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import pytest

from aiproxy.exchange import Exchange
from aiproxy.logs import Log, request_fields
from answers import USAGE
from invariants import check_secrets, eventually
from responses import responses_events
from rig import CREDENTIAL, OUTPUT_CANARY, PROMPT_CANARY, LogTap, Proxy, prompt
from upstream import Finish, ScriptedUpstream, Stall, error_answer, json_answer, stream

Serve = Callable[..., Awaitable[Proxy]]
RESPONSES = "/v1/responses"

# Contract, section 10.
FIELDS = {
    "request_id", "key", "endpoint", "route", "upstream",
    "model", "attempts", "status", "outcome", "error_code",
    "upstream_request_id", "duration_s", "first_token_s", "overhead_s", "input_tokens",
    "input_cached_tokens", "output_tokens", "output_reasoning_tokens", "estimated",
    "replayed_turns", "bytes_in", "bytes_out", "client",
}  # fmt: skip


async def line_of(proxy: Proxy, n: int = 1) -> dict[str, Any]:
    """The n-th request's line, once it is there."""

    async def holds() -> None:
        assert len(proxy.request_logs()) >= n

    await eventually(holds)
    return proxy.request_logs()[n - 1]


# A request's line


async def test_fields(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A line has exactly the fields of the contract, with the facts of its request."""
    proxy = await serve()
    body = json.dumps(prompt(stream=True)).encode()
    events = responses_events()
    upstream.script(stream(events, headers=[("x-request-id", "req_up")]))
    answer = await proxy.post(RESPONSES, body, {"x-request-id": "mine-1"})
    line = await line_of(proxy)
    assert line.keys() - {"event", "level", "timestamp"} == FIELDS
    assert (line["event"], line["level"]) == ("request", "info")
    assert datetime.fromisoformat(line["timestamp"]).tzinfo is not None
    facts = {
        "request_id": "mine-1",
        "key": "team-a",
        "endpoint": "responses",
        "route": "gpt-test",
        "upstream": "scripted",
        "model": "gpt-test",
        "attempts": 1,
        "status": 200,
        "outcome": "completed",
        "upstream_request_id": "req_up",
        "input_tokens": USAGE.input - USAGE.cached,
        "input_cached_tokens": USAGE.cached,
        "output_tokens": USAGE.output - USAGE.reasoning,
        "output_reasoning_tokens": USAGE.reasoning,
        "estimated": False,
        "replayed_turns": 0,
        "bytes_in": len(body),
        "bytes_out": len(b"".join(events)),
        "client": "127.0.0.1",
    }
    assert {name: line[name] for name in facts} == facts
    assert not line["error_code"]
    assert 0 < line["overhead_s"] < line["first_token_s"] <= line["duration_s"] < 5
    assert answer.headers["x-request-id"] == "mine-1"


async def test_what_did_not_happen(serve: Serve) -> None:
    """A refused request has its code, and no times or tokens of an upstream."""
    proxy = await serve()
    answer = await proxy.post(RESPONSES, key="sk-aip-unknown")
    line = await line_of(proxy)
    assert (line["status"], line["outcome"]) == (401, "rejected_auth")
    assert (line["error_code"], line["key"], line["route"]) == ("invalid_api_key", "none", "none")
    assert (line["attempts"], line["first_token_s"], line["overhead_s"]) == (0, None, None)
    assert (line["input_tokens"], line["output_tokens"]) == (0, 0)
    assert line["bytes_out"] == len(answer.body)


async def test_one_line_at_the_end(serve: Serve, upstream: ScriptedUpstream) -> None:
    """No line while a stream is open; one when its client left, with status 499 (traps, 56)."""
    proxy = await serve()
    events = responses_events()
    upstream.script([*stream(events)[:-3], Stall()])
    client = await proxy.send(RESPONSES, prompt(stream=True))
    await client.read_head()
    await client.read_until(events[3])
    assert proxy.request_logs() == []
    await client.close()
    line = await line_of(proxy)
    assert (line["status"], line["outcome"]) == (499, "client_disconnected")
    assert len(proxy.request_logs()) == 1


async def test_an_upstreams_refusal(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The upstream's own code and request id are in the line."""
    proxy = await serve()
    upstream.script(error_answer(400, code="bad_thing", headers=[("request-id", "req_1")]))
    await proxy.post(RESPONSES)
    line = await line_of(proxy)
    assert (line["status"], line["outcome"]) == (400, "upstream_rejected")
    assert (line["error_code"], line["upstream_request_id"]) == ("bad_thing", "req_1")


@pytest.mark.parametrize("route", ["org/*", "none"])
async def test_caller_made_strings_are_cut(serve: Serve, route: str) -> None:
    """A model's name is cut at 128 characters, its control characters escaped."""
    proxy = await serve()
    prefix = "org/" if route == "org/*" else ""
    await proxy.post(RESPONSES, prompt(model=f"{prefix}\x1b[31m\n\x9b\u2028" + "m" * 5000))
    model = (await line_of(proxy))["model"]
    assert model.startswith(f"{prefix}\\x1b[31m\\n\\x9b\\u2028mmm")
    assert model.count("m") <= 128
    assert model.isprintable()


async def test_a_callers_id_that_may_not_be_repeated(serve: Serve) -> None:
    """A request id of other characters, or too long, is replaced by a new one."""
    proxy = await serve()
    for n, given in enumerate(("a" * 129, "a b", "x/y", ""), 1):
        answer = await proxy.post(RESPONSES, headers={"x-request-id": given})
        line = await line_of(proxy, n)
        assert line["request_id"] == answer.headers["x-request-id"]
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", line["request_id"])
        assert line["request_id"] != given


async def test_what_an_upstream_says_is_cut_too(serve: Serve, upstream: ScriptedUpstream) -> None:
    """An error code or request id from outside is no way to fill the log, nor to forge it."""
    proxy = await serve()
    long = "\x1b[31m" + "c" * 5000
    fields = [("x-request-id", "r" * 5000)]
    upstream.script(error_answer(400, code=long, headers=fields))
    await proxy.post(RESPONSES)
    line = await line_of(proxy)
    assert len(line["upstream_request_id"]) == 128
    assert line["error_code"].isprintable()
    assert len(line["error_code"]) <= 140


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("evil, 203.0.113.7", "203.0.113.7"),
        ("203.0.113.7, 127.0.0.2", "203.0.113.7"),
        ("203.0.113.7, evil", "127.0.0.1"),
        ("2001:db8::7, 127.0.0.2", "2001:db8::7"),
    ],
)
async def test_the_client_behind_a_proxy(serve: Serve, forwarded: str, client: str) -> None:
    """Behind trusted proxies the client is the right-most address that is not one of them."""
    proxy = await serve(trusted_proxies=["127.0.0.0/8"])
    await proxy.post(RESPONSES, headers={"x-forwarded-for": forwarded})
    assert (await line_of(proxy))["client"] == client


async def test_a_forwarded_zone_is_caller_made(serve: Serve) -> None:
    """An address may carry any text as its zone: like all that a caller made it is cut."""
    proxy = await serve(trusted_proxies=["127.0.0.0/8"])
    forwarded = f"fe80::1%{'z' * 5000}, 127.0.0.2"
    assert (await proxy.post(RESPONSES, headers={"x-forwarded-for": forwarded})).status == 200
    assert len((await line_of(proxy))["client"]) <= 128


async def test_malformed_http_behind_a_proxy(serve: Serve) -> None:
    """What is no request is answered and logged with trusted proxies, too."""
    proxy = await serve(trusted_proxies=["127.0.0.0/8"])
    client = await proxy.client()
    await client.send(b"GET / HTTP/1.1\r\nno field\r\n\r\n")
    assert b" 400 " in (await client.reader.read()).split(b"\r\n")[0]
    line = await line_of(proxy)
    assert (line["status"], line["client"]) == (400, "127.0.0.1")


async def test_nothing_secret_at_debug(serve: Serve, upstream: ScriptedUpstream) -> None:
    """No key, credential, prompt or output is in the log, whatever happens (traps, 57)."""
    proxy = await serve(log={"level": "debug"})
    upstream.text = f"Hello {OUTPUT_CANARY}"
    bad = json.dumps(prompt()).encode()[:-1]
    for path in (RESPONSES, "/v1/chat/completions", "/v1/messages"):
        for streamed in (False, True):
            await proxy.post(path, prompt(path, stream=streamed))
        upstream.script(error_answer(400, f"no: {PROMPT_CANARY} {CREDENTIAL}"))
        await proxy.post(path)
        upstream.script(json_answer(OUTPUT_CANARY.encode()))
        await proxy.post(path)
        upstream.script([*stream(responses_events(OUTPUT_CANARY))[:-4], Finish()])
        await proxy.post(path, prompt(path, stream=True))
        await proxy.post(path, bad)
        await proxy.post(path, prompt(path, temperature=PROMPT_CANARY, stream=PROMPT_CANARY))
    await proxy.post(RESPONSES, headers={"x-api-key": proxy.other_key})
    await line_of(proxy, 19)
    await check_secrets(proxy)


class Nowhere:
    """Records nothing."""

    def begin(self, exchange: Exchange) -> None:
        """Do nothing."""

    def record(self, exchange: Exchange) -> None:
        """Do nothing."""


def test_the_fields_of_an_empty_exchange() -> None:
    """The fields are the same for a request of which nothing is known."""
    exchange = Exchange("r", "none", Nowhere(), clock=lambda: 12.5, started=10.0)
    exchange.finish("rejected_invalid")
    exchange.finish("completed")
    fields = request_fields(exchange)
    assert fields.keys() == FIELDS
    assert (fields["duration_s"], fields["outcome"]) == (2.5, "rejected_invalid")


@pytest.mark.parametrize("field", ["model", "client", "upstream_request_id", "error_code"])
def test_strings_from_outside_can_be_written(field: str) -> None:
    """Bytes that are no UTF-8 came as surrogates: a line is written nevertheless, escaped."""
    exchange = Exchange("r", "none", Nowhere(), clock=lambda: 12.5, started=10.0)
    setattr(exchange, field, "fe80::1%\udc9b\x1b[31m")
    exchange.finish("completed")
    tap = LogTap()
    log = Log(tap, level="info", fmt="json")
    log.record(exchange)
    log.close()
    (line,) = tap.lines()
    assert line[field].isprintable()
