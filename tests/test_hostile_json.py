"""Hostile JSON on the four endpoints: refused in the endpoint's shape, or sent on as it came."""

import gzip
import json
from dataclasses import dataclass
from typing import Any

import pytest

from faults import PATHS, Api, Serve, json_of
from hostile import Wrong, check_after, check_upstream, check_wire
from refusals import Refusal
from rig import Proxy, prompt
from upstream import Recorded, ScriptedUpstream, json_answer

MAXIMUM = {"responses": "max_output_tokens", "chat": "max_tokens", "messages": "max_tokens"}
CONTENT = {"responses": "input", "chat": "messages", "messages": "messages"}
ASKED = {api: json.dumps(prompt(path)).encode() for api, path in PATHS.items()}

INVALID_JSON = Refusal(400, "invalid_json")
NO_MODEL = Refusal(400, "missing_required_parameter", param="model")
UNKNOWN = Refusal(404, "model_not_found", param="model")


def wrong_type(param: str) -> Refusal:
    """Return the refusal of a field that is read and has a wrong type."""
    return Refusal(400, "invalid_type", param=param)


def unsupported(param: str) -> Refusal:
    """Return the refusal of what cannot be done."""
    return Refusal(400, "unsupported_parameter", param=param)


# Whole bodies that are not one JSON object in UTF-8 (RFC 8259 sections 2 and 8); `%b` is a good one
DOCUMENTS: dict[str, bytes] = {
    "empty": b"",
    "space": b" \t\r\n",
    "a number": b"1",
    "null": b"null",
    "true": b"true",
    "a string": b'"model"',
    "NaN": b"NaN",
    "an array": b"[%b]",
    "an empty array": b"[]",
    "two objects": b"%b%b",
    "two lines": b"%b\n%b",
    "a comma behind": b"%b,",
    "a brace behind": b"%b}",
    "a word behind": b"%b x",
    "a zero byte behind": b"%b\0",
    "a zero byte before": b"\0%b",
    "a byte order mark": b"\xef\xbb\xbf%b",
    "a comment before": b"/* */%b",
    "a comment behind": b"%b // x",
    "only opened": b"{",
    "cut": b'{"model": "gpt-test", "input": "x',
    "cut in a character": b'{"model": "gpt-test", "input": "\xe2\x82',
    "only closed": b"}",
    "no quotes": b'{model: "gpt-test"}',
    "single quotes": b"{'model': 'gpt-test'}",
    "no colon": b'{"model" "gpt-test"}',
    "no comma": b'{"model": "gpt-test" "input": "x"}',
    "two commas": b'{"model": "gpt-test",, "input": "x"}',
    "a comma at the end": b'{"model": "gpt-test", "input": "x",}',
    "a number as a key": b'{1: "gpt-test"}',
    "null as a key": b'{null: "gpt-test"}',
    "a form": b"model=gpt-test&input=x",
    "a part of a form": b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nx\r\n--x--',
    "XML": b"<model>gpt-test</model>",
    "YAML": b"model: gpt-test\ninput: x\n",
    "MessagePack": b"\x81\xa5model\xa8gpt-test",
    "bad UTF-8 in a key": b'{"model": "gpt-test", "\xff": 1}',
    "bad UTF-8 in the model": b'{"model": "gpt-test\xc0\x80"}',
    "100,000 arrays": b"[" * 100_000,
    "100,000 objects": b'{"a":' * 100_000,
}  # fmt: skip
ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp500")

