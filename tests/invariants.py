"""What must be true after every case: I1 to I8 of the list of faults."""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from client import parse_sse
from rig import (
    CREDENTIAL,
    OUTPUT_CANARY,
    PROMPT_CANARY,
    TEAM_A,
    TEAM_B,
    Proxy,
    key_hash,
    prompt,
    totals,
)

if TYPE_CHECKING:
    from upstream import ScriptedUpstream

SETTLE = 2.0  # seconds within which everything is back where it was
SETTLE_LIMIT = 5.0  # seconds for a daemon to come to rest at all

TERMINAL = {"response.completed", "response.incomplete", "response.failed"}
TOKEN_FIELDS = {
    "input": "input_tokens",
    "input_cached": "input_cached_tokens",
    "output": "output_tokens",
    "output_reasoning": "output_reasoning_tokens",
}
# The credential, and of each client key the key itself, its prefix and its hash.
SECRETS = (CREDENTIAL, *(s for key in (TEAM_A, TEAM_B) for s in (key[:12], key, key_hash(key))))


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a daemon at rest holds, its pooled upstream connections counted apart.

    Each of those is two descriptors and one task here, since the upstream is in this process.
    """

    tasks: int
    descriptors: int
    connections: int

    @classmethod
    def now(cls, upstream: "ScriptedUpstream") -> "Baseline":
        """Count what is held now."""
        pooled = upstream.connections
        descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough
        return cls(len(asyncio.all_tasks()) - pooled, descriptors - 2 * pooled, pooled)

    def holds(self, other: "Baseline") -> bool:
        """Tell whether nothing of `other` is above it."""
        return (
            other.tasks <= self.tasks
            and other.descriptors <= self.descriptors
            and other.connections <= self.connections
        )


async def take_baseline(proxy: Proxy, upstream: "ScriptedUpstream") -> Baseline:
    """Warm up with healthy requests, and count once nothing has changed for 50 ms."""
    await check_healthy(proxy)
    await proxy.close_clients()
    same, baseline = 0, Baseline.now(upstream)
    async with asyncio.timeout(SETTLE_LIMIT):
        while same < 5:
            await asyncio.sleep(0.01)
            before, baseline = baseline, Baseline.now(upstream)
            same = same + 1 if baseline == before else 0
    return baseline


async def check_invariants(
    proxy: Proxy,
    upstream: "ScriptedUpstream",
    *,
    baseline: Baseline | None = None,
    stream: bytes | None = None,
    completed: bool = False,
    bodies: Iterable[bytes] = (),
) -> None:
    """Assert all of them; the test's clients are closed and the upstream healed for it.

    Args:
        proxy: the daemon under test.
        upstream: healed, that is, without queued scripts from here on.
        baseline: from `take_baseline`; without it I4 is left out.
        stream: the body of a Responses stream, for I6 and I7.
        completed: whether the upstream itself ended that stream with `response.completed`.
        bodies: error bodies that were seen, for I5; outputs may not be among them.
    """
    await proxy.close_clients()
    upstream.heal()
    upstream.text = f"Hello {OUTPUT_CANARY}"
    if stream is not None:
        check_terminal(stream, completed=completed)
        await check_continued(proxy, stream)
    await check_healthy(proxy)
    await check_conservation(proxy)
    check_settled(proxy)
    await check_tokens(proxy)
    if baseline is not None:
        await check_at_rest(upstream, baseline)
    await check_secrets(proxy, bodies)


async def eventually(check: Callable[[], Awaitable[None]], within: float | None = None) -> None:
    """Try a check until it holds; after `within` (SETTLE) seconds its own failure is raised."""
    loop = asyncio.get_running_loop()
    end = loop.time() + (SETTLE if within is None else within)
    while True:
        try:
            return await check()
        except AssertionError:
            if loop.time() > end:
                raise
        await asyncio.sleep(0.01)


async def check_conservation(proxy: Proxy) -> None:
    """I1: none in flight, and as many request lines as finished requests, by outcome."""

    async def holds() -> None:
        metrics = await proxy.metrics()
        assert totals(metrics, "aiproxy_requests_in_flight", "endpoint") == {}
        lines = proxy.request_logs()
        assert all(line.get("request_id") for line in lines)
        outcomes = Counter(line["outcome"] for line in lines)
        assert totals(metrics, "aiproxy_requests_total", "outcome") == outcomes

    await eventually(holds)


def check_settled(proxy: Proxy) -> None:
    """I2: no slot is held, and nothing is set aside."""
    assert proxy.daemon._limits.held == 0
    for accounts in proxy.daemon._limits._books.values():
        for account in accounts.values():
            for bucket in account.tokens:
                assert (bucket.exposed, bucket.far) == (0, 0), account


async def check_tokens(proxy: Proxy) -> None:
    """I3: the tokens of the log lines are those of the metric, type by type."""

    async def holds() -> None:
        counted = totals(await proxy.metrics(), "aiproxy_tokens_total", "type")
        logged = {
            kind: sum(line.get(field) or 0 for line in proxy.request_logs())
            for kind, field in TOKEN_FIELDS.items()
        }
        assert counted == {kind: number for kind, number in logged.items() if number}

    await eventually(holds)


async def check_at_rest(upstream: "ScriptedUpstream", baseline: Baseline) -> None:
    """I4: tasks, descriptors and upstream connections are not above their baseline."""

    async def holds() -> None:
        now = Baseline.now(upstream)
        assert baseline.holds(now), f"{now} is above {baseline}"

    await eventually(holds)


async def check_secrets(proxy: Proxy, bodies: Iterable[bytes] = ()) -> None:
    """I5: nothing secret in any log line, any metric, any error body."""
    places = {
        "log": proxy.tap.raw,
        "metrics": (await proxy.admin("/metrics")).body,
        **{f"body {number}": body for number, body in enumerate(bodies)},
    }
    for place, seen in places.items():
        for secret in (*SECRETS, PROMPT_CANARY, OUTPUT_CANARY):
            assert secret.encode() not in seen, f"{secret} in {place}"


def check_terminal(stream: bytes, *, completed: bool) -> None:
    """I7: one terminal event, the last but for `[DONE]`, and never an invented `completed`."""
    events = parse_sse(stream)
    if events and events[-1][1] == "[DONE]":
        events.pop()
    facts: list[dict[str, Any]] = [json.loads(data) for _, data in events]
    ends = [fact["type"] for fact in facts if fact.get("type") in TERMINAL]
    assert len(ends) == 1, f"terminal events: {ends}"
    assert facts[-1].get("type") == ends[0], "something follows the terminal event"
    assert (ends[0] == "response.completed") <= completed, "an invented response.completed"
    assert stream.endswith((b"\n\n", b"\r\r", b"\r\n\r\n")), "the last event is not finished"


async def check_continued(proxy: Proxy, stream: bytes) -> None:
    """I6: a turn that was seen complete can be continued, by its owner alone; no other can."""
    facts = [json.loads(data) for _, data in parse_sse(stream) if data != "[DONE]"]
    end = next(fact for fact in facts if fact.get("type") in TERMINAL)
    body = prompt(previous_response_id=end["response"]["id"])
    whole = end["type"] != "response.failed" and end["response"].get("store") is not False
    for key, status in ((TEAM_A, 200 if whole else 400), (TEAM_B, 400)):
        answer = await proxy.post("/v1/responses", body, key=key)
        assert answer.status == status, answer


async def check_ids(proxy: Proxy, whole: Iterable[str], broken: Iterable[str] = ()) -> None:
    """I6 of responses by their ids: those seen complete go on for their owner alone."""
    statuses = dict.fromkeys(whole, 200) | dict.fromkeys(broken, 400)
    for response_id, status in statuses.items():
        body = prompt(previous_response_id=response_id)
        for key, expected in ((TEAM_A, status), (TEAM_B, 400)):
            answer = await proxy.post("/v1/responses", body, key=key)
            assert answer.status == expected, (response_id, key, answer)


class Purse:
    """The tokens of team-a from here on, with the limiter's time at a stop: nothing comes back.

    Made by `Purse.of`, when all is written down that was before.
    """

    @classmethod
    async def of(cls, proxy: Proxy) -> Self:
        """Wait for the lines of what has ended, and stop the time."""
        await check_conservation(proxy)
        return cls(proxy)

    def __init__(self, proxy: Proxy) -> None:
        limits = proxy.daemon._limits
        now = limits._clock.latest
        limits._clock.read = lambda: now
        self._proxy = proxy
        self._before = self._left()
        self._lines = len(proxy.request_logs())

    def _left(self) -> int:
        levels = self._proxy.daemon._limits.levels("keys")["team-a"]
        (level,) = [level for level in levels if level.kind == "tokens"]
        return level.remaining

    async def check(self) -> None:
        """I3: what left the bucket is what the lines of its key say, to the token."""

        async def holds() -> None:
            lines = self._proxy.request_logs()[self._lines :]
            logged = sum(
                line.get(field) or 0
                for line in lines
                for field in TOKEN_FIELDS.values()
                if line["key"] == "team-a"
            )
            assert self._before - self._left() == logged

        await eventually(holds)


async def check_healthy(proxy: Proxy) -> None:
    """I8: a healthy request, whole and streamed, succeeds."""
    for streamed in (False, True):
        answer = await proxy.post("/v1/responses", prompt(stream=streamed))
        assert answer.status == 200, answer
        if streamed:
            check_terminal(answer.body, completed=True)
