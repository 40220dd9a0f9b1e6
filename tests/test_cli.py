"""The program `aiproxy`: its commands, what they print, and their exit codes."""

import asyncio
import base64
import configparser
import hashlib
import json
import platform
import re
import shutil
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

import aiproxy
from aiproxy.__main__ import main
from aiproxy.config import json_schema, loads
from client import RawClient
from rig import key_hash

ROOT = Path(__file__).parent.parent
KEY = "sk-aip-of-the-command-line-test"
GOOD = f"""\
listen: 127.0.0.1:0
admin: 127.0.0.1:0
upstreams:
  u: {{url: "http://127.0.0.1:1/v1", apis: [chat]}}
routes:
  - {{model: m, upstreams: [u]}}
keys:
  me: {{sha256: {key_hash(KEY)}}}
drain: {{delay: 0s}}
"""
BAD = """\
listen: 127.0.0.1:0
upstream: {}
upstreams:
  u: {url: "ftp://h", apis: [caht]}
routes:
  - {model: m, upstreams: [v]}
max_body: 3 litres
"""
Run = Callable[..., Awaitable[Process]]


def write(path: Path, text: str) -> None:
    """Write a file."""
    path.write_text(text)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Write a configuration that can be used."""
    path = tmp_path / "aiproxy.yaml"
    path.write_text(GOOD)
    return path


@pytest.fixture
async def run(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Run]:
    """Run `python -m aiproxy` with arguments; it is ended after the test."""
    monkeypatch.delenv("AIPROXY_ADMIN", raising=False)
    started: list[Process] = []

    async def start(*arguments: object) -> Process:
        command = (sys.executable, "-m", "aiproxy", *map(str, arguments))
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, cwd=ROOT)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ended(process: Process) -> tuple[int | None, str, str]:
    """Return exit code, standard output and standard error of a program at its end."""
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def logged(process: Process, event: str) -> dict[str, Any]:
    """Read the log on standard error up to a line; return it."""
    assert process.stderr is not None
    async with asyncio.timeout(20):
        async for line in process.stderr:
            record: dict[str, Any] = json.loads(line)
            if record["event"] == event:
                return record
    raise AssertionError(f"no line says {event}")


@pytest.fixture
def taken() -> Iterator[int]:
    """Take a port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    """Return a port that is free at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def answers(port: int, path: str) -> int:
    """Ask with the key on a port; return the status."""
    async with await RawClient.connect(port) as client:
        await client.request("GET", path, {"authorization": f"Bearer {KEY}"})
        return (await client.answer()).status


# version, usage


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The versions of aiproxy, Python and aiohttp are on one line."""
    assert main(["version"]) == 0
    assert capsys.readouterr().out == (
        f"aiproxy {aiproxy.__version__}, Python {platform.python_version()},"
        f" aiohttp {version('aiohttp')}\n"
    )