# Values of a field that aiproxy does not read: no JSON wherever they stand, ...
NO_VALUES: dict[str, bytes] = {
    "NaN": b"NaN", "-NaN": b"-NaN", "Infinity": b"Infinity", "-Infinity": b"[-Infinity]",
    "undefined": b"undefined", "True": b"True", "nothing": b"", "a plus": b"+1", "zeros": b"01",
    "no integer": b".5", "no fraction": b"1.", "no exponent": b"1e", "hex": b"0x1",
    "1_000": b"1_000",
    "a lone minus": b"-", "single quotes": b"'x'", "no end": b'"x', "an unknown escape": rb'"\x41"',
    "a short escape": rb'"\u12"', "a newline": b'"a\nb"', "a zero byte": b'"a\0b"',
    "a comment": b"1 /* */", "an array with a comma": b"[1,]",
    "an object with a comma": b'{"a":1,}',
    "the wrong end": b"[1}", "bad UTF-8": b'["\xff"]', "half a character": b'{"a":["\xe2\x82"]}',
    "a surrogate in UTF-8": b'"\xed\xa0\x80"', "overlong UTF-8": b'"\xc0\xaf"',
    "beyond Unicode": b'"\xf4\x90\x80\x80"', "bad UTF-8 in a key": b'{"a":{"\xff":1}}',
    "257 levels of arrays": b"[" * 256 + b"]" * 256,
    "257 levels of objects": b'{"a":' * 256 + b"1" + b"}" * 256,
    "100,000 levels": b"[" * 100_000 + b"]" * 100_000,
}  # fmt: skip

