"""report.html in Chromium: it fits desktop and phone, light and dark, logs nothing, and requests nothing else."""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from full_run import make_full_run

from slimtune.core.training.run_dir import RunDir
from slimtune.evaluation.run_report import write_run_report_and_list_damage

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def missing_requirement() -> str:
    """Return what is not installed, and how to install it."""
    if not find_chromium():
        return "Chromium is not installed (Debian: apt-get install chromium)"
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed (pip install playwright)"
    return ""


def find_chromium() -> str | None:
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


@contextmanager
def open_page(profile: Path, width: int, scheme: Any) -> Iterator[Any]:
    """Open a page in Chromium with an empty profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            str(profile),
            executable_path=find_chromium(),
            args=list(FLAGS),
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
        )
        try:
            page = browser.new_page()
            page.set_default_timeout(5000)
            yield page
        finally:
            browser.close()


pytestmark = [pytest.mark.prove, pytest.mark.skipif(bool(missing_requirement()), reason=missing_requirement())]

STICKS_OUT = """
() => {
  const wide = document.documentElement.clientWidth, found = [];
  for (const e of document.body.querySelectorAll('*')) {
    if (e.closest('svg') && e.tagName !== 'svg') continue;
    const box = e.getBoundingClientRect();
    if (box.width && (box.left < -0.5 || box.right > wide + 0.5))
      found.push(`${e.tagName}.${e.className} ${box.left} to ${box.right}: ${e.textContent.trim().slice(0, 60)}`);
  }
  return found;
}
"""
OVERLAPS = """
() => {
  const found = [];
  for (const axis of document.querySelectorAll('.xs, .ys')) {
    const boxes = [...axis.children].map(e => [e.getBoundingClientRect(), e.textContent]);
    boxes.forEach(([a, s], i) => boxes.slice(i + 1).forEach(([b, t]) => {
      if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) found.push(`${s} on ${t}`);
    }));
  }
  return found;
}
"""
LONG = "averylongwordwithoutanybreak" * 12


@pytest.fixture(params=["plain", "long words", "bare"])
def page_file(request, tmp_path):
    run = make_full_run(tmp_path / "mine", LONG if request.param == "long words" else "")
    if request.param == "bare":
        for file in run.path.glob("*.json*"):
            file.unlink()
    return write_run_report_and_list_damage(RunDir(run.path))[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_requests_nothing(page_file, tmp_path, width, scheme):
    logged, requested = [], []
    with open_page(tmp_path / "profile", width, scheme) as page:
        page.on("console", lambda m: logged.append(m.text))
        page.on("pageerror", lambda e: logged.append(str(e)))
        page.on("request", lambda r: requested.append(r.url))
        page.goto(page_file.as_uri())
        for details in page.locator("details").all():
            if details.get_attribute("open") is None:
                details.locator("> summary").click()
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        assert page.evaluate(STICKS_OUT) == []
        assert page.evaluate(OVERLAPS) == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 22, 26)")
        page.screenshot(path=str(tmp_path / "seen.png"), full_page=True)
    assert logged == []
    assert requested == [page_file.as_uri()]


def test_it_prints_folded_parts_on_white(page_file, tmp_path):
    with open_page(tmp_path / "profile", 1280, "dark") as page:
        page.goto(page_file.as_uri())
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator("details pre").first.bounding_box()["height"] > 100
        page.pdf(path=str(tmp_path / "page.pdf"))
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_hovering_shows_a_value(tmp_path):
    page_file, _ = write_run_report_and_list_damage(make_full_run(tmp_path / "mine"))
    with open_page(tmp_path / "profile", 1280, "light") as page:
        page.goto(page_file.as_uri())
        page.locator("#training svg .hit").nth(3).hover()
        assert page.evaluate("document.querySelector('#training .hit:hover title').textContent").startswith(
            "training, step 4:"
        )
