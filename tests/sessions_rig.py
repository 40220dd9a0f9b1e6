"""Conversations as a client holds them: turns, what the upstream was asked, what ids can do."""

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from answers import sse
from client import Answer, RawClient
from refusals import Refusal
from responses import Item, responses_events, responses_json, responses_object
from rig import TEAM_A, Proxy, config_text, prompt
from steps import Step, error_answer, json_answer, stream

if TYPE_CHECKING:
    from upstream import Recorded, ScriptedUpstream

Serve = Callable[..., Awaitable[Proxy]]
Response = dict[str, Any]

PATH = "/v1/responses"
STORES = ("memory", "sqlite")
VERBS = ("continue", "get", "delete", "input_items", "cancel")
OWN_ID = re.compile(r"resp_[A-Za-z0-9_-]{32,}")
UNKNOWN = "resp_" + "Q" * 43  # of the right shape, and never made
LIFECYCLE = ("response.created", "response.queued", "response.in_progress")
ENDS = ("response.completed", "response.incomplete", "response.failed")
RESTING = ("response.completed", "response.incomplete")

NO_PARENT = Refusal(400, "previous_response_not_found", param="previous_response_id")
NOT_FOUND = Refusal(404, None)


def store_of(kind: str, folder: Path) -> str:
    """Return `sessions.store` of a kind; a file of its own below `folder`."""
    return "memory:" if kind == "memory" else f"sqlite:{folder}/sessions.db"


def held_here(upstream: "ScriptedUpstream", store: str, **changes: Any) -> str:
    """Return the text of a configuration in which aiproxy itself holds conversations."""
    mode = {"scripted": {"sessions": "replay"}}
    return config_text(upstream.url, upstreams=mode, sessions={"store": store}, **changes)


def files_with(folder: Path, text: str) -> list[str]:
    """Return the names of the files below a folder that have this text in them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path.name for path in files if text.encode() in path.read_bytes())


def unsupported(param: str) -> Refusal:
    """Return the refusal of what aiproxy does not do."""
    return Refusal(400, "unsupported_parameter", param=param)


async def ask(
    proxy: Proxy,
    given: Any = "hi",
    previous: str | None = None,
    *,
    key: str = TEAM_A,
    streamed: bool = False,
    **fields: Any,
) -> Answer:
    """Ask for one turn; `previous` is left out if None."""
    if previous is not None:
        fields["previous_response_id"] = previous
    body = prompt(**{"input": given, **fields})
    return await proxy.post(PATH, body | ({"stream": True} if streamed else {}), key=key)


def facts_of(answer: Answer) -> list[dict[str, Any]]:
    """Return the events of a stream, decoded."""
    return [json.loads(data) for _, data in answer.events() if data != "[DONE]"]


def response_of(answer: Answer) -> Response:
    """Return the response object of an answer; a stream must tell the same id all along."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return cast("Response", answer.json())
    facts = facts_of(answer)
    told = [fact["response"] for fact in facts if fact.get("type") in (*LIFECYCLE, *ENDS)]
    assert len({response["id"] for response in told}) == 1
    assert facts[-1]["type"] in ENDS
    return cast("Response", facts[-1]["response"])


async def turn(
    proxy: Proxy, given: Any = "hi", previous: str | None = None, **options: Any
) -> Response:
    """Make one turn that must succeed; options as of `ask`."""
    answer = await ask(proxy, given, previous, **options)
    assert answer.status == 200, answer
    response = response_of(answer)
    assert response["status"] in {"completed", "incomplete"}, response
    return response


async def call(proxy: Proxy, method: str, path: str, *, key: str | None = TEAM_A) -> Answer:
    """Make a call without a body on a connection of its own."""
    async with await RawClient.connect(proxy.port) as client:
        await client.request(method, path, proxy.headers(key=key))
        return await client.answer()


async def use(proxy: Proxy, verb: str, response_id: str, *, key: str = TEAM_A) -> Answer:
    """Do one of the five things that can be done with an id."""
    path = f"{PATH}/{response_id}"
    match verb:
        case "continue":
            return await ask(proxy, "more", response_id, key=key)
        case "get":
            return await call(proxy, "GET", path, key=key)
        case "delete":
            return await call(proxy, "DELETE", path, key=key)
        case "input_items":
            return await call(proxy, "GET", f"{path}/input_items", key=key)
        case _:
            return await call(proxy, "POST", f"{path}/cancel", key=key)


def untold(answer: Answer, named: str) -> tuple[int, bytes]:
    """Return the status and the body without the id in it: what may tell one id from another."""
    return answer.status, answer.body.replace(named.encode(), b"ID")


