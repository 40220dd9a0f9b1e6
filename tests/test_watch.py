"""The deadlines of one request, on a clock of the test's own."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from aiproxy.watch import MIN_PROGRESS, Interrupted, Phase, Reason, Watch


class Timer:
    """A timer of `Clock`."""

    def __init__(self, due: float, act: Callable[[], None]) -> None:
        self.due = due
        self.act = act
        self.cancelled = False

    def cancel(self) -> None:
        """Never fire."""
        self.cancelled = True


class Clock:
    """Stands in for the loop: time passes only when the test says so."""

    def __init__(self) -> None:
        self.now = -1e7  # before the real loop's time, by which an interruption is due at once
        self.timers: list[Timer] = []
        self.armed = 0

    def time(self) -> float:
        """Return the time."""
        return self.now

    def call_at(self, due: float, act: Callable[[], None]) -> Timer:
        """Set a timer."""
        self.armed += 1
        self.timers.append(Timer(due, act))
        return self.timers[-1]

    def pass_until(self, now: float) -> None:
        """Let time pass, firing what is due, in order."""
        while due := sorted(
            (t for t in self.timers if not t.cancelled and t.due <= now), key=lambda t: t.due
        ):
            self.timers.remove(due[0])
            self.now = max(self.now, due[0].due)
            due[0].act()
        self.now = now

    def after(self, seconds: float) -> None:
        """Let this much time pass."""
        self.pass_until(self.now + seconds)


class Rig:
    """A watch around a task that waits until it is interrupted."""

    def __init__(self, total: float = 0.0) -> None:
        self.clock = Clock()
        self.unsent = 0
        self.watch = Watch(cast("Any", self.clock), total=total)
        self.entered = asyncio.Event()
        self.free = asyncio.Event()
        self.task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        async with self.watch:
            self.entered.set()
            await self.free.wait()

    async def outcome(self) -> Reason | None:
        """Why the task was interrupted; None when it goes on."""
        for _ in range(5):
            await asyncio.sleep(0)
        if not self.task.done():
            return None
        error = self.task.exception()
        assert isinstance(error, Interrupted)
        return error.reason

    async def finish(self) -> None:
        """Let the task end by itself."""
        self.free.set()
        await asyncio.wait_for(self.task, 1)


async def rig(total: float = 0.0) -> Rig:
    """Begin a watch."""
    made = Rig(total)
    await made.entered.wait()
    return made


PHASES: list[Phase] = ["client_body", "connect", "first_byte", "idle", "tail"]


@pytest.mark.parametrize("phase", PHASES)
async def test_a_phase_has_its_limit(phase: Phase) -> None:
    """Without activity a phase is interrupted at its limit, not before, and the reason is named."""
    r = await rig()
    r.watch.enter(phase, 5)
    r.clock.after(4.9)
    assert await r.outcome() is None
    r.clock.after(0.1)
    assert await r.outcome() == phase
    assert r.watch.reason == phase


@pytest.mark.parametrize("phase", PHASES)
async def test_zero_is_no_bound(phase: Phase) -> None:
    """A limit of 0 never interrupts."""
    r = await rig()
    r.watch.enter(phase, 0)
    r.clock.after(1e6)
    assert await r.outcome() is None
    await r.finish()


async def test_activity_puts_the_limit_off() -> None:
    """Each touch begins the phase's silence anew, at no cost in timers."""
    r = await rig()
    r.watch.enter("idle", 5)
    for _ in range(10):
        r.clock.after(4)
        r.watch.touch()
    assert await r.outcome() is None
    assert r.clock.armed <= 12
    r.clock.after(4.9)
    assert await r.outcome() is None
    r.clock.after(0.1)
    assert await r.outcome() == "idle"


async def test_touches_move_no_timer() -> None:
    """A stream of a thousand chunks sets no timer for each."""
    r = await rig()
    r.watch.enter("idle", 5)
    armed = r.clock.armed
    for _ in range(1000):
        r.clock.now += 0.001
        r.watch.touch()
        r.watch.sent()
    assert r.clock.armed == armed
    await r.finish()


