"""kill -9 loses nothing that a client saw complete; the long form is the command `crash.py`."""

from pathlib import Path

import pytest

from client import RawClient
from crash import Daemon, Seen, ask, goes_on, is_there, lost_of, main, running_upstream, series
from sessions_rig import UNKNOWN


async def test_f26_kill_9_loses_nothing(tmp_path: Path) -> None:
    """Every id seen complete before one of two kills is there after it, with its whole past."""
    report = await series(tmp_path, rounds=2, ids=200, connections=16, seed=26)
    assert report.rounds == 2
    assert report.seen >= 400
    assert report.lost == []
    assert report.integrity == "ok"


async def test_what_is_not_there_is_reported(tmp_path: Path) -> None:
    """An id that never was, another text and a shorter past are each found, and nothing else."""
    async with running_upstream() as upstream, Daemon(tmp_path, upstream, "memory:") as daemon:
        await daemon.start()
        seen: list[Seen] = []
        async with await RawClient.connect(daemon.port) as client:
            for streams in (False, True, True, False):
                one, _ = await ask(client, seen[-1] if seen else None, streams=streams)
                assert one is not None
                seen.append(one)
        for holds in (is_there, goes_on):
            assert await lost_of(daemon.port, seen, holds) == set()
        changed, cut = seen[1]._replace(text="another"), seen[2]._replace(turns=4)
        asked = [seen[0], changed, cut, seen[3], Seen(UNKNOWN, "never was", 1)]
        assert await lost_of(daemon.port, asked, is_there) == {changed.id, UNKNOWN}
        assert await lost_of(daemon.port, asked, goes_on) == {cut.id, UNKNOWN}


@pytest.mark.parametrize(("store", "code"), [([], 0), (["--store", "memory:"], 1)])
def test_the_command(capsys: pytest.CaptureFixture[str], store: list[str], code: int) -> None:
    """It ends with 0 where all is kept and with 1 where it is not, and prints what was lost."""
    numbers = ["--rounds", "1", "--ids", "40", "--connections", "4", "--seed", "1"]
    assert main([*numbers, *store]) == code
    out = capsys.readouterr().out
    assert out.startswith("seed 1\n1 rounds, ")
    assert (", 0 lost, " in out) is not bool(store)
    assert ("lost: resp_" in out) is bool(store)
    assert out.endswith("; integrity: ok\n" if not store else "; integrity: not a file\n")
