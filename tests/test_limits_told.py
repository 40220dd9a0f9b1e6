"""What limits tell: refusals, headers on every answer, denied fields, metrics, the page."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from client import Answer
from faults import PATHS, Api
from invariants import eventually
from responses import responses_events
from rig import ABSENT, AMPLE, TEAM_A, TEAM_B, Proxy, key_hash, prompt, routes, totals
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Wait, error_answer

Serve = Callable[..., Awaitable[Proxy]]
CHUNKED = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
NAMES = [
    f"x-ratelimit-{what}-{kind}"
    for kind in ("requests", "tokens")
    for what in ("limit", "remaining", "reset")
]
MILLISECOND = 1_000_000  # ns


def limited(**limits: Any) -> dict[str, Any]:
    """The key team-a with these limits alone."""
    absent = {name: ABSENT for name in AMPLE if name not in limits}
    return {"team-a": {"sha256": key_hash(TEAM_A), "limits": {**absent, **limits}}}


class Time:
    """The limiter's clock, in the test's hands."""

    def __init__(self, proxy: Proxy) -> None:
        self.now = proxy.daemon._limits._clock.latest
        proxy.daemon._limits._clock.read = lambda: self.now

    def pass_(self, milliseconds: float) -> None:
        """Let time pass."""
        self.now += int(milliseconds * MILLISECOND)


def told(answer: Answer) -> list[str | None]:
    """The six headers."""
    return [answer.headers.get(name) for name in NAMES]


def refusal(answer: Answer) -> tuple[int, str, str | None, str]:
    """Status, type, code and message of a refusal in OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] is None
    return answer.status, error["type"], error["code"], error["message"]


async def test_a_rate_of_requests_that_is_exceeded(serve: Serve) -> None:
    """Status, headers and body say which limit it is, and when to come again; that suffices."""
    proxy = await serve(keys=limited(requests={"rate": "40/min", "burst": 2}))
    time = Time(proxy)
    assert [(await proxy.post()).status for _ in range(2)] == [200, 200]
    time.pass_(99.5)
    answer = await proxy.post()
    why = (
        "Rate limit reached for key 'team-a' on requests per minute: Limit 2, Used 2, Requested 1."
        " Please try again in 1.401s."
    )
    assert refusal(answer) == (429, "requests", "rate_limit_exceeded", why)
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("2", "1401")
    assert "x-should-retry" not in answer.headers
    time.pass_(1400)
    assert (await proxy.post()).status == 429
    time.pass_(1)
    assert (await proxy.post()).status == 200


async def test_a_rate_of_tokens_that_is_exceeded(serve: Serve) -> None:
    """What is set aside counts; after the time that was told the same request is admitted."""
    proxy = await serve(keys=limited(tokens="6000/min"))
    time = Time(proxy)
    account = proxy.daemon._limits._books["keys"]["team-a"]
    account.tokens[0].put(-50 * account.tokens[0].unit, time.now)  # in debt
    answer = await proxy.post(body=prompt(max_output_tokens=30))
    status, kind, code, message = refusal(answer)
    assert (status, kind, code) == (429, "tokens", "rate_limit_exceeded")
    assert message.startswith(
        "Rate limit reached for key 'team-a' on tokens per minute: Limit 6000, Used 6050, Requested"
    )
    assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
    time.pass_(int(answer.headers["retry-after-ms"]) - 1)
    assert (await proxy.post(body=prompt(max_output_tokens=30))).status == 429
    time.pass_(1)
    assert (await proxy.post(body=prompt(max_output_tokens=30))).status == 200


@pytest.mark.parametrize("limit", ["requests", "tokens"])
async def test_messages_are_refused_in_their_own_shape(serve: Serve, limit: str) -> None:
    """On messages it is Anthropic's rate_limit_error, with the same headers."""
    proxy = await serve(keys=limited(**{limit: {"rate": "2000/day", "burst": 200}}))
    Time(proxy)
    for bucket in getattr(proxy.daemon._limits._books["keys"]["team-a"], limit):
        bucket.put(0, proxy.daemon._limits._clock.now())
    answer = await proxy.post("/v1/messages")
    document = answer.json()
    assert (answer.status, document["type"]) == (429, "error")
    assert document["error"]["type"] == "rate_limit_error"
    assert f"on {limit} per day" in document["error"]["message"]
    assert int(answer.headers["retry-after"]) >= 43


