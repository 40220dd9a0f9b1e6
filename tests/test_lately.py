"""What the status page remembers: counts by name, days, first tokens, failures; and no more."""

from collections.abc import Sequence
from typing import Any

from aiproxy.errors import Outcome
from aiproxy.exchange import Exchange
from aiproxy.lately import FAILURES, Lately
from aiproxy.tallies import ANSWERS, UpstreamTally, tokens
from aiproxy.usage import Usage
from rig import config_text, key_hash, load, routes

URL = "http://127.0.0.1:1/v1"
DAY = 86400.0
NOON = 20_000 * DAY + DAY / 2  # some noon
USAGE = Usage(8, 3, 5, 2)
AS_TOKENS = {"input": 8, "input_cached": 3, "output": 5, "output_reasoning": 2}
NO_TOKENS = dict.fromkeys(AS_TOKENS, 0)


class Clocks:
    """Both clocks of a machine; that of the wall can be set, the other one only goes."""

    def __init__(self) -> None:
        self.wall, self.monotonic = NOON, 1000.0

    def go(self, seconds: float) -> None:
        """Let time pass."""
        self.wall += seconds
        self.monotonic += seconds


class Case:
    """A memory under test, with the clocks it reads."""

    def __init__(self, **changes: Any) -> None:
        self.clocks = Clocks()
        self.lately = Lately(lambda: self.clocks.wall, lambda: self.clocks.monotonic)
        self.configure(**changes)

    def configure(self, **changes: Any) -> None:
        """Put a configuration in force."""
        self.lately.configure(load(config_text(URL, **changes)))

    def end(
        self,
        outcome: Outcome = "completed",
        *,
        key: str = "team-a",
        route: str = "gpt-test",
        upstream: str = "scripted",
        results: Sequence[tuple[str, Any]] = (("scripted", "ok"),),
        took: float = 2.0,
        first: float | None = None,
        **facts: Any,
    ) -> None:
        """Let a request end now; `took` and `first` are seconds."""
        now = self.clocks.monotonic
        exchange = Exchange(
            facts.pop("request_id", "req_1"), "responses", self.lately, lambda: now, now - took,
            key=key, route=route, upstream=upstream, results=list(results), **facts,
        )  # fmt: skip
        if first is not None:
            exchange.first_token = exchange.started + first
        exchange.finish(outcome)

    def shown(self) -> list[str]:
        """The ids of the failures."""
        return [failure.request_id for failure in self.lately.failures()]


def test_each_name_has_its_counts() -> None:
    """A request counts for its key, its route, and each upstream that it asked."""
    spare = {"url": URL, "apis": ["responses"]}
    case = Case(upstreams={"spare": spare})
    case.end(usage=USAGE)
    case.end("upstream_error", results=[("spare", "connect"), ("scripted", "status_5xx")])
    case.end("rejected_limit", key="team-b", route="renamed", results=[], limit="tokens")
    lately = case.lately
    assert lately.requests() == {"completed": 1, "rejected_limit": 1, "upstream_error": 1}
    assert lately.tokens() == AS_TOKENS
    found = {name: (key.requests, key.refused, tokens(key)) for name, key in lately.keys.items()}
    assert found == {"team-a": (2, 0, AS_TOKENS), "team-b": (1, 1, NO_TOKENS)}
    assert lately.routes["gpt-test"].outcomes == {"completed": 1, "upstream_error": 1}
    assert lately.routes["renamed"].outcomes == {"rejected_limit": 1}
    assert tokens(lately.routes["gpt-test"]) == AS_TOKENS
    results = {name: dict(upstream.results) for name, upstream in lately.upstreams.items()}
    assert results == {"scripted": {"ok": 1, "status_5xx": 1}, "spare": {"connect": 1}}


def test_names_come_from_the_configuration_alone() -> None:
    """Whatever else is called or asked is counted, but under no name."""
    case = Case()
    before = [set(part) for part in (case.lately.keys, case.lately.routes, case.lately.upstreams)]
    for number in range(50):
        case.end(
            key=f"key-{number}", route=f"route-{number}", upstream=f"up-{number}", first=0.1,
            results=[(f"up-{number}", "ok")], usage=USAGE,
        )  # fmt: skip
    after = [set(part) for part in (case.lately.keys, case.lately.routes, case.lately.upstreams)]
    assert after == before == [{"team-a", "team-b"}, {"gpt-test", "renamed", "org/*"}, {"scripted"}]
    assert case.lately.requests() == {"completed": 50}
    assert case.lately.tokens()["input"] == 50 * 8


