"""The command line.

Exit codes: 0 clean end, 1 failure while running, 2 bad usage or bad configuration.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import aiproxy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiproxy.config import Address, Loaded

DEFAULT_CONFIG = Path("/etc/aiproxy/aiproxy.yaml")
OK, FAILED, BAD_USAGE = 0, 1, 2

_KEY_BYTES = 32  # 256 random bits
_LAST_PORT = 65535
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aiproxy", description="A reverse proxy daemon for LLM APIs."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the daemon")
    check = commands.add_parser("check", help="print every mistake in a configuration file")
    for command in (serve, check):
        command.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE")
    serve.add_argument(
        "--admin",
        type=_address,
        metavar="ADDR",
        default=os.environ.get("AIPROXY_ADMIN"),
        help="overrides `admin` of the file for this instance (also AIPROXY_ADMIN)",
    )
    commands.add_parser("schema", help="print the JSON Schema of the file, for editors")
    key = commands.add_parser("key", help="make a client key")
    key.add_argument("name", metavar="NAME", type=_key_name)
    demo = commands.add_parser("demo", help="show the main job, with no account and no network")
    form = demo.add_mutually_exclusive_group()
    form.add_argument("--once", action="store_true", help="exit when it was shown")
    form.add_argument(
        "--upstream",
        type=_port,
        metavar="PORT",
        help="only its sample model server, on this port of loopback",
    )
    commands.add_parser("version", help="print versions")
    return parser


def _key_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError("must match [A-Za-z0-9._-]{1,64}")
    return text


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= _LAST_PORT):
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {_LAST_PORT}")
    return int(text)


def _address(text: str) -> Address:
    from aiproxy.config import parse_address  # noqa: PLC0415 - as in `_load`

    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _load(path: Path) -> Loaded | None:
    """The configuration; None after its mistakes were printed."""
    from aiproxy.config import ConfigError, load  # noqa: PLC0415 - `version` and `key` do not wait

    try:
        return load(path, environ=os.environ)
    except ConfigError as error:
        for mistake in error.mistakes:
            print(mistake.text(path), file=sys.stderr)
        return None


def _serve(path: Path, admin: Address | None) -> int:
    first = _load(path)
    if first is None:
        return BAD_USAGE

    def overridden(loaded: Loaded) -> Loaded:
        if admin is None:
            return loaded
        return loaded._replace(config=loaded.config.model_copy(update={"admin": admin}))

    from aiproxy.config import load  # noqa: PLC0415 - as above
    from aiproxy.daemon import serve  # noqa: PLC0415 - as above

    return serve(str(path), lambda: overridden(load(path, environ=os.environ)), overridden(first))


def _check(path: Path) -> int:
    loaded = _load(path)
    if loaded is None:
        return BAD_USAGE
    for warning in loaded.warnings:
        print(f"{warning.text(path)} (warning)", file=sys.stderr)
    print(f"{path}: ok")
    return OK


def _schema() -> int:
    from aiproxy.config import json_schema  # noqa: PLC0415 - as above

    print(json.dumps(json_schema(), indent=2))
    return OK


def _key(name: str) -> int:
    secret = f"sk-aip-{secrets.token_urlsafe(_KEY_BYTES)}"
    print(f"# The key, shown this once; give it to the client:\n{secret}\n")
    print("# Its stanza for the configuration file:\nkeys:")
    print(f"  {name}:\n    sha256: {hashlib.sha256(secret.encode()).hexdigest()}")
    return OK


def _demo(*, once: bool, upstream: int | None) -> int:
    from aiproxy.demo import demo, sample_upstream  # noqa: PLC0415 - as above

    return demo(once=once) if upstream is None else sample_upstream(upstream)


def _version() -> int:
    from importlib.metadata import version  # noqa: PLC0415 - as above

    print(
        f"aiproxy {aiproxy.__version__}, Python {platform.python_version()},"
        f" aiohttp {version('aiohttp')}"
    )
    return OK


def main(argv: Sequence[str] | None = None) -> int:
    """The program `aiproxy`; returns its exit code."""
    given = _parser().parse_args(argv)
    match given.command:
        case "serve":
            return _serve(given.config, given.admin)
        case "check":
            return _check(given.config)
        case "schema":
            return _schema()
        case "key":
            return _key(given.name)
        case "demo":
            return _demo(once=given.once, upstream=given.upstream)
        case _:
            return _version()


if __name__ == "__main__":
    sys.exit(main())
