"""README.md: a stranger can follow it, and what it shows and names is so."""

import asyncio
import os
import re
import sys
import tomllib
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import yaml

import stranger
from aiproxy.config import ConfigError, loads
from readme import README, ROOT, Block, ReadmeError, blocks, completed, follow
from rig import Proxy
from stranger import Stranger
from upstream import ScriptedUpstream

Serve = Callable[..., Awaitable[Proxy]]

TEXT = README.read_text()
BLOCKS = blocks(TEXT)
TESTS = ROOT / "tests"
ACCOUNTS = {"OPENAI_API_KEY": "one", "ANTHROPIC_API_KEY": "another"}


def of(kind: str) -> list[object]:
    """Return the blocks of a kind as parameters, each named by its line."""
    return [pytest.param(one, id=f"line {one.line}") for one in BLOCKS if one.kind == kind]


def in_language(language: str) -> list[Block]:
    """Return the blocks in a language."""
    return [block for block in BLOCKS if block.language == language]


# Its blocks


@pytest.mark.timeout(180)
def test_a_stranger_can_follow_it(tmp_path: Path) -> None:
    """Its commands, typed from top to bottom, succeed and say what it shows."""
    with Stranger(ROOT, tmp_path, fresh=False) as reader:
        done = [block.kind for block, _ in follow(reader, BLOCKS)]
    assert done.count("terminal") == 2
    assert done.count("output") >= 4


@pytest.mark.parametrize("block", of("configuration"))
def test_parts_of_a_configuration(block: Block) -> None:
    """What it shows of a configuration is one, as soon as the rest is there."""
    loads(completed(block.text), path=README, environ=ACCOUNTS)


async def _run(program: str, environ: dict[str, str]) -> tuple[int | None, str]:
    command = (sys.executable, "-W", "error", "-c", program)
    process = await asyncio.create_subprocess_exec(*command, env=environ, stdout=PIPE, stderr=PIPE)
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    return process.returncode, f"{out.decode()}{err.decode()}"


@pytest.mark.parametrize("block", of("scripted"))
async def test_programs(block: Block, serve: Serve, upstream: ScriptedUpstream) -> None:
    """A program that it shows runs as it is against a model server that speaks the API."""
    proxy = await serve(routes=[{"model": "*", "upstreams": ["scripted"]}])
    program = block.text.replace("http://127.0.0.1:8080", proxy.url.removesuffix("/v1"))
    assert program != block.text
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    code, said = await _run(program, {**kept, "AIPROXY_KEY": proxy.key})
    assert code == 0, said
    assert upstream.requests


def test_programs_and_files_are_of_their_language() -> None:
    """Python compiles, YAML parses, and TOML is what Codex reads."""
    for block in in_language("yaml"):
        assert isinstance(yaml.safe_load(block.text), dict), block.line
    for block in in_language("python"):
        compile(block.text, f"README.md:{block.line}", "exec")
    (codex,) = (tomllib.loads(block.text) for block in in_language("toml"))
    provider = codex["model_providers"][codex["model_provider"]]
    assert provider["wire_api"] == "responses"
    assert {"name", "base_url", "env_key"} <= provider.keys()


async def test_commands_that_are_not_run_parse() -> None:
    """A command that needs root or an account is at least one for a shell."""
    for block in in_language("sh"):
        command = ("bash", "-n", "-c", block.text)
        process = await asyncio.create_subprocess_exec(*command, stderr=PIPE)
        _, err = await process.communicate()
        assert (process.returncode, err) == (0, b""), block.line


# What it names


def test_tests_that_it_names_are_there() -> None:
    """Each promise names tests, and each of these is in its file."""
    table = TEXT.partition("| promise | shown by")[2].partition("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            assert re.search(
                rf"^(async )?def {name}\(", (TESTS / file).read_text(), re.MULTILINE
            ), name


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    plain = re.sub(r"[^\w\- ]", "", heading.lower())
    return plain.replace(" ", "-")


def test_links_lead_somewhere() -> None:
    """A link to a heading has one, and a link to a file has it."""
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    anchors = [_anchor(heading) for heading in headings]
    assert len(set(anchors)) == len(anchors), "two headings have the same anchor"
    links = re.findall(r"\]\(([^)]+)\)", prose)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link.partition("#")[0]).exists(), link


def test_files_that_it_names_are_there() -> None:
    """A path in the source that it names is one."""
    named = set(re.findall(r"`((?:tests|etc|systemd|aiproxy|man)/[\w./@-]+)`", TEXT))
    assert len(named) > 20
    for path in named:
        assert (ROOT / path).exists(), path


async def test_it_names_every_metric(serve: Serve) -> None:
    """Each metric that the daemon has is in README, by the name that is scraped."""
    scraped = (await (await serve()).admin("/metrics")).body.decode()
    metrics = re.findall(r"^# TYPE (aiproxy_\w+) ", scraped, re.MULTILINE)
    assert len(metrics) > 15
    assert [metric for metric in metrics if f"`{metric}`" not in TEXT] == []


