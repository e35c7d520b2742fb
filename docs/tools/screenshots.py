"""Takes the pictures of the page of `nlae serve` that the documentation shows, each in light and dark.

    nlae serve --model smollm2-135m
    python docs/tools/screenshots.py http://127.0.0.1:5009

It needs playwright, which is in the extra `test`, and Chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

ASSETS = Path(__file__).parents[1] / "assets"
TEXT = "The ferry to the island was cancelled because of the storm"
_MILLISECONDS = 120_000  # a slow machine needs this long to explain a text
# The page's security policy does not let a test evaluate strings, so whatever is waited for is a selector.
_ALL_SCORED = "#tokens:not(:has(.tok:not(.scored)))"


def main(address: str) -> None:
    """Writes `viewer-THEME.png` (a text on a wide screen) and `viewer-phone-THEME.png` (a chat on a phone)."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for theme in ("light", "dark"):
            wide: dict[str, Any] = {"viewport": {"width": 1200, "height": 980}}
            phone: dict[str, Any] = {"viewport": {"width": 390, "height": 1350}}
            for name, options, show in (("viewer", wide, _show_text), ("viewer-phone", phone, _show_chat)):
                page = browser.new_context(color_scheme=theme, **options).new_page()
                page.set_default_timeout(_MILLISECONDS)
                page.goto(f"{address}/viewer")
                page.wait_for_selector("#variance:not(:empty)", state="attached")
                show(page)
                page.screenshot(path=ASSETS / f"{name}-{theme}.png")
        browser.close()


def _show_text(page: Page) -> None:
    """Explains every token of a text and scores a sentence for the last one."""
    page.fill("#text", TEXT)
    page.click("#read")
    page.wait_for_selector(".tok.pinned.scored")
    page.click("#explain-all")
    page.wait_for_selector(_ALL_SCORED)
    page.wait_for_selector("#stop", state="hidden")
    page.click("text=Score a sentence of your own")
    page.fill("#own-words", "A ferry is cancelled because of a storm.")
    page.click("#do-Score-it")
    page.wait_for_selector("details[data-tool=own] .outcome:not(:empty)")
    page.evaluate("() => scrollTo(0, 0)")


def _show_chat(page: Page) -> None:
    """Explains the last token of the example chat."""
    page.select_option("#examples", label="A question")
    page.wait_for_selector(".tok.pinned.scored")
    page.locator("#reading").evaluate("section => section.scrollIntoView()")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
