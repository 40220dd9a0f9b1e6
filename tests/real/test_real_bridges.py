"""The Responses API over a real model that speaks other APIs, or its own loosely."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import agents
import pydantic
import pytest
from openai import AsyncOpenAI

from real.daemon import until

if TYPE_CHECKING:
    from real.daemon import Daemon

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

MODELS = ["over-chat", "over-messages", "normalized"]
PROMPT = "Say hello."

every_model = pytest.mark.parametrize("model", MODELS)


@every_model
def test_text(daemon: Daemon, model: str) -> None:
    """A whole answer has a text, an usage that is counted, and the model that was asked for."""
    with daemon.openai() as client:
        response = client.responses.create(
            model=model, input=PROMPT, max_output_tokens=64, temperature=0
        )
    assert response.status in ("completed", "incomplete")
    assert response.output_text
    assert response.model == model
    assert response.usage is not None
    assert response.usage.output_tokens > 0
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    counted = response.usage.output_tokens
    until(
        "its tokens are counted",
        lambda: daemon.metric("aiproxy_tokens_total", route=model, type="output") >= counted,
    )


@every_model
def test_stream_helper(daemon: Daemon, model: str) -> None:
    """The SDK's stream helper rebuilds the response that the deltas add up to."""
    with (
        daemon.openai() as client,
        client.responses.stream(
            model=model, input=PROMPT, max_output_tokens=64, temperature=0
        ) as stream,
    ):
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    told = [event for event in events if event.type == "response.output_text.delta"]
    assert len(told) > 1
    assert "".join(event.delta for event in told) == final.output_text
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")


@every_model
def test_turns(daemon: Daemon, model: str) -> None:
    """A conversation goes on by `previous_response_id`: each turn's input holds those before."""
    previous, tokens = None, []
    with daemon.openai() as client:
        for text in ("My name is Ada.", "What is my name?", "Say it again."):
            response = client.responses.create(
                model=model,
                input=text,
                previous_response_id=previous,
                max_output_tokens=16,
                temperature=0,
            )
            previous = response.id
            assert response.usage is not None
            tokens.append(response.usage.input_tokens)
        stored = client.responses.retrieve(response.id)
    assert tokens == sorted(set(tokens))
    assert stored.output_text == response.output_text


@every_model
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_is_cut(daemon: Daemon, model: str, *, streamed: bool) -> None:
    """An answer that ends at `max_output_tokens` is incomplete, and says why."""
    asked: dict[str, Any] = {
        "model": model, "input": PROMPT, "max_output_tokens": 4, "temperature": 0,
    }  # fmt: skip
    with daemon.openai() as client:
        if streamed:
            with client.responses.stream(**asked) as stream:
                # The helper gives out only what is completed; the last event has what is not.
                last: Any = list(stream)[-1]
            response: Any = last.response
        else:
            response = client.responses.create(**asked)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 4


class City(pydantic.BaseModel):
    """What the model is asked for."""

    name: str
    inhabitants: int


def test_structured_output(daemon: Daemon) -> None:
    """The SDK's `parse` gets its type: the schema reaches the chat API, which keeps to it."""
    with daemon.openai() as client:
        response = client.responses.parse(
            model="over-chat",
            input="Name a city and how many people live there.",
            text_format=City,
            max_output_tokens=64,
            temperature=0,
        )
    assert response.status == "completed"
    assert isinstance(response.output_parsed, City)


@every_model
async def test_an_agent(daemon: Daemon, model: str) -> None:
    """An agent of openai-agents runs, streamed and whole."""
    agents.set_tracing_disabled(disabled=True)
    async with AsyncOpenAI(
        base_url=f"http://{daemon.listen}/v1", api_key=daemon.key, max_retries=0
    ) as client:
        agent = agents.Agent(
            name="Assistant",
            instructions="Be brief.",
            model=agents.OpenAIResponsesModel(model=model, openai_client=client),
            model_settings=agents.ModelSettings(temperature=0, max_tokens=32),
        )
        whole = await agents.Runner.run(agent, PROMPT)
        streamed = agents.Runner.run_streamed(agent, PROMPT)
        kinds = [event.type async for event in streamed.stream_events()]
    assert whole.final_output
    assert streamed.final_output
    assert "raw_response_event" in kinds


def test_a_coding_agent(daemon: Daemon) -> None:
    """A request as Codex sends it is answered; what cannot be expressed is left out, by name."""
    tools: list[Any] = [
        {"type": "function", "name": "shell", "parameters": {"type": "object", "properties": {}}},
        {"type": "namespace", "name": "github", "tools": []},
        {"type": "web_search"},
    ]
    with daemon.openai() as client:
        made = client.responses.with_raw_response.create(
            model="over-chat",
            input=[
                {"type": "message", "role": "developer", "content": "Be brief."},
                {"type": "message", "role": "user", "content": PROMPT},
            ],
            tools=tools,
            tool_choice="auto",
            store=False,
            include=["reasoning.encrypted_content"],
            max_output_tokens=16,
            extra_body={"client_metadata": {"a": "b"}},
        )
    assert made.headers["x-aiproxy-dropped-tools"] == "namespace:github, web_search"
    assert [tool["type"] for tool in json.loads(made.text)["tools"]] == ["function"]
