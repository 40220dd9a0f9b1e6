"""Model name -> route: globs, the order of the file, what a key may use, what it is shown."""

import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy.config import Config, Key, Route
from aiproxy.errors import ProxyError
from aiproxy.routes import Router, glob, is_glob, speaking
from rig import load

NAMES = st.text(alphabet="ab.[\n", max_size=5)
PATTERNS = st.text(alphabet="ab.[*?", min_size=1, max_size=5)


def route(model: str, listed: Sequence[str] = ()) -> Route:
    """Return a route for a model."""
    return Route.model_validate({"model": model, "upstreams": ["any"], "list": list(listed)})


def a_key(name: str = "any", models: Sequence[str] | None = None) -> Key:
    """Return a key that may use these models."""
    chosen = {} if models is None else {"models": list(models)}
    key = Key.model_validate({"sha256": "0" * 64, **chosen})
    key.bind(name)
    return key


def matches(pattern: str, name: str) -> bool:
    """Match as the contract says, one character after another."""
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(matches(pattern[1:], name[at:]) for at in range(len(name) + 1))
    return bool(name) and pattern[0] in ("?", name[0]) and matches(pattern[1:], name[1:])


def refusal(router: Router, model: str, key: Key) -> ProxyError:
    """Return why this key gets no route for this model."""
    with pytest.raises(ProxyError) as caught:
        router.choose(model, key)
    return caught.value


@given(PATTERNS, NAMES)
def test_globs_match_as_promised(pattern: str, name: str) -> None:
    """`*` is any text, `?` any one character, all else itself; over the whole name."""
    assert bool(glob(pattern).fullmatch(name)) == matches(pattern, name)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("gpt-*", "gpt-5", True),
        ("gpt-*", "gpt-", True),
        ("gpt-*", "my-gpt-5", False),
        ("gpt-*", "GPT-5", False),
        ("*", "org/any/thing", True),
        ("org/*", "org/a/b", True),
        ("gpt-?", "gpt-5", True),
        ("gpt-?", "gpt-", False),
        ("gpt-?", "gpt-55", False),
        ("gpt.5", "gpt-5", False),
        ("[ab]", "a", False),
        ("a*", "a\nb", True),
        ("m-?", "m-ü", True),
        ("(*", "(a", True),
        ("a$", "a", False),
    ],
)
def test_globs_by_example(pattern: str, name: str, *, expected: bool) -> None:
    """Case counts, nothing but `*` and `?` is special, and the whole name is meant."""
    assert bool(glob(pattern).fullmatch(name)) is expected


@pytest.mark.parametrize(
    ("text", "expected"), [("a*", True), ("a?", True), ("a", False), ("[a]", False)]
)
def test_is_glob(text: str, *, expected: bool) -> None:
    """Only `*` and `?` make a glob."""
    assert is_glob(text) is expected


@given(st.lists(PATTERNS | NAMES.filter(str.isprintable).filter(bool), max_size=6), NAMES)
def test_the_first_match_wins(patterns: list[str], model: str) -> None:
    """The route is the first of the file that matches, names and globs alike."""
    routes = [route(pattern) for pattern in patterns]
    router = Router(routes, [])
    expected = next((r for r in routes if matches(r.model, model)), None)
    if expected is None:
        error = refusal(router, model, a_key())
        assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    else:
        assert router.choose(model, a_key()) is expected


@given(st.lists(PATTERNS, min_size=1, max_size=3), NAMES)
def test_a_key_uses_only_its_models(models: list[str], model: str) -> None:
    """A key with `models` reaches a route only by a name that one of them matches."""
    key = a_key(models=models)
    router = Router([route("*")], [key])
    if any(matches(pattern, model) for pattern in models):
        assert router.choose(model, key).model == "*"
    else:
        assert refusal(router, model, key).code == "model_not_found"


def test_unknown_and_not_allowed_look_alike() -> None:
    """For a name that is not there and one that is another's, the refusal is the same."""
    key = a_key(models=["mine"])
    there = Router([route("mine"), route("theirs")], [key])
    not_there = Router([route("mine")], [key])
    assert repr(refusal(there, "theirs", key)) == repr(refusal(not_there, "theirs", key))


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (None, ["gpt-5", "fast", "org/small", "org/large"]),
        (["*"], ["gpt-5", "fast", "org/small", "org/large"]),
        (["org/*"], ["org/small", "org/large"]),
        (["fast", "gpt-?"], ["gpt-5", "fast"]),
        (["org/small"], ["org/small"]),
        (["none"], []),
    ],
)
def test_listed_names(models: list[str] | None, expected: list[str]) -> None:
    """Exact routes and what globs list, in the file's order, each once, and only the key's own."""
    key = a_key(models=models)
    routes = [
        route("gpt-5"),
        route("fast"),
        route("org/*", ["org/small", "org/large"]),
        route("fast"),
        route("*", ["org/small"]),
    ]
    assert Router(routes, [key]).listed(key) == expected


def test_a_name_that_is_listed_can_be_chosen() -> None:
    """Whatever is shown leads to a route."""
    router = Router([route("a*", ["ab"]), route("b")], [])
    assert [router.choose(name, a_key()).model for name in router.listed(a_key())] == ["a*", "b"]


def test_a_key_without_models_is_not_bound_by_another() -> None:
    """One key's `models` say nothing about a key that has none."""
    router = Router([route("m")], [a_key("narrow", ["x"]), a_key("wide")])
    assert router.choose("m", a_key("wide")).model == "m"
    assert refusal(router, "m", a_key("narrow")).code == "model_not_found"


def test_a_long_model_name_is_decided_at_once() -> None:
    """A caller's long name against a glob of several stars does not hold up the event loop."""
    router = Router([route("*-*-*-x")], [])
    began = time.process_time()
    assert refusal(router, "-" * 900, a_key()).code == "model_not_found"
    assert time.process_time() - began < 0.2


TWO_APIS = """
upstreams:
  chatty: {url: "http://127.0.0.1:1/v1", apis: [chat]}
routes:
  - {model: m, upstreams: [chatty]}
"""


@pytest.fixture
def config() -> Config:
    """Return a configuration whose upstream speaks chat alone."""
    return load(TWO_APIS)


def test_targets_speak_the_api(config: Config) -> None:
    """A route's targets are returned for an API that they speak."""
    (target,) = speaking(config.routes[0], "chat")
    assert target.upstream.name == "chatty"


@pytest.mark.parametrize("api", ["embeddings", "messages"])
def test_targets_that_do_not_speak_the_api(config: Config, api: str) -> None:
    """An endpoint that none of the targets speaks is 400 unsupported_parameter, param model."""
    with pytest.raises(ProxyError) as caught:
        speaking(config.routes[0], api)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "unsupported_parameter", "model")
