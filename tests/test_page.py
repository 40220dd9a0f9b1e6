"""The status page is one file of ours, and its policy lets nothing but that file act.

What it shows in a browser: `browser/`.
"""

import hashlib
import re
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path

import aiproxy
from faults import Serve

FILE = Path(aiproxy.__file__).parent / "status.html"
LOADING = {"src", "srcset", "href", "action", "data", "poster", "background", "ping", "formaction"}


class Page(HTMLParser):
    """The elements of a page, and its attributes with all their values."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: dict[str, list[str | None]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one element."""
        self.elements.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value)


async def test_the_page_is_one_file(serve: Serve) -> None:
    """It is the same whatever is asked and configured, and names nothing from elsewhere."""
    proxy = await serve()
    answer = await proxy.admin("/")
    assert answer.body == FILE.read_bytes()
    assert answer.body.startswith(
        b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    )
    page = Page()
    page.feed(answer.body.decode())
    assert page.attributes.keys() & LOADING == {"href"}
    assert page.attributes["href"] == ["-/status", "metrics", "-/config", "-/status"]
    assert not {name for name in page.attributes if name.startswith("on") or name == "style"}
    assert not page.elements & {"link", "img", "iframe", "object", "embed", "base", "form", "svg"}
    assert not re.search(rb"url\(|@import|//[a-z]|innerHTML|outerHTML|insertAdj|eval", answer.body)
    proxy.text = "nonsense"
    await proxy.daemon.reload()
    await proxy.post()
    assert (await proxy.admin("/")).body == answer.body


async def test_the_policy_lets_nothing_else_act(serve: Serve) -> None:
    """One style and one script, by the hashes of what is sent, and questions to itself alone."""
    proxy = await serve()
    answer = await proxy.admin("/")
    sent = {}
    for kind in ("style", "script"):
        (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>".encode(), answer.body, re.DOTALL)
        sent[kind] = b64encode(hashlib.sha256(content).digest()).decode()
    assert answer.headers["content-security-policy"].split("; ") == [
        "default-src 'none'", f"style-src 'sha256-{sent['style']}'",
        f"script-src 'sha256-{sent['script']}'", "connect-src 'self'", "base-uri 'none'",
        "form-action 'none'", "frame-ancestors 'none'",
    ]  # fmt: skip
    assert answer.headers["x-content-type-options"] == "nosniff"