def installed() -> list[str]:
    """Return the command of the installed script, or else what pip would put into it."""
    if script := shutil.which("aiproxy", path=Path(sys.executable).parent):
        return [script]
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    entry = re.search(
        r"^aiproxy = (\S+):(\S+)$", setup["options.entry_points"]["console_scripts"], re.MULTILINE
    )
    assert entry is not None
    code = f"import sys; from {entry[1]} import {entry[2]}; sys.exit({entry[2]}())"
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("arguments", "code"), [(["version"], 0), (["--help"], 0), (["key", "a b"], 2), ([], 2)]
)
async def test_the_module_is_the_program(run: Run, arguments: list[str], code: int) -> None:
    """`python -m aiproxy` and the script that is installed say and return the same."""
    script = await asyncio.create_subprocess_exec(
        *installed(), *arguments, stdout=PIPE, stderr=PIPE, cwd=ROOT
    )
    found = await ended(script)
    assert found == await ended(await run(*arguments))
    assert found[0] == code


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "required: COMMAND"),
        (["sevre"], "invalid choice"),
        (["serve", "--confg", "x"], "unrecognized arguments"),
        (["serve", "--admin", "nowhere"], "argument --admin"),
        (["check", "--admin", "127.0.0.1:1"], "unrecognized arguments"),
        (["key"], "required: NAME"),
        (["key", ""], r"must match \[A-Za-z0-9._-\]{1,64}"),
        (["key", "a b"], "must match"),
        (["key", "größe"], "must match"),
        (["key", "a\n"], "must match"),
        (["key", "a" * 65], "must match"),
        (["demo", "--twice"], "unrecognized arguments"),
        (["demo", "--upstream", "65536"], "must be a number from 1 to 65535"),
        (["demo", "--upstream", "http"], "must be a number from 1 to 65535"),
        (["demo", "--once", "--upstream", "8001"], "not allowed with argument --once"),
    ],
)
def test_bad_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], what: str) -> None:
    """A wrong command, option or name is refused with exit code 2 and a sentence."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(what, err)
    assert "Traceback" not in err


# key


@pytest.mark.parametrize("name", ["a", "team-A_1.2", "a" * 64, "007", "true", "null", "1e3"])
def test_key(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """The key is long and random; its stanza has its hash, and loads as it was printed."""
    assert main(["key", name]) == 0
    out = capsys.readouterr().out
    (secret,) = re.findall(r"^sk-aip-[A-Za-z0-9_-]+$", out, re.MULTILINE)
    stanza = out[out.index("keys:") :]
    head = GOOD[: GOOD.index("keys:")]
    key = loads(head + stanza, path=Path("x"), environ={}).config.keys[name]
    assert list(key.sha256) == [hashlib.sha256(secret.encode()).hexdigest()]
    body = secret.removeprefix("sk-aip-")
    assert len(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))) * 8 >= 192
    assert out.count(secret) == 1
    assert secret not in stanza


def test_keys_differ(capsys: pytest.CaptureFixture[str]) -> None:
    """No two keys are the same, nor begin alike."""
    keys = set()
    for _ in range(20):
        main(["key", "k"])
        keys.update(re.findall(r"^sk-aip-(.{8})", capsys.readouterr().out, re.MULTILINE))
    assert len(keys) == 20


# check


def test_check_tells_every_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All mistakes are printed at once, each with its place, in the order of the file: code 2."""
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    assert main(["check", "--config", str(path)]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    places = [re.fullmatch(rf"{re.escape(str(path))}:(\d+):(\d+): (.+)", line) for line in lines]
    assert all(places), lines
    assert [int(place[1]) for place in places if place] == [2, 4, 4, 6, 7]
    assert "did you mean 'upstreams'?" in lines[0]
    assert "did you mean 'chat'?" in err
    assert out == ""


def test_check_of_a_good_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that can be used is ok: exit code 0; what is doubtful is told with its place."""
    assert main(["check", "--config", str(config)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{config}: ok\n"
    assert err == f"{config}:8:3: keys.me: has no limit (warning)\n"


def test_check_opens_no_port(taken: int, config: Path) -> None:
    """A taken address is no mistake of the file."""
    write(config, GOOD.replace("127.0.0.1:0", f"127.0.0.1:{taken}", 1))
    assert main(["check", "--config", str(config)]) == 0


@pytest.mark.parametrize("command", ["check", "serve"])
@pytest.mark.parametrize("kind", ["missing", "directory", "binary"])
def test_an_unreadable_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    """A file that is not there, no file or no text is told like a mistake: exit code 2."""
    path = tmp_path if kind == "directory" else tmp_path / "x.yaml"
    if kind == "binary":
        path.write_bytes(b"listen: \xff")
    assert main([command, "--config", str(path)]) == 2
    reason = {"missing": "No such file", "directory": "Is a directory", "binary": "not UTF-8"}
    assert re.fullmatch(
        rf"{re.escape(str(path))}:1:\d+: .*{reason[kind]}.*\n", capsys.readouterr().err
    )


# schema


TYPES = {
    "object": dict, "array": list, "string": str, "integer": int, "boolean": bool,
    "null": type(None),
}  # fmt: skip


def fits(schema: Any, node: Any, root: Any) -> bool:
    """Tell whether a value is as the schema says, by the keywords that the printed one uses."""
    if "$ref" in schema and not fits(root["$defs"][schema["$ref"].split("/")[-1]], node, root):
        return False
    if "anyOf" in schema and not any(fits(one, node, root) for one in schema["anyOf"]):
        return False
    names = schema.get("type", list(TYPES))
    if not isinstance(
        node, tuple(TYPES[n] for n in ([names] if isinstance(names, str) else names))
    ):
        return False
    if isinstance(node, list):
        return all(fits(schema.get("items", {}), one, root) for one in node)
    if isinstance(node, dict):
        return members_fit(schema, node, root)
    return node in schema.get("enum", [node])


def members_fit(schema: Any, node: dict[str, Any], root: Any) -> bool:
    """Tell the same of the members of a mapping."""
    known = schema.get("properties", {})
    patterns = schema.get("patternProperties", {})
    for name, value in node.items():
        found = (
            [known[name]]
            if name in known
            else [v for k, v in patterns.items() if re.search(k, name)]
        )
        if not found and schema.get("additionalProperties") is False:
            return False
        if not all(fits(one, value, root) for one in found):
            return False
    return set(schema.get("required", ())) <= node.keys()


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    """The schema is JSON Schema 2020-12 with every key; it takes the reference, and no mistake."""
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["properties"].keys() == json_schema()["properties"].keys() > {"listen", "keys"}
    example = yaml.safe_load((ROOT / "etc" / "aiproxy.yaml").read_text())
    good = yaml.safe_load(GOOD)
    assert fits(schema, example, schema)
    assert fits(schema, good, schema)
    assert not fits(schema, {**example, "lisen": "x"}, schema)
    assert not fits(schema, {**example, "routes": {}}, schema)
    assert not fits(schema, {**example, "log": {"level": "loud"}}, schema)
    assert not fits(schema, {name: good[name] for name in good if name != "upstreams"}, schema)


# serve


async def test_serve(run: Run, config: Path) -> None:
    """It serves on both addresses of the file, logs warnings, and SIGTERM ends it with 0."""
    listen, admin = free_port(), free_port()
    text = GOOD.replace("127.0.0.1:0", f"127.0.0.1:{listen}", 1)
    write(config, text.replace("127.0.0.1:0", f"127.0.0.1:{admin}", 1))
    process = await run("serve", "--config", config)
    assert "has no limit" in (await logged(process, "configuration"))["warning"]
    started = await logged(process, "started")
    assert (started["listen"], started["admin"]) == (f"127.0.0.1:{listen}", f"127.0.0.1:{admin}")
    assert await answers(listen, "/v1/models") == 200
    assert await answers(admin, "/-/ready") == 200
    process.send_signal(signal.SIGTERM)
    assert (await logged(process, "request"))["key"] == "me"
    code, out, err = await ended(process)
    assert (code, out) == (0, "")
    assert json.loads(err.splitlines()[-1])["event"] == "stopped"


@pytest.mark.parametrize("way", ["option", "environment", "both"])
async def test_admin_is_overridden(
    run: Run, config: Path, taken: int, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """`--admin`, or else AIPROXY_ADMIN, stands in for the file's address, which may be taken."""
    write(config, GOOD.replace("admin: 127.0.0.1:0", f"admin: 127.0.0.1:{taken}"))
    port = free_port()
    option = ["--admin", f"127.0.0.1:{port}"]
    if way != "option":
        address = port if way == "environment" else taken
        monkeypatch.setenv("AIPROXY_ADMIN", f"127.0.0.1:{address}")
    process = await run("serve", "--config", config, *(option if way != "environment" else []))
    assert (await logged(process, "started"))["admin"] == f"127.0.0.1:{port}"
    assert await answers(port, "/-/healthy") == 200
    process.send_signal(signal.SIGINT)
    assert (await ended(process))[0] == 0


@pytest.mark.parametrize("which", ["listen", "admin"])
async def test_a_taken_port(run: Run, config: Path, taken: int, which: str) -> None:
    """An address that cannot be bound is named in the log, and the exit code is 1."""
    write(config, GOOD.replace(f"{which}: 127.0.0.1:0", f"{which}: 127.0.0.1:{taken}"))
    code, out, err = await ended(await run("serve", "--config", config))
    last = json.loads(err.splitlines()[-1])
    assert (code, out) == (1, "")
    assert (last["event"], last["level"]) == ("cannot listen", "error")
    assert str(taken) in last["error"]
    assert "Traceback" not in err


async def test_serve_with_a_bad_file(run: Run, config: Path) -> None:
    """Exit code 2 with the same sentences as `check`, and nothing was listened on."""
    port = free_port()
    write(config, BAD.replace("127.0.0.1:0", f"127.0.0.1:{port}"))
    serve = await run("serve", "--config", config)
    check = await run("check", "--config", config)
    found = await ended(serve)
    assert found == await ended(check)
    assert found[0] == 2
    assert len(found[2].splitlines()) == 5
    with pytest.raises(ConnectionRefusedError):
        await RawClient.connect(port)


async def test_a_bad_address_in_the_environment(
    run: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong AIPROXY_ADMIN stops `serve` with exit code 2, and no other command."""
    monkeypatch.setenv("AIPROXY_ADMIN", "nowhere")
    code, _, err = await ended(await run("serve", "--config", config))
    assert (code, "--admin" in err) == (2, True)
    assert (await ended(await run("check", "--config", config)))[0] == 0
