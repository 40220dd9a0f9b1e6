"""`aiproxy demo`: the main job, with no account and no network.

A sample upstream and the daemon itself, on ports that the kernel picks, in one process; and a
client that holds a conversation through the daemon's real port: two turns, and a third after the
daemon was restarted. The upstream keeps nothing. Key and credential are made for this run and are
nowhere but in its memory and on the terminal; the conversation is in a directory that goes with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import signal
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import uvloop

from aiproxy import sse
from aiproxy.config import Loaded, loads
from aiproxy.daemon import Daemon
from aiproxy.demo_upstream import SampleUpstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

PATIENCE = 20.0  # seconds for anything that is waited for
MODEL = "demo"
QUESTIONS = (
    "Hello, my name is Ada.",
    "How did I begin, and how many words are we at?",
    "Do you still know it?",
)

_CONFIG = """\
listen: 127.0.0.1:0
admin: 127.0.0.1:0
upstreams:
  sample: {{url: "{url}", credential: {{env: SAMPLE_CREDENTIAL}}, apis: [responses]}}
routes:
  - {{model: {model}, upstreams: [sample]}}
keys:
  you: {{sha256: {digest}}}
sessions: {{store: "sqlite:{directory}/sessions.db"}}
log: {{format: json}}
"""

_ENDING = (signal.SIGINT, signal.SIGTERM)

# Of a request's log line, what is shown where it has a value.
_LOGGED = (
    "request_id", "key", "route", "upstream", "status", "outcome", "error_code",
    "replayed_turns", "input_tokens", "output_tokens", "first_token_s", "duration_s",
)  # fmt: skip


class DemoError(Exception):
    """Something did not go as it should; the message is a sentence for the terminal."""


def demo(*, once: bool) -> int:
    """Show it on standard output.

    Args:
        once: end after the conversation, instead of serving until SIGINT or SIGTERM.

    Returns:
        The exit code: 0, also after a signal; 1 when something failed, which is told on standard
        error.
    """
    return _shown(_run(once=once))


def sample_upstream(port: int) -> int:
    """Serve the sample upstream alone, to everybody on this machine, until SIGINT or SIGTERM.

    Returns:
        The exit code: 0; 1 when the port cannot be had, which is told on standard error.
    """
    return _shown(_upstream_alone(port))


def _shown(work: Coroutine[None, None, None]) -> int:
    try:
        uvloop.run(_until_signal(work))
    except KeyboardInterrupt:  # before the loop took the signal over
        return 0
    except (DemoError, OSError, aiohttp.ClientError) as error:
        what = str(error) or f"no answer within {PATIENCE:g} s"
        print(f"aiproxy demo: {what}", file=sys.stderr)
        return 1
    return 0


async def _until_signal(work: Coroutine[None, None, None]) -> None:
    """Do the work, or as much of it as there is time for before a signal."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    told = asyncio.Event()

    def end() -> None:
        if not told.is_set():  # a second signal must not cut the clean end
            told.set()
            task.cancel()

    for number in _ENDING:
        loop.add_signal_handler(number, end)
    try:
        await task
    except asyncio.CancelledError:
        if not told.is_set():
            raise
        _say("\n\nEnded.")
    finally:
        for number in _ENDING:
            loop.remove_signal_handler(number)


async def _upstream_alone(port: int) -> None:
    async with SampleUpstream(None, port=port) as upstream:
        _say(
            f"A sample upstream of the Responses API: {upstream.url}, until Ctrl-C.\n"
            "No model: it counts words, one is a token; it keeps nothing, and wants no key."
        )
        await asyncio.Event().wait()


async def _run(*, once: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="aiproxy-demo-") as directory:
        await _three_turns(directory, once=once)


async def _three_turns(directory: str, *, once: bool) -> None:
    key, credential = (f"{kind}{secrets.token_urlsafe(24)}" for kind in ("sk-aip-", "sk-sample-"))
    log = _RequestLog(asyncio.get_running_loop())
    async with SampleUpstream(credential) as upstream:
        text = _CONFIG.format(
            url=upstream.url,
            model=MODEL,
            digest=hashlib.sha256(key.encode()).hexdigest(),
            directory=directory,
        )
        environ = {"SAMPLE_CREDENTIAL": credential}
        config = loads(text, path=Path("demo.yaml"), environ=environ).config

        def daemon() -> Daemon:
            return Daemon(config, path="demo", source=lambda: Loaded(config, []), log_stream=log)

        async with _running(daemon()) as first:
            _say(
                "A sample upstream and aiproxy itself, started in this process for this run only:\n"
                f"  sample upstream  {upstream.url}  (no model: it counts words, one is a token;\n"
                "                   it keeps nothing)\n"
                f"  aiproxy          http://127.0.0.1:{first.clients.port}/v1\n"
                f"  its metrics      http://127.0.0.1:{first.operators.port}/metrics\n"
            )
            async with _client(first, key) as client:
                last = await _converse(client, log)
        async with _running(daemon()) as second:
            _say(
                "aiproxy was restarted; it holds the conversation in SQLite:\n"
                f"  aiproxy          http://127.0.0.1:{second.clients.port}/v1\n"
            )
            async with _client(second, key) as client:
                await _turn(client, log, len(QUESTIONS), last)
            if once:
                _say("Without --once it now goes on serving, and prints a curl line to try.")
            else:
                _invite(second.clients.port, key)
                await log.follow()


@asynccontextmanager
async def _running(daemon: Daemon) -> AsyncIterator[Daemon]:
    await daemon.start()
    try:
        yield daemon
    finally:
        await daemon.stop()


