"""The soak in short: the daemon keeps nothing of what it has served, and a leak is seen."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import soak
from soak import Plan, main
from soak_load import PHASES

pytestmark = pytest.mark.timeout(300)  # on a machine that others use, too

# Of a leak only so much is served that there are some of what each fiftieth request leaks.
SHORT = Plan(decks=2, rounds=1, warm=6, patience=0.5)
KEPT = 200 + 33 + 16  # bytes: what is leaked of each request, as an object, in a block


def test_nothing_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    """After thousands of streams and hundreds of clients that left all is as it was before."""
    numbers = ["--streams", "2000", "--aborts", "200", "--rounds", "5", "--warm", "20"]
    code = main(numbers)
    said = capsys.readouterr().out
    assert "RED" not in said
    assert (code, said.splitlines()[-1].startswith("green: ")) == (0, True), said
    left = ", ".join(f"200 {phase}" for phase in PHASES)
    assert f"2000 streams; clients that left: {left}; " in said


def test_the_command_is_red(capsys: pytest.CaptureFixture[str]) -> None:
    """It says what leaks, and ends with 1."""
    numbers = ["--streams", "40", "--aborts", "4", "--rounds", "1", "--warm", "6"]
    assert main([*numbers, "--patience", "0.5", "--leak", "descriptor"]) == 1
    sentence, last = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r"RED: file descriptors: (\d+) at rest, after the warm-up (\d+)", sentence)
    assert last == "red"


async def test_a_leak_of_bytes_is_seen(tmp_path: Path) -> None:
    """200 bytes that are kept of each request show as what they are, and as nothing else.

    Beside other tests the process has a little more: its threads wait, and hold what they have.
    """
    report = await soak.soak(tmp_path, Plan(decks=3, rounds=4, warm=24, leak="bytes"))
    assert KEPT - 60 < report.growth < KEPT + 150
    assert report.found == [
        f"memory grows by {report.growth:.0f} bytes per request, at most 64 are allowed"
    ]


@pytest.mark.parametrize(
    ("leak", "told"),
    [
        ("task", ["tasks: "]),
        ("slot", ["slots of limits and upstreams: ", "tokens set aside: "]),
        ("series", ["series of metrics: "]),
        ("careless", ["its output says 'never awaited', ", "its output says 'unclosed', "]),
    ],
)
async def test_a_leak_is_seen(tmp_path: Path, leak: str, told: list[str]) -> None:
    """What each fiftieth request leaks is named, and nothing else is."""
    report = await soak.soak(tmp_path, replace(SHORT, leak=leak))
    assert len(report.found) == len(told), report.found
    for sentence, begins in zip(report.found, told, strict=True):
        assert sentence.startswith(begins)
