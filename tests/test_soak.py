"""The soak in its short form: nothing is left behind, and what is would be seen."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import soak
from soaked import LEAKS

SOAK = Path(__file__).resolve().parent / "soak.py"


def test_the_slope_of_a_line() -> None:
    """Least squares: exact on a line, and the middle of what lies around one."""
    assert soak.slope([0, 10, 20], [5, 25, 45]) == 2.0
    assert soak.slope([0, 1, 2, 3], [0, 2, 1, 3]) == pytest.approx(0.8)


@pytest.mark.parametrize("line", ["coroutine 'x' was never awaited", "ResourceWarning: unclosed <"])
def test_what_no_daemon_should_say(line: str) -> None:
    """Python's complaints of what was left are found among the log's lines."""
    assert soak.complaints(f'{{"event": "request"}}\n<4>{line}\n') == [f"<4>{line}"]
    assert soak.complaints('{"event": "request"}\n') == []


def soaked(*arguments: str) -> tuple[int, list[str]]:
    """Run the command; return its exit code, and what it says at its end."""
    command = [sys.executable, str(SOAK), *arguments]
    done = subprocess.run(  # noqa: S603 - its arguments are of this test
        command, check=False, capture_output=True, text=True, timeout=280
    )
    assert done.stderr == ""
    growth, *sentences = done.stdout[done.stdout.index("memory: ") :].splitlines()
    assert " bytes per request (at most 64)" in growth
    return done.returncode, sentences


@pytest.mark.timeout(300)
def test_nothing_is_left_behind() -> None:
    """Requests of every kind, and clients that leave in every phase, leave all as it was."""
    assert soaked("--streams", "900", "--aborts", "40") == (0, ["nothing has grown"])


@pytest.mark.timeout(300)
def test_bytes_that_are_kept_are_seen() -> None:
    """A few hundred bytes of each request show in the slope, and nothing else is named."""
    code, sentences = soaked("--streams", "280", "--aborts", "4", "--leak", "bytes")
    assert code == 1
    assert [re.sub(r"\d+", "N", sentence) for sentence in sentences] == [
        "memory grows by N bytes per request"
    ]


@pytest.mark.timeout(300)
def test_what_is_kept_now_and_then_is_seen() -> None:
    """Each thing that a request in fifty leaves behind is named."""
    seeded = ["descriptor", "task", "slot", "series"]
    assert {"bytes", *seeded} == set(LEAKS)
    options = [option for leak in seeded for option in ("--leak", leak)]
    code, sentences = soaked("--streams", "280", "--aborts", "4", *options)
    assert code == 1
    named = {sentence.partition(":")[0] for sentence in sentences}
    assert {"descriptors", "tasks", "slots", "series"} <= named
