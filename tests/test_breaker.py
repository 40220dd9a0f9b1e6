"""When an upstream is left alone: the breaker, and what stands beside it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy.breaker import Breaker
from aiproxy.standing import FULL, Standing, Standings
from rig import config_text, load

FAILURES, COOLDOWN, MOST = 3, 5.0, 60.0


def breaker(told: list[tuple[str, float]] | None = None) -> Breaker:
    """Return one that notes its transitions."""
    noted: list[tuple[str, float]] = [] if told is None else told
    return Breaker(FAILURES, COOLDOWN, MOST, lambda state, _, left: noted.append((state, left)))


def play(made: Breaker, steps: Sequence[tuple[Any, ...]]) -> list[object]:
    """Do what each step names; return what was answered."""
    return [getattr(made, name)(*args) for name, *args in steps]


def test_failures_in_a_row_open_it() -> None:
    """So many failures in a row open it, for the cooldown; a success in between starts anew."""
    told: list[tuple[str, float]] = []
    made = breaker(told)
    play(made, [("failed", 0.0), ("failed", 0.0), ("succeeded",), ("failed", 0.0), ("failed", 0.0)])
    assert (made.state, made.admits(0.0), told) == ("closed", True, [])
    made.failed(1.0)
    assert told == [("open", COOLDOWN)]
    assert [made.admits(at) for at in (1.0, 5.9)] == [False, False]
    assert made.wait(2.0) == 4.0


def test_one_probe() -> None:
    """After the cooldown one request goes; until it is known how it went no other does."""
    made = breaker()
    play(made, [("failed", 0.0)] * FAILURES)
    assert [made.admits(5.0), made.admits(5.0), made.state] == [True, False, "half-open"]
    made.succeeded(probe=True)
    assert [made.state, made.admits(5.0), made.admits(5.0)] == ["closed", True, True]


def test_a_probe_that_ends_without_a_word() -> None:
    """A probe whose client left leaves room for another at once."""
    made = breaker()
    play(made, [("failed", 0.0)] * FAILURES)
    assert made.admits(5.0)
    made.unknown()  # of one that went before
    assert not made.admits(5.0)
    made.unknown(probe=True)
    assert made.admits(5.0)


def test_the_cooldown_doubles() -> None:
    """Each probe that fails doubles the cooldown, to its maximum; a success begins anew."""
    told: list[tuple[str, float]] = []
    made = breaker(told)
    play(made, [("failed", 0.0)] * FAILURES)
    now = 0.0
    for _ in range(6):
        now += MOST
        assert made.admits(now)
        made.failed(now, probe=True)
    waits = [left for state, left in told if state == "open"]
    assert waits == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0]
    assert made.admits(now + MOST)
    made.succeeded(probe=True)
    play(made, [("failed", 0.0)] * FAILURES)
    assert told[-1] == ("open", COOLDOWN)


def test_why_it_changes_is_told() -> None:
    """Each transition is told once, with what opened it and for how long."""
    told: list[tuple[object, ...]] = []
    made = Breaker(2, COOLDOWN, MOST, lambda *what: told.append(what))
    play(made, [("failed", 0.0), ("failed", 0.0), ("failed", 0.0), ("admits", 5.0)])
    made.failed(5.0, probe=True)
    play(made, [("admits", 15.0)])
    made.unknown(probe=True)
    play(made, [("admits", 15.0)])
    made.succeeded(probe=True)
    made.refused(20.0)
    assert told == [
        ("open", "failures", COOLDOWN),
        ("half-open", "", 0.0),
        ("open", "failures", 2 * COOLDOWN),
        ("half-open", "", 0.0),
        ("open", "failures", 0.0),
        ("half-open", "", 0.0),
        ("closed", "", 0.0),
        ("open", "credential", COOLDOWN),
    ]


@pytest.mark.parametrize(("asked", "wait"), [(1.0, 5.0), (30.0, 30.0), (9999.0, 60.0)])
def test_what_the_upstream_asks_for(asked: float, wait: float) -> None:
    """Its Retry-After lengthens the cooldown, never beyond the maximum."""
    made = breaker()
    play(made, [("failed", 0.0), ("failed", 0.0), ("failed", 0.0, asked)])
    assert made.wait(0.0) == wait


def test_requests_under_way_when_it_opens() -> None:
    """Their failures do not double anything: they are of the same time."""
    told: list[tuple[str, float]] = []
    made = breaker(told)
    play(made, [("failed", 0.0)] * (FAILURES + 5))
    assert told == [("open", COOLDOWN)]
    made.failed(0.0, 20.0)
    assert made.wait(0.0) == 20.0


def test_a_refused_credential() -> None:
    """It opens at once: no other request would fare better."""
    made = breaker()
    made.refused(0.0)
    assert (made.state, made.wait(0.0)) == ("open", COOLDOWN)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["admit", "failed", "succeeded", "refused", "unknown"]),
            st.floats(0.0, 20.0),
        )
    )
)
def test_never_two_probes(steps: list[tuple[str, float]]) -> None:
    """Whatever happens, an open breaker admits nobody before its time, and one probe at a time."""
    made = breaker()
    now = 0.0
    probing = False
    for step, after in steps:
        now += after
        state, left = made.state, made.wait(now)
        if step == "admit":
            admitted = made.admits(now)
            assert admitted == (state == "closed" or (state == "open" and left == 0))
            probing = probing or (admitted and state == "open")
        elif probing or state == "closed":
            args = (now,) if step in ("failed", "refused") else ()
            options = {} if step == "refused" else {"probe": probing}
            getattr(made, step)(*args, **options)
            probing = False
        assert made.wait(now) <= MOST


def test_a_full_upstream_and_reloads() -> None:
    """`max_concurrent` bounds what is under way; a reload changes bounds, and forgets nothing."""
    told: list[tuple[Any, ...]] = []

    def config(**changes: Any) -> Any:
        text = config_text("http://127.0.0.1:1/v1", upstreams={"scripted": changes})
        return load(text)

    def upstream(**changes: Any) -> Any:
        return config(**changes).upstreams["scripted"]

    standings = Standings(config(max_concurrent=1), lambda *what: told.append(what))
    standing = standings.of(upstream())
    assert [standing.enter(0.0), standing.enter(0.0)] == [True, False]
    assert standing.wait(0.0) > 0
    standings.configure(config(max_concurrent=2))
    assert standings.of(upstream(max_concurrent=2)) is standing
    assert [standing.enter(0.0), standing.enter(0.0)] == [True, False]
    standing.leave()
    assert standing.enter(0.0)
    standing.breaker.refused(0.0)
    assert [standing.wait(at) for at in (1.0, 4.5, 5.0)] == [4.0, 0.5, FULL]
    assert told == [("scripted", "open", "credential", 5.0)]
    standings.configure(config(url="http://127.0.0.1:2/v1"))
    assert told[1:] == [("scripted", "closed", "", 0.0)]
    elsewhere = upstream(url="http://127.0.0.1:2/v1")
    assert standings.of(elsewhere).breaker.state == "closed"
    assert standings.of(upstream()) is not standing  # the one that is no more


ENDS = ["answered", "succeeded", "failed", "asked to wait", "refused", "unknown"]


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from(["begin", *ENDS]), st.floats(0.0, 30.0), st.integers(0, 5))),
)
def test_whatever_happens(failures: int, most: int, steps: list[tuple[str, float, int]]) -> None:
    """Of many under way: one probe at a time, no more than `most`, no change told twice, an end."""
    told: list[Any] = ["closed"]
    made = Breaker(failures, COOLDOWN, MOST, lambda state, *_: told.append(state))
    standing = Standing(made, most)
    now = 0.0
    open_ones: list[bool] = []  # those under way: whether each is the probe
    for step, after, which in steps:
        now += after
        if step == "begin":
            before, left = made.state, standing.wait(now)
            if standing.enter(now):
                assert left == 0.0
                assert before == "closed" or not any(open_ones)
                open_ones.append(made.state == "half-open")
        elif open_ones:
            end_one(standing, open_ones, step, now, which % len(open_ones))
        assert standing.in_flight == len(open_ones) <= most
        assert sum(open_ones) <= 1
        assert (made.state == "half-open") <= any(open_ones)
        assert made.wait(now) <= MOST
    assert all(one != other for one, other in pairwise(told))
    assert told[-1] == made.state
    while open_ones:
        end_one(standing, open_ones, "unknown", now, 0)
    assert standing.enter(now + MOST)


def end_one(standing: Standing, open_ones: list[bool], how: str, now: float, which: int) -> None:
    """End one of those under way, as an attempt does; `answered`: it goes on, and is no probe."""
    made, probe = standing.breaker, open_ones[which]
    if how == "answered":
        made.answered(probe=probe)
        open_ones[which] = False
        return
    del open_ones[which]
    standing.leave()
    if how == "refused":
        made.refused(now)
    elif how == "failed":
        made.failed(now, probe=probe)
    elif how == "asked to wait":
        made.failed(now, 20.0, probe=probe)
    else:
        getattr(made, how)(probe=probe)
