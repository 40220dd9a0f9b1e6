"""Headers, URLs and credentials of requests: what goes upstream, and what comes back."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aiproxy.config import ConfigError
from client import RawClient
from refusals import assert_stays
from rig import ABSENT, CREDENTIAL, OUTPUT_CANARY, TEAM_A, TEAM_B, Proxy, prompt
from upstream import Headers, Recorded, ScriptedUpstream, Send, json_answer

Serve = Callable[..., Awaitable[Proxy]]

R = "/v1/responses"
C = "/v1/chat/completions"
M = "/v1/messages"
E = "/v1/embeddings"

ALLOWED = {
    "accept": "text/event-stream",
    "user-agent": "codex/1",
    "openai-beta": "responses=v1",
    "anthropic-version": "2024-01-01",
    "anthropic-beta": "a,b",
    "x-stainless-lang": "python",
    "x-codex-turn-metadata": "{}",
    "session-id": "1",
    "session_id": "2",
    "thread-id": "3",
    "originator": "cli",
    "x-client-request-id": "4",
}
NEVER = {
    "cookie": "a=b",
    "x-forwarded-for": "1.2.3.4",
    "x_forwarded_user": "root",
    "x-forwarded-user": "root",
    "forwarded": "for=1.2.3.4",
    "via": "1.1 a",
    "proxy-authorization": "Basic x",
    "proxy-connection": "keep-alive",
    "keep-alive": "timeout=5",
    "te": "trailers",
    "accept-encoding": "gzip, br",
    "accept-language": "de",
    "origin": "http://evil",
    "referer": "http://evil/",
    "openai-organization": "org-theirs",
    "openai-project": "proj-theirs",
    "api-key": "theirs",
    "x-goog-api-key": "theirs",
    "traceparent": "00-1-2-01",
    "x_codex_a": "1",
    "host": "evil.example",
}
OURS = {"host", "content-type", "content-length", "accept-encoding", "authorization"}


async def ask(
    proxy: Proxy, upstream: ScriptedUpstream, path: str = R, headers: Any = (), query: str = ""
) -> Recorded:
    """POST what is good; return what the upstream got."""
    body = json.dumps(prompt(path)).encode()
    answer = await proxy.post(path + query, body, headers)
    assert answer.status == 200, answer
    return upstream.requests[-1]


def names_of(request: Recorded) -> list[str]:
    """Return the names of its fields."""
    return sorted(name.lower() for name, _ in request.headers)


async def test_what_goes_upstream(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Exactly the allow-list, our own, and nothing else; each once."""
    proxy = await serve()
    request = await ask(proxy, upstream, R, {**ALLOWED, **NEVER})
    assert names_of(request) == sorted([*ALLOWED, *OURS, "x-request-id"])
    assert {name: request.header(name) for name in ALLOWED} == ALLOWED
    assert request.header("host") == f"127.0.0.1:{upstream.port}"
    assert request.header("accept-encoding") == "identity"
    assert request.header("content-type") == "application/json"
    assert request.header("authorization") == f"Bearer {CREDENTIAL}"
    assert request.header("content-length") == str(len(request.body))