def test_its_lines_are_not_long() -> None:
    """Prose can be read in a terminal: only tables, commands and outputs have long lines."""
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    long = [line for line in prose.splitlines() if len(line) > 112 and not line.startswith("|")]
    assert long == []


# The reader of blocks, and the stranger


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("```\nx\n```\n", "1: the block has no language"),
        ("text\n```sh\nx\n```\n", "2: no comment before the block says"),
        ("<!-- run -->\n\n```sh\nx\n```\n", "3: no comment before the block says"),
        ("<!-- not run -->\n```sh\nx\n```\n", "2: no comment before the block says"),
        ("<!-- run: soon -->\n```sh\nx\n```\n", "2: no comment before the block says"),
        ("<!-- run -->\n```python\nx\n```\n", "2: python cannot be <!-- run -->"),
        ("<!-- run -->\n ```sh\nx\n ```\n", "2: the block has no language"),
        ("<!-- run -->\n```sh\nx\n", "2: the block has no end"),
    ],
)
def test_a_block_says_what_becomes_of_it(text: str, what: str) -> None:
    """A block without a language, without a comment or with a wrong one is a failure."""
    with pytest.raises(ReadmeError, match=re.escape(what)):
        blocks(text)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("<!-- run -->\n```sh\ntrue\nfalse\ntrue\n```\n", "2: this failed:\ntrue\nfalse"),
        ("<!-- run -->\n```sh\necho $UNKNOWN\n```\n", "UNKNOWN: unbound variable"),
        (
            "<!-- run -->\n```sh\necho 1\n```\n<!-- output -->\n```text\n2\n```\n",
            "6: the command did not say '2', but\n1\n",
        ),
        (
            "<!-- run -->\n```sh\nprintf '1\\n2\\n'\n```\n<!-- output -->\n```text\n2\n1\n```\n",
            "6: the command did not say '1', but\n1\n2\n",
        ),
        (
            "<!-- terminal: until 8001 listens -->\n```sh\necho no; exit 3\n```\n",
            "nothing listens on 8001:\necho no; exit 3\n\n-- terminal-8001\nno\n",
        ),
    ],
)
def test_what_fails_is_told(tmp_path: Path, text: str, what: str) -> None:
    """A command that fails, or says something else, ends the reading with its line and words."""
    with (
        Stranger(ROOT, tmp_path, fresh=False) as reader,
        pytest.raises(ReadmeError, match=re.escape(what)),
    ):
        list(follow(reader, blocks(text)))


def test_what_does_not_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that does not come back is ended with all that it began, and told."""
    monkeypatch.setattr(stranger, "PATIENCE", 0.5)
    text = f"<!-- run -->\n```sh\nsleep 61 & echo $! >{tmp_path}/pid; wait\n```\n"
    with (
        Stranger(ROOT, tmp_path, fresh=False) as reader,
        pytest.raises(ReadmeError, match="2: this failed"),
    ):
        list(follow(reader, blocks(text)))
    (state,) = re.findall(r"^State:\t(.)", _status(tmp_path / "pid"), re.MULTILINE) or ["Z"]
    assert state == "Z"


def _status(file: Path) -> str:
    """Return what the kernel says of the process whose id is in a file; nothing once it is gone."""
    try:
        return Path(f"/proc/{int(file.read_text())}/status").read_text()
    except FileNotFoundError:
        return ""


def test_a_wrong_part_of_a_configuration_is_seen() -> None:
    """What is added to a part does not hide a mistake in it."""
    with pytest.raises(ConfigError):
        loads(completed("retries: many\n"), path=README, environ=ACCOUNTS)
    with pytest.raises(ConfigError):
        loads(completed("upstreams: {a: {url: ftp://h}}\n"), path=README, environ=ACCOUNTS)


@pytest.mark.parametrize(("command", "code"), [("true", 0), ("false", 1)])
async def test_the_command(tmp_path: Path, command: str, code: int) -> None:
    """As a program it prints a line for each block that it ran, and exits with 1 if one failed."""
    file = tmp_path / "OTHER.md"
    file.write_text(f"<!-- run -->\n```sh\necho\n```\n<!-- run -->\n```sh\n{command}\n```\n")
    started = (sys.executable, str(TESTS / "readme.py"), str(file))
    process = await asyncio.create_subprocess_exec(*started, stdout=PIPE, stderr=PIPE)
    async with asyncio.timeout(30):
        out, err = (part.decode() for part in await process.communicate())
    assert process.returncode == code
    assert out.startswith("OTHER.md:2: run: ok\n")
    assert ("OTHER.md:6: run: ok\n" in out, "OTHER.md:6: this failed:\nfalse" in err) == (
        code == 0,
        code == 1,
    )
