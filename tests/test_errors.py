"""The table of errors, as far as a request alone decides: what each one is answered."""

import gzip
import json
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest

from refusals import INVALID, Refusal, assert_closes
from rig import Proxy, key_hash, prompt
from upstream import ScriptedUpstream

Serve = Callable[..., Awaitable[Proxy]]

R = "/v1/responses"
C = "/v1/chat/completions"
M = "/v1/messages"
E = "/v1/embeddings"

DISABLED = "sk-aip-disabled"
EXPIRED = "sk-aip-expired"
NARROW = "sk-aip-narrow"

CONFIG: dict[str, Any] = {
    "max_body": "64KiB",
    "upstreams": {
        "chatty": {"url": "http://127.0.0.1:9/v1", "apis": ["chat"]},
        "vectors": {"url": "http://127.0.0.1:9/v1", "apis": ["embeddings"]},
    },
    "routes": [
        {"model": "gpt-test", "upstreams": ["scripted"], "max_output_tokens": 100},
        {"model": "chat-only", "upstreams": ["chatty"]},
        {"model": "embeddings-only", "upstreams": ["vectors"]},
    ],
    "keys": {
        "off": {"sha256": key_hash(DISABLED), "disabled": True},
        "old": {"sha256": key_hash(EXPIRED), "expires": "2020-01-01"},
        "narrow": {"sha256": key_hash(NARROW), "models": ["chat-only"]},
    },
}


class Case(NamedTuple):
    """A POST, and its refusal."""

    path: str
    body: bytes
    refusal: Refusal
    headers: tuple[tuple[str, str], ...] = ()


def invalid_type(param: str) -> Refusal:
    """Return the refusal of a wrong type."""
    return Refusal(400, "invalid_type", param=param)


def asked(path: str, **fields: Any) -> bytes:
    """Return a good body with some fields changed."""
    return json.dumps(prompt(path, **fields)).encode()


def with_number(path: str, name: str, number: str) -> bytes:
    """Return a good body with a field of this very spelling."""
    return asked(path, **{name: "NUMBER"}).replace(b'"NUMBER"', number.encode())


INVALID_JSON = Refusal(400, "invalid_json")
MISSING_MODEL = Refusal(400, "missing_required_parameter", param="model")
TOO_LARGE = Refusal(413, "request_too_large")
GZIP = (("content-encoding", "gzip"),)

# On every endpoint alike.
EVERYWHERE: dict[str, Callable[[str], Case]] = {
    "model missing": lambda p: Case(p, b'{"input":"x"}', MISSING_MODEL),
    "model null": lambda p: Case(p, b'{"model":null}', MISSING_MODEL),
    "model empty": lambda p: Case(p, b'{"model":""}', MISSING_MODEL),
    "model a number": lambda p: Case(p, asked(p, model=5), invalid_type("model")),
    "model a list": lambda p: Case(p, asked(p, model=["gpt-test"]), invalid_type("model")),
    "model no Unicode": lambda p: Case(p, asked(p, model="a\ud800"), invalid_type("model")),
    "stream a number": lambda p: Case(p, asked(p, stream=1), invalid_type("stream")),
    "empty body": lambda p: Case(p, b"", INVALID_JSON),
    "array": lambda p: Case(p, b"[%b]" % asked(p), INVALID_JSON),
    "NaN": lambda p: Case(p, with_number(p, "x", "NaN"), INVALID_JSON),
    "nested too deep": lambda p: Case(p, with_number(p, "x", "[" * 256 + "]" * 256), INVALID_JSON),
    "no UTF-8": lambda p: Case(p, asked(p, x="NON").replace(b"NON", b"\xff"), INVALID_JSON),
    "UTF-16": lambda p: Case(p, asked(p).decode().encode("utf-16-le"), INVALID_JSON),
    "trailing data": lambda p: Case(p, asked(p) + b"x", INVALID_JSON),
    "larger than max_body": lambda p: Case(p, asked(p, x="x" * 65536), TOO_LARGE),
    "inflates beyond max_body": lambda p: Case(
        p, gzip.compress(asked(p, x="x" * 65536)), TOO_LARGE, GZIP
    ),
    "does not inflate": lambda p: Case(p, asked(p), INVALID_JSON, (("content-encoding", "gzip"),)),
    "unknown content encoding": lambda p: Case(
        p, asked(p), Refusal(415, "unsupported_content_encoding"), (("content-encoding", "lzma"),)
    ),
    "two content encodings": lambda p: Case(
        p,
        gzip.compress(gzip.compress(asked(p))),
        Refusal(415, "unsupported_content_encoding"),
        (("content-encoding", "gzip, gzip"),),
    ),
    "two content encodings in two fields": lambda p: Case(
        p,
        gzip.compress(gzip.compress(asked(p))),
        Refusal(415, "unsupported_content_encoding"),
        (("content-encoding", "gzip"), ("content-encoding", "gzip")),
    ),
    "unknown expectation": lambda p: Case(
        p, asked(p), Refusal(417, "invalid_http"), (("expect", "200-ok"),)
    ),
}