@asynccontextmanager
async def _client(daemon: Daemon, key: str) -> AsyncIterator[_Client]:
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        yield _Client(session, daemon, key)


async def _converse(client: _Client, log: _RequestLog) -> str:
    """All turns but the last, and what they moved; the id of the last response."""
    before = await client.metrics()
    last: str | None = None
    for number in range(1, len(QUESTIONS)):
        last = await _turn(client, log, number, last)
    _say("Metrics that moved, by how much:")
    for name, value in (await client.metrics()).items():
        moved = value - before.get(name, 0.0)
        if moved:
            _say(f"  {name}  {moved:+.6g}")
    _say("")
    return last or ""


async def _turn(client: _Client, log: _RequestLog, number: int, previous: str | None) -> str:
    """One turn; the id of its response."""
    question = QUESTIONS[number - 1]
    goes_on = "" if previous is None else f", previous_response_id: {previous[:12]}..."
    _say(f'Turn {number}, the client asks: "{question}"{goes_on}')
    response = await client.turn(question, previous)
    _say(f"  usage  {_usage(response['usage'])}")
    async with asyncio.timeout(PATIENCE):
        _say(f"  log    {await log.line()}\n")
    response_id: str = response["id"]
    return response_id


def _invite(port: int, key: str) -> None:
    body = json.dumps({"model": MODEL, "input": "Hello there!", "stream": True})
    _say(
        "aiproxy goes on serving, until Ctrl-C. The key was made for this run. Try:\n\n"
        f"curl -N http://127.0.0.1:{port}/v1/responses -H 'Authorization: Bearer {key}'"
        f" -H 'Content-Type: application/json' -d '{body}'\n\n"
        "Log of requests:"
    )


def _usage(usage: dict[str, Any]) -> str:
    return (
        f"{usage['input_tokens']} input tokens, {usage['output_tokens']} output tokens,"
        f" {usage['total_tokens']} in total"
    )


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)


class _Client:
    """A client of the daemon, and a scraper of its metrics."""

    def __init__(self, session: aiohttp.ClientSession, daemon: Daemon, key: str) -> None:
        self._session = session
        self._responses = f"http://127.0.0.1:{daemon.clients.port}/v1/responses"
        self._metrics = f"http://127.0.0.1:{daemon.operators.port}/metrics"
        self._headers = {"Authorization": f"Bearer {key}"}

    async def turn(self, question: str, previous: str | None) -> dict[str, Any]:
        """Stream one answer to the terminal; return the response object.

        Args:
            question: the new input, and all that is sent of the conversation.
            previous: the id of the response that it goes on from.

        Raises:
            DemoError: it is not a complete answer.
        """
        body: dict[str, Any] = {"model": MODEL, "input": question, "stream": True}
        if previous is not None:
            body["previous_response_id"] = previous
        async with self._session.post(self._responses, json=body, headers=self._headers) as answer:
            if answer.status != 200:  # noqa: PLR2004 - HTTP's own number
                raise DemoError(f"aiproxy answered {answer.status}: {await answer.text()}")
            show = _show_events()
            splitter = sse.Splitter()
            event: dict[str, Any] = {}
            async for chunk in answer.content.iter_any():
                for frame in splitter.feed(chunk):
                    if (data := sse.parse(frame.raw)[1]) is not None:
                        event = json.loads(data)
                        show(event)
        if event.get("type") != "response.completed":
            raise DemoError(f"the stream ended with {event.get('type') or 'no event'}")
        response: dict[str, Any] = event["response"]
        return response

    async def metrics(self) -> dict[str, float]:
        """The samples of aiproxy's own metrics, without what moves by itself and the buckets."""
        async with self._session.get(self._metrics) as answer:
            text = await answer.text()
        samples = (line.rpartition(" ") for line in text.splitlines())
        return {
            name: float(value)
            for name, _, value in samples
            if name.startswith("aiproxy_")
            and not name.startswith("aiproxy_event_loop_lag")
            and "_bucket{" not in name
        }


def _show_events() -> Callable[[dict[str, Any]], None]:
    """A function that shows one event after another: a line each, deltas joined in one."""
    joined = False

    def show(event: dict[str, Any]) -> None:
        nonlocal joined
        delta = event["type"].endswith(".delta")
        if joined and delta:
            _say(event["delta"], end="")
            return
        if joined:
            _say("")
        joined = delta
        _say(f"  {event['type']}" + (f"  {event['delta']}" if delta else ""), end="")
        if not delta:
            _say("")

    return show


class _RequestLog:
    """Where the daemon writes its log: lines of requests wait to be shown, warnings are shown."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lines: asyncio.Queue[str] = asyncio.Queue()
        self._unfinished = b""

    def write(self, data: memoryview, /) -> int:
        """Take some bytes; called in the log's thread."""
        *lines, self._unfinished = (self._unfinished + bytes(data)).split(b"\n")
        for line in lines:
            record = json.loads(line)
            if record.get("event") == "request":
                shown = " ".join(f"{name}={record[name]}" for name in _LOGGED if record.get(name))
                self._loop.call_soon_threadsafe(self._lines.put_nowait, shown)
            elif record.get("level") != "info":
                print(line.decode(), file=sys.stderr, flush=True)
        return len(data)

    def flush(self) -> None:
        """Nothing is kept back."""

    async def line(self) -> str:
        """The next request's line, once it was written."""
        return await self._lines.get()

    async def follow(self) -> None:
        """Show every request's line, for ever."""
        while True:
            _say(await self.line())
