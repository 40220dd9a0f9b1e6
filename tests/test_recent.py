"""What answers showed: pace of targets, density of routes, outputs of keys; and estimates by it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy.prompt_size import Size
from aiproxy.recent import LARGEST, Density, Outputs, Pace, Recent

# Pace


def test_an_unknown_target_has_a_usual_pace() -> None:
    """A target that has not answered yet is taken for a usual one, never for a stopped one."""
    assert Pace().tokens(("r", "u"), 2) == int(2 * Pace.UNKNOWN) > 0


def test_pace_is_that_of_the_target() -> None:
    """The first answer sets a target's pace; others keep theirs; time never counts backwards."""
    pace = Pace()
    pace.observe(("r", "u"), 100, 2.0)
    assert pace.tokens(("r", "u"), 3) == 150
    assert pace.tokens(("r", "other"), 1) == int(Pace.UNKNOWN)
    assert pace.tokens(("r", "u"), -5) == 0


def test_pace_follows_recent_answers() -> None:
    """One odd answer moves it a little, many move it there."""
    pace = Pace()
    pace.observe(("r", "u"), 100, 1.0)
    pace.observe(("r", "u"), 1000, 1.0)
    assert 100 < pace.tokens(("r", "u"), 1) < 550
    for _ in range(50):
        pace.observe(("r", "u"), 1000, 1.0)
    assert pace.tokens(("r", "u"), 1) in (999, 1000)


@pytest.mark.parametrize(("tokens", "seconds"), [(0, 1.0), (-1, 1.0), (1000, 0.0), (1000, 0.001)])
def test_pace_ignores_what_says_nothing(tokens: int, seconds: float) -> None:
    """No output, or one that came at once, is no measure of pace."""
    pace = Pace()
    pace.observe(("r", "u"), tokens, seconds)
    assert pace.tokens(("r", "u"), 1) == int(Pace.UNKNOWN)


# Density


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        (Size(0, 0), 1),
        (Size(1, 0), 1),
        (Size(8, 0), 2),
        (Size(4000, 0), 1000),
        (Size(400, 3000), 3100),
    ],
)
def test_an_unknown_route_has_four_bytes_to_a_token(size: Size, tokens: int) -> None:
    """Without an answer about four bytes are a token; media count as they are; one is least."""
    assert Density().tokens("r", size) == tokens


def test_density_follows_the_routes_answers() -> None:
    """Answers correct the ratio of their own route, and of no other."""
    density = Density()
    for _ in range(60):
        density.observe("r", 10_000, 5000)
    assert 4950 <= density.tokens("r", Size(10_000, 0)) <= 5000
    assert density.tokens("other", Size(10_000, 0)) == 2500


def test_one_request_moves_density_by_a_tenth_at_most() -> None:
    """A body of junk that no model reads makes the next request hardly cheaper."""
    density = Density()
    density.observe("r", 10_000_000, 1)
    assert density.tokens("r", Size(10_000, 0)) >= 2300
    small = Density()
    small.observe("r", 40, 40)
    assert small.tokens("r", Size(10_000, 0)) <= 2520


@given(st.lists(st.tuples(st.integers(-5, 10**9), st.integers(-5, 10**9)), max_size=80))
def test_density_stays_within_bounds(seen: list[tuple[int, int]]) -> None:
    """Whatever is observed, a byte is a token at most, and sixteen are one at least."""
    density = Density()
    for size, tokens in seen:
        density.observe("r", size, tokens)
    assert 1000 <= density.tokens("r", Size(16_000, 0)) <= 16_000


# Outputs


def test_p90_is_what_nine_of_ten_did_not_exceed() -> None:
    """Of 1 to 20 it is 18; of one answer that answer; before the first it is not known."""
    outputs = Outputs()
    assert outputs.p90("k", "r") is None
    outputs.observe("k", "r", 7)
    assert outputs.p90("k", "r") == 7
    outputs = Outputs()
    for tokens in (*range(20, 10, -1), *range(1, 11)):
        outputs.observe("k", "r", tokens)
    assert outputs.p90("k", "r") == 18
    assert outputs.p90("k", "other") is None
    assert outputs.p90("other", "r") is None


