"""A real browser that opens pages from files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OFFLINE = ["quic", "background-networking", "component-update", "sync", "gpu"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium that asks nobody."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on the PATH")
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in OFFLINE)]
        found = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


@pytest.fixture
def open_file(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; at the end nothing may have been asked for but the file, nor said on the console, nor run."""
    said: list[str] = []
    pages: list[Any] = []
    files: set[str] = set()

    def open_page(file: Path, width: int = 1200, scheme: str = "light", place: str = "") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url.partition("#")[0]))
        page.goto(file.as_uri() + place)
        page.wait_for_function("[...document.querySelectorAll('.chart')].every(each => each.querySelector('svg'))")
        pages.append(page)
        files.add(file.as_uri())
        return page

    yield open_page
    for page in pages:
        assert page.evaluate("window.ran") is None
        page.close()
    assert set(said) == files