# ... and JSON, which goes on byte for byte.
VALUES: dict[str, bytes] = {
    "-0": b"-0", "-0.0": b"-0.0e-0", "1e999": b"1e999", "a million digits": b"9" * 1_000_000,
    "5,000 digits, nested": b'[{"a":' + b"9" * 5000 + b"}]", "5,000 decimals": b"0." + b"3" * 5000,
    "255 levels": b"[" * 254 + b"]" * 254, "256 levels": b"[" * 255 + b"]" * 255,
    "256 levels of objects": b'{"a":' * 255 + b"1" + b"}" * 255,
    "brackets in a string": b'"' + b"[{" * 10_000 + b'"',
    "lone surrogates": rb'["\ud800","\udc00x"]',
    "a surrogate as a key": rb'{"\udfff":1}', "zero bytes": rb'"a\u0000b"',
    "non-characters": b'"\xef\xbf\xbf\xf4\x8f\xbf\xbf"', "a byte order mark": b'"\xef\xbb\xbf"',
    "a prototype": b'{"__proto__":{"a":1},"constructor":{"prototype":null}}',
    "a class": b'{"__class__":"os.system","$ref":"#","@type":"x"}', "keys twice": b'{"a":1,"a":2}',
    "an empty key": b'{"":{"":[]}}', "a path": b'"../../etc/passwd"',
    "a template": b'"${x} {{7*7}} %s"',
    "escapes": rb'"\/\b\f\u00e9\ud83d\ude00"', "space": b"[ 1\t,\r\n2 ]", "null": b"null",
    "a megabyte": b'"' + b"x" * 2**20 + b'"', "a long key": b'{"' + b"k" * 100_000 + b'":1}',
    "100,000 elements": b"[" + b"0," * 99_999 + b"0]",
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """A field of a good body that is replaced, as written; None: it goes on unchanged."""

    name: str
    value: bytes
    refusal: Refusal | None


NO_TEXTS = (b"1", b"true", b"{}", b"[]", b'["gpt-test"]', b"1.5", rb'"\ud800"')
NO_BOOLEANS = (b'"true"', b"1", b"0", b'""', b"[]", b"{}", b"1.0", b"[true]")
NO_INTEGERS = (b'"16"', b"1.5", b"1e2", b"true", b"[]", b"{}", b"-", b"9" * 401)
NO_NAMES = ("*", "?", "org*", "gpt-tes?", "[a-z]*", "GPT-TEST", " gpt-test", "gpt-test\0", "a\nb",
            "\x1b[31m", "../gpt-test", "gpt-test\u200b", "\u202egpt", "x" * 100_000, "$(id)",
            "none")  # fmt: skip


def fields_of(api: Api) -> list[Field]:
    """Return every field that an endpoint reads, with values that are and are not right."""
    rows = [Field("model", value, wrong_type("model")) for value in NO_TEXTS]
    rows += [Field("model", json.dumps(name).encode(), UNKNOWN) for name in NO_NAMES]
    rows += [Field("model", value, NO_MODEL) for value in (b"null", b'""')]
    rows += [
        Field("model", b'"org/*"', None),
        Field("model", b'"org/' + b"x" * 10_000 + b'"', None),
    ]
    rows += [Field("stream", value, wrong_type("stream")) for value in NO_BOOLEANS]
    rows += [Field("stream", b"null", None), Field("stream", b"false", None)]
    if api == "embeddings":
        return [*rows, Field("stream", b"true", unsupported("stream"))]
    most, content = MAXIMUM[api], CONTENT[api]
    rows += [Field(most, value, wrong_type(most)) for value in NO_INTEGERS if value != b"-"]
    rows += [Field(most, value, None) for value in (b"null", b"0", b"-0", b"-1", b"9" * 399)]
    rows += [Field(content, value, wrong_type(content)) for value in (b"1", b"true", b"{}")]
    if api == "chat":
        rows += [Field("n", value, wrong_type("n")) for value in NO_INTEGERS if value != b"-"]
        rows += [Field("n", value, None) for value in (b"0", b"-5", b"null", b"9" * 400)]
    if api != "responses":
        return [*rows, Field("messages", b'"x"', wrong_type("messages"))]
    previous = "previous_response_id"
    rows += [Field(previous, value, wrong_type(previous)) for value in NO_TEXTS]
    rows += [Field("background", value, wrong_type("background")) for value in NO_BOOLEANS]
    rows += [Field("store", value, wrong_type("store")) for value in NO_BOOLEANS]
    rows += [Field("background", b"true", unsupported("background")), Field("store", b"null", None)]
    rows += [Field("conversation", value, unsupported("conversation")) for value in (b'"c"', b"{}")]
    return rows


def pairs(body: bytes) -> Any:
    """Return a document as it is written, numbers as text, keys given twice twice."""
    return json.loads(body, object_pairs_hook=list, parse_int=str, parse_float=str)


class Asker:
    """Asks one endpoint, plain or packed, and judges what comes of it."""

    def __init__(self, proxy: Proxy, upstream: ScriptedUpstream, api: Api, *, packed: bool) -> None:
        self.proxy = proxy
        self.upstream = upstream
        self.api: Api = api
        self.packed = packed
        upstream.default = json_answer(json_of(api))

    async def ask(self, body: bytes, refusal: Refusal | None) -> Recorded | None:
        """POST a body; return what went upstream of it."""
        self.upstream.requests.clear()
        headers = [("content-encoding", "gzip")] if self.packed else []
        sent = gzip.compress(body, 1) if self.packed else body
        answer = await self.proxy.post(PATHS[self.api], sent, headers)
        check_wire(str(answer.headers).encode() + answer.body)
        assert len(answer.body) < 4096
        if refusal is None:
            assert answer.status == 200, answer
            (request,) = self.upstream.requests
            return request
        refusal.check(answer, anthropic=self.api == "messages")
        assert self.upstream.requests == []
        return None

    async def passes(self, body: bytes, part: bytes = b"") -> None:
        """POST a body that is good; all of it must go upstream, and a part of it as written."""
        request = await self.ask(body, None)
        assert request is not None
        assert part in request.body
        meant = pairs(body)
        if self.api != "embeddings":
            meant = [*(pair for pair in meant if pair[0] != "stream"), ("stream", False)]
        got = pairs(request.body)
        assert sorted(map(repr, got)) == sorted(map(repr, meant))


@pytest.fixture(params=[False, True], ids=["plain", "gzip"])
def packed(request: pytest.FixtureRequest) -> bool:
    """Return whether bodies are sent packed."""
    return bool(request.param)


@pytest.mark.parametrize("api", PATHS)
async def test_what_is_no_object(
    api: Api, serve: Serve, upstream: ScriptedUpstream, *, packed: bool
) -> None:
    """A body that is not one JSON object in UTF-8 is 400 invalid_json; nothing goes upstream."""
    asker = Asker(await serve(), upstream, api, packed=packed)
    wrong = Wrong()
    good = ASKED[api]
    documents = {name: form.replace(b"%b", good) for name, form in DOCUMENTS.items()}
    documents |= {coding: good.decode().encode(coding) for coding in ENCODINGS}
    documents |= {
        f"within: {name}": good[:-1] + b',"x":' + value + b"}" for name, value in NO_VALUES.items()
    }
    for name, body in documents.items():
        with wrong.row(name):
            await asker.ask(body, INVALID_JSON)
    assert wrong == {}
    await check_after(asker.proxy, upstream)


@pytest.mark.parametrize("api", PATHS)
async def test_what_is_not_read(
    api: Api, serve: Serve, upstream: ScriptedUpstream, *, packed: bool
) -> None:
    """What is JSON in a field that aiproxy does not read goes upstream byte for byte."""
    asker = Asker(await serve(), upstream, api, packed=packed)
    wrong = Wrong()
    for name, value in VALUES.items():
        for key in (b"x", b"__proto__", rb"\u0000", "\u00fc".encode()):
            with wrong.row(f"{key!r}: {name}"):
                await asker.passes(ASKED[api][:-1] + b',"%b":%b}' % (key, value), value)
    assert wrong == {}
    await check_after(asker.proxy, upstream)


@pytest.mark.parametrize("api", PATHS)
async def test_what_is_read(
    api: Api, serve: Serve, upstream: ScriptedUpstream, *, packed: bool
) -> None:
    """A field of a wrong type is refused by its name, also when given twice or escaped."""
    asker = Asker(await serve(), upstream, api, packed=packed)
    wrong = Wrong()
    for row in fields_of(api):
        others = {key: value for key, value in prompt(PATHS[api]).items() if key != row.name}
        start = json.dumps(others).encode()[:-1]
        name = row.name.encode()
        escaped = rb"\u%04x%b" % (name[0], name[1:])
        decoy = b'"unknown"' if row.name == "model" else b"null"
        with wrong.row(f"{row.name}: {row.value[:40]!r}"):
            body = start + b', "%b": %b}' % (name, row.value)
            if row.refusal is None:
                await asker.passes(body)
            else:
                await asker.ask(body, row.refusal)
        for keys in ((name, escaped), (escaped, name), (name, name)):
            with wrong.row(f"{keys}: {row.value[:40]!r}"):
                body = start + b', "%b": %b, "%b": %b}' % (keys[0], decoy, keys[1], row.value)
                request = await asker.ask(body, row.refusal)
                if request is not None:
                    got = [value for key, value in pairs(request.body) if key == row.name]
                    assert len(got) == 1, "it goes upstream twice"
                    assert row.name == "stream" or got == [pairs(row.value)]
    assert wrong == {}
    await check_after(asker.proxy, upstream)


@pytest.mark.parametrize(
    "value", [b'"resp_x"', b'""', b'"../x"', rb'"\u0000"', b'"' + b"r" * 10_000 + b'"']
)
async def test_a_response_that_is_not_there(
    value: bytes, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Whatever names a previous response that nobody knows is 400 with its param."""
    proxy = await serve()
    answer = await proxy.post(body=ASKED["responses"][:-1] + b',"previous_response_id":%b}' % value)
    assert (answer.status, answer.json()["error"]["param"]) == (400, "previous_response_id")
    assert len(answer.body) < 4096
    assert upstream.requests == []
    await check_after(proxy, upstream)


@pytest.mark.parametrize("api", ["responses", "chat", "messages"])
async def test_a_stream_is_asked_for_once(
    api: Api, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Of two spellings of `stream` the last is read and sent, and the answer is what it says."""
    proxy = await serve()
    for first, last in ((b"false", b"true"), (b"true", b"false"), (b'"x"', b"true")):
        tail = rb', "stream": %b, "\u0073tream": %b}' % (first, last)
        answer = await proxy.post(PATHS[api], ASKED[api][:-1] + tail)
        assert answer.status == 200, answer
        streamed = answer.headers["content-type"].startswith("text/event-stream")
        assert streamed is (last == b"true")
        sent = [value for key, value in pairs(upstream.requests[-1].body) if key == "stream"]
        assert sent == [streamed]
        if not streamed:
            check_upstream(upstream.requests[-1], ASKED[api], PATHS[api])
    await check_after(proxy, upstream)
