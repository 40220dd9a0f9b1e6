"""Who may call: keys in the headers, checked before anything of the body is read; and models."""

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from invariants import check_invariants
from refusals import Refusal, assert_closes, assert_stays
from rig import TEAM_A, TEAM_B, Proxy, key_hash, prompt
from upstream import ScriptedUpstream

Serve = Callable[..., Awaitable[Proxy]]

R = "/v1/responses"
M = "/v1/messages"

UNKNOWN = "sk-aip-unknown"
NO_KEY = Refusal(401, "invalid_api_key", headers={"connection": "close"})

ACCEPTED: dict[str, list[tuple[str, str]]] = {
    "Bearer": [("authorization", f"Bearer {TEAM_A}")],
    "bearer": [("authorization", f"bearer {TEAM_A}")],
    "BEARER": [("Authorization", f"BEARER {TEAM_A}")],
    "x-api-key": [("x-api-key", TEAM_A)],
    "X-Api-Key": [("X-Api-Key", TEAM_A)],
    "both the same": [("authorization", f"Bearer {TEAM_A}"), ("x-api-key", TEAM_A)],
}
REJECTED: dict[str, list[tuple[str, str]]] = {
    "none": [],
    "two different ones": [("authorization", f"Bearer {TEAM_A}"), ("x-api-key", TEAM_B)],
    "a good and a bad one": [("authorization", f"Bearer {TEAM_A}"), ("x-api-key", UNKNOWN)],
    "two authorizations": [("authorization", f"Bearer {t}") for t in (TEAM_A, TEAM_B)],
    "no scheme": [("authorization", TEAM_A)],
    "another scheme": [("authorization", f"Basic {TEAM_A}")],
    "api-key": [("api-key", TEAM_A)],
    "x_api_key": [("x_api_key", TEAM_A)],
    "a cookie": [("cookie", f"x-api-key={TEAM_A}")],
    "its hash": [("x-api-key", key_hash(TEAM_A))],
    "its name": [("x-api-key", "team-a")],
    "no ASCII": [("x-api-key", "\u00fc\u00ff")],
    "an empty one": [("authorization", "Bearer ")],
}


@pytest.mark.parametrize("fields", ACCEPTED.values(), ids=ACCEPTED)
async def test_a_good_key(fields: list[tuple[str, str]], serve: Serve) -> None:
    """A key is taken as Bearer or as x-api-key, in any spelling of the names, on every endpoint."""
    proxy = await serve()
    for path in (R, M):
        assert (await proxy.post(path, headers=fields, key=None)).status == 200
    assert (await proxy.get("/v1/models", fields, key=None)).status == 200