@pytest.mark.parametrize(("first", "second"), [(100, 5), (5, 100), (0, 5), (5, 5)])
async def test_another_phase_has_its_own_limit(first: float, second: float) -> None:
    """A shorter limit is not seen late, a longer one not early (traps, 42a)."""
    r = await rig()
    r.watch.enter("first_byte", first)
    r.clock.after(4)
    r.watch.enter("idle", second)
    r.clock.after(second - 0.1)
    assert await r.outcome() is None
    r.clock.after(0.1)
    assert await r.outcome() == "idle"


async def test_a_phase_left_in_time_never_interrupts() -> None:
    """Nothing of a phase that was left remains."""
    r = await rig()
    r.watch.enter("client_body", 5)
    r.clock.after(4)
    r.watch.enter("none", 0)
    r.clock.after(1e6)
    assert await r.outcome() is None
    await r.finish()


async def test_a_phase_after_an_unbounded_one() -> None:
    """A limit that comes after none at all is kept too."""
    r = await rig()
    r.watch.enter("idle", 0)
    r.clock.after(1e6)
    r.watch.enter("tail", 1)
    r.clock.after(1)
    assert await r.outcome() == "tail"


async def test_total_spans_all_phases() -> None:
    """Neither activity nor another phase puts the total off."""
    r = await rig(total=10)
    for _ in range(9):
        r.watch.enter("idle", 5)
        r.clock.after(1)
        r.watch.touch()
    assert await r.outcome() is None
    r.clock.after(1)
    assert await r.outcome() == "total"


async def test_the_earlier_of_two_deadlines_counts() -> None:
    """A phase within a longer total is interrupted for its own reason."""
    r = await rig(total=10)
    r.watch.enter("connect", 5)
    r.clock.after(20)
    assert await r.outcome() == "connect"


# Heartbeats


async def beating(every: float) -> tuple[Rig, list[float]]:
    """A watch with a heartbeat, and when it beat, counted from the start."""
    r = await rig()
    beats: list[float] = []
    start = r.clock.now
    r.watch.heartbeat(every, lambda: beats.append(round(r.clock.now - start, 3)))
    return r, beats


async def test_a_heartbeat_after_each_silence() -> None:
    """It beats after each silence of that length, for as long as it lasts."""
    r, beats = await beating(15)
    r.clock.after(46)
    assert beats == [15, 30, 45]
    await r.finish()


async def test_what_was_sent_puts_a_heartbeat_off() -> None:
    """Silence is measured from what went to the client, not from what came from the upstream."""
    r, beats = await beating(15)
    r.clock.after(10)
    r.watch.sent()
    r.clock.after(10)
    r.watch.touch()
    r.clock.after(10)
    assert beats == [25]
    await r.finish()


async def test_no_heartbeat() -> None:
    """0 is never, not always."""
    r, beats = await beating(0)
    r.clock.after(1000)
    assert beats == []
    await r.finish()


async def test_a_heartbeat_is_no_activity() -> None:
    """A beat does not put the deadline of a silent upstream off."""
    r, beats = await beating(2)
    r.watch.enter("idle", 5)
    r.clock.after(5)
    assert beats == [2, 4]
    assert await r.outcome() == "idle"


async def test_heartbeats_go_on_through_phases() -> None:
    """Another phase neither stops nor delays the heartbeat."""
    r, beats = await beating(2)
    for phase in PHASES:
        r.watch.enter(phase, 100)
        r.clock.after(1)
    assert beats == [2, 4]
    await r.finish()


async def test_no_heartbeat_after_the_end() -> None:
    """Nothing fires once the work is done."""
    r, beats = await beating(2)
    r.watch.enter("idle", 3)
    await r.finish()
    r.clock.after(100)
    assert beats == []
    assert all(timer.cancelled for timer in r.clock.timers)
    assert (r.watch._beat, r.watch._scope) == (None, None)  # else a cycle to collect per request