async def test_an_input_that_is_larger_than_the_bucket(serve: Serve) -> None:
    """It is told never to come again, also where another limit would refuse it first."""
    proxy = await serve(keys=limited(tokens="100/min", requests="1/day"))
    answer = await proxy.post(body=prompt(input="word " * 400))
    status, kind, code, message = refusal(answer)
    assert (status, kind, code) == (429, "tokens", "request_too_large")
    assert "on tokens per minute: Limit 100, Used 0, Requested 5" in message
    assert answer.headers["x-should-retry"] == "false"
    assert not {"retry-after", "retry-after-ms"} & set(answer.headers)
    assert (await proxy.post(body={"model": "gpt-test", "input": "x"})).status == 200
    assert refusal(await proxy.post(body=prompt(input="word " * 400)))[2] == "request_too_large"
    answer = await proxy.post("/v1/messages", prompt("/v1/messages", system="word " * 400))
    assert (answer.status, answer.json()["error"]["type"]) == (429, "rate_limit_error")
    assert answer.headers["x-should-retry"] == "false"


async def test_the_first_limit_in_the_way_is_told(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Concurrent, then requests, then tokens; the wait is enough for requests and tokens."""
    proxy = await serve(keys=limited(concurrent=1, requests="2/min", tokens="1000/h"))
    time = Time(proxy)
    go_on = asyncio.Event()
    frames = responses_events()
    upstream.script(Headers(200, CHUNKED), Chunk(frames[0]), Wait(go_on),
                    *map(Chunk, frames[1:]), EndChunks())  # fmt: skip
    client = await proxy.send("/v1/responses", prompt(stream=True))
    await client.read_head()
    bucket = proxy.daemon._limits._books["keys"]["team-a"]
    bucket.requests[0].put(0, time.now)
    bucket.tokens[0].put(0, time.now)
    answer = await proxy.post()
    why = (
        "Rate limit reached for key 'team-a' on concurrent requests: Limit 1, Used 1, Requested 1."
        " Please try again in 1s."
    )
    assert refusal(answer) == (429, "concurrent", "rate_limit_exceeded", why)
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("1", "1000")
    assert (bucket.requests[0].parts(time.now), bucket.tokens[0].parts(time.now)) == (0, 0)
    go_on.set()
    await client.read_body()
    bucket.tokens[0].put(0, time.now)
    answer = await proxy.post(body=prompt(max_output_tokens=1))
    assert refusal(answer)[1] == "requests"
    assert int(answer.headers["retry-after"]) > 60  # of the tokens, which come more slowly
    time.pass_(int(answer.headers["retry-after-ms"]) - 1)
    assert refusal(await proxy.post(body=prompt(max_output_tokens=1)))[1] == "tokens"
    time.pass_(1)
    assert (await proxy.post(body=prompt(max_output_tokens=1))).status == 200


async def test_headers_are_on_every_answer_of_a_limited_key(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """JSON, streams, errors before and after admission, lists; not without a key or a limit."""
    proxy = await serve(
        keys=limited(requests=["100/min", "50/h"], tokens="100000/min"),
        routes=routes(limits={"tokens": "90000/min"}),
    )
    Time(proxy)
    body = prompt(max_output_tokens=100)
    answer = await proxy.post(body=body)
    set_aside = 100 + len(json.dumps(body)) // 4
    kept = 90_000 - set_aside
    assert [*told(answer)[:5]] == ["50", "49", "1m12s", "90000", str(kept)]
    used = 11 + 7
    streamed = await proxy.post(body={**body, "stream": True})
    assert told(streamed)[1] == "48"
    assert 0 < 90_000 - used - int(told(streamed)[4] or 0) <= set_aside + 10
    for script, status in ((error_answer(500), 502), (error_answer(429), 429)):
        upstream.script(script)
        answer = await proxy.post(body=body)
        assert (answer.status, told(answer)[0]) == (status, "50")
        assert None not in told(answer)
    early = [
        await proxy.post(body=b"{"),
        await proxy.post(body=prompt(model="unknown")),
        await proxy.get("/v1/models"),
        await proxy.get("/v1/models/gpt-test"),
        await proxy.get("/v1/responses/resp_x"),
    ]
    assert [answer.status for answer in early] == [400, 404, 200, 200, 404]
    # The route is not known: the key's own windows. A look for a response takes a request.
    assert early[-1].headers["x-ratelimit-reset-requests"] == "6m0s"
    assert [told(answer)[1:4:2] for answer in early] == [["46", "100000"]] * 4 + [["45", "100000"]]
    for answer in (await proxy.get("/v1/models", key=TEAM_B), await proxy.post(key=None)):
        assert told(answer) == [None] * 6
    assert told(await proxy.post(key=TEAM_B))[:4] == [None, None, None, "90000"]


async def test_what_takes_nothing(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Own 400s, 401s, 404s on models, 413s and refusals leave every level as it is."""
    proxy = await serve(keys=limited(requests="10/min", tokens="1000/min"), max_body="1KiB")
    Time(proxy)
    limits = proxy.daemon._limits
    before = limits.save()
    answers = [
        await proxy.post(body=b"[]"),
        await proxy.post(body=prompt(model=5)),  # type: ignore[arg-type] # wrong on purpose
        await proxy.post(body=prompt(model="unknown")),
        await proxy.post(body=prompt(background=True)),
        await proxy.post(key="sk-aip-wrong"),
        await proxy.post(body=b'{"x": "' + b"y" * 2000 + b'"}'),
        await proxy.get("/v1/models"),
        await proxy.post(body=prompt(max_output_tokens="x")),
    ]
    assert [a.status for a in answers] == [400, 400, 404, 400, 401, 413, 200, 400]
    assert limits.save() == before
    bucket = limits._books["keys"]["team-a"].tokens[0]
    bucket.put(0, limits._clock.now())
    empty = limits.save()
    assert (await proxy.post()).status == 429
    assert limits.save() == empty
    assert len(upstream.requests) == 0


async def test_a_call_for_a_response_takes_one_request(serve: Serve) -> None:
    """Each of them, and no slot or token; without one it is refused, while models are listed."""
    proxy = await serve(keys=limited(requests="4/day", tokens="10/day", concurrent=1))
    Time(proxy)
    calls = [("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("GET", "")]
    client, seen = await proxy.client(), []
    for method, rest in calls:
        await client.request(method, f"/v1/responses/resp_x{rest}", proxy.headers())
        answer = await client.answer()
        seen.append((answer.status, told(answer)[1], told(answer)[4]))
    assert seen == [*[(404, str(n), "10") for n in (3, 2, 1, 0)], (429, "0", "10")]
    assert [(await proxy.get("/v1/models")).status for _ in range(2)] == [200, 200]


async def test_a_routes_limits_are_shared(serve: Serve) -> None:
    """What one key takes of a route is gone for the other, who is told whose limit it is."""
    proxy = await serve(routes=routes(limits={"requests": "2/day"}))
    assert (await proxy.post()).status == 200
    assert (await proxy.post(key=TEAM_B)).status == 200
    for key in (TEAM_A, TEAM_B):
        assert "for route 'gpt-test' on requests per day" in refusal(await proxy.post(key=key))[3]
    assert (await proxy.post(body=prompt(model="renamed"))).status == 200


async def test_defaults_are_for_keys_without_their_own(serve: Serve) -> None:
    """`limits: {}` is a key's own way to say none."""
    own = {"sha256": key_hash("sk-own"), "limits": {"requests": "2/day"}}
    keys = {"team-a": {"limits": ABSENT}, "team-b": {"limits": {}}, "own": own}
    proxy = await serve(keys=keys, keys_default={"limits": {"requests": "1/day"}})
    assert [(await proxy.post()).status for _ in range(2)] == [200, 429]
    assert [(await proxy.post(key=TEAM_B)).status for _ in range(3)] == [200] * 3
    assert [(await proxy.post(key="sk-own")).status for _ in range(3)] == [200, 200, 429]


FIELDS: dict[Api, str] = {
    "responses": "max_output_tokens", "chat": "max_completion_tokens", "messages": "max_tokens",
}  # fmt: skip


@pytest.mark.parametrize("api", FIELDS)
async def test_with_reserve_max_the_maximum_is_sent(
    serve: Serve, upstream: ScriptedUpstream, api: Api
) -> None:
    """Only where the client declared none, and only where tokens are limited."""
    proxy = await serve(
        limiter={"reserve": "max"}, routes=[*routes(max_output_tokens=900)[:1], *routes()[1:]]
    )
    bare = {k: v for k, v in prompt(PATHS[api]).items() if k != "max_tokens"}
    name = FIELDS[api]
    rows: list[tuple[dict[str, Any], str, int | None]] = [
        ({}, TEAM_A, 900), ({"model": "renamed"}, TEAM_A, 16384), ({name: 5}, TEAM_A, 5),
        ({name: -1}, TEAM_A, 900), ({name: 0}, TEAM_A, 0), ({name: None}, TEAM_A, 900),
        ({}, TEAM_B, None),
    ]  # fmt: skip
    for fields, key, expected in rows:
        await proxy.post(PATHS[api], {**bare, **fields}, key=key)
        assert upstream.requests[-1].json().get(name) == expected, fields
    await proxy.post("/v1/chat/completions", prompt("/v1/chat/completions", n=3, max_tokens=-5))
    sent = upstream.requests[-1].json()
    assert (sent["max_tokens"], "max_completion_tokens" in sent) == (300, False)
    await proxy.post("/v1/embeddings")
    assert not {"max_tokens", *FIELDS.values()} & set(upstream.requests[-1].json())


async def test_with_p90_nothing_is_added(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Then the body goes upstream with no maximum of ours."""
    proxy = await serve()
    await proxy.post()
    assert "max_output_tokens" not in upstream.requests[-1].json()


async def test_a_denied_field_is_refused_by_its_name(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Before anything is taken, on every endpoint; another key may use it."""
    key = {"deny": ["service_tier", "tools.web_search"], "limits": {"requests": "9/min"}}
    proxy = await serve(keys={"team-a": key})
    Time(proxy)
    before = proxy.daemon._limits.save()
    for path in PATHS.values():
        answer = await proxy.post(path, prompt(path, service_tier="flex"))
        assert answer.status == 400
        assert "'service_tier' is not allowed to this key" in answer.body.decode()
    search = {"type": "web_search_preview"}
    plain = json.dumps(prompt(tools=[search])).encode()
    escaped = plain.replace(b"web_search_preview", rb"web\u005fsearch")
    nested = prompt(tools=[{"type": "namespace", "name": "n", "tools": [search]}])
    for body in (plain, escaped, nested):
        answer = await proxy.post(body=body)
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_parameter", "tools.web_search")
    assert proxy.daemon._limits.save() == before
    assert upstream.requests == []
    both = prompt(service_tier="flex", tools=[search])
    assert (await proxy.post(body=both, key=TEAM_B)).status == 200
    function = {"type": "function", "name": "web_search", "parameters": {}}
    assert (await proxy.post(body=prompt(service_tier=None, tools=[function]))).status == 200


async def test_the_sdks_own_retry_waits_as_told_and_succeeds(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """openai-python sleeps exactly `retry-after-ms`, and its second attempt is admitted."""
    proxy = await serve(keys=limited(requests={"rate": "40/min", "burst": 1}))
    time = Time(proxy)
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        time.pass_(seconds * 1000)

    monkeypatch.setattr(anyio, "sleep", sleep)
    async with proxy.openai(max_retries=1) as client:
        for _ in range(3):
            answer = await client.responses.create(model="gpt-test", input="Hello")
            assert answer.status == "completed"
    assert slept == [1.5, 1.5]


async def test_what_the_operator_sees(serve: Serve) -> None:
    """Metrics, log line, status and page: who was refused by what, and what is left."""
    limits = {"requests": "3/day", "tokens": ["1000/min", "900/h"], "concurrent": 7}
    proxy = await serve(keys=limited(**limits), routes=routes(limits={"tokens": "5000/s"}))
    Time(proxy)
    bodies = [await proxy.post(body=prompt(max_output_tokens=20)) for _ in range(4)]
    assert [answer.status for answer in bodies] == [200, 200, 200, 429]

    async def logged() -> None:
        assert len(proxy.request_logs()) == 4

    await eventually(logged)
    line = proxy.request_logs()[-1]
    assert (line["status"], line["outcome"]) == (429, "rejected_limit")
    assert (line["error_code"], line["attempts"], line["output_tokens"]) == (
        "rate_limit_exceeded", 0, 0,
    )  # fmt: skip
    metrics = await proxy.metrics()
    refused = frozenset({("key", "team-a"), ("limit", "requests")})
    assert metrics["aiproxy_limit_rejections_total", refused] == 1
    left = totals(metrics, "aiproxy_limit_remaining", "limit")
    assert left == {"tokens": 900 - 3 * 18, "concurrent": 7}  # and no request
    assert totals(metrics, "aiproxy_requests_total", "outcome")["rejected_limit"] == 1
    await proxy.post(body=prompt(input="word " * 2000))
    rejected = totals(await proxy.metrics(), "aiproxy_limit_rejections_total", "limit")
    assert rejected == {"requests": 1, "tokens": 1}
    status = (await proxy.admin("/-/status")).json()
    (key,) = [it for it in status["keys"] if it["name"] == "team-a"]
    shown = ("limit", "window", "capacity", "remaining")
    assert [tuple(it[name] for name in shown) for it in key["limits"]] == [
        ("requests", "day", 3, 0), ("tokens", "minute", 1000, 946), ("tokens", "hour", 900, 846),
        ("concurrent", None, 7, 7),
    ]  # fmt: skip
    assert key["limits"][1]["full_in_s"] == 3.24
    assert status["routes"][0]["limits"][0]["remaining"] == 4946
    assert TEAM_A.encode() not in (await proxy.admin("/-/status")).body
