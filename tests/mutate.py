"""Mutation run: break the product in small ways, one at a time, and see whether tests notice.

    python tests/mutate.py [--sample N] [--seed S] [--only FILE] [--work DIR] [--again]

It records once which test reaches which line, then runs for each mutant tests that reach it: one
of each test function, those that are most about the module first, until one fails or `--budget`
seconds of them have passed. What hangs is caught. It all happens in a copy of the tree. With
`--work` the copy stays, and so do record and verdicts: then only changed test files are recorded
anew, and only new mutants are judged; with `--again` also those that survived, say by more tests.

Why not a tool: mutmut passes over decorated functions and deletes no statements, and cosmic-ray
runs the same tests for every mutant, which are minutes here.
"""

import argparse
import hashlib
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from mutants import Mutant, Place, mutants

ROOT = Path(__file__).resolve().parent.parent
TREE = ("aiproxy", "tests", "etc", "systemd", "setup.cfg", "pyproject.toml", "README.md")
AREAS = {
    "limits": "limits/*.py stores/memory.py",
    "sessions": (
        "sessions/*.py stores/memory_*.py stores/sqlite*.py session_gate.py conversation.py"
    ),
    "relay": "relay.py reply.py watch.py",
    "upstream": "upstream*.py attempts.py breaker.py standing.py",
}
# In the names of test files that have something to say about these.
WORDS = """answers attempts body breaker connections count_tokens ends envelope errors faults gaps
hostile invariants leftovers limits metrics reload reply requests routing session store streams
upstream usage_counted watch""".split()  # noqa: SIM905 - a list of words
NOT = re.compile("bridge(?!_chat_ends)|sdk|json")  # these are about what a body says
# Imported once, not for every mutant.
LIBRARIES = """aiohttp.web anthropic blockbuster hypothesis jsonschema openai prometheus_client
pydantic pytest structlog uvloop yaml"""
OPTIONS = ["-q", "-pno:cacheprovider", "--assert=plain"]


def say(text: str) -> None:
    """Tell whoever runs it."""
    print(text, flush=True)  # noqa: T201 - a program for a terminal


