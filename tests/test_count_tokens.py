"""Token counting is relayed to upstreams that have it; it costs one request and nothing else."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from invariants import TOKEN_FIELDS, check_secrets, eventually
from refusals import SERVER, Refusal
from responses import responses_json
from rig import CREDENTIAL, PROMPT_CANARY, TEAM_A, TEAM_B, key_hash, prompt, totals
from sessions_rig import NO_PARENT, PATH, UNKNOWN, Serve, heard, turn
from steps import Step, Wait, error_answer, json_answer
from upstream import Recorded, ScriptedUpstream

COUNT = 4711


@dataclass(frozen=True)
class Api:
    """One of the two endpoints."""

    path: str
    label: str
    asks: dict[str, Any]
    answer: dict[str, Any]
    speaks: str
    credential: tuple[str, str]

    @property
    def anthropic(self) -> bool:
        """Whether its errors have Anthropic's shape."""
        return self.speaks == "messages"

    def body(self, **fields: Any) -> dict[str, Any]:
        """Return a body that it takes."""
        return {"model": "gpt-test", **self.asks, **fields}


RESPONSES = Api(
    "/v1/responses/input_tokens",
    "input_tokens",
    {"input": f"Count this. {PROMPT_CANARY}"},
    {"object": "response.input_tokens", "input_tokens": COUNT},
    "responses",
    ("authorization", f"Bearer {CREDENTIAL}"),
)
MESSAGES = Api(
    "/v1/messages/count_tokens",
    "count_tokens",
    {"messages": [{"role": "user", "content": f"Count this. {PROMPT_CANARY}"}]},
    {"input_tokens": COUNT},
    "messages",
    ("x-api-key", CREDENTIAL),
)


@pytest.fixture(params=[RESPONSES, MESSAGES], ids=["responses", "messages"])
def api(request: pytest.FixtureRequest, upstream: ScriptedUpstream) -> Api:
    """Each of them, with an upstream that has it."""
    chosen: Api = request.param
    healthy = upstream.healthy

    def counting(asked: Recorded) -> Sequence[Step]:
        return json_answer(chosen.answer) if asked.path == chosen.path else healthy(asked)

    upstream.default = counting
    return chosen


@pytest.mark.parametrize("holder", ["upstream", "replay"])
async def test_it_is_relayed(serve: Serve, upstream: ScriptedUpstream, api: Api) -> None:
    """What the client asks reaches the upstream as it is, and its answer comes back so."""
    proxy = await serve()
    raw = json.dumps(api.body(x_new=[1.50, {"deep": None}]), indent=3).encode()
    odd = json.dumps({**api.answer, "x": 1.5}, indent=1).encode().replace(b"1.5", b"1.50e0")
    upstream.script(json_answer(odd))
    answer = await proxy.post(api.path, raw)
    assert (answer.status, answer.body) == (200, odd)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-aiproxy-upstream"] == "scripted"
    assert answer.headers["x-request-id"]
    (request,) = upstream.requests
    assert (request.method, request.target) == ("POST", api.path)
    assert json.loads(request.body) == json.loads(raw)
    name, value = api.credential
    assert request.header(name) == value
    assert TEAM_A not in str(request.headers)


@pytest.mark.parametrize("holder", ["upstream", "replay"])
async def test_nothing_is_added(serve: Serve, upstream: ScriptedUpstream, api: Api) -> None:
    """The endpoints know no `store`, `stream` or `include`: none of them is sent."""
    proxy = await serve(upstreams={"scripted": {"normalize": True}})
    answer = await proxy.post(api.path, api.body())
    assert answer.status == 200
    assert upstream.requests[-1].json() == api.body()


async def test_a_renamed_model(serve: Serve, upstream: ScriptedUpstream, api: Api) -> None:
    """The upstream is asked under the route's name for the model."""
    proxy = await serve()
    answer = await proxy.post(api.path, api.body(model="renamed"))
    assert answer.json() == api.answer
    assert upstream.requests[-1].json() == api.body(model="upstream-model")


async def test_the_query(serve: Serve, upstream: ScriptedUpstream, api: Api) -> None:
    """Only messages know one, and of it only `beta`."""
    proxy = await serve()
    answer = await proxy.post(f"{api.path}?beta=true&other=1", api.body())
    assert answer.status == 200
    query = "?beta=true" if api is MESSAGES else ""
    assert upstream.requests[-1].target == api.path + query


