"""Chromium, headless and without a network, for pages of this disk.

python tests/reporting/browser.py PAGE.html OUT.png WIDTH light|dark FROM HEIGHT      takes a picture, from a section on
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def lacking() -> str:
    """Return what is not installed, with how to get it; "" where all is there."""
    if not program():
        return "Chromium is not installed (Debian: apt-get install chromium)"
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed (pip install playwright)"
    return ""


def program() -> str | None:
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


@contextmanager
def opened(profile: Path, width: int, scheme: Any, height: int = 900, scale: float = 1) -> Iterator[Any]:
    """Open Chromium with an empty profile, give a page of it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            str(profile),
            executable_path=program(),
            args=list(QUIET),
            viewport={"width": width, "height": height},
            device_scale_factor=scale,
            color_scheme=scheme,
        )
        try:
            page = browser.new_page()
            page.set_default_timeout(5000)
            yield page
        finally:
            browser.close()


if __name__ == "__main__":
    import tempfile

    page_file, out, width, scheme, start, height = sys.argv[1:]
    with tempfile.TemporaryDirectory() as profile, opened(Path(profile), int(width), scheme) as page:
        page.goto(Path(page_file).resolve().as_uri())
        top = page.locator(start).bounding_box()["y"]
        box = {"x": 0, "y": top, "width": int(width), "height": int(height)}
        page.screenshot(path=out, full_page=True, clip=box)
