"""The manual page says what the command line takes, and the command line what it says."""

import argparse
import re
import signal
from pathlib import Path
from typing import NamedTuple

import aiproxy.__main__ as program

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "man" / "aiproxy.8").read_text()


class Usage(NamedTuple):
    """What a command takes: options with the name of their value ("": none), and operands."""

    options: dict[str, str]
    operands: list[str]


def section(name: str) -> str:
    """Return the lines of one section of the page."""
    return PAGE.partition(f"\n.Sh {name}\n")[2].partition("\n.Sh ")[0]


def parsed() -> dict[str, Usage]:
    """Return what the parser takes, by command; its help is everywhere, and left out."""
    parser = program._parser()
    (commands,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    found = {}
    for name, command in commands.choices.items():
        actions = [one for one in command._actions if one.dest != "help"]
        options = {
            option: str(one.metavar or "") for one in actions for option in one.option_strings
        }
        operands = [str(one.metavar) for one in actions if not one.option_strings]
        found[name] = Usage(options, operands)
    return found


def usage(text: str) -> Usage:
    """Return what some lines of the page say that a command takes."""
    options = dict(re.findall(r"Fl (-[\w-]+)(?: Ar (\w+))?", text))
    operands = re.findall(r"^\.Ar (\w+)$|^\.It Cm \w+ Ar (\w+)$", text, re.MULTILINE)
    named = {f"-{name}": value for name, value in options.items()}
    return Usage(named, [one or other for one, other in operands])


def test_the_synopsis_is_the_command_line() -> None:
    """Every command and every option of the parser is in the synopsis, and nothing else."""
    lines = section("SYNOPSIS").split(".Nm\n.Cm ")[1:]
    *commands, last = lines
    last = last.partition(".Nm\n")[0]
    said = {}
    for line in (*commands, last):
        name, _, rest = line.partition("\n")
        said[name] = usage(rest)
    assert said == parsed()


def test_every_option_is_described() -> None:
    """The section of commands has each with its own options, operands and a description."""
    said = {}
    for part in re.split(r"^(?=\.It Cm )", section("COMMANDS"), flags=re.MULTILINE)[1:]:
        described = re.match(r"\.It Cm (\w+)(?: Ar \w+)?\n(?!\.It)", part)
        assert described, part
        items = "\n".join(line for line in part.splitlines() if line.startswith(".It"))
        said[described[1]] = usage(items)
    assert said == parsed()


def test_it_names_the_environment() -> None:
    """Every variable that the code reads by its name is in the page, and no other."""
    lines = [
        line
        for file in (ROOT / "aiproxy").rglob("*.py")
        for line in file.read_text().splitlines()
        if "environ" in line
    ]
    read = set(re.findall(r'"([A-Z]+_[A-Z_]+)"', "\n".join(lines))) - {"SAMPLE_CREDENTIAL"}
    items = re.findall(r"^\.It Ev (.*)$", section("ENVIRONMENT"), re.MULTILINE)
    assert {name for item in items for name in item.split(" , ")} == read


def test_it_names_the_signals_and_exit_codes() -> None:
    """The signals that the daemon handles and the codes that it exits with are the page's."""
    daemon = (ROOT / "aiproxy" / "daemon.py").read_text()
    handled = set(re.findall(r"signal\.(SIG[A-Z]+)\b", daemon)) - {"SIG"}
    handled = {name for name in handled if isinstance(getattr(signal, name), signal.Signals)}
    items = re.findall(r"^\.It Dv (.*)$", section("SIGNALS"), re.MULTILINE)
    assert {name for item in items for name in item.split(" , ")} == handled

    codes = [program.OK, program.FAILED, program.BAD_USAGE]
    said = re.findall(r"^\.It (\d+)$", section("EXIT STATUS"), re.MULTILINE)
    assert [int(code) for code in said] == codes


def test_its_paths_are_those_of_the_program() -> None:
    """The default configuration is named where it is looked for."""
    assert section("COMMANDS").count(f".Pa {program.DEFAULT_CONFIG} .") == 2
    assert f".It Pa {program.DEFAULT_CONFIG}\n" in section("FILES")
