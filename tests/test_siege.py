"""The program that measures how others fare under attack; its long form is `siege.py` itself."""

from pathlib import Path
from typing import Any

import pytest

import siege
from child_rig import child
from siege import Numbers, Report, main
from upstream import ScriptedUpstream

SMALL = Numbers(clients=10, rate=30.0, seconds=1.2, rounds=1, slow=40, bombs=1, unpacked=40)


@pytest.mark.timeout(120)  # three processes
async def test_others_are_served_under_attack(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    """While slow sockets are closed in time and bombs are 413, all others get their answers."""
    bounds: Any = {"timeouts": {"client_header": "500ms", "client_body": "500ms"}}
    async with child(upstream, tmp_path, **bounds) as daemon:
        rest = daemon.descriptors()
        report = await siege.siege(daemon, SMALL)
        assert report.right, report
        assert min(report.attack.bombs["413"], report.attack.slow["closed"]) > 0
        assert report.attack.slow["408"] > 0
        assert len(report.attacked[0]) > 10
        await daemon.check(rest)


@pytest.mark.parametrize(("times", "code"), [(1.9, 0), (2.1, 1)])
def test_the_command(monkeypatch: pytest.MonkeyPatch, times: float, code: int) -> None:
    """It ends with 1 where others wait more than twice as long."""

    async def run(numbers: Numbers) -> Report:
        assert (numbers.clients, numbers.slow) == (200, 1000)
        report = Report([[0.001] * 100], [[0.001 * times] * 100])
        report.statuses[200] += 200
        return report

    monkeypatch.setattr(siege, "run", run)
    assert main([]) == code


def test_a_wrong_answer_is_none_too_late() -> None:
    """Whoever is refused that should not be, or served, is seen."""
    refused, served = Report([[0.001]], [[0.001]]), Report([[0.001]], [[0.001]])
    for report in (refused, served):
        report.statuses[200] += 1
        assert report.right
    refused.statuses[503] += 1
    served.attack.bombs["200"] += 1
    assert [report.right for report in (refused, served)] == [False, False]
