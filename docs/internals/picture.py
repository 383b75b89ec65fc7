"""Draw what docs/first_adapter.md shows of a terminal as the README's picture: `python docs/internals/picture.py`."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parents[1]
STYLES = {
    r"^\$ .*": "bold green",
    r"^(base|tuned):(?= [A-Z])": "bold",
    r"^(loss reduction|tuned|base) .*": "cyan",
    r"\d+\.\d+ to \d+\.\d+": "bold cyan",
}
SHOWN = ("train", "eval", "generate")  # the commands of the page that the picture has


def make_picture() -> str:
    """Return the picture, an SVG."""
    console = Console(record=True, width=110, file=io.StringIO())
    blocks = re.findall(
        r"^```console\n(\$ slimtune (\w+) .*?)^```", (DOCS / "first_adapter.md").read_text(), re.M | re.S
    )
    for block in (block for block, command in blocks if command in SHOWN):
        for line in block.splitlines():
            text = Text(line)
            for pattern, style in STYLES.items():
                text.highlight_regex(re.compile(pattern), style)
            console.print(text)
        console.print()
    return console.export_svg(title="slimtune")


if __name__ == "__main__":
    (DOCS / "first_adapter.svg").write_text(make_picture())
