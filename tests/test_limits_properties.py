"""Limits, whatever happens in which order: never more than promised, nothing lost, exact waits."""

from fractions import Fraction
from typing import NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from aiproxy.config import Limits
from aiproxy.limits import SECOND, Account, Combined, Demand, Refusal, Reservation, TokenBucket
from test_limits import World, level, limits, state

# What is asked for is near the capacities, so that it often meets them.
WINDOWS = st.builds(
    lambda amount, unit, burst: {"rate": f"{amount}/{unit}", "burst": burst},
    st.integers(1, 20),
    st.sampled_from(["s", "min", "h", "day"]),
    st.integers(1, 20),
)
BUCKETS = st.lists(WINDOWS, max_size=2)
LIMITS = st.builds(
    limits, requests=BUCKETS, tokens=BUCKETS, concurrent=st.none() | st.integers(1, 4)
)
UNSLOTTED = st.builds(limits, requests=BUCKETS, tokens=st.lists(WINDOWS, min_size=1, max_size=2))
INPUTS, OUTPUTS, ACTUALS = st.integers(0, 15), st.integers(0, 20), st.integers(0, 60)
UNBOUNDED = st.builds(Demand, INPUTS, OUTPUTS, st.none(), st.booleans())
BOUNDED = st.builds(
    lambda demand, more: demand._replace(largest=demand.output + more),
    UNBOUNDED,
    st.integers(0, 30),
)
DEMANDS = UNBOUNDED | BOUNDED
STARTS = st.integers(0, 10**18)
JUMPS = st.one_of(
    st.just(0),
    st.integers(-2, 2),
    st.integers(-SECOND, 3 * SECOND),
    st.builds(
        lambda n, unit: n * unit * SECOND // 7, st.integers(-5, 40), st.sampled_from([1, 60])
    ),
    st.integers(-(10**14), 10**14),
)


class Step(NamedTuple):
    """The clock jumps, and a request comes or an open one ends."""

    jump: int
    demand: Demand | None
    which: int
    actual: int


def steps(demands: st.SearchStrategy[Demand]) -> st.SearchStrategy[list[Step]]:
    """Histories of requests that ask for such demands; some are open at their end."""
    step = st.builds(Step, JUMPS, st.none() | demands, st.integers(0, 9), ACTUALS)
    return st.lists(step, max_size=12)


def live(world: World, history: list[Step]) -> World:
    """Bring a world into some state."""
    for step in history:
        world.time.ns += step.jump
        if step.demand:
            world.admit(step.demand)
        elif world.open:
            world.open.pop(step.which % len(world.open)).settle(step.actual)
    return world


def worlds(
    accounts: int,
    each: st.SearchStrategy[Limits] = LIMITS,
    demands: st.SearchStrategy[Demand] = DEMANDS,
) -> st.SearchStrategy[World]:
    """Worlds of so many accounts in which something has happened."""
    several = st.lists(each, min_size=accounts, max_size=accounts)
    return st.builds(live, st.builds(World, several, STARTS), steps(demands))


# Any schedule


class Model:
    """A bucket as it is promised, and all that it ever let through; in tokens, exact."""

    def __init__(self, bucket: TokenBucket) -> None:
        self.bucket = bucket
        self.rate = Fraction(bucket.spec.amount, bucket.spec.seconds * SECOND)
        self.capacity = bucket.spec.capacity
        self.level = Fraction(self.capacity)
        self.charged = 0  # of all settled, up to what was set aside
        self.open: dict[Reservation, tuple[int, int | None]] = {}  # set aside, and largest use

    def may(self, share: int, worst: int | None) -> bool:
        """Whether a request may be admitted."""
        if share > self.level or worst is None:
            return share <= self.level
        bounded = [(taken, far) for taken, far in self.open.values() if far is not None]
        bounded.append((share, worst))
        debt = self.level - share + sum(taken for taken, _ in bounded)
        debt -= sum(min(far, self.capacity) for _, far in bounded)
        crowd = sum(min(far, 2 * self.capacity) for _, far in bounded)
        return debt >= -self.capacity and crowd <= 2 * self.capacity


