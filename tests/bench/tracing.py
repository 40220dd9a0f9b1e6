"""What tracing costs a request, in microseconds of CPU: `python tests/bench/tracing.py`.

A daemon without it and daemons with it are given the same requests in turn, at a pace at which no
span is dropped; counted is the CPU time of the whole process, the exporter's thread included. The
upstream and the collector are processes of their own.
"""
# ruff: noqa: T201 - a program for a terminal prints

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rig import TEAM_A, key_hash, parse_metrics, totals

TICK = os.sysconf("SC_CLK_TCK")
CONNECTIONS, PACE = 16, 400  # requests per second: less than half of what one core can do
VARIANTS = {"off": "", "on": "content: false", "with content": "content: true"}
REPLY = (
    b'{"id":"resp_1","object":"response","created_at":1,"status":"completed","model":"m","output":'
    b'[{"type":"message","id":"msg_1","role":"assistant","status":"completed","content":'
    b'[{"type":"output_text","text":"Hello there","annotations":[]}]}],"usage":{"input_tokens":80,'
    b'"input_tokens_details":{"cached_tokens":0},"output_tokens":20,"output_tokens_details":'
    b'{"reasoning_tokens":0},"total_tokens":100}}'
)
SENTENCE = "Write one paragraph about the sea, in plain words. "
# A question, and a turn of a coding agent: 40 messages and 15 tools, 50 kB.
AGENT = {
    "input": [
        each
        for turn in range(20)
        for each in (
            {"type": "function_call", "call_id": f"c{turn}", "name": "read", "arguments": "{}"},
            {"type": "function_call_output", "call_id": f"c{turn}", "output": SENTENCE * 40},
        )
    ],
    "tools": [
        {"type": "function", "name": f"tool_{n}", "description": SENTENCE, "parameters": {}}
        for n in range(15)
    ],
}
BODIES: dict[str, dict[str, object]] = {"question": {"input": SENTENCE * 8}, "agent": AGENT}
CONFIG = """
listen: 127.0.0.1:0
admin: 127.0.0.1:0
upstreams: {{up: {{url: "http://127.0.0.1:{upstream}/v1", apis: [responses]}}}}
routes: [{{model: m, upstreams: [{{name: up, reasoning: false}}]}}]
keys: {{bench: {{sha256: {hash}}}}}
log: {{level: info, format: json}}
{tracing}
"""


class Sink(asyncio.Protocol):
    """Answers every request with the same body."""

    def __init__(self, reply: bytes) -> None:
        self._reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        self._reply += b"Content-Length: %d\r\n\r\n%b" % (len(reply), reply)
        self._data = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            fields = bytes(self._data[:end]).lower().split(b"content-length:", 1)
            size = int(fields[1].split(b"\r\n", 1)[0]) if len(fields) == 2 else 0
            if len(self._data) < end + 4 + size:
                return
            del self._data[: end + 4 + size]
            self._transport.write(self._reply)


async def sink(reply: bytes) -> None:
    """Serve until killed; the port is the first line printed."""
    server = await asyncio.get_running_loop().create_server(lambda: Sink(reply), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run another Python."""
    with subprocess.Popen(  # noqa: S603 - this Python
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def port_of(process: subprocess.Popen[str]) -> int:
    """What a sink has printed."""
    assert process.stdout is not None
    return int(process.stdout.readline())


class Served:
    """A daemon, where it listens, and its log, which nobody reads."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.pid = process.pid
        while '"started"' not in (text := log.read_text()):
            if process.poll() is not None:
                raise RuntimeError(text)
            time.sleep(0.05)
        places = dict(
            pair.split('":"', 1) for pair in text.split('","') if pair.startswith(("listen", "adm"))
        )
        self.expected = 0  # spans
        self.port, self.admin = (int(places[n].rsplit(":", 1)[1]) for n in ("listen", "admin"))

    def cpu(self) -> float:
        """Seconds of CPU so far, of all its threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def wait(self) -> None:
        """Wait until the spans of all requests are with the collector, if there are any."""
        while (spans := self.spans()) and sum(spans.values()) < self.expected:
            time.sleep(0.1)  # between two looks

    def spans(self) -> dict[str, float]:
        """What became of its spans."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics") as answer:
            metrics = parse_metrics(answer.read().decode())
        return totals(metrics, "aiproxy_trace_spans_total", "result")


async def load(port: int, seconds: float, asked: dict[str, object]) -> int:
    """Make requests at the pace; how many."""
    body = json.dumps({"model": "m", "store": False, "temperature": 0.7, **asked}).encode()
    request = (
        f"POST /v1/responses HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {TEAM_A}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    done = 0
    begin = asyncio.get_running_loop().time()

    async def one(number: int) -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        turn = 0
        while (due := begin + (number + turn * CONNECTIONS) / PACE) < begin + seconds:
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(b"http/1.1 200"), head
            await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
            turn, done = turn + 1, done + 1
        writer.close()

    await asyncio.gather(*map(one, range(CONNECTIONS)))
    return done


def measure(served: Served, seconds: float, asked: dict[str, object]) -> float:
    """Microseconds of CPU for one request, the export of its spans included."""
    before = served.cpu()
    requests = asyncio.run(load(served.port, seconds, asked))
    served.expected += 2 * requests
    served.wait()
    return (served.cpu() - before) / requests * 1e6


def main() -> None:
    """Measure in turn, print medians and what they come to."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--seconds", type=float, default=4.0)
    given = options.parse_args()
    os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "200"  # so that a round exports its own spans
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream = port_of(stack.enter_context(child(__file__, "--sink", "upstream")))
        collector = port_of(stack.enter_context(child(__file__, "--sink", "collector")))
        daemons = {}
        for place, (name, content) in enumerate(VARIANTS.items()):
            url = f"http://127.0.0.1:{collector}/v1/traces"
            tracing = f"tracing: {{otlp: '{url}', {content}}}" if content else ""
            path, log = folder / f"{place}.yaml", folder / f"{place}.log"
            text = CONFIG.format(upstream=upstream, hash=key_hash(TEAM_A), tracing=tracing)
            path.write_text(text)
            with log.open("wb") as written:
                process = subprocess.Popen(  # noqa: S603 - this Python
                    [sys.executable, "-m", "aiproxy", "serve", "--config", str(path)],
                    stderr=written,
                )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            daemons[name] = Served(process, log)
        for served in daemons.values():
            served.expected += 2 * asyncio.run(load(served.port, 1.0, AGENT))
        figures: dict[tuple[str, str], list[float]] = {}
        for _ in range(given.rounds):
            for body, asked in BODIES.items():
                for name, served in daemons.items():
                    cost = measure(served, given.seconds, asked)
                    figures.setdefault((body, name), []).append(cost)
        print(f"{'us of CPU per request':<24} median   least   more than off")
        for (body, name), found in figures.items():
            pairs = zip(found, figures[body, "off"], strict=True)
            more = statistics.median(mine - off for mine, off in pairs)
            line = f"{statistics.median(found):6.0f}  {min(found):6.0f}   {more:13.0f}"
            print(f"{f'{body}, {name}':<24} {line}")
        for name, served in daemons.items():
            if spans := served.spans():
                told = ", ".join(f"{number:.0f} {what}" for what, number in spans.items())
                print(f"spans, {name}: {told}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--sink"]:
        asyncio.run(sink(REPLY if sys.argv[2] == "upstream" else b""))
    else:
        main()