async def test_a_bad_key(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Whatever else is presented is 401; nothing goes upstream, and nothing of it is seen again."""
    proxy = await serve()
    bodies = []
    for fields in REJECTED.values():
        answer = await proxy.post(R, headers=fields, key=None)
        NO_KEY.check(answer)
        bodies.append(answer.body)
    assert upstream.requests == []
    assert UNKNOWN.encode() not in proxy.tap.raw
    await check_invariants(proxy, upstream, bodies=bodies)


async def test_who_called_is_in_the_log(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A request counts under its key's name; one without a valid key under none."""
    proxy = await serve()
    for key in (TEAM_A, TEAM_B, UNKNOWN):
        await proxy.post(key=key)
    await check_invariants(proxy, upstream)
    lines = [(line["key"], line["outcome"]) for line in proxy.request_logs()[:3]]
    assert lines == [("team-a", "completed"), ("team-b", "completed"), ("none", "rejected_auth")]


async def test_keys_of_the_configuration(serve: Serve) -> None:
    """Rotation, disabling and expiry of keys decide who may call."""
    now = datetime.now(UTC)
    soon, past = ((now + timedelta(seconds=s)).isoformat() for s in (3600, -1))
    today, yesterday = (str((now - timedelta(days=days)).date()) for days in (0, 1))
    keys: dict[str, dict[str, Any]] = {
        "rotated": {"sha256": [key_hash("old"), key_hash("new")]},
        "disabled": {"sha256": key_hash("disabled"), "disabled": True},
        "soon": {"sha256": key_hash("soon"), "expires": soon},
        "past": {"sha256": key_hash("past"), "expires": past},
        "today": {"sha256": key_hash("today"), "expires": today},
        "yesterday": {"sha256": key_hash("yesterday"), "expires": yesterday},
    }
    proxy = await serve(keys=keys)
    for key in ("old", "new", "soon", "today"):
        assert (await proxy.get("/v1/models", key=key)).status == 200, key
    for key in ("disabled", "past", "yesterday", "rotated"):
        NO_KEY.check(await proxy.get("/v1/models", key=key))


# The key comes first


@pytest.mark.parametrize(
    "fields",
    [
        [("content-length", "1000000")],
        [("transfer-encoding", "chunked")],
        [("content-length", "1000000"), ("content-encoding", "gzip")],
        [("content-length", "99999999999")],
        [("content-length", "10"), ("content-encoding", "lzma")],
    ],
)
async def test_a_bad_key_is_told_before_the_body_comes(
    fields: list[tuple[str, str]], serve: Serve
) -> None:
    """401 comes while the body is still awaited, whatever the head says of the body."""
    proxy = await serve()
    client = await proxy.client()
    await client.request("POST", R, proxy.headers(fields, UNKNOWN))
    async with asyncio.timeout(1):
        NO_KEY.check(await client.answer())


async def test_a_body_under_a_bad_key_is_not_read(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A bomb that no key opens is neither counted nor inflated."""
    proxy = await serve()
    body = gzip.compress(json.dumps(prompt(x="x" * 2**24)).encode())
    fields = [("content-encoding", "gzip")]
    NO_KEY.check(await proxy.post(R, body, fields, key=UNKNOWN))
    await check_invariants(proxy, upstream)
    assert proxy.request_logs()[0]["bytes_in"] == 0


async def test_expect_under_a_bad_key(serve: Serve) -> None:
    """`Expect: 100-continue` gets the 401 at once, no 100, and the close."""
    proxy = await serve()
    client = await proxy.client()
    fields = proxy.headers({"expect": "100-continue", "content-length": "9"}, UNKNOWN)
    await client.request("POST", R, fields)
    async with asyncio.timeout(1):
        head = await client.read_head()
        assert head.status == 401
        await client.read_body()
        assert await client.reader.read() == b""


@pytest.mark.parametrize("expect", ["100-continue", "100-Continue"])
async def test_expect_under_a_good_key(expect: str, serve: Serve) -> None:
    """`Expect: 100-continue` gets 100 Continue first, and after the body the answer."""
    proxy = await serve()
    body = json.dumps(prompt()).encode()
    client = await proxy.client()
    fields = proxy.headers({"expect": expect, "content-length": str(len(body))})
    await client.request("POST", R, fields)
    async with asyncio.timeout(1):
        assert (await client.read_head()).status == 100
    await client.send(body)
    assert (await client.read_head()).status == 200
    await client.read_body()
    await assert_stays(client)


async def test_expect_before_a_chunked_body(serve: Serve) -> None:
    """100 Continue also comes before a body of unknown length."""
    proxy = await serve()
    body = json.dumps(prompt()).encode()
    client = await proxy.client()
    fields = proxy.headers({"expect": "100-continue", "transfer-encoding": "chunked"})
    await client.request("POST", R, fields)
    assert (await client.read_head()).status == 100
    await client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
    assert (await client.answer()).status == 200


async def test_expect_of_a_body_that_is_too_large(serve: Serve) -> None:
    """A body that is refused by its length is refused without 100 Continue."""
    proxy = await serve(max_body="1KiB")
    client = await proxy.client()
    fields = proxy.headers({"expect": "100-continue", "content-length": "1025"})
    await client.request("POST", R, fields)
    assert (await client.read_head()).status == 413
    await client.read_body()
    await assert_closes(client)


async def test_expect_by_http_1_0(serve: Serve) -> None:
    """HTTP/1.0 knows no 1xx: its Expect is ignored (RFC 9110, section 10.1.1)."""
    proxy = await serve()
    body = json.dumps(prompt()).encode()
    client = await proxy.client()
    head = f"POST {R} HTTP/1.0\r\nexpect: 100-continue\r\nauthorization: Bearer {TEAM_A}\r\n"
    await client.send(b"%bcontent-length: %d\r\n\r\n" % (head.encode(), len(body)))
    await asyncio.sleep(0.1)
    await client.send(body)
    assert b" 200 " in (await client.reader.readline())


@pytest.mark.parametrize("expect", ["200-ok", "100-continue, x", "", "\u00fc"])
async def test_another_expectation(expect: str, serve: Serve) -> None:
    """Any other Expect is 417."""
    proxy = await serve()
    Refusal(417, "invalid_http").check(await proxy.post(headers=[("expect", expect)]))


# Models


def model_names(proxy_answer: Any) -> list[str]:
    """Return the names of a list of models, checking its shape."""
    listed = proxy_answer.json()
    assert listed["object"] == "list"
    for model in listed["data"]:
        assert set(model) == {"id", "object", "created", "owned_by"}
        assert (model["object"], type(model["created"])) == ("model", int)
    return [model["id"] for model in listed["data"]]


MODEL_KEYS = {
    "all": {"sha256": key_hash("all")},
    "orgs": {"sha256": key_hash("orgs"), "models": ["org/*"]},
    "one": {"sha256": key_hash("one"), "models": ["gpt-test", "org/n?thing"]},
}


async def test_models(serve: Serve) -> None:
    """Exact route names and `list`s, of those that the key may use; and each of them by name."""
    proxy = await serve(keys=MODEL_KEYS)
    shown = {"all": ["gpt-test", "renamed", "org/small"], "orgs": ["org/small"]}
    shown["one"] = ["gpt-test"]
    for key, expected in shown.items():
        assert model_names(await proxy.get("/v1/models", key=key)) == expected
        for name in ("gpt-test", "renamed", "org/small"):
            answer = await proxy.get(f"/v1/models/{name}", key=key)
            assert answer.status == (200 if name in expected else 404), (key, name)
            if answer.status == 200:
                assert answer.json()["id"] == name


@pytest.mark.parametrize("name", ["org/small", "org%2Fsmall", "org%2fsmall"])
async def test_a_model_with_a_slash(name: str, serve: Serve) -> None:
    """A name with a slash is found as it is and escaped."""
    proxy = await serve()
    answer = await proxy.get(f"/v1/models/{name}")
    assert (answer.status, answer.json()["id"]) == (200, "org/small")


@pytest.mark.parametrize("name", ["org/*", "org/other", "", "%FF", "..", "%00", "gpt-test/", "x?y"])
async def test_a_model_that_is_not_listed(name: str, serve: Serve) -> None:
    """Globs, unlisted names and nonsense are 404."""
    proxy = await serve()
    Refusal(404, "model_not_found", param="model").check(await proxy.get(f"/v1/models/{name}"))


async def test_per_key_models_on_calls(serve: Serve) -> None:
    """A key reaches what its globs match, listed or not, and nothing else."""
    proxy = await serve(keys=MODEL_KEYS)
    for key, model, status in (
        ("orgs", "org/small", 200),
        ("orgs", "org/unlisted", 200),
        ("orgs", "gpt-test", 404),
        ("one", "gpt-test", 200),
        ("one", "org/nothing", 200),
        ("one", "org/something", 404),
        ("one", "GPT-TEST", 404),
        ("all", "org/x/y", 200),
        ("all", "org", 404),
    ):
        assert (await proxy.post(R, prompt(model=model), key=key)).status == status, (key, model)
