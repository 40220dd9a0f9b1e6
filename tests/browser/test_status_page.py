"""The status page in a real browser: what it shows, how it goes on, and what it survives."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

import aiproxy
import aiproxy.status
from browser.conftest import PHONE, WIDE
from invariants import SECRETS, eventually
from rig import (
    OUTPUT_CANARY,
    PROMPT_CANARY,
    TEAM_A,
    TEAM_B,
    Proxy,
    config_text,
    key_hash,
    prompt,
    routes,
)
from steps import SSE_HEADERS
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Wait, error_answer

if TYPE_CHECKING:
    from playwright.async_api import Route

    from browser.conftest import Look, Shown
    from faults import Serve

pytestmark = pytest.mark.browser

ODD = "<img src=x onerror=alert(1)>"
SIZES = pytest.mark.parametrize("size", [WIDE, (820, 1000), PHONE], ids=["wide", "tablet", "phone"])
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])
REFUSED = "error: Failed to load resource: net::ERR_CONNECTION_REFUSED"


async def lively(serve: Serve, upstream: ScriptedUpstream) -> Proxy:
    """Start a daemon with something to see in every place of the page."""
    dead = {"url": "http://127.0.0.1:1/v1", "apis": ["responses"]}
    odd = [
        {"model": "dead/*", "upstreams": ["dead"]}, {"model": ODD, "upstreams": ["scripted"]},
    ]  # fmt: skip
    proxy = await serve(
        upstreams={"dead": dead},
        routes=[*routes(limits={"tokens": "900000/min"}), *odd],
        keys={
            "team-a": {"limits": {"requests": "20/day", "tokens": "900000/h", "concurrent": 4}},
            "team-b": {"limits": {"requests": "2/day"}},
            "off": {"sha256": key_hash("x"), "disabled": True},
        },
        breaker={"failures": 3, "cooldown": "10min", "max_cooldown": "10min"},
    )
    upstream.text = OUTPUT_CANARY
    await proxy.post(body=prompt(stream=True))
    for _ in range(3):
        await proxy.post(key=TEAM_B)
    for _ in range(4):
        await proxy.post(body=prompt(model="dead/one"))
    await fail(proxy, upstream, "first-failure")
    return proxy


async def fail(proxy: Proxy, upstream: ScriptedUpstream, request_id: str) -> None:
    """Let a request fail at its upstream, under this id."""
    upstream.heal()
    upstream.script(*error_answer(500))
    assert (await proxy.post(headers=[("x-request-id", request_id)])).status == 502


async def cells(shown: Shown, table: str, row: str) -> list[str]:
    """Return what stands in a row of a table, each cell on one line."""
    found = shown.page.locator(f"#{table} tbody tr").filter(has_text=row).first.locator("th, td")
    return [" ".join(text.split()) for text in await found.all_inner_texts()]


async def test_it_shows_the_report(serve: Serve, upstream: ScriptedUpstream, look: Look) -> None:
    """Every part of the report is on the page, in words and numbers, and nothing goes wrong."""
    proxy = await lively(serve, upstream)
    shown = await look(proxy)
    await shown.shows("#upstreams", "left alone")
    assert await shown.text("#bar h1") == f"aiproxy {aiproxy.__version__}"
    assert await shown.text("#state") == "✓ ready"
    assert "Left alone: dead" in await shown.text("#said")
    assert await shown.text("#listen") == f"127.0.0.1:{proxy.port}"
    assert await shown.text("#requests") == "9"
    assert "upstream_error 5" in " ".join((await shown.text("#outcomes")).split())
    dead = await cells(shown, "upstreams", "dead")
    assert dead[1].startswith("✕ left alone tried again in ")
    assert (dead[4], dead[5]) == ("3", "3 (100 %) connect 3")
    route = await cells(shown, "routes", "gpt-test")
    assert route[2] == "5"
    assert route[6] == "54 33 in, 21 out"
    assert route[7].startswith("tokens per minute 900 k of 900 k")
    assert (await cells(shown, "keys", "team-b"))[3:5] == ["3", "1"]
    assert (await cells(shown, "keys", "off"))[1] == "disabled"
    assert await shown.text("#store") == "memory"
    failure = await cells(shown, "failures", "first-failure")
    assert failure[1:8] == [
        "first-failure Copy", "upstream_error", "502", "responses", "team-a", "gpt-test",
        "scripted",
    ]  # fmt: skip
    assert await shown.page.title() == "aiproxy: ready"
    await shown.check_quiet()


async def test_levels_are_bars(serve: Serve, upstream: ScriptedUpstream, look: Look) -> None:
    """Each limit has a bar as long as what is left, with the same in words, and says when low."""
    shown = await look(await lively(serve, upstream))
    found = await shown.page.evaluate(
        """() => [...document.querySelectorAll("#keys .level")].map((level) => {
          const bar = level.querySelector("[role=meter]");
          const filled = bar.firstElementChild.getBoundingClientRect().width;
          return [bar.getAttribute("aria-label"), level.children[1].textContent,
                  Math.round(100 * filled / bar.getBoundingClientRect().width)];
        })"""
    )
    by_name = {name: (text, filled) for name, text, filled in found}
    assert len(found) == 4
    assert by_name["requests per day"] == ("empty: 0 of 2", 0)  # the last one: of team-b
    assert by_name["at the same time"] == ("4 of 4", 100)
    assert ["requests per day", "15 of 20", 75] in found


async def test_it_refreshes(serve: Serve, upstream: ScriptedUpstream, look: Look) -> None:
    """What happens meanwhile appears by itself, in the rows that are there already."""
    proxy = await lively(serve, upstream)
    shown = await look(proxy)
    await shown.page.evaluate("""() => {
      window.rows = [...document.querySelectorAll("#routes tbody tr, #keys tbody tr")];
    }""")
    await proxy.post()
    await shown.shows("#requests", "10")
    await fail(proxy, upstream, "second-failure")
    await shown.shows("#failures tbody tr:first-child", "second-failure")
    await shown.shows("#failures tbody tr:nth-child(2)", "first-failure")
    assert await shown.page.evaluate("""() => {
      const now = [...document.querySelectorAll("#routes tbody tr, #keys tbody tr")];
      return now.length === rows.length && now.every((row, index) => row === rows[index]);
    }""")
    await shown.check_quiet()


async def test_streams_in_flight(serve: Serve, upstream: ScriptedUpstream, look: Look) -> None:
    """A stream is seen while it lasts, and is gone when it has ended."""
    proxy = await serve()
    shown = await look(proxy)
    go_on = asyncio.Event()
    upstream.script(Headers(200, SSE_HEADERS), Chunk(b": x\n\n"), Wait(go_on), EndChunks())
    await proxy.send(body=prompt(stream=True))
    await shown.shows("#streams", "1")
    assert (await cells(shown, "keys", "team-a"))[2] == "1"
    go_on.set()
    await shown.shows("#streams", "0")


@SIZES
async def test_place_focus_and_selection_stay(
    serve: Serve, upstream: ScriptedUpstream, look: Look, size: tuple[int, int]
) -> None:
    """A refresh moves neither the page, nor the focus, nor what is selected."""
    proxy = await lively(serve, upstream)
    shown = await look(proxy, size)
    await shown.page.locator("#failures code", has_text="first-failure").click()
    await shown.page.get_by_role("button", name="Copy request id first-failure").focus()
    await shown.page.evaluate("scrollTo(0, 300)")
    places = """() => [...document.querySelectorAll("section, dl")].map(
      (one) => Math.round(one.getBoundingClientRect().top))"""
    before = await shown.page.evaluate(places)
    await fail(proxy, upstream, "second-failure")
    await shown.shows("#failures", "second-failure")
    assert await shown.page.evaluate("scrollY") == 300
    assert await shown.page.evaluate(places) == before
    assert await shown.page.evaluate("document.activeElement.ariaLabel") == (
        "Copy request id first-failure"
    )
    assert await shown.page.evaluate("String(getSelection())") == "first-failure"


async def test_a_request_id_is_copied(serve: Serve, upstream: ScriptedUpstream, look: Look) -> None:
    """One click puts it on the clipboard."""
    permissions = ["clipboard-read", "clipboard-write"]
    shown = await look(await lively(serve, upstream), permissions=permissions)
    button = shown.page.get_by_role("button", name="Copy request id first-failure")
    await button.click()
    await shown.until("document.body.innerText.includes('Copied')")
    assert await shown.page.evaluate("navigator.clipboard.readText()") == "first-failure"
    await shown.check_quiet()


async def test_a_hidden_page_asks_nothing(serve: Serve, look: Look) -> None:
    """In the background it rests; when it is seen again it is up to date at once."""
    proxy = await serve()
    shown = await look(proxy)
    asked: list[str] = []
    go_on = asyncio.Event()

    async def hold(route: Route) -> None:
        asked.append(route.request.url)
        await go_on.wait()
        await route.continue_()

    async def held() -> None:
        assert asked

    async def later() -> int:
        """Let time pass, and what it sets off be asked; return how often it was."""
        await shown.page.clock.fast_forward(60_000)
        await shown.page.evaluate("fetch('metrics').then((answer) => answer.text())")
        return len(asked)

    await shown.page.route("**/-/status", hold)
    await eventually(held, 15)
    await proxy.post()
    await hide(shown, hidden=True)
    go_on.set()
    await shown.shows("#requests", "1")  # what was under way comes to its end
    await proxy.post()
    assert [await later() for _ in range(3)] == [1, 1, 1]
    assert await shown.text("#requests") == "1"
    await hide(shown, hidden=False)
    await shown.shows("#requests", "2")
    await hide(shown, hidden=True)  # while nothing is under way
    await shown.page.evaluate("fetch('metrics').then((answer) => answer.text())")
    before = len(asked)
    assert await later() == before


async def hide(shown: Shown, *, hidden: bool) -> None:
    """Let the page believe that its tab is hidden, or seen again."""
    await shown.page.evaluate(
        """(hidden) => {
          Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
          document.dispatchEvent(new Event("visibilitychange"));
        }""",
        hidden,
    )


async def test_a_daemon_that_is_gone(upstream: ScriptedUpstream, look: Look) -> None:
    """The page says so, and how old it is, over all else; and goes on when one is back."""
    first = await Proxy.start(config_text(upstream.url))
    shown = await look(first)
    await first.post()
    await shown.shows("#requests", "1")
    admin = f"127.0.0.1:{first.daemon.operators.port}"
    await first.stop()
    await shown.shows("#said", "aiproxy cannot be reached")
    assert "What stands here is old" in await shown.text("#said")
    assert await shown.text("#state") == "✕ lost"
    assert await shown.text("#requests") == "1"
    assert "lost" in await shown.page.title()
    await shown.page.clock.fast_forward(90_000)
    await shown.shows("#age", "updated 1\u202fmin")
    second = await Proxy.start(config_text(upstream.url, admin=admin))
    try:
        await shown.shows("#state", "ready")
        assert "cannot be reached" not in await shown.text("#said")
        assert await shown.text("#requests") == "0"
        assert set(shown.said) == {REFUSED}
    finally:
        await second.stop()


async def test_an_answer_that_is_an_error(
    serve: Serve, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page says which, and goes on when it has passed."""
    shown = await look(await serve())

    async def broken(self: object) -> dict[str, Any]:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(aiproxy.status.Status, "report", broken)
        await shown.shows("#said", "aiproxy answers with status 500")
    await shown.shows("#state", "ready")


