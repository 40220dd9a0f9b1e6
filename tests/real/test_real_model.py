"""aiproxy as its users run it: a daemon process between the official SDKs and a real model."""

from __future__ import annotations

import secrets
import signal
from typing import TYPE_CHECKING

import anthropic
import openai
import pytest

from real.daemon import Tokens, answers, busy_slots, serving, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from real.daemon import Daemon

# The first test waits for two processes to start; a stream takes seconds on one core.
pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

PROMPT = "Say hello."
# llama.cpp's own field: the model writes until max_tokens, whatever it would like to do.
ENDLESS = {"ignore_eos": True}
# Far more than a slot makes in the time of a test (about 60 tokens a second).
LONG = 1500
SLOT_LIMIT = 2.0


@pytest.fixture
def own_daemon(llama_server: str, tmp_path: Path) -> Iterator[Daemon]:
    """Run a daemon for one test that ends it or leaves open work behind."""
    with serving(llama_server, tmp_path) as running:
        yield running


def test_chat_answers_and_counts_exactly_its_usage(daemon: Daemon) -> None:
    """A JSON chat answer names the route, keeps llama.cpp's fields, and its usage is counted."""
    before = daemon.tokens()
    with daemon.openai() as client:
        answer = client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=16,
            temperature=0,
        )
    assert answer.model == "smol"
    assert answer.choices[0].message.content
    assert answer.model_extra is not None
    assert answer.model_extra["timings"]["predicted_n"] > 0
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    cached = answer.usage.prompt_tokens_details.cached_tokens or 0
    assert daemon.spent_since(before) == Tokens(
        answer.usage.prompt_tokens - cached, cached, answer.usage.completion_tokens
    )


def test_chat_stream_with_usage_ends_in_one_usage_chunk_that_is_counted(daemon: Daemon) -> None:
    """A client that asks for usage gets exactly one usage chunk, the last, and it is counted."""
    before = daemon.tokens()
    with (
        daemon.openai() as client,
        client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ) as stream,
    ):
        chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {"smol"}
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    cached = usage.prompt_tokens_details.cached_tokens or 0
    assert daemon.spent_since(before) == Tokens(
        usage.prompt_tokens - cached, cached, usage.completion_tokens
    )


def test_chat_stream_without_usage_shows_none_and_is_counted_all_the_same(daemon: Daemon) -> None:
    """A client that does not ask for usage sees no usage chunk, yet no token is estimated."""
    with daemon.openai() as client:
        twin = client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=1,
            temperature=0,
        )
        until("no request is open", lambda: daemon.metric("aiproxy_requests_in_flight") == 0)
        before = daemon.tokens()
        estimated = daemon.metric("aiproxy_usage_estimated_total")
        with client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=16,
            temperature=0,
            stream=True,
            extra_body=ENDLESS,
        ) as stream:
            chunks = list(stream)
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"
    spent = daemon.spent_since(before)
    assert twin.usage is not None
    assert spent.input + spent.input_cached == twin.usage.prompt_tokens
    assert spent.output == 16
    assert daemon.metric("aiproxy_usage_estimated_total") == estimated


def test_max_tokens_ends_a_chat_answer_with_length(daemon: Daemon) -> None:
    """`max_tokens` reaches the model: the answer stops at it, with finish reason `length`."""
    with daemon.openai() as client:
        answer = client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=4,
            temperature=0,
            extra_body=ENDLESS,
        )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_messages_answer_and_count_exactly_their_usage(daemon: Daemon) -> None:
    """A JSON messages answer names the route, and its usage is what the metrics count."""
    before = daemon.tokens()
    with daemon.anthropic() as client:
        message = client.messages.create(
            model="smol", max_tokens=16, messages=[{"role": "user", "content": PROMPT}]
        )
    assert message.model == "smol"
    assert message.content[0].type == "text"
    assert message.content[0].text
    assert daemon.spent_since(before) == Tokens(
        message.usage.input_tokens,
        message.usage.cache_read_input_tokens or 0,
        message.usage.output_tokens,
    )


def test_messages_stream_helper_rebuilds_the_message(daemon: Daemon) -> None:
    """Anthropic's stream helper gets every text delta, the final message and the counted usage."""
    before = daemon.tokens()
    with (
        daemon.anthropic() as client,
        client.messages.stream(
            model="smol",
            max_tokens=16,
            # llama.cpp leaves out message_start when the first token is half a character.
            extra_body={"temperature": 0},
            messages=[{"role": "user", "content": PROMPT}],
        ) as stream,
    ):
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert message.model == "smol"
    assert message.content[0].type == "text"
    assert message.content[0].text == text
    assert text
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 0
    assert daemon.spent_since(before) == Tokens(
        message.usage.input_tokens,
        message.usage.cache_read_input_tokens or 0,
        message.usage.output_tokens,
    )


def test_embeddings_come_back_as_the_numbers_of_the_model(
    daemon: Daemon, llama_server: str
) -> None:
    """The base64 that the SDK asks for survives: the vector equals the one llama.cpp gives."""
    with (
        daemon.openai() as client,
        openai.OpenAI(base_url=llama_server, api_key="none", max_retries=0) as direct,
    ):
        through = client.embeddings.create(model="smol", input=PROMPT)
        straight = direct.embeddings.create(model="smollm2", input=PROMPT)
    assert through.model == "smol"
    assert len(through.data[0].embedding) == 576
    assert through.data[0].embedding == pytest.approx(straight.data[0].embedding, abs=1e-3)
    assert through.usage == straight.usage