async def test_versions_of_messages(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The API's version goes up as the client gave it, else as it is known."""
    upstream.default = json_answer(MESSAGES.answer)
    proxy = await serve()
    await proxy.post(MESSAGES.path, MESSAGES.body())
    assert upstream.requests[-1].header("anthropic-version") == "2023-06-01"
    await proxy.post(MESSAGES.path, MESSAGES.body(), {"anthropic-version": "2024-01-01"})
    assert upstream.requests[-1].header("anthropic-version") == "2024-01-01"


@pytest.mark.parametrize("apis", [["chat"], ["chat", "messages"], ["chat", "responses"]])
async def test_where_it_is_not(
    serve: Serve, upstream: ScriptedUpstream, api: Api, apis: list[str]
) -> None:
    """An upstream that speaks another API counts something else: the path is unknown there."""
    proxy = await serve(upstreams={"scripted": {"apis": apis}})
    answer = await proxy.post(api.path, api.body())
    if api.speaks in apis:
        assert answer.json() == api.answer
        return
    told = answer.headers.get("x-aiproxy-upstream")
    Refusal(404, "unknown_url").check(answer, anthropic=api.anthropic, upstream=told)
    assert not upstream.requests


async def test_an_upstream_without_it(serve: Serve, upstream: ScriptedUpstream, api: Api) -> None:
    """An upstream that does not know the path says so itself."""
    proxy = await serve()
    if api.anthropic:
        error: Any = {"type": "error", "error": {"type": "not_found_error", "message": "No path."}}
    else:
        code = {"type": "invalid_request_error", "param": None, "code": "unknown_url"}
        error = {"error": {"message": "No path.", **code}}
    upstream.script(json_answer(error, 404))
    answer = await proxy.post(api.path, api.body())
    assert (answer.status, answer.json()) == (404, error)


@pytest.mark.parametrize("body", [b"", b"no", b"[1]", b'"4711"'])
async def test_what_is_no_count(
    serve: Serve, upstream: ScriptedUpstream, api: Api, body: bytes
) -> None:
    """An answer that is no JSON object is the upstream's error."""
    proxy = await serve()
    upstream.script(json_answer(body))
    answer = await proxy.post(api.path, api.body())
    refusal = Refusal(502, "upstream_error", SERVER)
    refusal.check(answer, anthropic=api.anthropic, upstream="scripted")


async def test_failures_of_the_upstream(serve: Serve, upstream: ScriptedUpstream, api: Api) -> None:
    """They are told as on every other endpoint, in the endpoint's own shape."""
    proxy = await serve()
    for status, expected in ((500, "upstream_error"), (401, "upstream_credential")):
        upstream.default = error_answer(status)
        answer = await proxy.post(api.path, api.body())
        refusal = Refusal(502, expected, SERVER)
        refusal.check(answer, anthropic=api.anthropic, upstream="scripted")


# Who may


async def test_a_key_is_needed(serve: Serve, upstream: ScriptedUpstream, api: Api) -> None:
    """Without a valid key nothing is read or asked."""
    proxy = await serve()
    for key in (None, "sk-aip-unknown"):
        answer = await proxy.post(api.path, api.body(), key=key)
        Refusal(401, "invalid_api_key").check(answer, anthropic=api.anthropic)
    assert not upstream.requests


async def test_models_that_are_not_there(
    serve: Serve, upstream: ScriptedUpstream, api: Api
) -> None:
    """An unknown model, one that the key may not use, and none are told as everywhere."""
    key = {"team-a": {"sha256": key_hash(TEAM_A), "models": ["gpt-test"]}}
    proxy = await serve(keys=key)
    refusal = Refusal(404, "model_not_found", param="model")
    for model in ("other", "renamed"):
        answer = await proxy.post(api.path, api.body(model=model))
        refusal.check(answer, anthropic=api.anthropic)
    answer = await proxy.post(api.path, api.asks)
    missing = Refusal(400, "missing_required_parameter", param="model")
    missing.check(answer, anthropic=api.anthropic)
    assert not upstream.requests


async def test_bodies_that_are_none(serve: Serve, upstream: ScriptedUpstream, api: Api) -> None:
    """What is no JSON object is refused here."""
    proxy = await serve()
    for body in (b"", b"[]", b'{"model": NaN}', b"\xff"):
        answer = await proxy.post(api.path, body)
        Refusal(400, "invalid_json").check(answer, anthropic=api.anthropic)
    assert not upstream.requests


async def test_other_methods_on_messages(serve: Serve) -> None:
    """A path that is known is not unknown with another method."""
    proxy = await serve()
    answer = await proxy.get(MESSAGES.path)
    assert answer.status == 405
    assert answer.headers["allow"] == "POST"


# What it costs


async def test_it_takes_one_request(serve: Serve, upstream: ScriptedUpstream, api: Api) -> None:
    """The rate of requests counts it, and a refusal is told in the endpoint's shape."""
    limits = {"requests": {"rate": "2/day", "burst": 2}}
    proxy = await serve(keys={"team-a": {"sha256": key_hash(TEAM_A), "limits": limits}})
    for left in ("1", "0"):
        answer = await proxy.post(api.path, api.body())
        assert answer.status == 200
        assert answer.headers["x-ratelimit-remaining-requests"] == left
    answer = await proxy.post(api.path, api.body())
    assert (answer.status, answer.headers["retry-after"] > "0") == (429, True)
    error = answer.json()["error"]
    assert error["type"] == ("rate_limit_error" if api.anthropic else "requests")
    assert len(upstream.requests) == 2


async def test_it_takes_no_tokens(serve: Serve, upstream: ScriptedUpstream, api: Api) -> None:
    """Even an input that no bucket could hold is counted, and leaves the bucket as it was."""
    limits = {"tokens": {"rate": "100/day", "burst": 100}}
    proxy = await serve(keys={"team-a": {"sha256": key_hash(TEAM_A), "limits": limits}})
    large = {name: json.loads(json.dumps(value).replace("Count", "Count " * 2000))
             for name, value in api.asks.items()}  # fmt: skip
    answer = await proxy.post(api.path, api.body(**large))
    assert answer.json() == api.answer
    assert answer.headers["x-ratelimit-remaining-tokens"] == "100"
    assert not totals(await proxy.metrics(), "aiproxy_tokens_total", "type")


async def test_it_takes_no_slot(serve: Serve, upstream: ScriptedUpstream, api: Api) -> None:
    """While the key's one slot is held by an answer, counting goes on."""
    proxy = await serve(keys={"team-a": {"sha256": key_hash(TEAM_A), "limits": {"concurrent": 1}}})
    gate = asyncio.Event()
    upstream.script(Wait(gate), json_answer(responses_json()))
    held = await proxy.send(PATH, prompt())
    await upstream.wait_request()
    assert (await proxy.post(PATH, prompt())).status == 429
    assert (await proxy.post(api.path, api.body())).json() == api.answer
    gate.set()
    assert (await held.answer()).status == 200


@pytest.mark.parametrize("holder", ["upstream", "replay"])
async def test_what_is_written_of_it(serve: Serve, upstream: ScriptedUpstream, api: Api) -> None:
    """Metrics and log have it under its own endpoint, without tokens and without the prompt."""
    proxy = await serve()
    await proxy.post(api.path, api.body())

    async def written() -> None:
        assert len(proxy.request_logs()) == 1

    await eventually(written)
    (line,) = proxy.request_logs()
    assert (line["endpoint"], line["outcome"], line["status"]) == (api.label, "completed", 200)
    assert (line["key"], line["route"], line["upstream"]) == ("team-a", "gpt-test", "scripted")
    assert not any(line.get(name) for name in TOKEN_FIELDS.values())
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_requests_total", "endpoint") == {api.label: 1}
    assert not totals(metrics, "aiproxy_requests_in_flight", "endpoint")
    assert not totals(metrics, "aiproxy_usage_estimated_total", "reason")
    await check_secrets(proxy, ())


# Conversations


async def test_a_conversation_is_counted_whole(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Where aiproxy holds it, all of it is sent to be counted, and nothing is stored of that."""
    proxy = await serve(upstreams={"scripted": {"sessions": "replay"}})
    first = await turn(proxy, "one")
    upstream.script(json_answer(RESPONSES.answer))
    body = {"model": "gpt-test", "input": "two", "previous_response_id": first["id"]}
    answer = await proxy.post(RESPONSES.path, body)
    assert answer.json() == RESPONSES.answer
    request = upstream.requests[-1]
    assert heard(request) == ["one", "Hello world", "two"]
    assert request.json().keys() == {"model", "input"}
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    upstream.script(json_answer(RESPONSES.answer))
    answer = await proxy.post(RESPONSES.path, RESPONSES.body(input=[reference]))
    assert answer.json() == RESPONSES.answer
    assert heard(upstream.requests[-1]) == ["Hello world"]
    await turn(proxy, "two", first["id"])
    assert heard(upstream.requests[-1]) == ["one", "Hello world", "two"]


async def test_a_conversation_that_the_upstream_holds(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """There its own id goes up as it is."""
    proxy = await serve()
    first = await turn(proxy, "one")
    upstream.script(json_answer(RESPONSES.answer))
    body = RESPONSES.body(previous_response_id=first["id"])
    answer = await proxy.post(RESPONSES.path, body)
    assert answer.json() == RESPONSES.answer
    assert upstream.requests[-1].json() == body


@pytest.mark.parametrize("holder", ["upstream", "replay"])
async def test_conversations_of_others(serve: Serve, upstream: ScriptedUpstream) -> None:
    """What is not one's own cannot be counted either."""
    proxy = await serve()
    first = await turn(proxy, "one")
    for key, previous in ((TEAM_B, first["id"]), (TEAM_A, UNKNOWN)):
        body = RESPONSES.body(previous_response_id=previous)
        NO_PARENT.check(await proxy.post(RESPONSES.path, body, key=key))
    assert len(upstream.requests) == 1


# SDKs


async def test_the_sdks(serve: Serve, upstream: ScriptedUpstream, api: Api) -> None:
    """The official SDKs get their counts."""
    proxy = await serve()
    if api is RESPONSES:
        async with proxy.openai() as client:
            counted = await client.responses.input_tokens.count(model="gpt-test", input="hi")
        assert counted.input_tokens == COUNT
        return
    async with proxy.anthropic() as claude:
        given: Any = api.asks["messages"]
        total = await claude.messages.count_tokens(model="gpt-test", messages=given)
    assert total.input_tokens == COUNT
