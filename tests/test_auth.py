"""Who is calling: the one key that the headers present, and whose it is."""

import hashlib
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from aiproxy import auth
from aiproxy.config import Key
from aiproxy.errors import ProxyError

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
SECRET = "sk-aip-the-key"
OTHER = "sk-aip-another"


def digest(secret: str) -> str:
    """Return the hash as the configuration has it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def ring(**fields: Any) -> auth.Keyring:
    """Return a keyring of one key, `team`."""
    key = Key.model_validate({"sha256": digest(SECRET), **fields})
    key.bind("team")
    return auth.Keyring([key])


def refused(keyring: auth.Keyring, secret: str = SECRET, now: datetime = NOW) -> ProxyError:
    """Return why a key is refused."""
    with pytest.raises(ProxyError) as caught:
        keyring.authenticate(secret, now)
    return caught.value


@pytest.mark.parametrize(
    ("authorization", "api_key"),
    [
        (["Bearer K"], []),
        (["bearer K"], []),
        (["BEARER   K "], []),
        ([], ["K"]),
        ([], [" K "]),
        (["Bearer K"], ["K"]),
        (["Bearer K", "Bearer K"], ["K", "K"]),
    ],
)
def test_one_key_is_presented(authorization: list[str], api_key: list[str]) -> None:
    """As a Bearer token in any case, as x-api-key, or as both when they are the same."""
    assert auth.presented(authorization, api_key) == "K"


@pytest.mark.parametrize(
    ("authorization", "api_key"),
    [
        ([], []),
        (["Bearer K"], ["L"]),
        (["Bearer K", "Bearer L"], []),
        ([], ["K", "L"]),
        (["Basic K"], []),
        (["K"], []),
        (["Bearer"], []),
        (["Bearer "], []),
        ([], [""]),
        ([], [" "]),
    ],
)
def test_none_or_two_keys_are_refused(authorization: list[str], api_key: list[str]) -> None:
    """No key, an empty one, another scheme, and two different keys are 401."""
    with pytest.raises(ProxyError) as caught:
        auth.presented(authorization, api_key)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert caught.value.close


def test_a_key_is_known_by_its_hash() -> None:
    """The key itself finds its stanza; its hash, its name and a part of it do not."""
    keyring = ring()
    assert keyring.authenticate(SECRET, NOW).name == "team"
    for wrong in (digest(SECRET), "team", SECRET[:-1], SECRET + " ", SECRET.upper(), "", "ü\udc80"):
        assert refused(keyring, wrong).code == "invalid_api_key"


def test_up_to_four_hashes_of_one_key() -> None:
    """While a key is rotated, the old and the new secret are the same key."""
    secrets = [f"sk-{number}" for number in range(4)]
    keyring = ring(sha256=[digest(secret) for secret in secrets])
    assert {keyring.authenticate(secret, NOW).name for secret in secrets} == {"team"}


def test_a_hash_in_capitals_is_the_same_hash() -> None:
    """Hexadecimal digits count in either case."""
    assert ring(sha256=digest(SECRET).upper()).authenticate(SECRET, NOW).name == "team"


def test_a_disabled_key_is_refused() -> None:
    """`disabled` alone decides."""
    assert refused(ring(disabled=True)).code == "invalid_api_key"


EXPIRES = [
    ("2027-06-30", datetime(2027, 7, 1, tzinfo=UTC)),
    ("2028-02-29", datetime(2028, 3, 1, tzinfo=UTC)),
    ("2027-06-30T10:00:00Z", datetime(2027, 6, 30, 10, tzinfo=UTC)),
    ("2027-06-30T10:00:00+02:00", datetime(2027, 6, 30, 8, tzinfo=UTC)),
]


@pytest.mark.parametrize(("expires", "end"), EXPIRES, ids=[text for text, _ in EXPIRES])
def test_expiry(expires: str, end: datetime) -> None:
    """A date is the last valid day in UTC; an instant is the first moment that is not valid."""
    keyring = ring(expires=expires)
    assert keyring.authenticate(SECRET, end - timedelta(microseconds=1)).name == "team"
    assert refused(keyring, now=end).code == "invalid_api_key"
    elsewhere = end.astimezone(timezone(timedelta(hours=-9)))
    assert refused(keyring, now=elsewhere).code == "invalid_api_key"


def test_every_refusal_is_the_same() -> None:
    """Unknown, disabled, expired and not presented cannot be told apart."""
    with pytest.raises(ProxyError) as none_at_all:
        auth.presented([], [])
    refusals = [
        none_at_all.value,
        refused(ring(), OTHER),
        refused(ring(disabled=True)),
        refused(ring(expires="2020-01-01")),
    ]
    assert len({(e.render("openai"), e.status, e.headers, e.outcome) for e in refusals}) == 1
    assert len({e.render("anthropic") for e in refusals}) == 1


def test_several_keys_do_not_mix() -> None:
    """Each secret leads to its own key."""
    keys = []
    for name, secret in (("one", SECRET), ("two", OTHER)):
        key = Key.model_validate({"sha256": digest(secret)})
        key.bind(name)
        keys.append(key)
    keyring = auth.Keyring(keys)
    assert keyring.authenticate(SECRET, NOW).name == "one"
    assert keyring.authenticate(OTHER, NOW).name == "two"
