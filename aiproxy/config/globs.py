"""Globs for model names: `*` is any text, `?` any one character; over the whole name, in its case.

A name without either is a glob that matches itself only, so both functions take names too. Time is
the product of the two lengths.
"""

from __future__ import annotations


def is_glob(text: str) -> bool:
    """Whether a text stands for more than one name."""
    return "*" in text or "?" in text


def glob_covers(pattern: str, other: str) -> bool:
    """Whether `pattern` matches every name that `other` matches.

    True is always right, and right for a name as `other`. False may be wrong where single wildcards
    of `pattern` would have to be matched by parts of a `*`: `?*` is not seen to cover `*a`.
    """
    pattern, other = _ordered(pattern), _ordered(other)
    places = _after_stars(pattern, {0})
    for symbol in other:
        moved = set()
        for place in places:
            if place < len(pattern):
                expected = pattern[place]
                if expected == "*":
                    moved.add(place)
                elif expected == symbol or (expected == "?" and symbol != "*"):
                    moved.add(place + 1)
        places = _after_stars(pattern, moved)
    return len(pattern) in places


def globs_overlap(one: str, other: str) -> bool:
    """Whether some name is matched by both; exact."""
    pending, seen = [(0, 0)], {(0, 0)}
    while pending:
        i, j = pending.pop()
        if i == len(one) and j == len(other):
            return True
        a, b = one[i : i + 1], other[j : j + 1]
        following = []
        if a == "*":
            following += [(i + 1, j), (i, j + 1)] if b else [(i + 1, j)]
        if b == "*":
            following += [(i, j + 1), (i + 1, j)] if a else [(i, j + 1)]
        if a and b and (a == b or "?" in (a, b)):
            following.append((i + 1, j + 1))
        pending += [pair for pair in following if pair not in seen]
        seen.update(following)
    return False


def _ordered(pattern: str) -> str:
    """Write each run of wildcards as its `?`s and then at most one `*`: `*?*` is `?*`."""
    text, singles, star = "", 0, False
    for character in [*pattern, ""]:
        if character == "?":
            singles += 1
        elif character == "*":
            star = True
        else:
            text += "?" * singles + "*" * star + character
            singles, star = 0, False
    return text


def _after_stars(pattern: str, places: set[int]) -> set[int]:
    """Add the places reached where a `*` matches nothing; no two are adjacent."""
    return places | {place + 1 for place in places if pattern[place : place + 1] == "*"}