async def test_an_answer_that_means_nothing(
    serve: Serve, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a report that is another one than it knows the page says so, instead of half of it."""
    shown = await look(await serve())

    async def other(self: object) -> dict[str, Any]:
        return {"version": "99"}

    with monkeypatch.context() as patch:
        patch.setattr(aiproxy.status.Status, "report", other)
        await shown.shows("#said", "aiproxy answers what this page does not understand")
    await shown.shows("#state", "ready")


async def test_a_drain_is_said(serve: Serve, upstream: ScriptedUpstream, look: Look) -> None:
    """While it drains the page says what is waited for."""
    proxy = await serve()
    shown = await look(proxy)
    go_on = asyncio.Event()
    upstream.script(Headers(200, SSE_HEADERS), Chunk(b": x\n\n"), Wait(go_on), EndChunks())
    await proxy.send(body=prompt(stream=True))
    await upstream.wait_request()
    drain = asyncio.ensure_future(proxy.daemon.drain())
    await shown.shows("#said", "Draining: it stops once its requests in flight have ended (1)")
    assert await shown.text("#state") == "↓ draining"
    go_on.set()
    await drain


async def test_a_failed_reload_is_said(serve: Serve, look: Look) -> None:
    """Until a good one the page says which configuration is in force."""
    proxy = await serve()
    shown = await look(proxy)
    assert await shown.text("#reload") == "none"
    whole, proxy.text = proxy.text, "nonsense"
    await proxy.daemon.reload()
    await shown.shows("#said", "The last reload failed; the configuration of")
    assert await shown.text("#reload") == "failed"
    proxy.text = whole
    await proxy.daemon.reload()
    await shown.shows("#reload", "successful")
    assert await shown.text("#said") == "Every upstream takes requests."


@SIZES
async def test_it_fits(
    serve: Serve, upstream: ScriptedUpstream, look: Look, size: tuple[int, int]
) -> None:
    """Nothing is wider than the window, and no text is cut off or runs into another."""
    proxy = await lively(serve, upstream)
    long_id = "x" * 128
    await fail(proxy, upstream, long_id)
    shown = await look(proxy, size)
    await shown.shows("#failures", long_id)
    assert await shown.page.evaluate("document.documentElement.scrollWidth") == size[0]
    assert (
        await shown.page.evaluate("""() => [...document.querySelectorAll(
      "dt, dd > *, th, td, td > *, li, p, h1, h2, #state")]
      .filter((one) => one.checkVisibility() && !one.closest("thead") &&
        one.scrollWidth > Math.ceil(one.getBoundingClientRect().width) + 1)
      .map((one) => one.outerHTML)""")
        == []
    )
    await shown.check_quiet()


# The least contrast of a text with what lies under it, of all that can be seen (WCAG 2.2, 1.4.3).
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, index) => sum + c * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const color = parse(getComputedStyle(one).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    const text = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!text || !one.checkVisibility() || one.matches("script, style, noscript *")) continue;
    const both = [light(parse(getComputedStyle(one).color)), light(ground(one))].sort();
    const contrast = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    if (contrast < 4.5) found.push([contrast.toFixed(2), one.outerHTML]);
  }
  return found;
}"""


@SCHEMES
@SIZES
async def test_it_is_readable(
    serve: Serve, upstream: ScriptedUpstream, look: Look, size: tuple[int, int], scheme: str
) -> None:
    """Light and dark as the system is, and all text has the contrast that WCAG AA asks for."""
    shown = await look(await lively(serve, upstream), size, scheme=scheme)
    ground = await shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(14, 18, 22)") == (scheme == "dark")
    assert await shown.page.evaluate(CONTRAST) == []


@SIZES
async def test_tables_are_tables(
    serve: Serve, upstream: ScriptedUpstream, look: Look, size: tuple[int, int]
) -> None:
    """To those who cannot see it, also where rows are laid out as cards."""
    shown = await look(await lively(serve, upstream), size)
    for name, rows in (("Upstreams", 2), ("Routes", 5), ("Keys", 3), ("Last failures", 5)):
        table = shown.page.get_by_role("table", name=name)
        # By name: not every browser keeps what an element means when it is laid out otherwise.
        many = {
            role: await table.locator(f"[role={role}]").count()
            for role in ("rowgroup", "row", "rowheader", "columnheader", "cell")
        }
        heads = await table.locator("thead th").count()
        assert many == {
            "rowgroup": 2, "row": rows + 1, "rowheader": rows, "columnheader": heads,
            "cell": rows * (heads - 1),
        }  # fmt: skip
        assert await table.get_attribute("role") == "table"


async def test_names_are_text(serve: Serve, upstream: ScriptedUpstream, look: Look) -> None:
    """A name that looks like a tag stands there as it is, and nothing secret stands anywhere."""
    shown = await look(await lively(serve, upstream))
    assert (await cells(shown, "routes", ODD))[0] == f"{ODD} scripted"
    assert await shown.page.locator("img").count() == 0
    seen = await shown.page.content()
    for secret in (*SECRETS, TEAM_A, PROMPT_CANARY, OUTPUT_CANARY):
        assert secret not in seen
    await shown.check_quiet()


async def test_nothing_else_can_act(serve: Serve, look: Look) -> None:
    """What got into the page all the same would neither run, nor load, nor look."""
    shown = await look(await serve())
    await shown.page.evaluate("""() => {
      const add = (tag, fill) => {
        const one = document.createElement(tag);
        fill(one);
        document.body.append(one);
      };
      add("script", (one) => { one.textContent = "window.ran = true"; });
      add("style", (one) => { one.textContent = "body { display: none }"; });
      add("img", (one) => { one.src = "/metrics"; });
      add("p", (one) => { one.setAttribute("style", "color: red"); });
    }""")
    await shown.until("forbidden.length >= 4")
    assert set(await shown.page.evaluate("forbidden")) == {
        "script-src-elem", "style-src-elem", "img-src", "style-src-attr",
    }  # fmt: skip
    assert await shown.page.evaluate("window.ran") is None
    assert await shown.page.locator("body").is_visible()


async def test_without_scripts(serve: Serve, look: Look) -> None:
    """A browser that runs none is told where the same can be read."""
    shown = await look(await serve(), java_script_enabled=False)
    assert "This page needs JavaScript" in await shown.text("body")
    await shown.page.get_by_role("link", name="-/status", exact=True).click()
    assert '"version"' in await shown.text("body")


async def test_where_there_is_nothing(serve: Serve, look: Look) -> None:
    """Before the first request every place says that there is nothing yet."""
    shown = await look(await serve(keys={"team-b": {"limits": {"requests": "9/min"}}}))
    assert "No request has failed since the start." in await shown.text("main")
    assert await shown.text("#outcomes") == "no request has ended yet"
    assert await shown.text("#requests-failed") == "none failed"
    assert await shown.text("#said") == "Every upstream takes requests."
    await shown.check_quiet()
