"""Take the pictures of docs/ui.md: `ui_pictures.py`; it trains SmolLM2 for a minute, and needs Chromium."""

import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parents[1]
sys.path[:0] = [str(DOCS.parent / "tests" / name) for name in ("", "ui", "evaluation")]

from test_report_browser import open_page  # noqa: E402
from walk import make_home, serve_page, walk  # noqa: E402

LOOKS = {"rows": ("light", 1280), "plan": ("light", 1280), "train": ("dark", 1280), "chat": ("light", 390)}
"""The pages in the docs, and how each looks there."""


def main(folder: Path) -> None:
    """Walk over the pages; write the pictures of `LOOKS` into docs, and every page in every look into `folder`."""
    home = Path(tempfile.mkdtemp())
    with serve_page(make_home(home / "tuning")) as url, open_page(home / "profile", 1280, "light") as page:

        def picture(name: str) -> None:
            for scheme in ("light", "dark"):
                for width in (1280, 390):
                    page.set_viewport_size({"width": width, "height": 900})
                    page.emulate_media(color_scheme=scheme)
                    file = f"ui-{name}-{scheme}-{width}.png"
                    page.screenshot(path=str(folder / file), full_page=True)
                    if LOOKS[name] == (scheme, width):
                        (DOCS / f"ui-{name}.png").write_bytes((folder / file).read_bytes())
            page.set_viewport_size({"width": 1280, "height": 900})
            page.emulate_media(color_scheme="light")

        walk(page, url, picture, steps=16, tokens=32)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
