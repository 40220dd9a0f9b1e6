"""A browser, and the status page in it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from playwright.async_api import Browser, ConsoleMessage, Page

    from rig import Proxy

    Look = Callable[..., Awaitable["Shown"]]

WIDE, PHONE = (1280, 800), (360, 740)  # CSS pixels
LIMIT = 15_000  # ms for what is waited for
# Where it is told of everything that the policy of a page has forbidden.
LISTEN = """
window.forbidden = [];
addEventListener("securitypolicyviolation", (event) => forbidden.push(event.violatedDirective));
"""


class Shown:
    """The status page as a browser shows it.

    Attributes:
        page: to look at, and to use.
        said: what stands in the browser's console, by kind: errors, warnings, uncaught exceptions.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.said: list[str] = []
        page.set_default_timeout(LIMIT)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.said.append(f"uncaught: {error}"))

    def _on_console(self, message: ConsoleMessage) -> None:
        self.said.append(f"{message.type}: {message.text}")

    async def text(self, selector: str) -> str:
        """Return what stands there, as it is seen."""
        text: str = await self.page.locator(selector).inner_text()
        return text

    async def until(self, script: str, value: object = None) -> None:
        """Wait until an expression over `value` is true in the page."""
        await self.page.wait_for_function(f"(value) => {script}", arg=value)

    async def shows(self, selector: str, text: str) -> None:
        """Wait until a text stands there."""
        wanted = {"selector": selector, "text": text}
        await self.until(
            "document.querySelector(value.selector).innerText.includes(value.text)", wanted
        )

    async def fill(self) -> None:
        """Wait for the first report."""
        await self.page.wait_for_selector("#main:not([hidden])")

    async def check_quiet(self) -> None:
        """Assert that nothing went wrong, and that nothing was tried that the policy forbids."""
        assert self.said == []
        assert await self.page.evaluate("forbidden") == []


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    """Start Debian's Chromium."""
    from playwright.async_api import async_playwright  # noqa: PLC0415 - only here it is needed

    path = shutil.which("chromium")
    assert path, "there is no chromium: run tests/browser/install"
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=path)
        yield browser
        await browser.close()


@pytest.fixture
async def look(chromium: Browser) -> Look:
    """Open the status page of a daemon; options as of a browser's context."""

    async def open_page(
        proxy: Proxy, size: tuple[int, int] = WIDE, *, scheme: str = "light", **options: Any
    ) -> Shown:
        viewport: Any = {"width": size[0], "height": size[1]}
        color_scheme: Any = scheme
        context = await chromium.new_context(
            viewport=viewport, color_scheme=color_scheme, **options
        )
        await context.add_init_script(LISTEN)
        shown = Shown(await context.new_page())
        if options.get("java_script_enabled") is False:
            await shown.page.goto(address(proxy))
        else:
            await shown.page.clock.install()  # time goes on, until a test says otherwise
            await shown.page.goto(address(proxy))
            await shown.fill()
        return shown

    return open_page


def address(proxy: Proxy) -> str:
    """Return the page's address."""
    return f"http://127.0.0.1:{proxy.daemon.operators.port}/"
