"""pydantic's errors -> mistakes: at the offending key or value, in the words of the file."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeAlias

from aiproxy.config.schema import keys_at
from aiproxy.config.units import kind, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

    from aiproxy.config.document import Document, Mistake, Steps

_Sentence: TypeAlias = "Callable[[ErrorDetails], str]"

_MAX_WORD = 64
"""Beyond this a misspelt word is not compared with others: the time is quadratic."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` if one of the known words is close, else nothing."""
    close = get_close_matches(word, known, n=1) if len(word) <= _MAX_WORD else []
    return f" (did you mean '{close[0]}'?)" if close else ""


def mistakes(error: ValidationError, document: Document) -> list[Mistake]:
    """Return a mistake for each of the errors of a document's tree."""
    found = []
    for details in error.errors(include_url=False):
        if what := _what(details):
            steps = _steps(document, details["loc"])
            if details["type"] == "missing":
                steps = (*steps, details["loc"][-1])
            at_key = details["type"] == "extra_forbidden" or details["loc"][-1:] == ("[key]",)
            found.append(document.mistake(steps, what, at_key=at_key))
    return found


def _steps(document: Document, location: Steps) -> Steps:
    """Return how far an error's location goes in the file.

    It may go further: a lone value stands for a list of one, a name for a mapping with that name.
    """
    node = document.tree
    steps: Steps = ()
    for step in location:
        if isinstance(step, int):
            if not isinstance(node, list):
                continue
            node = node[step]
        elif isinstance(node, dict) and step in node:
            node = node[step]
        else:
            break
        steps = (*steps, step)
    return steps


def _what(details: ErrorDetails) -> str:
    """Return the sentence for an error; empty if it only follows from others."""
    sentence = _SENTENCES.get(details["type"])
    return sentence(details) if sentence else f"is wrong ({details['type']})"


def _unknown(details: ErrorDetails) -> str:
    *stanza, key = details["loc"]
    return "unknown key" + did_you_mean(str(key), keys_at(stanza))


def _not_text(details: ErrorDetails) -> str:
    quote = ": quote it" if isinstance(details["input"], bool | int | float) else ""
    return f"must be text, not {kind(details['input'])}{quote}"


def _not_one_of(details: ErrorDetails) -> str:
    value = details["input"]
    words = [
        word.strip("'") for word in _expected(details, "expected").replace(" or ", ", ").split(", ")
    ]
    hint = did_you_mean(value, words) if isinstance(value, str) else ""
    choice = " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    return f"must be {choice}, not {shown(value)}{hint}"


def _too_short(details: ErrorDetails) -> str:
    # pydantic counts the items that are right: it says so of a list of wrong ones, too.
    return "" if details["input"] else "must not be empty"


def _expected(details: ErrorDetails, name: str) -> str:
    """Return a part of what the error says of the rule, in YAML's words."""
    return str(details["ctx"][name]).replace("True", "true").replace("False", "false")


def _must_be(what: str, bound: str = "") -> _Sentence:
    """Make the sentence of a rule about a value that may be shown."""

    def sentence(details: ErrorDetails) -> str:
        expected = f" {_expected(details, bound)}" if bound else ""
        return f"must be {what}{expected}, not {shown(details['input'])}"

    return sentence


def _must_be_kind(what: str) -> _Sentence:
    return lambda details: f"must be {what}, not {kind(details['input'])}"


_SENTENCES: Mapping[str, _Sentence] = {
    "value_error": lambda details: str(details["ctx"]["error"]),
    "missing": lambda _: "is required",
    "extra_forbidden": _unknown,
    "string_type": _not_text,
    "path_type": _not_text,
    # The only pattern is that of names.
    "string_pattern_mismatch": lambda _: "must be 1 to 64 of the characters A-Z a-z 0-9 . _ -",
    "int_type": _must_be("a whole number"),
    "bool_type": _must_be("true or false"),
    "literal_error": _not_one_of,
    "greater_than_equal": _must_be("at least", "ge"),
    "less_than_equal": _must_be("at most", "le"),
    "too_short": _too_short,
    "too_long": lambda details: f"must have at most {_expected(details, 'max_length')} items",
    "tuple_type": _must_be_kind("a list"),
    "frozen_set_type": _must_be_kind("a list"),
    "model_type": _must_be_kind("a mapping"),
    "mapping_type": _must_be_kind("a mapping"),
    "dict_type": _must_be_kind("a mapping"),
}
