"""The Vercel AI SDK with its defaults: items by reference, before an upstream that keeps none."""

import asyncio
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from responses import (
    Item,
    function_item,
    message_item,
    reasoning_item,
    responses_events,
    responses_json,
)
from rig import Proxy
from sessions_rig import OWN_ID, Serve, check_replayed, heard, store_of
from steps import Step, error_answer, json_answer, stream
from upstream import Recorded, ScriptedUpstream

pytestmark = pytest.mark.node

HERE = Path(__file__).parent
# The SDK takes a model that is named like OpenAI's own for one that reasons.
MODELS = {"gpt-test": False, "gpt-5-test": True}
CALL, RESULT, REASONING = "<function_call>", "<function_call_output>", "<reasoning>"


class Model:
    """The upstream's default: it keeps nothing, and refuses what it would have had to keep."""

    def __init__(self, *, reasons: bool) -> None:
        self.reasons = reasons
        self.made: dict[str, Item] = {}  # what it said, by id

    def __call__(self, request: Recorded) -> Sequence[Step]:
        """Call the tool when asked for the weather, else say how many items there were."""
        body = request.json()
        told: list[Item] = body["input"]
        for item in told:
            if item.get("type") == "item_reference":
                return error_answer(404, f"Item with id '{item['id']}' not found.", param="input")
        if body.get("previous_response_id") is not None:
            return error_answer(400, code="previous_response_not_found")
        items = self._answer(told)
        self.made |= {item["id"]: item for item in items}
        if body["stream"]:
            return stream(responses_events(items=items, request=body))
        return json_answer(responses_json(items=items, request=body))

    def _answer(self, told: list[Item]) -> list[Item]:
        asked = str(told[-1].get("content"))
        thought = [reasoning_item(f"ENCRYPTED-{len(self.made)}")] if self.reasons else []
        if "Weather in" not in asked:
            return [*thought, message_item(f"{len(told)} items")]
        city = "Bern" if "Bern" in asked else "Zürich"
        return [*thought, function_item("get_weather", json.dumps({"city": city}))]


@pytest.fixture
def holder() -> str:
    """Let aiproxy hold conversations."""
    return "replay"


@pytest.fixture
async def proxy(serve: Serve, tmp_path: Path) -> Proxy:
    """Run the daemon with a route for each model."""
    routes = [{"model": model, "upstreams": ["scripted"]} for model in MODELS]
    return await serve(routes=routes, sessions={"store": store_of("sqlite", tmp_path)})


async def converse(proxy: Proxy, model: str) -> dict[str, Any]:
    """Run conversation.mjs to its end; return what it printed."""
    node = shutil.which("node")
    if node is None or not (HERE / "node_modules").is_dir():
        pytest.fail(f"node or its packages are missing: run {HERE}/install")
    process = await asyncio.create_subprocess_exec(
        node,
        str(HERE / "conversation.mjs"),
        env={
            "PATH": os.environ["PATH"],
            "AIPROXY_URL": proxy.url,
            "AIPROXY_KEY": proxy.key,
            "AIPROXY_MODEL": model,
        },
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(30):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, err) == (0, b""), err.decode()
    printed: dict[str, Any] = json.loads(out)
    return printed


def references(sent: dict[str, Any]) -> list[str]:
    """Return the ids of the items that a request of the SDK refers to."""
    return [item["id"] for item in sent["input"] if item.get("type") == "item_reference"]


def whole_conversations(thought: list[str]) -> list[list[str]]:
    """Return what the upstream is to hear in each request; `thought` comes before each answer."""
    loop = [*thought, CALL, RESULT]
    rounds = [["Weather in Bern?"]]
    rounds += [[*rounds[-1], *loop]]
    rounds += [[*rounds[-1], *thought, f"{len(rounds[-1])} items", "Weather in Zürich?"]]
    rounds += [[*rounds[-1], *loop]]
    rounds += [[*rounds[-1], *thought, f"{len(rounds[-1])} items", "Is that all?"]]
    rounds += [[*rounds[-1], *thought, f"{len(rounds[-1])} items", "Are you sure?"]]
    rounds += [[*rounds[-1], *thought, f"{len(rounds[-1])} items", "Weather in Bern?"]]
    # On a previous response the SDK leaves its own reasoning out of the loop.
    rounds += [[*rounds[-1], CALL, RESULT]]
    rounds += [[*rounds[-1], *thought, f"{len(rounds[-1])} items", "And now?"]]
    return rounds


@pytest.mark.parametrize("model", MODELS)
async def test_a_conversation(proxy: Proxy, upstream: ScriptedUpstream, model: str) -> None:
    """What the SDK refers to, or leaves to `previousResponseId`, reaches the upstream in full."""
    upstream.default = Model(reasons=MODELS[model])
    said = await converse(proxy, model)
    assert said["warnings"] == []
    expected = whole_conversations([REASONING] if MODELS[model] else [])
    assert [heard(request) for request in upstream.requests] == expected
    for request in upstream.requests:
        check_replayed(request)
    texts = [f"{len(expected[at])} items" for at in (1, 3, 4, 5, 7, 8)]
    assert [turn["text"] for turn in said["turns"]] == texts
    assert [turn["steps"] for turn in said["turns"]] == [2, 2, 1, 1, 2, 1]
    assert all(OWN_ID.fullmatch(turn["id"]) for turn in said["turns"])


@pytest.mark.parametrize("model", MODELS)
async def test_items_are_what_the_references_meant(
    proxy: Proxy, upstream: ScriptedUpstream, model: str
) -> None:
    """Each item that was referred to arrives once, as the upstream made it, thoughts included."""
    upstream.default = made_by = Model(reasons=MODELS[model])
    said = await converse(proxy, model)
    for sent, request in zip(said["sent"], upstream.requests, strict=True):
        told = request.json()["input"]
        for item_id in references(sent):
            assert [item for item in told if item.get("id") == item_id] == [made_by.made[item_id]]
    referred = {item_id for sent in said["sent"] for item_id in references(sent)}
    kinds = {made_by.made[item_id]["type"] for item_id in referred}
    assert kinds == ({"message", "reasoning"} if MODELS[model] else {"message"})
    chained = [sent for sent in said["sent"] if "previous_response_id" in sent]
    assert [len(sent["input"]) for sent in chained] == [1, 1, 3, 2]
    assert len(references(chained[-1])) == 1