class Schedules(RuleBasedStateMachine):
    """Two keys on two routes: requests come and end while the clock jumps."""

    @initialize(each=st.lists(LIMITS, min_size=4, max_size=4), start=STARTS)
    def begin(self, each: list[Limits], start: int) -> None:
        """Begin with everything full."""
        self.world = World(each, start)
        self.start = self.seen = start
        self.open: list[tuple[Reservation, list[int], Demand]] = []
        self.requests = [[Model(b) for b in a.requests] for a in self.world.accounts]
        self.tokens = [[Model(b) for b in a.tokens] for a in self.world.accounts]
        self.models = [m for models in (*self.requests, *self.tokens) for m in models]

    def jump(self, ns: int) -> None:
        """Let the clock jump; time passes only where it is later than ever."""
        self.world.time.ns += ns
        passed = max(0, self.world.time.ns - self.seen)
        self.seen += passed
        for model in self.models:
            model.level = min(Fraction(model.capacity), model.level + passed * model.rate)

    def state(self) -> list[object]:
        """All that admission depends on, without a look at the clock."""
        return [state(account, self.seen) for account in self.world.accounts]

    @rule(ns=JUMPS, key=st.sampled_from([0, 2]), route=st.sampled_from([1, 3, None]), ask=DEMANDS)
    def request(self, ns: int, key: int, route: int | None, ask: Demand) -> None:
        """Ask, on a key and perhaps on a route."""
        self.jump(ns)
        at = [key] if route is None else [key, route]
        accounts = [self.world.accounts[index] for index in at]
        slots = [account.slots for account in accounts]
        worst = None if ask.largest is None else ask.input + ask.largest
        shares: list[tuple[Model, int, int | None]]
        shares = [(m, 1, None) for index in at for m in self.requests[index]]
        if ask.input:
            shares += [
                (model, min(ask.input + ask.output, model.capacity), worst)
                for index in at
                for model in self.tokens[index]
            ]
        expected = all(model.may(share, far) for model, share, far in shares)
        expected &= all(ask.input <= model.capacity for index in at for model in self.tokens[index])
        expected &= not ask.slot or all(each.held < each.most for each in slots)
        before = self.state()
        result = Combined(accounts, self.world.clock).admit(ask)
        assert isinstance(result, Reservation) == expected
        if isinstance(result, Refusal):
            assert self.state() == before
            assert result.wait is None or result.wait > 0
            return
        self.open.append((result, at, ask))
        for model, share, far in shares:
            model.level -= share
            model.open[result] = (share, far)

    @precondition(lambda self: bool(self.open))
    @rule(ns=JUMPS, which=st.integers(0, 99), actual=ACTUALS, again=ACTUALS)
    def end(self, ns: int, which: int, actual: int, again: int) -> None:
        """Settle one of those that are open, and once more."""
        self.jump(ns)
        held, at, _ = self.open.pop(which % len(self.open))
        held.settle(actual)
        for model in self.models:
            share, _ = model.open.pop(held, (0, None))
            if not share:
                continue
            used = 1 if any(model in self.requests[index] for index in at) else actual
            model.level = min(Fraction(model.capacity), model.level + share - used)
            model.charged += min(used, share)
        settled = self.state()
        held.settle(again)
        assert self.state() == settled

    @invariant()
    def never_more_than_promised(self) -> None:
        """Of each bucket, exactly: what was let through, its level, and what is still possible."""
        assert self.world.clock.now() == self.seen
        for model in self.models:
            through = model.charged + sum(share for share, _ in model.open.values())
            assert through <= model.capacity + model.rate * (self.seen - self.start)
            assert level(model.bucket, self.seen) == model.level <= model.capacity
            far = [far for _, far in model.open.values() if far is not None]
            assert sum(far) <= 2 * model.capacity or len(far) == 1

    @invariant()
    def slots_are_those_of_the_open(self) -> None:
        """A slot is held by each open request that takes one, and by nobody else."""
        for index, account in enumerate(self.world.accounts):
            held = sum(ask.slot and index in at for _, at, ask in self.open)
            assert account.slots.held == held <= account.slots.most

    def teardown(self) -> None:
        """Nothing stays behind when all is settled."""
        for held, _, _ in self.open:
            held.settle(0)
        for account in self.world.accounts:
            assert account.slots.held == 0
            for bucket in (*account.requests, *account.tokens):
                assert (bucket.exposed, bucket.far) == (0, 0)