@given(st.lists(st.integers(0, 50), min_size=1, max_size=200))
def test_p90_is_of_the_recent_ones(seen: list[int]) -> None:
    """It is one of the last answers; at least nine of ten of these are not above it."""
    outputs = Outputs()
    for tokens in seen:
        outputs.observe("k", "r", tokens)
    last = seen[-Outputs.MANY :]
    p90 = outputs.p90("k", "r")
    assert p90 in last
    assert sum(tokens <= p90 for tokens in last) * 10 >= 9 * len(last)
    assert sum(tokens < p90 for tokens in last) * 10 < 9 * len(last)


# Estimates

TEXT = Size(400, 0)


def test_estimate_without_history_sets_aside_all_that_may_come() -> None:
    """Before the first answer it is the declared maximum, the route's, or the assumed one."""
    estimate = Recent().estimate
    assert estimate("k", "r", TEXT, declared=50, most=90, many=1) == (100, 50, 50, True)
    assert estimate("k", "r", TEXT, declared=None, most=90, many=1) == (100, 90, 90, True)
    assert estimate("k", "r", TEXT, declared=None, most=90, many=3) == (100, 270, 270, True)
    expected = (100, LARGEST, LARGEST, False)
    assert estimate("k", "r", TEXT, declared=None, most=None, many=1) == expected


def test_estimate_with_history_is_capped_by_what_was_declared() -> None:
    """Then it is what nine of ten used, and the largest possible is told beside it."""
    recent = Recent()
    for _ in range(10):
        recent.outputs.observe("k", "r", 70)
    assert recent.estimate("k", "r", TEXT, declared=500, most=None, many=1)[1:3] == (70, 500)
    assert recent.estimate("k", "r", TEXT, declared=50, most=None, many=1)[1:3] == (50, 50)


@given(
    text=st.integers(0, 2**40),
    media=st.integers(0, 10**9),
    declared=st.none() | st.integers(0, 10**400),
    most=st.none() | st.integers(1, 10**9),
    many=st.integers(1, 10**400),
    seen=st.lists(st.integers(0, 10**8), max_size=5),
)
def test_p14_the_estimate_is_total(  # noqa: PLR0917 - the facts of a request
    text: int, media: int, declared: int | None, most: int | None, many: int, seen: list[int]
) -> None:
    """P14: it never raises, the input is at least 1, the output at most the largest possible."""
    recent = Recent()
    for tokens in seen:
        recent.outputs.observe("k", "r", tokens)
        recent.density.observe("r", text, tokens)
    got = recent.estimate("k", "r", Size(text, media), declared=declared, most=most, many=many)
    assert got.input >= 1
    assert 0 <= got.output <= got.largest


def test_what_is_configured_no_more_is_forgotten() -> None:
    """A reload that drops a key or a route drops what was known of it, and nothing else."""
    recent = Recent()
    for key in ("k", "gone"):
        for route in ("r", "old"):
            recent.outputs.observe(key, route, 5)
    for route in ("r", "old"):
        recent.pace.observe((route, "u"), 100, 1.0)
        recent.density.observe(route, 10_000, 10_000)
    recent.keep({"k"}, {"r"})
    assert recent.outputs.p90("k", "r") == 5
    assert recent.outputs.p90("gone", "r") is None
    assert recent.outputs.p90("k", "old") is None
    assert recent.pace.tokens(("r", "u"), 1) == 100
    assert recent.pace.tokens(("old", "u"), 1) == int(Pace.UNKNOWN)
    assert recent.density.tokens("old", Size(100, 0)) == 25 < recent.density.tokens("r", TEXT)
