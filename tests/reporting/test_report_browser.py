"""report.html in Chromium: it fits desktop and phone, light and dark, is silent, and asks no network."""

from __future__ import annotations

import pytest
from browser import lacking, opened
from full_run import make_full_run

from slimtune.reporting import write_report
from slimtune.run_dir import RunDir

pytestmark = [pytest.mark.prove, pytest.mark.skipif(bool(lacking()), reason=lacking())]

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
    return write_report(RunDir(run.path))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_asks_nobody(page_file, tmp_path, width, scheme):
    said, asked = [], []
    with opened(tmp_path / "profile", width, scheme) as page:
        page.on("console", lambda m: said.append(m.text))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
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
    assert said == []
    assert asked == [page_file.as_uri()]


def test_it_prints_dark_on_white_with_what_is_folded(page_file, tmp_path):
    with opened(tmp_path / "profile", 1280, "dark") as page:
        page.goto(page_file.as_uri())
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator("details pre").first.bounding_box()["height"] > 100
        page.pdf(path=str(tmp_path / "page.pdf"))
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_a_point_says_its_value(tmp_path):
    page_file = write_report(make_full_run(tmp_path / "mine"))
    with opened(tmp_path / "profile", 1280, "light") as page:
        page.goto(page_file.as_uri())
        page.locator("#training svg .hit").nth(3).hover()
        assert page.evaluate("document.querySelector('#training .hit:hover title').textContent").startswith(
            "training, step 4:"
        )
