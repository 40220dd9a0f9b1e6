"""Which headers cross: allow-lists in both directions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy import headers

# Of the contract, section 3.
UP = [
    "content-type",
    "accept",
    "user-agent",
    "openai-beta",
    "anthropic-version",
    "anthropic-beta",
    "x-stainless-os",
    "x-stainless-retry-count",
    "x-codex-turn-metadata",
    "session-id",
    "session_id",
    "thread-id",
    "originator",
    "x-client-request-id",
]
BACK = [
    "content-type",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "openai-processing-ms",
    "openai-version",
    "x-codex-limit",
]
NEVER = [
    "authorization",
    "x-api-key",
    "api-key",
    "cookie",
    "host",
    "content-length",
    "content-encoding",
    "transfer-encoding",
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "accept-encoding",
    "proxy-authorization",
    "proxy-connection",
    "x-forwarded-for",
    "x_forwarded_user",
    "x-forwarded-user",
    "x-request-id",
    "x-api_key",
    "content_type",
    "x_stainless_os",
    "x-stainless",
    "xx-codex-a",
    "openai-organization",
    "traceparent",
    "origin",
]
NEVER_BACK = [
    "set-cookie",
    "server",
    "date",
    "connection",
    "content-length",
    "transfer-encoding",
    "content-encoding",
    "x-request-id",
    "x-aiproxy-upstream",
    "x-ratelimit-limit-requests",
    "openai-organization",
    "strict-transport-security",
    "alt-svc",
    "location",
    "www-authenticate",
    "retry_after",
]


@pytest.mark.parametrize("spelt", [str.lower, str.upper, str.title])
@pytest.mark.parametrize("name", UP)
def test_what_goes_upstream(name: str, spelt: "type[str]") -> None:
    """The named headers go upstream, however they are spelt, their values unchanged."""
    field = (spelt(name), "v 1; q=0.5")
    assert headers.to_upstream([field]) == [field]


@pytest.mark.parametrize("name", NEVER)
def test_what_does_not_go_upstream(name: str) -> None:
    """Everything else stays here: credentials, framing, cookies, look-alikes."""
    assert headers.to_upstream([(name, "v"), (name.upper(), "v")]) == []


def test_further_headers_that_may_pass() -> None:
    """`header_allow` lets exactly its names pass, in any case of the client's."""
    received = [("X-Team", "a"), ("x-team-b", "b"), ("x-Trace", "c")]
    extra = frozenset({"x-team", "x-trace"})
    assert headers.to_upstream(received, extra) == [("X-Team", "a"), ("x-Trace", "c")]


def test_what_connection_names_does_not_go_upstream() -> None:
    """A field that the client's Connection names concerns that connection (RFC 9110, 7.6.1)."""
    received = [
        ("Connection", "close, X-Codex-Hop"),
        ("connection", "originator"),
        ("x-codex-hop", "1"),
        ("originator", "cli"),
        ("accept", "*/*"),
    ]
    assert headers.to_upstream(received) == [("accept", "*/*")]


@given(st.text(st.characters(max_codepoint=0x24F), max_size=20))
def test_values_that_go_upstream_can_be_written(text: str) -> None:
    """Bytes that came as surrogates become something that can be encoded; all else stays."""
    for value in (text, text + "\udcff"):
        ((_, sent),) = headers.to_upstream([("accept", value)])
        assert sent.encode().decode().startswith(text)


@pytest.mark.parametrize("spelt", [str.lower, str.upper, str.title])
@pytest.mark.parametrize("name", BACK)
def test_what_comes_back(name: str, spelt: "type[str]") -> None:
    """The named headers of an answer go on to the client."""
    assert headers.to_client([(spelt(name), "17")]) == [(spelt(name), "17")]


@pytest.mark.parametrize("name", NEVER_BACK)
def test_what_does_not_come_back(name: str) -> None:
    """Everything else of an answer stays here."""
    assert headers.to_client([(name, "v"), (name.upper(), "v")]) == []


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("\x00\r\n\x7f\udc80")))
def test_values_that_come_back_are_harmless(value: str) -> None:
    """No control character reaches the client, nor what is not ASCII."""
    for _, passed in headers.to_client([("retry-after", value)]):
        assert passed == value
        assert all(" " <= character <= "~" or character == "\t" for character in passed)


@pytest.mark.parametrize(
    "given_id", ["a", "A.b_c-9", "0" * 128, "550e8400-e29b-41d4-a716-446655440000"]
)
def test_a_request_id_that_may_be_repeated(given_id: str) -> None:
    """1 to 128 characters of `[A-Za-z0-9._-]` are kept."""
    assert headers.request_id(given_id) == given_id


@pytest.mark.parametrize(
    "given_id", [None, "", "0" * 129, "a b", "a/b", "a\n", "ü", "a,b", "<x>", "\u0663"]
)
def test_a_request_id_that_may_not(given_id: str | None) -> None:
    """Anything else is replaced."""
    assert headers.request_id(given_id) is None


@pytest.mark.parametrize(
    ("way", "api", "header"),
    [
        ("auto", "responses", ("Authorization", "Bearer S")),
        ("auto", "chat", ("Authorization", "Bearer S")),
        ("auto", "embeddings", ("Authorization", "Bearer S")),
        ("auto", "messages", ("x-api-key", "S")),
        ("bearer", "messages", ("Authorization", "Bearer S")),
        ("x-api-key", "responses", ("x-api-key", "S")),
        ("api-key", "chat", ("api-key", "S")),
        ("none", "chat", None),
        ("none", "messages", None),
    ],
)
def test_how_the_credential_is_carried(way: str, api: str, header: tuple[str, str] | None) -> None:
    """`auto` is Bearer, but x-api-key on messages; the others are what they say."""
    assert headers.credential(way, api, "S") == header


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", "application/json"),
        ("Application/JSON; charset=utf-8", "application/json"),
        (" text/event-stream ;x", "text/event-stream"),
        ("", ""),
    ],
)
def test_media_type(content_type: str, expected: str) -> None:
    """Parameters and case do not count."""
    assert headers.media_type(content_type) == expected