def test_a_reload_forgets_what_it_removes() -> None:
    """A name that comes back begins anew, others go on, and the totals never go back."""
    case = Case()
    case.end(usage=USAGE, first=0.1)
    case.end(key="team-b", route="renamed", usage=USAGE)
    ok = {"sha256": key_hash("x")}
    case.configure(keys={"team-c": ok}, routes=routes()[1:])
    assert "gpt-test" not in case.lately.routes
    assert (case.lately.requests(), case.lately.tokens()["output"]) == ({"completed": 2}, 10)
    case.configure()
    assert case.lately.routes["gpt-test"].outcomes == {}
    assert case.lately.routes["gpt-test"].first_tokens().answers == 0
    assert case.lately.routes["renamed"].outcomes == {"completed": 1}
    assert tokens(case.lately.keys["team-b"]) == AS_TOKENS
    assert case.lately.upstreams["scripted"].results == {"ok": 2}
    assert (case.lately.requests(), case.lately.tokens()["output"]) == ({"completed": 2}, 10)


def test_an_upstream_elsewhere_is_another() -> None:
    """Under the same name but another address nothing is known of it."""
    case = Case()
    case.end(first=0.1)
    case.configure(upstreams={"scripted": {"url": "http://127.0.0.1:2/v1"}})
    upstream = case.lately.upstreams["scripted"]
    assert (upstream.results, upstream.first_tokens().answers) == ({}, 0)
    assert case.lately.routes["gpt-test"].first_tokens().answers == 1


def test_a_day_ends_at_midnight_utc() -> None:
    """Today's tokens and requests begin at 0 with the first request of a day; totals go on."""
    case = Case()
    assert case.lately.since == NOON
    case.end(usage=USAGE)
    case.clocks.go(DAY / 2 - 0.001)
    case.end(usage=USAGE)
    key, route = case.lately.keys["team-a"], case.lately.routes["gpt-test"]
    assert (key.requests, key.input, route.output) == (2, 16, 10)
    case.clocks.go(0.001)
    case.end(usage=USAGE)
    assert (key.requests, tokens(key), tokens(route)) == (1, AS_TOKENS, AS_TOKENS)
    assert case.lately.since == NOON + DAY / 2
    assert case.lately.tokens() == {name: 3 * count for name, count in AS_TOKENS.items()}
    assert case.lately.requests() == route.outcomes == {"completed": 3}


def test_a_day_ends_where_nobody_asks() -> None:
    """Who looks at a quiet daemon in the morning does not see yesterday's tokens."""
    case = Case()
    case.end("rejected_limit", usage=USAGE, limit="requests")
    case.clocks.go(3 * DAY)
    case.lately.turn()
    key = case.lately.keys["team-a"]
    assert (key.requests, key.refused, tokens(key)) == (0, 0, NO_TOKENS)
    assert case.lately.since == NOON + 2.5 * DAY
    assert case.lately.tokens() == AS_TOKENS


def test_a_wall_clock_that_is_set_moves_the_day() -> None:
    """Set back or forward by days, it is another day; by minutes within a day, the same."""
    case = Case()
    for moved, requests in ((-60.0, 1), (-3 * DAY, 0), (5 * DAY, 0), (60.0, 1)):
        case.end()
        case.clocks.wall += moved
        case.lately.turn()
        assert case.lately.keys["team-a"].requests == requests, moved
        case.lately.keys["team-a"].clear()
        assert case.lately._turns - case.clocks.monotonic == DAY - case.clocks.wall % DAY


def test_first_tokens_are_of_who_answered() -> None:
    """They count from the request's start, for the route and the last upstream that was asked."""
    case = Case(upstreams={"spare": {"url": URL, "apis": ["responses"]}})
    case.end(upstream="spare", results=[("scripted", "connect"), ("spare", "ok")], first=0.25)
    case.end()
    found = {name: upstream.first_tokens() for name, upstream in case.lately.upstreams.items()}
    assert found == {"scripted": (0, None, None), "spare": (1, 0.25, 0.25)}
    assert case.lately.routes["gpt-test"].first_tokens() == (1, 0.25, 0.25)


def test_quantiles_are_by_rank() -> None:
    """Of n values the p50 is the n/2th and the p95 the 95n/100th, both rounded up."""
    tally = UpstreamTally(URL)
    for many, p50, p95 in ((1, 1, 1), (2, 1, 2), (10, 5, 10), (20, 10, 19), (21, 11, 20)):
        tally.firsts.clear()
        tally.firsts.extend(reversed(range(1, many + 1)))
        assert tally.first_tokens() == (many, p50, p95)