def test_any_schedule_gets_what_is_promised() -> None:
    """No schedule of requests, ends and jumps gets more than C + R * t, and none gets less."""
    run_state_machine_as_test(Schedules, settings=settings(stateful_step_count=30))


@given(st.lists(WINDOWS, min_size=1, max_size=2), steps(BOUNDED))
def test_a_debt_has_a_bound(windows: list[object], history: list[Step]) -> None:
    """Bounded demands of at most a capacity, and kept to, owe at most a capacity."""
    world = World([limits(tokens=windows)])
    buckets = world.accounts[0].tokens
    least = min(bucket.capacity for bucket in buckets)
    largest: dict[Reservation, int] = {}
    for step in history * 3:
        world.time.ns += step.jump
        if step.demand:
            tokens, output = min(step.demand.input or 1, least), step.demand.largest or 0
            bound = min(output, least - tokens)
            held = world.admit(Demand(tokens, min(step.demand.output, bound), bound))
            if isinstance(held, Reservation):
                largest[held] = tokens + bound
        elif world.open:
            held = world.open.pop(step.which % len(world.open))
            held.settle(largest[held] - step.actual % 2)
        for bucket in buckets:
            assert bucket.parts(world.clock.now()) >= -bucket.full


# Refusals


@pytest.mark.parametrize("whole", [1, 1_000_000, SECOND])
@given(worlds(1, UNSLOTTED, UNBOUNDED) | worlds(2, UNSLOTTED, UNBOUNDED), DEMANDS, ACTUALS)
def test_a_wait_is_enough_and_not_too_long(
    whole: int, world: World, demand: Demand, more: int
) -> None:
    """After the wait, rounded up or not, the demand is admitted; a nanosecond earlier it is not."""
    result = world.all.admit(demand)
    for _ in range(60):
        if isinstance(result, Reservation):
            result.settle(demand.input + demand.output + more)
            result = world.all.admit(demand)
    if not isinstance(result, Refusal):
        return
    now = world.time.ns = world.clock.now()
    if result.wait is None:
        world.time.ns = now + 10**18
        assert world.refused(demand).wait is None
        assert demand.input > min(b.capacity for a in world.accounts for b in a.tokens)
        return
    world.time.ns = now + result.wait - 1
    assert world.refused(demand).wait == 1
    world.time.ns = now + -(-result.wait // whole) * whole
    world.admitted(demand)


@given(worlds(1) | worlds(2), DEMANDS)
def test_who_asks_for_more_is_not_admitted_sooner(world: World, demand: Demand) -> None:
    """What is refused is refused with more input, more output or a larger bound, too."""
    while isinstance(world.admit(demand), Reservation) and len(world.open) < 30:
        pass
    assume(isinstance(world.all.admit(demand), Refusal))
    larger = 0 if demand.largest is None else demand.largest
    for more in (1, 7, 100):
        world.refused(demand._replace(input=demand.input + more))
        world.refused(demand._replace(output=demand.output + more))
        world.refused(demand._replace(largest=max(larger, demand.output) + more))


@given(worlds(2), st.lists(DEMANDS, min_size=1), st.sampled_from([1, -1]))
def test_where_one_refuses_the_other_is_unchanged(
    world: World, demands: list[Demand], order: int
) -> None:
    """Of a key and a route nothing is taken where either refuses, in whichever order they are."""
    full, other = world.accounts[::order]
    now = world.clock.now()
    full.resize(limits(requests="1/day"), now)
    full.requests[0].put(0, now)
    before = state(full, now), state(other, now)
    both = Combined(world.accounts, world.clock)
    for demand in demands:
        assert isinstance(both.admit(demand), Refusal)
        assert (state(full, now), state(other, now)) == before


# Time


@given(
    st.lists(LIMITS, min_size=2, max_size=2),
    steps(DEMANDS),
    st.lists(st.integers(0, 10**12), min_size=36, max_size=36),
    STARTS,
)
def test_a_clock_that_goes_back_stands_still(
    each: list[Limits], history: list[Step], back: list[int], start: int
) -> None:
    """Levels and decisions are those of a clock that stands still instead of going back."""
    still, moved = World(each, start), World(each, start)
    latest = start
    for step, ns in zip(history * 3, back, strict=False):
        latest += max(0, step.jump)
        still.time.ns = moved.time.ns = latest
        assert moved.state() == still.state()
        moved.time.ns = latest - ns
        assert moved.all.levels() == still.all.levels()
        if step.demand:
            one, two = still.admit(step.demand), moved.admit(step.demand)
            assert one == two if isinstance(one, Refusal) else isinstance(two, Reservation)
        elif still.open:
            for world in (still, moved):
                world.open.pop(step.which % len(world.open)).settle(step.actual)
        assert moved.state() == still.state()


@given(worlds(1))
def test_a_level_is_full_at_its_reset_and_not_before(world: World) -> None:
    """`reset` is the first nanosecond at which a bucket is full, a debt included."""
    now = world.clock.now()
    buckets = (*world.accounts[0].requests, *world.accounts[0].tokens)
    for bucket, told in zip(buckets, world.accounts[0].levels(now), strict=False):
        assert told.remaining == level(bucket, now) // 1
        assert level(bucket, now + told.reset) == told.capacity
        assert told.reset == 0 or level(bucket, now + told.reset - 1) < told.capacity


@given(worlds(1), LIMITS)
def test_a_reload_gives_nothing(world: World, new: Limits) -> None:
    """A window that goes on never has more than before, a debt stays; one that is new is full."""
    now, account = world.clock.now(), world.accounts[0]
    were = (account.requests, account.tokens)
    before = {bucket: level(bucket, now) for buckets in were for bucket in buckets}
    kept = {bucket: bucket.spec for bucket in before}
    account.resize(new, now)
    for olds, news in zip(were, (account.requests, account.tokens), strict=True):
        assert sum(bucket in before for bucket in news) == min(len(olds), len(news))
        for bucket in news:
            was, left = before.get(bucket), level(bucket, now)
            if was is None:
                assert left == bucket.capacity
                continue
            assert left <= min(was, Fraction(bucket.capacity))
            if was <= 0 or bucket.capacity >= kept[bucket].capacity:
                assert left // 1 == was // 1
            else:
                shrunk = was * bucket.capacity / kept[bucket].capacity
                assert 0 <= shrunk - left < Fraction(2, bucket.unit)
            seconds = bucket.spec.seconds
            alike = [b.spec.seconds for b in news].count(seconds)
            if alike <= [kept[b].seconds for b in olds].count(seconds):
                assert kept[bucket].seconds == seconds


@given(worlds(1), LIMITS, LIMITS, steps(DEMANDS))
def test_a_reload_under_way_leaves_nothing_behind(
    world: World, old: Limits, new: Limits, history: list[Step]
) -> None:
    """Requests that were admitted before reloads end after them, and no slot or promise stays."""
    for chosen in (new, old, new):
        world.accounts[0].resize(chosen, world.clock.now())
        world.all = Combined(world.accounts, world.clock)
        live(world, history)
    for held in world.open:
        held.settle(3)
    assert world.accounts[0].slots.held == 0
    for bucket in (*world.accounts[0].requests, *world.accounts[0].tokens):
        assert (bucket.exposed, bucket.far) == (0, 0)
        assert level(bucket, world.clock.now()) <= bucket.capacity


@given(LIMITS, steps(DEMANDS), STARTS, st.integers(0, 10**15))
def test_a_restart_is_time_that_passes(
    one: Limits, history: list[Step], start: int, elapsed: int
) -> None:
    """A restored level is the saved one and what came since: at most full, a millionth short."""
    world, now = live(World([one], start), history), 12345
    was, before, after = world.clock.now(), world.accounts[0], Account("key 'a'")
    after.restore(before.save(was), now - elapsed)
    after.resize(one, now)
    olds, news = (*before.requests, *before.tokens), (*after.requests, *after.tokens)
    for old, new in zip(olds, news, strict=True):
        aged = level(old, was) + Fraction(old.spec.amount, old.spec.seconds * SECOND) * elapsed
        assert new.spec == old.spec
        assert 0 <= min(aged, Fraction(old.capacity)) - level(new, now) < Fraction(1, 500_000)
