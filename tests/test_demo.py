"""`aiproxy demo`: what it shows, what it invites to, and the sample upstream behind it."""

import asyncio
import re
import shutil
import signal
import socket
import sys
import urllib.request
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from openai import AsyncOpenAI, AuthenticationError, BadRequestError
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from aiproxy import demo
from aiproxy.demo_upstream import SampleUpstream
from client import RawClient, parse_sse
from conftest import BlockingCalls
from invariants import check_terminal

STRICT = TypeAdapter[Any](ResponseStreamEvent)
CREDENTIAL = "sk-sample-test"
HISTORY: list[Any] = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": [{"type": "output_text", "text": "three"}]},
    {"type": "function_call_output", "call_id": "c", "output": "not a message"},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "four five"}]},
]
Start = Callable[..., Any]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start `python -m aiproxy demo` with more arguments; it is ended after the test."""
    started: list[Process] = []

    async def start_demo(*arguments: str) -> Process:
        command = (sys.executable, "-m", "aiproxy", "demo", *arguments)
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
        started.append(process)
        return process

    yield start_demo
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture
async def openai() -> AsyncIterator[AsyncOpenAI]:
    """Point the SDK at the sample upstream itself."""
    async with (
        SampleUpstream(CREDENTIAL, pause=0) as upstream,
        AsyncOpenAI(base_url=upstream.url, api_key=CREDENTIAL, max_retries=0) as client,
    ):
        yield client


async def read_until(process: Process, pattern: str) -> re.Match[str]:
    """Read lines of standard output until one has the pattern."""
    assert process.stdout is not None
    async with asyncio.timeout(20):
        async for line in process.stdout:
            if found := re.search(pattern, line.decode()):
                return found
    raise AssertionError(f"no line has {pattern}")


# The command


async def test_once_shows_three_turns_and_ends(start: Start) -> None:
    """With --once it shows events, usage, log and metrics of all turns, and exits with 0."""
    process = await start("--once")
    async with asyncio.timeout(20):
        out, err = (part.decode() for part in await process.communicate())
    assert (process.returncode, err) == (0, "")
    for event in ("created", "output_item.added", "output_text.done", "completed"):
        assert out.count(f"  response.{event}\n") == 3
    assert 'You said: "Hello, my name is Ada." That makes 5 words so far.\n' in out
    assert 'You have spoken 2 times, and began with: "Hello, my name is Ada."' in out
    assert "  usage  5 input tokens, 13 output tokens, 18 in total\n" in out
    assert out.count("outcome=completed") == 3
    assert re.search(r"aiproxy_requests_total\{.*\}  \+2\n", out)
    assert re.search(r'aiproxy_tokens_total\{.*type="input"\}  \+34\n', out)
    assert 'You have spoken 3 times, and began with: "Hello, my name is Ada."' in out
    first, restarted, last = out.partition("aiproxy was restarted")
    assert restarted
    assert ("replayed_turns=1" in first, "replayed_turns=2" in last) == (True, True)
    assert (first.count("previous_response_id: "), last.count("previous_response_id: ")) == (1, 1)
    assert re.search(r'aiproxy_sessions_loads_total\{result="hit"\}  \+1\n', first)
    assert "curl -N" not in out
    assert "sk-" not in out
    assert "\x1b" not in out


async def test_the_printed_curl_line_works(start: Start) -> None:
    """The line, pasted into a shell, is answered by a stream, and its log line is shown."""
    process = await start()
    found = await read_until(process, r"^curl -N (\S+) -H '(\S+: [^']*)' -H '([^']*)' -d '(.*)'$")
    await read_until(process, "^Log of requests:$")
    if shutil.which("curl"):
        shell = await asyncio.create_subprocess_shell(f"{found[0]} -sS", stdout=PIPE)
        body, _ = await shell.communicate()
    else:
        url, *headers, data = found.groups()
        fields = dict(header.split(": ") for header in headers)
        request = urllib.request.Request(url, data.encode(), fields)  # noqa: S310 - it is http
        opened = await asyncio.to_thread(urllib.request.urlopen, request)
        with opened:
            body = await asyncio.to_thread(opened.read)
    assert parse_sse(body)[-1][0] == "response.completed"
    await read_until(process, "^request_id=req_.*status=200 outcome=completed")
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(10):
        _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_it_anywhere(start: Start, number: int) -> None:
    """In the middle of a turn a signal ends it cleanly: exit code 0, nothing on standard error."""
    process = await start()
    await read_until(process, "response.created")
    process.send_signal(number)
    async with asyncio.timeout(10):
        out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.endswith(b"\n\nEnded.\n")


async def test_it_ends_with_a_client_in_mid_stream(start: Start) -> None:
    """A stream that is open at Ctrl-C gets its terminal event, and the exit code is still 0."""
    process = await start()
    found = await read_until(process, r"^curl -N http://127.0.0.1:(\d+)\S+ -H '[^:]*: ([^']*)'")
    asked = b'{"model": "demo", "input": "%b", "stream": true}' % (b"a " * 30)
    async with await RawClient.connect(int(found[1])) as client:
        await client.request("POST", "/v1/responses", {"authorization": found[2]}, asked)
        await client.read_head()
        stream = await client.read_until(b"output_text.delta")
        process.send_signal(signal.SIGINT)
        stream += await client.read_body()
    check_terminal(stream, completed=True)
    async with asyncio.timeout(10):
        await process.communicate()
    assert process.returncode == 0


@pytest.fixture
def _here(blocking_calls: BlockingCalls) -> None:
    """Let the demo run in this process: it prints, and starts a daemon in its loop."""
    blocking_calls.allow("aiproxy/demo.py", {"_run", "_say"})


@pytest.mark.usefixtures("_here")
def test_a_failing_upstream_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When the conversation fails, the exit code is 1 and standard error says why."""
    monkeypatch.setattr(demo, "SampleUpstream", lambda _: SampleUpstream("another one"))
    assert demo.demo(once=True) == 1
    logged, err = capsys.readouterr().err.splitlines()
    assert "upstream refuses our credential" in logged
    assert err.startswith("aiproxy demo: aiproxy answered 502: ")
    assert "upstream_credential" in err