def test_first_tokens_are_of_the_last_answers() -> None:
    """Older ones than the last 1,024 are forgotten."""
    case = Case()
    for _ in range(ANSWERS):
        case.end(first=1.0)
    for _ in range(ANSWERS // 2 + 1):
        case.end(first=0.5)
    assert case.lately.upstreams["scripted"].first_tokens() == (ANSWERS, 0.5, 1.0)
    assert len(case.lately.routes["gpt-test"].firsts) == ANSWERS


def test_the_last_failures_are_kept() -> None:
    """Twenty, the newest first, with all that finds one in the log."""
    case = Case()
    for number in range(25):
        case.clocks.go(1)
        case.end("upstream_error", request_id=f"req_{number}")
    assert case.shown() == [f"req_{number}" for number in range(24, 4, -1)]
    case.clocks.go(1)
    case.end(
        "failed", request_id="req_x", status=502, error_code="upstream_error", took=1.5,
        results=[("scripted", "reset")],
    )  # fmt: skip
    assert case.lately.failures()[0] == (
        NOON + 26, "req_x", "responses", "team-a", "gpt-test", "scripted", "failed",
        "upstream_error", 502, 1.5,
    )  # fmt: skip


OURS: list[Outcome] = [
    "failed", "upstream_error", "upstream_timeout", "store_error", "drained", "internal_error",
]  # fmt: skip
PROVOKED: list[Outcome] = ["upstream_rejected", "rejected_overload"]
THEIRS: list[Outcome] = [
    "completed", "incomplete", "client_disconnected", "rejected_auth", "rejected_invalid",
    "rejected_limit",
]  # fmt: skip


def test_what_counts_as_a_failure() -> None:
    """What is ours or an upstream's fault, and nothing that a caller did wrong."""
    case = Case()
    for outcome in (*THEIRS, *OURS, *PROVOKED):
        case.clocks.go(1)
        case.end(outcome, request_id=outcome)
    assert case.shown() == [*reversed(PROVOKED), *reversed(OURS)]


def test_a_flood_of_callers_pushes_no_failure_out() -> None:
    """However many are refused, or have refused what they sent, 15 others stay to be seen."""
    case = Case()
    for number in range(FAILURES):
        case.clocks.go(1)
        case.end("internal_error", request_id=f"ours-{number}")
    flood: list[Outcome] = [*THEIRS, *PROVOKED]
    for number in range(1000):
        case.clocks.go(1)
        for outcome in flood:
            case.end(outcome, request_id=f"{outcome}-{number}", key="none")
    shown = case.shown()
    assert len(shown) == FAILURES
    assert shown[5:] == [f"ours-{number}" for number in range(19, 4, -1)]
    assert {name.rpartition("-")[0] for name in shown[:5]} == set(PROVOKED)


def test_provoked_failures_alone_have_all_places() -> None:
    """Where there is nothing else to see, twenty of them are."""
    case = Case()
    for number in range(30):
        case.end("upstream_rejected", request_id=f"req_{number}")
        case.clocks.go(1)
    assert case.shown() == [f"req_{number}" for number in range(29, 9, -1)]
    case.end("failed", request_id="ours")
    assert case.shown() == ["ours", *(f"req_{number}" for number in range(29, 10, -1))]


def test_failures_are_in_order_when_the_clock_is_set_back() -> None:
    """What happened last comes first, whatever the time was said to be."""
    case = Case()
    ends: list[Outcome] = ["failed", "upstream_rejected", "drained", "failed"]
    for number, outcome in enumerate(ends):
        case.clocks.monotonic += 1
        case.clocks.wall -= 3600
        case.end(outcome, request_id=f"req_{number}")
    assert case.shown() == ["req_3", "req_2", "req_1", "req_0"]


def test_others_strings_are_cut_and_escaped() -> None:
    """An upstream's code takes at most 128 characters of memory, and controls nothing."""
    case = Case()
    case.end("upstream_rejected", error_code="\x1b[2J" + "x" * 10_000, request_id="\n" * 500)
    assert len(case.lately._provoked[0][8]) == 128
    failure = case.lately.failures()[0]
    assert failure.error_code == "\\x1b[2J" + "x" * 124
    assert failure.request_id == "\\n" * 128
