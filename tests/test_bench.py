"""The benchmark of the relay works. How fast anything is, no test says."""

import asyncio
import re
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

RELAY = Path(__file__).resolve().parent / "bench" / "relay.py"


@pytest.mark.timeout(180)
async def test_a_short_round() -> None:
    """Every relay answers every request in full, and has a line with what that cost."""
    command = (sys.executable, str(RELAY), "--short")
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    async with asyncio.timeout(150):
        out, err = (part.decode() for part in await process.communicate())
    assert (process.returncode, err) == (0, "")
    rows = re.findall(r"^(\S.*?) +([\d.]+) +([\d.]+)(?: +[\d.]+ and [\d.]+)+$", out, re.MULTILINE)
    assert [name for name, *_ in rows if name != "nginx"] == ["aiohttp, 20 lines", "aiproxy"]
    assert all(float(cost) > 0 for _, *costs in rows for cost in costs)


@pytest.mark.timeout(180)
async def test_a_short_round_of_tracing() -> None:
    """Each daemon answers all requests, and the collector takes the spans of those that trace."""
    command = (
        sys.executable,
        str(RELAY.with_name("tracing.py")),
        "--rounds",
        "1",
        "--seconds",
        "0.3",
    )
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    async with asyncio.timeout(150):
        out, err = (part.decode() for part in await process.communicate())
    assert (process.returncode, err) == (0, "")
    assert len(re.findall(r"^(?:question|agent), (?:off|on|with content) ", out, re.MULTILINE)) == 6
    spans = re.findall(r"^spans, (.+): (\d+) exported$", out, re.MULTILINE)  # none failed
    assert [name for name, _ in spans] == ["on", "with content"]
    assert all(int(exported) > 0 for _, exported in spans)
