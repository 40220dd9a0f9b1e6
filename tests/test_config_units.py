"""Durations, sizes, rates, addresses, days and globs: text -> value, and back."""

import re
from datetime import UTC, datetime
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy.config import Address, Rate, glob_covers, parse_address, texts, units
from aiproxy.config.globs import globs_overlap

PATTERNS = st.text(alphabet="ab*?", max_size=5)


def matches(pattern: str, name: str) -> bool:
    """Match by way of the standard library."""
    return bool(
        re.fullmatch("".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in pattern), name)
    )


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("250ms", 0.25),
        ("5s", 5.0),
        ("2min", 120.0),
        ("1h", 3600.0),
        ("30d", 2_592_000.0),
        ("0s", 0.0),
        ("0ms", 0.0),
        ("1ms", 0.001),
    ],
)
def test_duration(written: str, seconds: float) -> None:
    """A duration is seconds."""
    assert units.parse_duration(written) == seconds


@pytest.mark.parametrize(
    "written",
    ["", "5", "5 s", "5m", "5S", "1h30min", "-1s", "+1s", "1.5s", "\u0665s", "5s\n", 5, None],
)
def test_no_duration(written: object) -> None:
    """A number without a unit, another unit, a sign or a fraction is no duration."""
    with pytest.raises(ValueError, match=r"^must be a duration such as 250ms, 5s, 2min, 1h or 30d"):
        units.parse_duration(written)


@given(st.integers(0, int(units.MAX_SECONDS) * 1000))
def test_durations_are_written_as_they_are_read(milliseconds: int) -> None:
    """Every duration of whole milliseconds survives being written and read."""
    seconds = milliseconds / 1000
    assert units.parse_duration(units.format_duration(seconds)) == seconds


@pytest.mark.parametrize(("written", "size"), [("64KiB", 65_536), ("1GiB", 1 << 30)])
def test_size(written: str, size: int) -> None:
    """A size is bytes."""
    assert units.parse_size(written) == size


@pytest.mark.parametrize("written", ["64", "64KB", "64kib", "64K", "1.5MiB", "-1KiB", 64, [], {}])
def test_no_size(written: object) -> None:
    """A size has one of the binary units."""
    with pytest.raises(ValueError, match=r"^must be a size such as 64KiB, 32MiB or 1GiB"):
        units.parse_size(written)


@given(st.integers(1, units.MAX_SIZE // 1024).filter(lambda n: len(str(n)) <= 12))
def test_sizes_are_written_as_they_are_read(kibibytes: int) -> None:
    """Every size of whole KiB survives being written and read."""
    assert units.parse_size(units.format_size(kibibytes * 1024)) == kibibytes * 1024


@pytest.mark.parametrize("written", ["10/s", "600/min", "1000/h", "5000/day"])
def test_rate(written: str) -> None:
    """A rate knows its amount and its seconds, and is written as it was read."""
    assert str(units.parse_rate(written)) == written
    assert units.parse_rate("600/min") == Rate(600, 60)


@pytest.mark.parametrize("written", ["0/s", "600", "600/m", "600 /min", "6.5/s", 600])
def test_no_rate(written: object) -> None:
    """A rate of none, or in no known unit, is refused."""
    with pytest.raises(ValueError, match=r"^must be a rate such as 10/s"):
        units.parse_rate(written)


@pytest.mark.parametrize(
    ("written", "address", "loopback"),
    [
        ("127.0.0.1:8080", Address("127.0.0.1", 8080), True),
        ("127.8.9.1:0", Address("127.8.9.1", 0), True),
        ("[::1]:8080", Address("::1", 8080), True),
        ("localhost:1", Address("localhost", 1), True),
        ("unix:/run/a b.sock", Address("", 0, "/run/a b.sock"), True),
        ("192.0.2.1:80", Address("192.0.2.1", 80), False),
        ("[::]:80", Address("::", 80), False),
        ("gw-1.example:65535", Address("gw-1.example", 65_535), False),
    ],
)
def test_address(written: str, address: Address, *, loopback: bool) -> None:
    """An address is written as it was read, and knows whether others can reach it."""
    assert parse_address(written) == address
    assert str(address) == written
    assert address.is_loopback is loopback


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        ("127.0.0.1:1", "127.0.0.1:1", True),
        ("127.0.0.1:1", "127.0.0.1:2", False),
        ("127.0.0.1:1", "[::1]:1", False),
        ("[::]:1", "127.0.0.1:1", True),
        ("127.0.0.1:0", "127.0.0.1:0", False),
        ("unix:/a", "unix:/a", True),
        ("unix:/a", "127.0.0.1:1", False),
    ],
)
def test_clash(one: str, other: str, *, clash: bool) -> None:
    """Two addresses clash if a second bind would fail."""
    assert parse_address(one).clashes(parse_address(other)) is clash
    assert parse_address(other).clashes(parse_address(one)) is clash


