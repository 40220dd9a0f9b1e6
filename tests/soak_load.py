"""What the soak does to a daemon: every kind of request there is, and clients that leave.

A deck is 20 streams (of every API, bridged ones, conversations, some that are tried again or fail),
two clients that leave in each phase, and a few requests of other kinds. How a request ends does not
depend on time, so that all labels of metrics that there will ever be are there after some decks.
"""

import asyncio
import gzip
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, Literal, get_args

from client import Answer, IncompleteBody, RawClient
from soak_upstream import KEYS, PATHS, Api, Play, Plays

Phase = Literal[
    "while the body is sent",
    "before the first byte",
    "mid-stream",
    "between the last delta and the terminal event",
    "without a stream",
]
PHASES: tuple[Phase, ...] = get_args(Phase)
Job = Callable[[], Awaitable[object]]

STREAMS, LEAVING = 20, 2  # of a deck: streams; clients that leave in each phase
WORKERS = 24  # at the same time
LONGEST = 60.0  # seconds for one scene, on a machine that others use, too
SCRAPES = 0.25  # seconds between scrapes and looks at the status


class LoadError(Exception):
    """The daemon answered something else: then nothing is soaked."""


def body_of(api: Api, model: str, text: str, *, streamed: bool, **fields: Any) -> dict[str, Any]:
    """Return the body of a request."""
    messages = [{"role": "user", "content": text}]
    asked: dict[Api, dict[str, Any]] = {
        "responses": {"input": text, "store": False},
        "chat": {"messages": messages},
        "messages": {"messages": messages, "max_tokens": 64},
        "embeddings": {"input": text},
    }
    if streamed:
        fields = {"stream": True, **fields}
        if api == "chat":
            fields["stream_options"] = {"include_usage": True}
    return {"model": model, **asked[api], **fields}


WAYS: tuple[tuple[Api, str], ...] = (
    ("responses", "main"),
    ("chat", "main"),
    ("responses", "chatty"),
    ("messages", "main"),
    ("responses", "wordy"),
    ("responses", "keeper"),
)