async def check_unknown(proxy: Proxy, response_id: str, *, key: str = TEAM_A) -> None:
    """Assert that every verb says of this id just what it says of one that never was."""
    for verb in VERBS:
        told = await use(proxy, verb, response_id, key=key)
        (NO_PARENT if verb == "continue" else NOT_FOUND).check(told)
        expected = untold(await use(proxy, verb, UNKNOWN, key=key), UNKNOWN)
        assert untold(told, response_id) == expected, verb


def sent(request: "Recorded") -> list[bytes]:
    """Return the input items that the upstream was sent, each as its very bytes."""
    body = msgspec.json.decode(request.body, type=dict[str, msgspec.Raw])
    return [bytes(item) for item in msgspec.json.decode(body["input"], type=list[msgspec.Raw])]


def said(item: bytes | Mapping[str, Any]) -> str:
    """Return what a message says, of anything else its type."""
    fact: Mapping[str, Any] = json.loads(item) if isinstance(item, bytes) else item
    if fact.get("type", "message") != "message":
        return f"<{fact['type']}>"
    content = fact["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def heard(request: "Recorded") -> list[str]:
    """Return what the upstream was told, item by item; a string stands for one item."""
    given = request.json()["input"]
    return [given] if isinstance(given, str) else [said(item) for item in given]


def check_replayed(request: "Recorded") -> None:
    """Assert that the upstream is asked to keep nothing, and for nothing it was to keep."""
    body = request.json()
    assert body["store"] is False
    assert "previous_response_id" not in body


def frame(fact: Mapping[str, Any]) -> bytes:
    """Encode an event under its type."""
    return sse(fact, event=fact["type"])


def numbered(facts: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Encode events, numbered from 0."""
    return [frame({**fact, "sequence_number": at}) for at, fact in enumerate(facts)]


def lifecycle(kind: str, status: str, **options: Any) -> dict[str, Any]:
    """Build a lifecycle or terminal event; options as of `responses_object`."""
    return {"type": f"response.{kind}", "response": responses_object(status=status, **options)}


def raw_json(items: Sequence[bytes], **options: Any) -> bytes:
    """Return a JSON answer whose output items are these very bytes."""
    whole = json.dumps(responses_json(items=[], **options)).encode()
    return whole.replace(b'"output": []', b'"output": [' + b" , ".join(items) + b"]", 1)


def raw_events(items: Sequence[bytes], **options: Any) -> list[bytes]:
    """Return the events of a stream whose output items are these very bytes."""
    created, opened, ended = responses_events(items=[], **options)
    done = [
        b'event: response.output_item.%b\ndata: {"type": "response.output_item.%b",'
        b' "sequence_number": %d, "output_index": %d, "item": %b}\n\n'
        % (step, step, 2 + 2 * at + (step == b"done"), at, item)
        for at, item in enumerate(items)
        for step in (b"added", b"done")
    ]
    number = b'"sequence_number": %d'
    ended = ended.replace(b'"output": []', b'"output": [' + b" , ".join(items) + b"]", 1)
    return [created, opened, *done, ended.replace(number % 2, number % (2 + len(done)))]


def raw_answer(items: Sequence[bytes], *, streamed: bool) -> list[Step]:
    """Return the script of an answer with these very items."""
    return stream(raw_events(items)) if streamed else json_answer(raw_json(items))


class Holder:
    """The default of a scripted upstream that holds conversations itself."""

    def __init__(self) -> None:
        self.held: dict[str, Response] = {}

    def __call__(self, request: "Recorded") -> Sequence[Step]:
        """Make, show, list or delete a response."""
        if request.path.endswith("/responses"):
            return self._make(request.json())
        response_id, _, rest = request.path.partition("/responses/")[2].partition("/")
        if response_id not in self.held:
            return error_answer(404, f"Response with id '{response_id}' not found.")
        if rest == "input_items":
            item: Item = {"id": "msg_upstream_input", "type": "message", "role": "user"}
            page = {"object": "list", "data": [item], "has_more": False}
            return json_answer({**page, "first_id": item["id"], "last_id": item["id"]})
        if request.method == "DELETE":
            del self.held[response_id]
            return json_answer({"id": response_id, "object": "response", "deleted": True})
        return json_answer(self.held[response_id])

    def _make(self, body: dict[str, Any]) -> Sequence[Step]:
        whole = responses_json(model=body["model"], request=body)
        self.held[whole["id"]] = whole
        if not body.get("stream"):
            return json_answer(whole)
        facts = {"response_id": whole["id"], "items": whole["output"], "model": body["model"]}
        return stream(responses_events(request=body, **facts))