WRONG_TYPES: dict[str, dict[str, list[Any]]] = {
    R: {
        "input": [5, {}, True],
        "previous_response_id": [5, ["resp_1"]],
        "background": ["yes", 1],
        "store": ["yes", 0],
        "max_output_tokens": ["10", 1.5, True],
    },
    C: {
        "messages": ["x", {}, 1],
        "n": ["1", 1.5, []],
        "max_tokens": ["10", 1.5],
        "max_completion_tokens": [[], 2.0],
    },
    M: {"messages": ["x", {}], "max_tokens": ["10", 1.5]},
}

UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    (R, {"background": True}, "background"),
    (R, {"conversation": "conv_1"}, "conversation"),
    (R, {"conversation": {"id": "conv_1"}}, "conversation"),
    (E, {"stream": True}, "stream"),
    (R, {"model": "embeddings-only", "stream": True}, "model"),
    (M, {"model": "chat-only"}, "model"),
    (E, {"model": "chat-only"}, "model"),
]

OVER_THE_OUTPUT: list[tuple[str, dict[str, Any], str]] = [
    (R, {"max_output_tokens": 101}, "max_output_tokens"),
    (C, {"max_tokens": 101}, "max_tokens"),
    (C, {"max_completion_tokens": 101}, "max_completion_tokens"),
    (C, {"max_tokens": 5, "max_completion_tokens": 101}, "max_completion_tokens"),
    (C, {"max_tokens": 101, "max_completion_tokens": 5}, "max_tokens"),
    (C, {"max_tokens": 40, "n": 3}, "max_tokens"),
    (M, {"max_tokens": 101}, "max_tokens"),
]

REFERENCE = b'{"type":"item_reference","id":"msg_1"}'
REFERENCES: dict[str, bytes] = {
    "alone": b"[%b]" % REFERENCE,
    "after a message": b'[{"role":"user","content":"x"},%b]' % REFERENCE,
    "type spelt with an escape": rb'[{"type":"item\u005freference","id":"msg_1"}]',
    "beside a lone surrogate": rb'[%b,{"role":"user","content":"\ud800"}]' % REFERENCE,
    "beside a long number": b'[%b,{"role":"user","content":"x","n":%b}]' % (REFERENCE, b"9" * 5000),
    "without a type": b'[{"id":"msg_1"}]',
}

OTHERS: dict[str, list[Case]] = {
    "wrong types": [
        Case(path, asked(path, **{name: value}), invalid_type(name))
        for path, fields in WRONG_TYPES.items()
        for name, values in fields.items()
        for value in values
    ],
    "numbers of 401 digits": [
        Case(path, with_number(path, name, "1" * 401), invalid_type(name))
        for path, name in ((R, "max_output_tokens"), (C, "n"), (C, "max_tokens"), (M, "max_tokens"))
    ],
    "options of another type": [
        Case(C, asked(C, stream=True, stream_options=[]), invalid_type("stream_options"))
    ],
    "what cannot be done": [
        Case(path, asked(path, **fields), Refusal(400, "unsupported_parameter", param=param))
        for path, fields, param in UNSUPPORTED
    ],
    "more output than the route allows": [
        Case(path, asked(path, **fields), Refusal(400, "invalid_value", param=param))
        for path, fields, param in OVER_THE_OUTPUT
    ],
}


@pytest.fixture
async def proxy(serve: Serve) -> Proxy:
    """Start a daemon with what the cases need."""
    return await serve(**CONFIG)


async def check_all(proxy: Proxy, upstream: ScriptedUpstream, cases: list[Case]) -> None:
    """Assert each case's refusal, and tell all that are not as promised at once."""
    wrong = {}
    for case in cases:
        answer = await proxy.post(case.path, case.body, case.headers)
        try:
            case.refusal.check(answer, anthropic=case.path == M)
        except AssertionError as error:
            wrong[case.path, case.body[:200]] = str(error)
    assert wrong == {}
    assert upstream.requests == []