async def test_what_goes_upstream_of_a_bare_request(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Nothing is made up for a client that sends none: no user-agent, no accept."""
    proxy = await serve()
    for path in (R, C, E):
        request = await ask(proxy, upstream, path)
        assert names_of(request) == sorted([*OURS, "x-request-id"])
    request = await ask(proxy, upstream, M)
    expected = (OURS - {"authorization"}) | {"x-api-key", "anthropic-version", "x-request-id"}
    assert names_of(request) == sorted(expected)


async def test_no_key_of_the_client_goes_upstream(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The client's key is in no field of what the upstream gets, however it was presented."""
    proxy = await serve()
    for fields in ({"x-api-key": TEAM_A}, {"authorization": f"Bearer {TEAM_A}"}):
        for path in (R, M):
            body = json.dumps(prompt(path)).encode()
            await proxy.post(path, body, fields, key=None)
            assert TEAM_A not in str(upstream.requests[-1].headers)


async def test_what_connection_names_stays_here(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Fields that the client's Connection names are of that connection only."""
    proxy = await serve()
    named = {"connection": "keep-alive, X-Codex-Hop", "x-codex-hop": "1", "x-codex-other": "2"}
    request = await ask(proxy, upstream, R, named)
    assert request.header("x-codex-other") == "2"
    assert request.header("x-codex-hop") is None


async def test_header_allow(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Further client headers pass where the upstream's `header_allow` names them."""
    proxy = await serve(upstreams={"scripted": {"header_allow": ["X-Team", "cf-ray"]}})
    request = await ask(proxy, upstream, R, {"x-team": "a", "CF-Ray": "b", "x-teams": "c"})
    assert (request.header("x-team"), request.header("cf-ray")) == ("a", "b")
    assert request.header("x-teams") is None


async def test_header_allow_makes_no_duplicates(serve: Serve, upstream: ScriptedUpstream) -> None:
    """What aiproxy sets itself goes upstream once, or cannot be allowed at all."""
    for name in ("x-request-id", "content-type", "anthropic-version"):
        try:
            proxy = await serve(upstreams={"scripted": {"header_allow": [name]}})
        except ConfigError:
            continue
        request = await ask(proxy, upstream, M, {name: "application/json"})
        assert names_of(request).count(name) == 1, name


async def test_own_headers_of_the_upstream(serve: Serve, upstream: ScriptedUpstream) -> None:
    """An upstream's `headers` are sent, and win over the client's of the same name."""
    own = {"OpenAI-Organization": "org-1", "User-Agent": "ours", "anthropic-version": "2025-01-01"}
    proxy = await serve(upstreams={"scripted": {"headers": own}})
    request = await ask(proxy, upstream, M, ALLOWED)
    for name, value in own.items():
        assert [v for n, v in request.headers if n.lower() == name.lower()] == [value]


@pytest.mark.parametrize(
    ("way", "path", "expected"),
    [
        ("auto", R, ("authorization", f"Bearer {CREDENTIAL}")),
        ("auto", M, ("x-api-key", CREDENTIAL)),
        ("bearer", M, ("authorization", f"Bearer {CREDENTIAL}")),
        ("x-api-key", R, ("x-api-key", CREDENTIAL)),
        ("api-key", C, ("api-key", CREDENTIAL)),
        ("none", R, None),
    ],
)
async def test_the_credential(
    *, way: str, path: str, expected: tuple[str, str] | None, serve: Serve,
    upstream: ScriptedUpstream,
) -> None:  # fmt: skip
    """It is sent as `auth` says, and in no other field."""
    credential = {"credential": ABSENT} if way == "none" else {}
    proxy = await serve(upstreams={"scripted": {"auth": way, **credential}})
    request = await ask(proxy, upstream, path)
    carried = [(name.lower(), value) for name, value in request.headers if CREDENTIAL in value]
    assert carried == ([expected] if expected else [])


async def test_the_version_of_messages(serve: Serve, upstream: ScriptedUpstream) -> None:
    """`anthropic-version: 2023-06-01` where the client names none, on messages only."""
    proxy = await serve()
    assert (await ask(proxy, upstream, M)).header("anthropic-version") == "2023-06-01"
    given = await ask(proxy, upstream, M, {"anthropic-version": "2025-02-02"})
    assert given.header("anthropic-version") == "2025-02-02"
    assert (await ask(proxy, upstream, R)).header("anthropic-version") is None


# Addresses


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        ("/v1", "/v1/responses"),
        ("/v1/", "/v1/responses"),
        ("", "/v1/responses"),
        ("/", "/v1/responses"),
        ("/openai/v1", "/openai/v1/responses"),
        ("/openai/v1?api-version=2025-01", "/openai/v1/responses?api-version=2025-01"),
        ("/openai/v1/?a=1&a=2", "/openai/v1/responses?a=1&a=2"),
        ("/v1?a=%2B%26+b", "/v1/responses?a=%2B%26+b"),
        ("/a%2Fb", "/a%2Fb/responses"),
    ],
)
async def test_upstream_urls(
    suffix: str, expected: str, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """The path is after the base, with or without a slash; its query is kept as it is written."""
    url = f"http://127.0.0.1:{upstream.port}{suffix}"
    proxy = await serve(upstreams={"scripted": {"url": url}})
    upstream.default = json_answer({"object": "response", "output": []})
    assert (await ask(proxy, upstream, R, query="?api-version=theirs&x=1")).target == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("?beta=true", {"beta": "true"}),
        ("?x=1&beta=true&y=2", {"beta": "true"}),
        ("?beta=true%26x%3D1", {"beta": "true%26x%3D1"}),
        ("?beta=a%23b", {"beta": "a%23b"}),
        ("?x=1", {}),
        ("", {}),
    ],
)
async def test_beta_on_messages(
    given: str, expected: dict[str, str], serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Of the client's query only `beta` on messages goes upstream, beside the upstream's own."""
    url = f"http://127.0.0.1:{upstream.port}/v1?k=a%2Bb"
    proxy = await serve(upstreams={"scripted": {"url": url}})
    target = (await ask(proxy, upstream, M, query=given)).target
    path, _, query = target.partition("?")
    pairs = dict(pair.split("=", 1) for pair in query.split("&"))
    assert (path, pairs) == ("/v1/messages", {"k": "a%2Bb", **expected})
    assert (await ask(proxy, upstream, R, query=given)).target == "/v1/responses?k=a%2Bb"


# Values


ODD = ["\u00fc", "\u00ff\u0080", "a\tb", "", "x" * 8000, "\"',;=", "%00"]


async def test_odd_values_break_nothing(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Bytes beyond ASCII in any field of a request leave it what it is: answered."""
    proxy = await serve(trusted_proxies=["127.0.0.0/8"])
    for value in ODD:
        names = [*ALLOWED, "x-request-id", "x-forwarded-for", "cookie", "x-other"]
        fields = [(name, value) for name in names if name != "anthropic-version"]
        for path in (R, M):
            request = await ask(proxy, upstream, path, fields)
            sent = request.header("originator")
            assert sent is not None
            assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f]", sent)
    for name in ("authorization", "x-api-key"):
        for value in ODD:
            assert (await proxy.post(headers=[(name, value)], key=None)).status == 401
    assert all(line["status"] in {200, 401} for line in proxy.request_logs())


