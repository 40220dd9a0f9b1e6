"""Texts that must have a certain form: URLs, headers, names, hashes, stores.

Each function takes the text and returns it, normalised where it says so, or raises ValueError with
the sentence that the writer of the file gets. A sentence never repeats a text that may hold a
secret: a URL, a header's value, a hash, a store.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from aiproxy.config.units import parse_host, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = r"^[A-Za-z0-9._-]{1,64}$"
"""Of upstreams and keys, which become labels of metrics."""
SHA256 = r"^[0-9A-Fa-f]{64}$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
TOKEN = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}$"  # noqa: S105 - RFC 9110, section 5.6.2
FIELD = r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_-]+)*$"
STORE = r"^(memory:|sqlite:/.+|rediss?://.+)$"
SHARED_STORE = r"^(memory:|rediss?://.+)$"

_MAX_MODEL = 256

# Headers about one connection or one body: they are true on one side of a proxy only (RFC 9110,
# section 7.6.1), and made anew on the other.
_FRAMING = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# What a client proves itself to aiproxy with, or its browser to a site: no upstream's business.
_CREDENTIALS = frozenset(["authorization", "x-api-key", "api-key", "cookie"])
_NEEDED = frozenset(["model", "input", "messages"])
# aiproxy sends these itself: the request id of its log line, the type of the body it sends.
_OWN = frozenset(["x-request-id", "content-type"])

AUTH_HEADERS: Mapping[str, frozenset[str]] = {
    "auto": frozenset(["authorization", "x-api-key"]),
    "bearer": frozenset(["authorization"]),
    "x-api-key": frozenset(["x-api-key"]),
    "api-key": frozenset(["api-key"]),
    "none": frozenset(),
}
"""The headers (in lower case) that an upstream's `auth` fills in."""


def url(text: str) -> str:
    """Return an http or https URL, without a trailing slash in its path; a query is kept."""
    if not re.fullmatch(r"[!-~]+", text):  # before urlsplit, which drops tabs and newlines
        raise ValueError("must be a URL of ASCII characters without spaces")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError("is no URL: its host or its port is wrong") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("must begin with http:// or https://")
    host = parts.hostname or ""
    if "@" in parts.netloc:
        raise ValueError("must not hold a user name or password: use credential")
    if "#" in text:
        raise ValueError("must not have a fragment ('#')")
    parse_host(f"[{host}]" if ":" in host else host, "is no URL: its host is wrong")
    if port == 0 or parts.netloc.endswith(":"):
        raise ValueError("is no URL: its port is wrong")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), parts.query, ""))


def model(text: str) -> str:
    """Return a model's name, or a glob for such names."""
    if not 0 < len(text) <= _MAX_MODEL or not text.isprintable():
        raise ValueError(f"must be 1 to {_MAX_MODEL} characters, no control characters among them")
    return text


def sha256(text: str) -> str:
    """Return a SHA-256 in hexadecimal digits, in lower case."""
    if text.startswith("sk-"):
        raise ValueError("a literal key is never accepted: `aiproxy key` prints its hash")
    if not re.fullmatch(SHA256, text):
        raise ValueError("must be the 64 hexadecimal digits of a SHA-256")
    return text.lower()


def variable(text: str) -> str:
    """Return the name of an environment variable."""
    if not re.fullmatch(VARIABLE, text):
        raise ValueError("must be the name of an environment variable, never a literal secret")
    return text


def secret(text: str) -> str:
    """Return what a header can carry as a credential, one trailing newline cut."""
    text = re.sub(r"\r?\n\Z", "", text)
    if not text:
        raise ValueError("is empty")
    if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", text):
        raise ValueError("must be printable ASCII, without spaces at its ends")
    return text


def header(text: str) -> str:
    """Return the name of a header that every request to an upstream gets."""
    name = _token(text)
    if name in _FRAMING | _OWN or name.startswith("proxy-"):
        raise ValueError("aiproxy sets this header itself, or it concerns one connection only")
    return text


def header_value(text: str) -> str:
    """Return the value of a header."""
    if re.search(r"[\x00-\x1f\x7f-\x9f]", text):
        raise ValueError("must not have control characters")
    return text


def header_allowed(text: str) -> str:
    """Return the name, in lower case, of a client's header that may pass."""
    name = _token(text)
    if name in _FRAMING | _CREDENTIALS or name.startswith("proxy-"):
        raise ValueError(f"{shown(name)} never passes: it concerns this connection or this client")
    return name


def _token(text: str) -> str:
    if not re.fullmatch(TOKEN, text):
        raise ValueError("must be the name of a header")
    return text.lower()


def denied_field(text: str) -> str:
    """Return a field that is denied to a key: `service_tier`, `tools.web_search`."""
    if not re.fullmatch(FIELD, text):
        raise ValueError("must be a field such as service_tier or tools.web_search")
    if text in _NEEDED:
        raise ValueError(f"every request needs {text}: to refuse the key, disable it")
    return text


def store(text: str) -> str:
    """Return where sessions are kept: `memory:`, `sqlite:PATH` or `redis://...`."""
    if not re.fullmatch(STORE, text):
        raise ValueError("must be memory:, sqlite:/PATH (absolute) or redis://HOST:PORT/DB")
    return text


def shared_store(text: str) -> str:
    """Return where limits are counted: `memory:` or `redis://...`."""
    if not re.fullmatch(SHARED_STORE, text):
        raise ValueError("must be memory: or redis://HOST:PORT/DB")
    return text


def absolute(text: str) -> str:
    """Return the path of a file, which must not depend on where the daemon was started."""
    if not text.startswith("/") or not text.isprintable():
        raise ValueError("must be an absolute path")
    return text