def in_child(work: Path, run: Callable[[], int], seconds: float) -> int | None:
    """Run this in the copy; its result, or None if it took too long. Nothing of it stays."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(work)
        sys.path[:0] = [str(work), str(work / "tests")]
        os.environ["PYTHONPATH"] = str(work)
        quiet = os.open(work / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(run())
    ends = time.monotonic() + seconds
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < ends:
        time.sleep(0.02)
    try:
        os.killpg(child, signal.SIGKILL)  # daemons that its tests have started, too
    except ProcessLookupError:
        pass
    if ended[0] == 0:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(ended[1])


def recorded(tests: str, out: Path) -> int:
    """Run tests, and write how long each takes and what it reaches."""
    import coverage  # noqa: PLC0415 - before the product, and only here
    import pytest  # noqa: PLC0415

    product = Path.cwd() / "aiproxy"
    files = [str(product / glob) for globs in AREAS.values() for glob in globs.split()]
    made = coverage.Coverage(data_file=None, include=files, config_file=False)
    seconds: dict[str, float] = {}

    class Switch:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
            made.switch_context(item.nodeid)
            begun = time.monotonic()
            yield
            seconds[item.nodeid] = time.monotonic() - begun
            made.switch_context("")

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                failed.add(report.nodeid)

    failed: set[str] = set()
    made.start()
    pytest.main([*OPTIONS, tests], plugins=[Switch()])
    made.stop()
    data = made.get_data()
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for file in data.measured_files():
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in contexts:
                found[context][str(Path(file).relative_to(product))].append(line)
    out.write_text(json.dumps({t: (s, found[t]) for t, s in seconds.items() if t not in failed}))
    return 0


class Record:
    """Which test reaches which line, and how long it takes."""

    def __init__(self, work: Path) -> None:
        path = work / "record.json"
        sources = b"".join(p.read_bytes() for p in sorted((work / "aiproxy").rglob("*.py")))
        product = hashlib.sha256(sources).hexdigest()
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        files = known["files"] if known.get("product") == product else {}
        self._reaching: dict[Place, list[str]] = defaultdict(list)
        self._seconds: dict[str, float] = {}
        self._about: dict[str, Counter[str]] = {}  # by module: how much each test is about it
        for tests in sorted((work / "tests").glob("test_*.py")):
            if NOT.search(tests.name) or not any(word in tests.name for word in WORDS):
                continue
            digest = hashlib.sha256(tests.read_bytes()).hexdigest()
            if files.get(tests.name, {}).get("digest") != digest:
                out = work / "recorded.json"
                in_child(work, partial(recorded, f"tests/{tests.name}", out), 1200)
                files[tests.name] = {"digest": digest, "tests": json.loads(out.read_text())}
                out.unlink()
                path.write_text(json.dumps({"product": product, "files": files}))
            found = files[tests.name]["tests"]
            say(f"{tests.name}: {len(found)} tests, {sum(s for s, _ in found.values()):.1f} s")
            for test, (seconds, reached) in found.items():
                self._seconds[test] = seconds
                for file, lines in reached.items():
                    for line in lines:
                        self._reaching[file, line].append(test)

    def chosen(self, mutant: Mutant, budget: float) -> list[str]:
        """Tests for a mutant, best first: one of each function, then the next of each.

        The best are fast, and reach lines of its module that few others do.
        """
        if mutant.file not in self._about:
            about = self._about[mutant.file] = Counter[str]()
            for (file, _), tests in self._reaching.items():
                if file == mutant.file and tests:
                    about.update(dict.fromkeys(tests, 1 / len(tests)))
        about = self._about[mutant.file]
        found = {test for place in mutant.places for test in self._reaching[place]}
        functions: dict[str, list[str]] = defaultdict(list)
        for test in found or about:  # its name may be used by modules that are not judged alone
            functions[test.split("[")[0]].append(test)

        named = {word.rstrip("s") for word in re.split(r"[/_.]", mutant.file)} - {"py"}

        def cost(test: str) -> float:
            ours = sum(word in test.partition("::")[0] for word in named)
            worth = about[test] * (1 + 4 * ours)
            return (self._seconds[test] + 0.03) / worth if worth else math.inf

        columns = [sorted(tests, key=cost) for tests in functions.values()]
        columns.sort(key=lambda tests: cost(tests[0]))
        chosen: list[str] = []
        total = 0.0
        for test in filter(None, chain.from_iterable(zip_longest(*columns))):
            total += self._seconds[test]
            if chosen and (total > budget or len(chosen) > 20 * budget):
                break
            chosen.append(test)
        return chosen

    def judge(self, work: Path, mutant: Mutant, budget: float) -> str:
        """Whether any test notices: `caught`, `hangs`, `survived` or `untested`."""
        tests = self.chosen(mutant, budget)
        if not tests:
            return "untested"
        path = work / "aiproxy" / mutant.file
        whole = path.read_bytes()
        path.write_bytes(mutant.source)
        try:
            for some in filter(None, (tests[:9], tests[9:])):  # most need few, of few files
                code = in_child(work, partial(run, some), 30 + 4 * budget)
                if code != 0:
                    return "hangs" if code is None else "caught"
        finally:
            path.write_bytes(whole)
        return "survived"


def run(tests: list[str]) -> int:
    """Run these tests up to the first that fails."""
    import pytest  # noqa: PLC0415 - in the child only

    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    return int(pytest.main([*OPTIONS, "-x", "--timeout=20", *tests]))


def sampled(sources: dict[str, bytes], only: str, count: int, seed: int) -> list[Mutant]:
    """So many mutants, evenly of the modules; 0: all."""

    def using(name: str) -> Iterator[Place]:
        for file, source in sources.items():
            for number, line in enumerate(source.decode().splitlines(), 1):
                if re.search(rf"\b{name}\b", line):
                    yield file, number

    columns = []
    for file, source in sources.items():
        if only not in file:
            continue
        made = list(mutants(file, source, using))
        random.Random(f"{seed} {file}").shuffle(made)  # noqa: S311 - a sample
        columns.append(made)
        say(f"{file}: {len(made)} mutants")
    return list(filter(None, chain.from_iterable(zip_longest(*columns))))[: count or None]


def main() -> int:
    """Run it; 0 if at least nine tenths are caught in each area."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, default=0, help="how many mutants; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="modules whose path has this in it")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of tests per mutant")
    parser.add_argument("--work", type=Path, help="a directory for the copy, which then stays")
    parser.add_argument("--again", action="store_true", help="judge the survivors again")
    parser.add_argument("--control", action="store_true", help="first judge unchanged modules")
    args = parser.parse_args()
    work = (args.work or Path(tempfile.mkdtemp(prefix="mutate-"))).resolve()
    ignored = shutil.ignore_patterns("__pycache__", "node", "real", ".*")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, work / name, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, work / name)
    for name in LIBRARIES.split():
        importlib.import_module(name)
    product = work / "aiproxy"
    areas = {
        str(path.relative_to(product)): area
        for area, globs in AREAS.items()
        for glob in globs.split()
        for path in sorted(product.glob(glob))
    }
    kept = work / "verdicts.json"
    verdicts: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    record = Record(work)
    sources = {file: (product / file).read_bytes() for file in areas}
    sample = sampled(sources, args.only, args.sample, args.seed)
    for file in {mutant.file for mutant in sample} if args.control else ():
        lines = range(1, sources[file].count(b"\n") + 1)
        places = frozenset((file, line) for line in lines)
        unchanged = Mutant(file, 0, "unchanged", sources[file], places)
        say(f"{record.judge(work, unchanged, args.budget):8} {unchanged.name}")
    for mutant in sample:
        verdict = verdicts.get(mutant.name)
        if verdict is None or (args.again and verdict in ("survived", "untested")):
            begun = time.monotonic()
            verdict = verdicts[mutant.name] = record.judge(work, mutant, args.budget)
            say(f"{verdict:8} {time.monotonic() - begun:5.1f} s  {mutant.name}")
            kept.write_text(json.dumps(verdicts, indent=1))
    if not args.work:
        shutil.rmtree(work)
    return told(areas, [(mutant, verdicts[mutant.name]) for mutant in sample])


def told(areas: dict[str, str], judged: list[tuple[Mutant, str]]) -> int:
    """Print the survivors, and how many of each module and area were caught."""
    made, caught = Counter[str](), Counter[str]()
    for mutant, verdict in judged:
        names = [f"{areas[mutant.file]:9} {mutant.file}", areas[mutant.file]]
        made.update(names)
        caught.update(names if verdict in ("caught", "hangs") else [])
        if verdict in ("survived", "untested"):
            say(f"{verdict}: {mutant.name}")
    for name in sorted(made):
        say(f"{name:40} {caught[name]:4} of {made[name]:4}  {caught[name] / made[name]:6.1%}")
    return int(any(caught[area] < 0.9 * made[area] for area in AREAS))


if __name__ == "__main__":
    sys.exit(main())
