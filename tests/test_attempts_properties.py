"""For any failures: who may have acted is the last to be asked, unless the route allows more."""

from collections.abc import Callable, Sequence

import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from steps import Step
from targets_rig import LIFECYCLE, Rig, failed_events, frames, healthy, refusal, targets
from upstream import Finish, Garbage, Reset, Stall

Made = Callable[[bool], Sequence[Step]]

SAFE: dict[str, Made] = {
    "429": lambda _: refusal(429, ("retry-after", "0")),
    "503": lambda _: refusal(503),
    "529": lambda _: refusal(529),
}
ACTED: dict[str, Made] = {
    "ok": lambda streamed: healthy("responses", streamed=streamed, text="well"),
    "400": lambda _: refusal(400),
    "401": lambda _: refusal(401),
    "500": lambda _: refusal(500),
    "502": lambda _: refusal(502),
    "reset": lambda _: [Reset()],
    "closed": lambda _: [Finish()],
    "silent": lambda _: [Stall()],
    "garbage": lambda _: [Garbage(64), Finish()],
    "cut": lambda _: frames(*LIFECYCLE, end=Reset()),
}
UNSAFE = {"reset", "closed", "silent"}  # after these `retry_unsafe` allows another attempt
ALL: dict[str, Made] = SAFE | ACTED | {"declared": lambda _: frames(*failed_events())}

scripts = st.lists(st.sampled_from(sorted(ALL)), max_size=3)


async def play(
    plans: Sequence[Sequence[str]], retries: int, *, streamed: bool, unsafe: bool
) -> None:
    """Ask once; each target fails as its plan says, and then answers well."""
    names = "abc"[: len(plans)]
    times = {"first_byte": "60ms", "idle": "60ms"}
    route = {"retry_unsafe": unsafe}
    async with targets(names, retries=retries, timeouts=times, route=route) as rig:
        for name, plan in zip(names, plans, strict=True):
            for kind in plan:
                rig[name].script(ALL[kind](streamed))
        seen = await rig.ask(streamed=streamed)
        done = played(rig, names, plans)
        assert seen.line["attempts"] == len(done) == sum((await rig.attempts()).values())
        assert 1 <= len(done) <= 1 + retries
        acted = [kind for kind in done if may_have_acted(kind, streamed=streamed)]
        if unsafe:
            acted = [kind for kind in acted if kind not in UNSAFE]
        assert len(acted) <= 1, done
        if len(done) <= retries:  # it ended before its retries did: somebody may have acted
            assert acted, done
        await rig.check(
            stream=seen.body if streamed and seen.answer.status == 200 else None,
            completed=acted == ["ok"],
        )


def played(rig: Rig, names: str, plans: Sequence[Sequence[str]]) -> list[str]:
    """Return how each attempt went, target by target."""
    return [
        [*plan, *["ok"] * 11][turn]
        for name, plan in zip(names, plans, strict=True)
        for turn in range(len(rig[name].requests))
    ]


def may_have_acted(kind: str, *, streamed: bool) -> bool:
    """Tell whether an upstream that behaves so may have acted."""
    if kind == "declared":
        return not streamed  # as a JSON answer that is no JSON, it is not declared
    return kind in ACTED


@settings(max_examples=30)
@given(st.lists(scripts, min_size=2, max_size=3), st.integers(0, 3), st.booleans(), st.booleans())
def test_at_most_one_upstream_that_may_have_acted(
    plans: list[list[str]],
    retries: int,
    streamed: bool,  # noqa: FBT001
    unsafe: bool,  # noqa: FBT001
) -> None:
    """A POST goes on only from those that cannot have acted, or where the route allows it."""
    uvloop.run(play(plans, retries, streamed=streamed, unsafe=unsafe))