def test_answers_name_their_request_and_their_upstream(daemon: Daemon) -> None:
    """Every answer carries `x-request-id`, the caller's if it gave one, and the upstream's name."""
    with daemon.openai() as client:
        made = client.chat.completions.with_raw_response.create(
            model="smol", messages=[{"role": "user", "content": PROMPT}], max_tokens=1
        )
        given = client.chat.completions.with_raw_response.create(
            model="smol",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=1,
            stream=True,
            extra_headers={"x-request-id": "real-7"},
        )
        list(given.parse())
    assert made.headers["x-request-id"]
    assert made.headers["x-aiproxy-upstream"] == "llama"
    assert given.headers["x-request-id"] == "real-7"
    assert given.headers["x-aiproxy-upstream"] == "llama"


def test_models_are_the_routes(daemon: Daemon) -> None:
    """The model list shows the route's name and nothing of the upstream's."""
    with daemon.openai() as client:
        assert [model.id for model in client.models.list()] == [
            "smol", "over-chat", "over-messages", "normalized",
        ]  # fmt: skip


def test_unknown_model_is_not_found_for_both_sdks(daemon: Daemon) -> None:
    """A model that no route names is the SDKs' own NotFoundError, in each one's error shape."""
    with daemon.openai() as client, pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": PROMPT}]
        )
    assert refused.value.code == "model_not_found"
    assert refused.value.param == "model"
    with (
        daemon.anthropic() as claude,
        pytest.raises(anthropic.NotFoundError, match="not_found_error"),
    ):
        claude.messages.create(
            model="smollm2", max_tokens=1, messages=[{"role": "user", "content": PROMPT}]
        )


def test_wrong_key_is_an_authentication_error_for_both_sdks(daemon: Daemon) -> None:
    """A key that is not in the file is the SDKs' own AuthenticationError, in each one's shape."""
    wrong = "sk-aip-" + secrets.token_urlsafe(32)
    with daemon.openai(wrong) as client, pytest.raises(openai.AuthenticationError) as refused:
        client.chat.completions.create(model="smol", messages=[{"role": "user", "content": PROMPT}])
    assert refused.value.code == "invalid_api_key"
    with (
        daemon.anthropic(wrong) as claude,
        pytest.raises(anthropic.AuthenticationError, match="authentication_error"),
    ):
        claude.messages.create(
            model="smol", max_tokens=1, messages=[{"role": "user", "content": PROMPT}]
        )


def test_chat_client_that_leaves_mid_stream_frees_the_slot(
    own_daemon: Daemon, llama_server: str
) -> None:
    """Tokens arrive while the model still works, and a client that leaves stops the model."""
    with (
        own_daemon.openai() as client,
        client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=LONG,
            stream=True,
            extra_body=ENDLESS,
        ) as stream,
    ):
        assert any(chunk.choices[0].delta.content for chunk in stream)
        assert busy_slots(llama_server) >= 1
    until("the slot is idle", lambda: busy_slots(llama_server) == 0, SLOT_LIMIT)
    until(
        "the disconnect is counted",
        lambda: own_daemon.metric("aiproxy_client_disconnects_total", phase="streaming") == 1,
    )


def test_messages_client_that_leaves_mid_stream_frees_the_slot(
    own_daemon: Daemon, llama_server: str
) -> None:
    """A messages client that leaves after the first text stops the model."""
    with (
        own_daemon.anthropic() as client,
        client.messages.stream(
            model="smol",
            max_tokens=LONG,
            messages=[{"role": "user", "content": PROMPT}],
            extra_body=ENDLESS,
        ) as stream,
    ):
        assert any(stream.text_stream)
        assert busy_slots(llama_server) >= 1
    until("the slot is idle", lambda: busy_slots(llama_server) == 0, SLOT_LIMIT)


def test_client_that_gives_up_on_a_json_answer_frees_the_slot(
    own_daemon: Daemon, llama_server: str
) -> None:
    """A client that stops waiting for an answer without a stream stops the model too."""
    with own_daemon.openai() as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=LONG,
            timeout=1,
            extra_body=ENDLESS,
        )
    until(
        "the disconnect is counted",
        lambda: own_daemon.metric("aiproxy_client_disconnects_total", phase="waiting") == 1,
    )
    # While it makes a JSON answer llama.cpp looks at its client only after a whole second without
    # any other task, and /slots is one: asked more often, it never looks.
    until("the slot is idle", lambda: busy_slots(llama_server) == 0, limit=5, every=1.3)


def test_sigterm_lets_a_running_stream_finish(own_daemon: Daemon) -> None:
    """After SIGTERM the daemon is not ready, the open stream ends whole, and the exit code is 0."""
    with (
        own_daemon.openai() as client,
        client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=120,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=ENDLESS,
        ) as stream,
    ):
        first = next(stream)
        own_daemon.process.send_signal(signal.SIGTERM)
        until("draining shows", lambda: answers(own_daemon.admin, "/-/ready", 503))
        rest = list(stream)
    assert first.choices[0].finish_reason is None
    assert [c.choices[0].finish_reason for c in rest if c.choices][-1] == "length"
    assert rest[-1].usage is not None
    assert rest[-1].usage.completion_tokens == 120
    assert own_daemon.process.wait(10) == 0