class Load:
    """Clients of one daemon, on ports `port` and `admin`, whose upstreams are `plays`.

    Attributes:
        made: requests so far; each was begun, whatever became of it.
        streams: made so far, those of clients that left apart.
        left: clients that left, by phase.
    """

    def __init__(self, plays: Plays, port: int, admin: int, seed: int = 0) -> None:
        self._plays = plays
        self._port = port
        self._admin = admin
        self._choose = random.Random(seed)  # noqa: S311 - an order, no secrets
        self._kept: list[RawClient] = []
        self._decks = itertools.count()
        self._talking = asyncio.Semaphore(4)
        self._over = False
        self.made = 0
        self.streams = 0
        self.left: Counter[Phase] = Counter()

    async def begin(self) -> None:
        """Use up what the smallest key has."""
        await self.json("responses", key="small")

    async def run(self, decks: int) -> None:
        """Play so many decks, and what is played once beside them; all connections are closed."""
        jobs = self._jobs(decks)
        self._over = False
        scraping = asyncio.create_task(self._scrape())
        try:
            async with asyncio.TaskGroup() as workers:
                workers.create_task(self._alone())
                for _ in range(WORKERS):
                    workers.create_task(self._work(jobs))
        finally:
            self._over = True
            await scraping
            while self._kept:
                await self._kept.pop().close()

    def _jobs(self, decks: int) -> Iterator[Job]:
        for number in itertools.islice(self._decks, decks):
            deck = self._deck(number)
            self._choose.shuffle(deck)
            yield from deck

    async def _work(self, jobs: Iterator[Job]) -> None:
        for job in jobs:
            async with asyncio.timeout(LONGEST):
                await job()

    def _deck(self, number: int) -> list[Job]:
        """Everything once; what differs from deck to deck goes by its number."""
        way = WAYS[number % len(WAYS)]
        stream, leave = self.stream, self.leave
        return [
            *(partial(stream, *each) for each in (*WAYS, *WAYS[:3])),
            self.conversation,
            partial(self.conversation, delete=True),
            partial(stream, *way, play="later"),
            partial(stream, "responses", "both", play="later"),
            partial(stream, "responses", "main", play="declared"),
            partial(stream, "responses", "main", play="failed", ends=b"response.failed"),
            partial(stream, *way, play="cut", ends=_failure(way[0])),
            partial(stream, *way, play="reset", ends=_failure(way[0])),
            partial(stream, "chat", "main", play="reset", ends=_failure("chat")),
            *(partial(self.json, api) for api in PATHS),
            partial(self.json, "responses", "wordy", coded=True),
            partial(self.json, "chat", play="busy", status=429),
            partial(self.json, "responses", play="refused", status=400),
            partial(self.json, "messages", key="free"),
            partial(self.json, "responses", key="small", status=429),
            # What callers make up is never the same.
            partial(self.json, "responses", f"any-{number}"),
            partial(self.json, "chat", f"unknown-{number}", status=404),
            partial(self.json, "chat", key=f"nobody-{number}", status=401),
            partial(self.json, "responses", status=400, previous_response_id=f"resp_{number}"),
            *(partial(leave, phase, number, at) for phase in PHASES for at in range(LEAVING)),
        ]

    # -- asking

    async def _client(self) -> RawClient:
        return self._kept.pop() if self._kept else await RawClient.connect(self._port)

    async def _send(
        self,
        client: RawClient,
        path: str,
        document: object = None,
        *,
        key: str = "team",
        method: str = "POST",
        coded: bool = False,
    ) -> None:
        headers = [("authorization", f"Bearer {KEYS.get(key, key)}")]
        body = None if document is None else json.dumps(document).encode()
        if body is not None:
            headers.append(("content-type", "application/json"))
            if coded:
                headers.append(("content-encoding", "gzip"))
                body = gzip.compress(body)
        self.made += 1
        await client.request(method, path, headers, body)

    async def _ask(
        self, path: str, document: object = None, *, status: int = 200, **how: Any
    ) -> Answer:
        client = await self._client()
        try:
            await self._send(client, path, document, **how)
            answer = await client.answer()
        except BaseException:
            await client.close()
            raise
        if answer.headers.get("connection") == "close":
            await client.close()
        else:
            self._kept.append(client)
        if answer.status != status:
            raise LoadError(f"{path} {document}: {answer}")
        return answer

    async def json(
        self,
        api: Api,
        model: str = "main",
        play: Play = "whole",
        *,
        status: int = 200,
        key: str = "team",
        coded: bool = False,
        **fields: Any,
    ) -> None:
        """Make a request without a stream."""
        prompt = self._plays.begin(play)
        body = body_of(api, model, prompt.text, streamed=False, **fields)
        try:
            await self._ask(PATHS[api], body, status=status, key=key, coded=coded)
        finally:
            self._plays.end(prompt)

    async def stream(
        self,
        api: Api,
        model: str,
        play: Play = "whole",
        ends: bytes | None = None,
        **fields: Any,
    ) -> Answer:
        """Make a request with a stream, and look at its end."""
        prompt = self._plays.begin(play)
        body = body_of(api, model, prompt.text, streamed=True, **fields)
        fails = ends is not None
        client = await (RawClient.connect(self._port) if fails else self._client())
        try:
            await self._send(client, PATHS[api], body)
            head = await client.read_head()
            said = await client.read_until(b"Hello") if head.status == 200 else b""
            prompt.go_on.set()
            said += await client.read_body()
        except IncompleteBody as error:
            await client.close()
            raise LoadError(f"{api} {model} {play}: {error.partial!r}") from None
        except BaseException:
            await client.close()
            raise
        finally:
            self._plays.end(prompt)
        if fails:
            await client.close()
        else:
            self._kept.append(client)
        if head.status != 200 or (ends or _END[api]) not in said[-2000:]:
            raise LoadError(f"{api} {model} {play}: {head} {said!r}")
        self.streams += 1
        return Answer(200, {}, said)

    # -- scenes

    async def conversation(self, *, delete: bool = False) -> None:
        """Two streamed turns that are kept and one that is not, and what is stored of them.

        Few at the same time: the store is small, and gives way to the next ones.
        """
        async with self._talking:
            await self._converse(delete=delete)

    async def _converse(self, *, delete: bool) -> None:
        ids: list[str] = []
        for _ in range(2):
            before: dict[str, Any] = {"previous_response_id": ids[-1]} if ids else {}
            answer = await self.stream("responses", "main", store=True, **before)
            found = re.search(rb'"id": ?"(resp_[^"]+)"', answer.body)
            if found is None:
                raise LoadError(f"no id in {answer}")
            ids.append(found[1].decode())
        await self.json("responses", previous_response_id=ids[-1])
        place = f"{PATHS['responses']}/{ids[-1]}"
        await self._ask(place, method="GET")
        await self._ask(f"{place}/input_items", method="GET")
        if delete:
            await self._ask(place, method="DELETE")
            await self._ask(place, method="GET", status=404)

    async def leave(self, phase: Phase, deck: int, at: int) -> None:
        """Make a request and leave in a phase of it; the two of a deck do so by FIN and by RST."""
        api, model = WAYS[deck % len(WAYS)]
        plays: dict[Phase, Play] = {
            "mid-stream": "some",
            "between the last delta and the terminal event": "most",
            "without a stream": "some" if at else "nothing",
        }
        streamed = phase != "without a stream"
        play = plays.get(phase, "nothing")
        prompt = self._plays.begin(play)
        body = body_of(api, model, prompt.text, streamed=streamed)
        client = await RawClient.connect(self._port)
        try:
            if phase == "while the body is sent":
                await self._begin_body(client, PATHS[api], json.dumps(body).encode())
            else:
                await self._send(client, PATHS[api], body)
                await prompt.came.wait()
                if streamed and play != "nothing":
                    await client.read_head()
                    await client.read_until(b"Hello" if play == "some" else b"world")
            if (deck // len(WAYS) + at) % 2:
                client.abort()
        finally:
            await client.close()
            self._plays.end(prompt)
        self.left[phase] += 1

    async def _begin_body(self, client: RawClient, path: str, body: bytes) -> None:
        """Send half a body once the daemon wants it: then the request is one."""
        fields = {
            "authorization": f"Bearer {KEYS['team']}",
            "content-type": "application/json",
            "content-length": str(len(body)),
            "expect": "100-continue",
        }
        self.made += 1
        await client.request("POST", path, fields)
        if (await client.read_head()).status != 100:
            raise LoadError("the body is not wanted")
        await client.send(body[: len(body) // 2])

    async def _alone(self) -> None:
        """Do what cannot be done twice at once: a full key, an upstream that is left alone."""
        async with asyncio.timeout(LONGEST):
            await self._full()
            await self._breaks()

    async def _full(self) -> None:
        """One request has the only slot, another one is refused."""
        prompt = self._plays.begin("nothing")
        async with await RawClient.connect(self._port) as client:
            body = body_of("responses", "main", prompt.text, streamed=True)
            await self._send(client, PATHS["responses"], body, key="one")
            await prompt.came.wait()
            await self.json("responses", key="one", status=429)
        self._plays.end(prompt)

    async def _breaks(self) -> None:
        """An upstream fails until it is left alone, and is well when it is tried."""
        await self._until("broken", b"upstream_overloaded")
        await self._until("whole", b"completed")

    async def _until(self, play: Play, seen: bytes) -> None:
        while True:
            prompt = self._plays.begin(play)
            body = body_of("responses", "broken", prompt.text, streamed=False)
            async with await RawClient.connect(self._port) as client:
                await self._send(client, PATHS["responses"], body)
                answer = await client.answer()
            self._plays.end(prompt)
            if seen in answer.body:
                return
            if play == "whole":
                await asyncio.sleep(0.02)  # it is left alone for a while

    async def _scrape(self) -> None:
        """Look at what operators look at, now and then."""
        while not self._over:
            async with await RawClient.connect(self._admin) as client:
                for path in ("/metrics", "/-/status", "/-/ready"):
                    await client.request("GET", path)
                    if (await client.answer()).status != 200:
                        raise LoadError(path)
            await asyncio.sleep(SCRAPES)


_END: dict[Api, bytes] = {
    "responses": b"response.completed",
    "chat": b"[DONE]",
    "messages": b"message_stop",
}


def _failure(api: Api) -> bytes:
    return b"response.failed" if api == "responses" else b'"error"'