@pytest.mark.parametrize(
    ("written", "instant"),
    [
        ("2027-06-30", datetime(2027, 7, 1, tzinfo=UTC)),
        ("2028-02-28", datetime(2028, 2, 29, tzinfo=UTC)),
        ("2027-06-30T12:00:00Z", datetime(2027, 6, 30, 12, tzinfo=UTC)),
        ("2027-06-30t12:00:00.5+02:00", datetime(2027, 6, 30, 10, 0, 0, 500_000, tzinfo=UTC)),
        ("2027-06-30 12:00:00.123456789z", datetime(2027, 6, 30, 12, 0, 0, 123_456, tzinfo=UTC)),
    ],
)
def test_expiry(written: str, instant: datetime) -> None:
    """A day is valid to its end in UTC; an instant is itself."""
    assert units.parse_expiry(written) == instant


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("https://api.example/v1", "https://api.example/v1"),
        ("https://api.example/v1/", "https://api.example/v1"),
        ("http://h", "http://h"),
        ("http://h/", "http://h"),
        ("http://[::1]:80/a//?api-version=1&b=/", "http://[::1]:80/a?api-version=1&b=/"),
        ("HTTP://Host/V1", "http://Host/V1"),
    ],
)
def test_url(written: str, kept: str) -> None:
    """A URL loses the slash at the end of its path and keeps its query."""
    assert texts.url(written) == kept


@given(st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none()))
def test_readers_of_units_raise_only_value_errors(value: Any) -> None:
    """Whatever a file has in place of a unit, the reader returns or says what is wrong."""
    for parse in (
        units.parse_duration,
        units.parse_size,
        units.parse_rate,
        units.parse_address,
        units.parse_network,
        units.parse_expiry,
    ):
        try:
            parse(value)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is right


@given(st.text())
def test_readers_of_texts_raise_only_value_errors(text: str) -> None:
    """Whatever text a file has, the reader returns or says what is wrong."""
    for read in (texts.url, texts.model, texts.sha256, texts.secret, texts.header, texts.store):
        try:
            read(text)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is right


@given(PATTERNS, PATTERNS, st.text(alphabet="abc", max_size=6))
def test_what_a_glob_covers_it_matches(pattern: str, other: str, name: str) -> None:
    """A glob that covers another matches each name that the other matches."""
    if glob_covers(pattern, other) and matches(other, name):
        assert matches(pattern, name)


@given(PATTERNS, st.text(alphabet="ab", max_size=5))
def test_covering_a_name_is_matching_it(pattern: str, name: str) -> None:
    """For one name, to cover is to match, both ways."""
    assert glob_covers(pattern, name) is matches(pattern, name)


@pytest.mark.parametrize(
    ("pattern", "other", "covered"),
    [
        ("*", "*", True),
        ("*", "?", True),
        ("?", "*", False),
        ("a*", "ab*", True),
        ("ab*", "a*", False),
        ("?*", "*?", True),
        ("gpt-*", "gpt-5*mini", True),
        ("*-mini", "gpt-*", False),
        ("A*", "a", False),
        ("[ab]*", "a", False),
    ],
)
def test_covers(pattern: str, other: str, *, covered: bool) -> None:
    """Only * and ? are wildcards, and case counts."""
    assert glob_covers(pattern, other) is covered


@given(st.text(alphabet="ab*?", max_size=3), st.text(alphabet="ab*?", max_size=3))
def test_globs_overlap_where_a_name_matches_both(one: str, other: str) -> None:
    """Two globs overlap exactly if there is a name that both match."""
    names = ("".join(letters) for size in range(7) for letters in product("ab", repeat=size))
    both = any(matches(one, name) and matches(other, name) for name in names)
    assert globs_overlap(one, other) is both