@pytest.mark.parametrize("make", EVERYWHERE.values(), ids=EVERYWHERE)
async def test_refused_on_every_endpoint(
    make: Callable[[str], Case], proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """What no endpoint takes: status, type, code, param and shape, and nothing goes upstream."""
    await check_all(proxy, upstream, [make(path) for path in (R, C, M, E)])


@pytest.mark.parametrize("cases", OTHERS.values(), ids=OTHERS)
async def test_refused_on_its_endpoint(
    cases: list[Case], proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """What one endpoint does not take, the same way."""
    await check_all(proxy, upstream, cases)


@pytest.mark.parametrize("items", REFERENCES.values(), ids=REFERENCES)
async def test_a_reference_that_is_not_own(
    items: bytes, proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """An item_reference is 404 with code null, however it is written, and never goes upstream."""
    answer = await proxy.post(R, b'{"model":"gpt-test","input":%b}' % items)
    assert upstream.requests == []
    assert answer.status == 404
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == (INVALID, None)
    assert set(error) == {"message", "type", "param", "code"}


async def test_the_text_item_reference_is_no_reference(proxy: Proxy) -> None:
    """Text that mentions an item_reference goes upstream like any other."""
    text = 'what is {"type": "item_reference"}?'
    assert (await proxy.post(R, prompt(R, input=text))).status == 200
    item = {"role": "user", "content": [{"type": "input_text", "text": text}]}
    assert (await proxy.post(R, prompt(R, input=[item]))).status == 200


BAD_KEYS = [None, "", "sk-aip-unknown", DISABLED, EXPIRED, key_hash(NARROW)]


@pytest.mark.parametrize("path", [R, C, M, E])
async def test_every_401_is_the_same(path: str, proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """No key, unknown, disabled, expired: one same body, and the connection closed."""
    bodies = set()
    for key in BAD_KEYS:
        client = await proxy.send(path, key=key)
        answer = await client.answer()
        Refusal(401, "invalid_api_key", headers={"connection": "close"}).check(
            answer, anthropic=path == M
        )
        await assert_closes(client)
        bodies.add(answer.body)
    assert len(bodies) == 1
    assert upstream.requests == []


NEEDS_A_KEY = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/gpt-test"),
    ("GET", f"{R}/resp_1"),
    ("HEAD", f"{R}/resp_1"),
    ("DELETE", f"{R}/resp_1"),
    ("GET", f"{R}/resp_1/input_items"),
    ("GET", f"{R}/resp_1/input_items?limit=1"),
    ("POST", f"{R}/resp_1/cancel"),
]


async def test_what_needs_a_key(proxy: Proxy) -> None:
    """Everything about models and responses is 401 without a key."""
    for method, path in NEEDS_A_KEY:
        client = await proxy.client()
        await client.request(method, path, (), b"" if method == "POST" else None)
        answer = await client.answer()
        assert answer.status == 401, (method, path)
        if method != "HEAD":
            Refusal(401, "invalid_api_key").check(answer)
        await assert_closes(client)


async def test_a_response_that_is_not_there(proxy: Proxy) -> None:
    """Every verb on a stored response is 404 with code null, after the key."""
    for method, path in NEEDS_A_KEY[2:]:
        client = await proxy.client()
        await client.request(method, path, proxy.headers(), b"")
        answer = await client.answer()
        if method == "HEAD":
            assert (answer.status, answer.body) == (404, b"")
        else:
            Refusal(404, None).check(answer)


@pytest.mark.parametrize("path", [R, C, M, E])
async def test_every_unknown_model_is_the_same(path: str, proxy: Proxy) -> None:
    """A model that is not there and one that is not this key's: one same body."""
    refusal = Refusal(404, "model_not_found", param="model")
    unknown = await proxy.post(path, prompt(path, model="some-model"))
    refusal.check(unknown, anthropic=path == M)
    there = await proxy.post(path, prompt(path, model="gpt-test"), key=NARROW)
    refusal.check(there, anthropic=path == M)
    assert there.body.replace(b"gpt-test", b"some-model") == unknown.body


async def test_a_model_that_is_not_there_or_not_shown(proxy: Proxy) -> None:
    """GET /v1/models/{model} is 404 alike for an unknown model and for another key's."""
    refusal = Refusal(404, "model_not_found", param="model")
    unknown = await proxy.get("/v1/models/some-model", key=NARROW)
    refusal.check(unknown)
    there = await proxy.get("/v1/models/gpt-test", key=NARROW)
    refusal.check(there)
    assert there.body.replace(b"gpt-test", b"some-model") == unknown.body


async def test_no_answer_repeats_a_key(proxy: Proxy) -> None:
    """A refused key, its hash and its parts are in no answer, no log line and no metric."""
    key = "sk-aip-0123456789-refused-key"
    answer = await proxy.post(key=key)
    metrics = (await proxy.admin("/metrics")).body
    await proxy.get("/v1/models", [("x-api-key", key)], key=None)
    for place in (answer.body, repr(answer.headers).encode(), proxy.tap.raw, metrics):
        assert key[:14].encode() not in place
        assert key_hash(key).encode() not in place