BACK = {
    "retry-after": "1",
    "retry-after-ms": "900",
    "x-should-retry": "false",
    "openai-processing-ms": "12",
    "openai-version": "2020-10-01",
    "x-codex-primary-used-percent": "3",
}
NOT_BACK = {
    "set-cookie": "a=b",
    "server": "upstream",
    "x-request-id": "theirs",
    "x-aiproxy-upstream": "theirs",
    "x-ratelimit-limit-requests": "1",
    "openai-organization": "org-1",
    "alt-svc": "h3",
    "keep-alive": "timeout=5",
    "x-odd": "\u00fc",
}
OF_JSON = {"content-type", "content-length", "date", "x-request-id", "x-aiproxy-upstream"}


async def test_what_comes_back(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Exactly the allow-list and our own, on JSON answers and streams (team-b has no limits)."""
    proxy = await serve()
    answer = {"object": "response", "output": []}
    upstream.script(json_answer(answer, headers=[*BACK.items(), *NOT_BACK.items()]))
    got = (await proxy.post(headers={"x-request-id": "mine"}, key=TEAM_B)).headers
    assert set(got) == {*BACK, *OF_JSON}
    assert {name: got[name] for name in BACK} == BACK
    assert (got["x-request-id"], got["x-aiproxy-upstream"]) == ("mine", "scripted")
    request = upstream.requests[-1]
    assert request.header("x-request-id") == "mine"
    streamed = (await proxy.post(R, prompt(stream=True), key=TEAM_B)).headers
    own = {"cache-control", "x-accel-buffering", "transfer-encoding"}
    assert set(streamed) == (OF_JSON - {"content-length"}) | own
    assert (streamed["cache-control"], streamed["x-accel-buffering"]) == ("no-cache", "no")


async def test_request_ids(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The caller's id where it is a good one, else a new one each time; it goes upstream."""
    proxy = await serve()
    seen = set()
    for given in ("", "a b", "x" * 129, "\u00fc", "a/b", "<script>"):
        answer = await proxy.post(headers={"x-request-id": given})
        made = answer.headers["x-request-id"]
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", made)
        assert upstream.requests[-1].header("x-request-id") == made
        seen.add(made)
    assert len(seen) == 6
    for given in ("x" * 128, "A.b_c-1"):
        answer = await proxy.post(headers={"x-request-id": given})
        assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("value", [b"a\x01b", b"a\rb", b"a\x00b", b"\xff\xfe", b"a\x7fb"])
async def test_odd_values_of_the_upstream(
    value: bytes, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """No byte of an upstream's header breaks our answer: it is left out, or the answer is 502."""
    proxy = await serve()
    body = b'{"object":"response","output":[]}'
    for name in (b"x-codex-a", b"retry-after", b"x-request-id", b"x-other"):
        fields = [("content-type", "application/json"), ("content-length", str(len(body)))]
        head = Headers(200, fields).encode()[:-2] + name + b": " + value + b"\r\n\r\n"
        upstream.script(Send(head), Send(body))
        answer = await proxy.post()
        assert answer.status in {200, 502}
        assert not any(re.search(r"[^\t -~]", v) for v in answer.headers.values())
        assert answer.json()
    assert (await proxy.post()).status == 200


async def test_nobody_says_what_serves(serve: Serve) -> None:
    """No answer has a Server header, be it of calls or errors, of either listener."""
    proxy = await serve()
    answers = [await proxy.post(), await proxy.get("/"), await proxy.get("/x")]
    answers += [await proxy.post(key=None), await proxy.admin("/metrics"), await proxy.admin("/x")]
    answers.append(await proxy.admin("/-/healthy", "POST"))
    assert [a.status for a in answers if "server" in a.headers] == []


@pytest.mark.parametrize("listener", ["client", "admin"])
async def test_nobody_says_what_refuses(listener: str, serve: Serve) -> None:
    """Nor has the answer to what is no HTTP."""
    proxy = await serve()
    port = proxy.port if listener == "client" else proxy.daemon.operators.port
    async with await RawClient.connect(port) as client:
        await client.send(b"no HTTP\r\n\r\n")
        async with asyncio.timeout(3):
            assert b"\r\nserver:" not in (await client.reader.read()).lower()


# The client in the log

CLIENTS = [
    ([], None, "127.0.0.1"),
    ([], "1.2.3.4", "127.0.0.1"),
    (["127.0.0.0/8"], None, "127.0.0.1"),
    (["127.0.0.0/8"], "1.2.3.4", "1.2.3.4"),
    (["127.0.0.0/8"], "6.6.6.6, 1.2.3.4", "1.2.3.4"),
    (["127.0.0.0/8", "10.0.0.0/8"], "6.6.6.6, 1.2.3.4, 10.1.1.1", "1.2.3.4"),
    (["127.0.0.0/8", "10.0.0.0/8"], "10.2.2.2, 10.1.1.1", "10.2.2.2"),
    (["127.0.0.0/8"], "6.6.6.6, 2001:db8::1", "2001:db8::1"),
    (["127.0.0.0/8"], "6.6.6.6, unknown", "127.0.0.1"),
    (["192.0.2.0/24"], "1.2.3.4", "127.0.0.1"),
]


@pytest.mark.parametrize(("trusted", "forwarded", "expected"), CLIENTS)
async def test_the_client_in_the_log(
    trusted: list[str], forwarded: str | None, expected: str, serve: Serve
) -> None:
    """Behind trusted proxies it is the right-most untrusted address; else whoever connected."""
    proxy = await serve(trusted_proxies=trusted)
    fields = [("x-forwarded-for", forwarded)] if forwarded else []
    client = await proxy.client()
    await client.request("GET", "/", fields)
    await client.answer()
    await assert_stays(client)
    assert OUTPUT_CANARY.encode() not in proxy.tap.raw
    line = next(iter(await logged(proxy)))
    assert line["client"] == expected


async def logged(proxy: Proxy) -> list[dict[str, Any]]:
    """Return the lines of requests, once the daemon has written the first."""
    while not (lines := proxy.request_logs()):
        await proxy.admin("/-/healthy")
    return lines
