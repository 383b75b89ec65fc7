"""The page in Chromium, from rows to chat on SmolLM2: keyboard, contrast, phone, and a console without errors."""

import pytest
from test_report_browser import STICKS_OUT, missing_requirement, open_page
from walk import serve_page, walk

pytestmark = [
    pytest.mark.prove,
    pytest.mark.real,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(missing_requirement()), reason=missing_requirement()),
]

LOW_CONTRAST = """
() => {
  const numbers = s => s.match(/[\\d.]+/g).map(Number), found = [];
  const light = c => {
    const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = numbers(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const check = (e, style, text) => {
    const [a, b] = [light(numbers(style.color)), light(ground(e))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    const least = size >= 24 || (size >= 18.66 && bold) ? 3 : 4.5, ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least) found.push(`${ratio.toFixed(2)} of ${least}: ${e.tagName} ${text.slice(0, 40)}`);
  };
  for (const e of document.body.querySelectorAll('*')) {
    if (!e.checkVisibility()) continue;
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join('');
    if (text && e.tagName !== 'OPTION') check(e, getComputedStyle(e), text);
    if (e.placeholder) check(e, getComputedStyle(e, '::placeholder'), e.placeholder);
  }
  return found;
}
"""
REACHABLE = """
() => [...document.querySelectorAll('a[href], button, input:not([type=hidden]), select, textarea, summary')]
  .filter(e => e.checkVisibility()).map((e, i) => (e.dataset.number = i))
"""
FOCUSED = """
() => {
  const e = document.activeElement, style = getComputedStyle(e);
  return [Number(e.dataset.number ?? -1), style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2];
}
"""
UNNAMED = """
() => [...document.querySelectorAll('input:not([type=hidden]), select, textarea')]
  .filter(e => !e.labels.length && !e.ariaLabel).map(e => e.outerHTML)
"""
OUTSIDE_SCROLLERS = STICKS_OUT.replace("const box", "if (e.closest('.wide > *, .skip, .hidden')) continue; const box")


def check_keyboard(page) -> None:
    """Press Tab until every control was reached, each with an outline."""
    page.evaluate("document.activeElement.blur()")
    wanted = set(page.evaluate(REACHABLE))
    reached, without_outline = set(), set()
    for _ in range(len(wanted) + 12):
        page.keyboard.press("Tab")
        number, outlined = page.evaluate(FOCUSED)
        reached.add(number)
        if number >= 0 and not outlined:
            without_outline.add(number)
    assert wanted - reached == set()
    assert without_outline == set()


def test_the_page_leads_from_rows_to_chat(smollm2_folder, tmp_path):
    logged, asked, pages = [], [], []
    with serve_page(tmp_path / "home") as url, open_page(tmp_path / "profile", 1280, "light") as page:
        page.on("console", lambda m: logged.append(m.text))
        page.on("pageerror", lambda e: logged.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))

        def look(name: str) -> None:
            pages.append(name)
            assert page.evaluate(UNNAMED) == []
            check_keyboard(page)
            for width in (1280, 390):
                for scheme in ("light", "dark"):
                    page.set_viewport_size({"width": width, "height": 900})
                    page.emulate_media(color_scheme=scheme)
                    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), (name, width)
                    assert page.evaluate(OUTSIDE_SCROLLERS) == [], (name, width)
                    assert page.evaluate(LOW_CONTRAST) == [], (name, scheme)
            page.set_viewport_size({"width": 1280, "height": 900})
            page.emulate_media(color_scheme="light")

        walk(page, url, look)
        said = page.locator(".answer .said").all_inner_texts()
        for path in ("/evaluate", "/runs?pick=runs/first", "/export"):
            page.goto(page.url.split("/chat")[0].split("/evaluate")[0].split("/runs")[0] + path)
            look(path)
    assert pages[:4] == ["rows", "plan", "train", "chat"]
    assert len(said) == 2
    assert all(text.strip() for text in said)
    assert logged == []
    assert [address for address in asked if not address.startswith(("http://127.0.0.1:", "data:"))] == []