# A slow client


@pytest.mark.parametrize(
    ("taken", "cut"),
    [(0, True), (MIN_PROGRESS - 1, True), (MIN_PROGRESS, False), (10 * MIN_PROGRESS, False)],
)
async def test_a_client_must_take_a_kibibyte(taken: int, cut: bool) -> None:  # noqa: FBT001
    """Less than 1 KiB in `client_write` while data waits cuts the client; more lets it live."""
    r = await rig()
    r.unsent = 100 * MIN_PROGRESS
    r.watch.enter("client_write", 60, lambda: r.unsent)
    r.unsent -= taken
    r.clock.after(60)
    assert await r.outcome() == ("client_write" if cut else None)
    if not cut:
        r.unsent -= MIN_PROGRESS - 1
        r.clock.after(60)
        assert await r.outcome() == "client_write"


@pytest.mark.parametrize("phase", ["client_write", "first_byte"])
async def test_who_keeps_moving_is_kept(phase: Phase) -> None:
    """Progress is measured anew in each period: a slow client or upload lives while it moves."""
    r = await rig()
    r.unsent = 100 * MIN_PROGRESS
    r.watch.enter(phase, 60, lambda: r.unsent)
    for _ in range(20):
        r.unsent -= MIN_PROGRESS
        r.clock.after(60)
    assert await r.outcome() is None
    r.watch.enter("first_byte", 60)  # all is sent: only an answer is a sign of life
    r.unsent -= MIN_PROGRESS
    r.clock.after(60)
    assert await r.outcome() == "first_byte"


# Interruption and cancellation


@pytest.mark.parametrize("reason", ["shutting_down", "ended_at_once"])
async def test_an_interruption_from_outside(reason: Reason) -> None:
    """The drain interrupts with its own reason."""
    r = await rig()
    r.watch.interrupt(reason)
    assert await r.outcome() == reason


async def test_the_first_reason_stands() -> None:
    """What comes after an interruption does not rename it."""
    r = await rig(total=10)
    r.watch.enter("idle", 5)
    r.clock.after(5)
    r.watch.interrupt("shutting_down")
    r.clock.after(100)
    assert await r.outcome() == "idle"
    assert r.watch.reason == "idle"


async def test_a_cancellation_stays_one() -> None:
    """A cancellation from elsewhere (the client left) is no interruption."""
    r = await rig(total=10)
    r.watch.enter("idle", 5)
    r.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await r.task
    assert r.watch.reason is None
    assert all(timer.cancelled for timer in r.clock.timers)


async def test_an_error_of_the_work_stays() -> None:
    """What the work raises comes out as it is, a TimeoutError too."""
    watch = Watch(asyncio.get_running_loop(), total=0)
    for error in (ValueError("x"), TimeoutError("y"), ConnectionResetError("z")):
        with pytest.raises(type(error), match=str(error)):
            async with Watch(asyncio.get_running_loop(), total=9):
                raise error
    async with watch:
        pass


async def test_a_task_may_clean_up_before_it_is_told() -> None:
    """The interruption passes through `finally` blocks that await."""
    clean = asyncio.Event()

    async def work(watch: Watch) -> None:
        async with watch:
            watch.enter("idle", 0.01)
            try:
                await asyncio.sleep(5)
            finally:
                await asyncio.sleep(0)
                clean.set()

    with pytest.raises(Interrupted, match="idle"):
        await work(Watch(asyncio.get_running_loop(), total=0))
    assert clean.is_set()


async def test_on_the_real_loop() -> None:
    """With the loop that the daemon runs on, beats and the deadline come in order."""
    beats: list[int] = []
    watch = Watch(asyncio.get_running_loop(), total=0)

    async def work() -> None:
        async with watch:
            watch.heartbeat(0.01, lambda: beats.append(1))
            watch.enter("first_byte", 0.1)
            await asyncio.sleep(5)

    with pytest.raises(Interrupted, match="first_byte"):
        await work()
    assert beats