@pytest.mark.usefixtures("_here")
def test_an_answer_that_is_not_complete_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stream that ends otherwise than with response.completed is told, with exit code 1."""
    monkeypatch.setattr(
        "aiproxy.demo_upstream._Turn.events",
        lambda _: iter([{"type": "response.created", "response": {"id": "r", "output": []}}]),
    )
    assert demo.demo(once=True) == 1
    assert capsys.readouterr().err == "aiproxy demo: the stream ended with response.failed\n"


@pytest.mark.usefixtures("_here")
def test_it_runs_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    """As a function it returns the exit code, and leaves the signals' handlers as they were."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert demo.demo(once=True) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert "Turn 2" in capsys.readouterr().out


# The sample upstream


async def test_it_can_be_had_alone(start: Start) -> None:
    """With --upstream it listens on that port, answers without a key, and ends with a signal."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    process = await start("--upstream", str(port))
    await read_until(process, f"http://127.0.0.1:{port}/v1, until Ctrl-C")
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any") as client:
        answer = await client.responses.create(model="m", input="hi")
    assert answer.output_text == 'You said: "hi" That makes 1 words so far.'
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(10):
        out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.endswith(b"Ended.\n")


async def test_a_port_that_cannot_be_had_is_told(start: Start) -> None:
    """A port that is taken is an exit code of 1 and a sentence on standard error."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = await start("--upstream", str(server.getsockname()[1]))
        async with asyncio.timeout(20):
            out, err = await process.communicate()
    assert (process.returncode, out) == (1, b"")
    assert re.fullmatch(r"aiproxy demo: .*address already in use\n", err.decode())


async def test_its_events_are_strictly_valid(openai: AsyncOpenAI) -> None:
    """Every event has every field that the SDK's types require, numbered without a gap."""
    async with openai.responses.with_streaming_response.create(
        model="m", input="hi", stream=True
    ) as raw:
        frames = parse_sse(await raw.read())
    events = [STRICT.validate_json(data, strict=True) for _, data in frames]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events] == [name for name, _ in frames]


async def test_the_stream_helper_accepts_it(openai: AsyncOpenAI) -> None:
    """The SDK rebuilds from the events what the whole answer says, history included."""
    async with openai.responses.stream(model="m", input=HISTORY, temperature=0.5) as helper:
        streamed = await helper.get_final_response()
    whole = await openai.responses.create(model="m", input=HISTORY, temperature=0.5)
    assert Response.model_validate(whole.model_dump(), strict=True) == whole
    assert (streamed.output_text, streamed.usage) == (whole.output_text, whole.usage)
    assert 'spoken 2 times, and began with: "one two"' in whole.output_text
    assert whole.usage is not None
    assert whole.usage.input_tokens == 5
    assert whole.usage.output_tokens == len(whole.output_text.split())
    assert (whole.temperature, whole.status) == (0.5, "completed")


async def test_it_keeps_to_the_declared_maximum(openai: AsyncOpenAI) -> None:
    """An answer longer than max_output_tokens is cut, incomplete, and counted as it is."""
    whole = await openai.responses.create(model="m", input="hi", max_output_tokens=2)
    async with openai.responses.stream(model="m", input="hi", max_output_tokens=2) as helper:
        last = [event async for event in helper][-1]
    assert whole.output_text == "You said:"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert last.type == "response.incomplete"
    assert last.response.usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.output_tokens == 2


@pytest.mark.parametrize(
    "asked",
    [
        {"input": "hi"},
        {"model": 1, "input": "hi"},
        {"model": "m"},
        {"model": "m", "input": {}},
        {"model": "m", "input": ["hi"]},
        {"model": "m", "input": "hi", "max_output_tokens": "2"},
        {"model": "m", "input": "hi", "max_output_tokens": 0},
    ],
)
async def test_it_refuses_what_it_does_not_understand(
    openai: AsyncOpenAI, asked: dict[str, Any]
) -> None:
    """A wrong request is a 400 in the API's shape, which says what is wrong."""
    with pytest.raises(BadRequestError, match="The request cannot be read: "):
        await openai.post("/responses", body=asked, cast_to=Response)


async def test_it_answers_whoever_says_nothing(openai: AsyncOpenAI) -> None:
    """A conversation without a word of the user, or with content of another form, is answered."""
    for said in ([], [{"role": "system", "content": 7}], [{"role": "developer", "content": "x"}]):
        answer = await openai.post(
            "/responses", body={"model": "m", "input": said}, cast_to=Response
        )
        assert answer.output_text == "You have not said anything yet."


async def test_it_refuses_strangers(openai: AsyncOpenAI) -> None:
    """Only its own credential is let in, so the daemon must have replaced the client's key."""
    with pytest.raises(AuthenticationError):
        await openai.with_options(api_key="sk-aip-client").responses.create(model="m", input="hi")
