"""The mutation run's own tests: what it changes, what it leaves, and who judges a change."""

from textwrap import dedent

import pytest

from mutants import Mutant, mutants

CHANGES = [
    ("a < b", ["a <= b", "a >= b"]),
    ("a == b", ["a != b"]),
    ("a is None", ["a is not None"]),
    ("a in b", ["a not in b"]),
    ("a and b", ["a or b"]),
    ("not a", ["a"]),
    ("a + b", ["a - b"]),
    ("a * 3", ["a // 3", "a * 4", "a * 2"]),
    ("min(a, b)", ["max(a, b)"]),
    ("a if b else c", ["a if not b else c"]),
    ("[a for a in b if a]", ["[a for a in b if True]"]),
    ("'a'", ["'Xa'"]),
    ("b''", ["b'X'"]),
    ("True", ["False"]),
    ("'a sentence'", []),
    ("f'{a + 1}'", []),
    ("None", []),
]
STATEMENTS = [
    ("a.b = c", ["pass"]),
    ("a += b", ["pass", "a -= b"]),
    ("del a", ["pass"]),
    ("raise a", ["pass"]),
    ("await a", ["pass"]),
    ("return a", ["return None"]),
    ("return None", []),
    ("while a: break", ["while not a: break", "while a: continue"]),
    ("while a: continue", ["while not a: continue", "while a: break"]),
    ("'''A docstring.'''", []),
    ("a: Literal['b'] = c", []),
    ("__slots__ = ('a', 'b')", []),
    ("if TYPE_CHECKING: a += 1", []),
]


def made(source: str) -> list[Mutant]:
    """Return the mutants of a module of which no name is used elsewhere."""
    return list(mutants("it.py", source.encode(), lambda name: [("elsewhere.py", 7)]))


def plain(text: bytes | str) -> str:
    """Return a source without the parentheses that a change brings."""
    text = text.decode() if isinstance(text, bytes) else text
    return text.replace("(", "").replace(")", "")


@pytest.mark.parametrize(("expression", "others"), CHANGES)
def test_an_expression_is_changed_in_each_of_its_ways(expression: str, others: list[str]) -> None:
    """Each operator and each constant of an expression is changed, one at a time."""
    found = made(f"async def f():\n    a = {expression}\n")
    assert sorted(plain(each.source) for each in found) == sorted(
        plain(f"async def f():\n    a = {other}\n") for other in others
    )


@pytest.mark.parametrize(("statement", "others"), STATEMENTS)
def test_a_statement_is_changed_or_left_out(statement: str, others: list[str]) -> None:
    """What acts is left out or turned round; what is for people or for types alone stays."""
    found = made(f"async def f():\n    {statement}\n")
    assert sorted(plain(each.source) for each in found) == sorted(
        plain(f"async def f():\n    {other}\n") for other in others
    )


def test_a_change_in_a_function_is_judged_by_who_reaches_its_lines() -> None:
    """Tests that reach the lines of the change, or the statement around it, judge it."""
    source = dedent("""\
        def f():
            return g(
                "a",
                a < b,
            )
        """)
    [change, *_] = [each for each in made(source) if "a < b ->" in each.change]
    assert change.places == {("it.py", 4), ("it.py", 2)}


def test_a_default_is_judged_by_who_reaches_the_function() -> None:
    """A default is made at the import, which every test reaches, and matters in the body."""
    [change, *_] = made("def f(a=False):\n    g(a)\n    h(a)\n")
    assert change.places == {("it.py", 2), ("it.py", 3)}


def test_a_constant_is_judged_by_who_reaches_its_uses() -> None:
    """A constant of a module is judged by tests of the lines that name it, wherever these are."""
    [change] = made("A = 0\n")
    assert change.places == {("elsewhere.py", 7)}


def test_places_count_bytes_of_the_source() -> None:
    """A letter of two bytes before a change does not move it."""
    [_, change] = made("def f():\n    return 'ä ä' + 0\n")[1:]
    assert change.source.decode() == "def f():\n    return 'ä ä' + (1)\n"
