"""Draw a log as a picture of a terminal, as the README shows it: `python docs/picture.py LOG docs/demo.svg`."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

STYLES = {
    r"^\$ .*": "bold green",
    r"^(base|tuned):(?= [A-Z])": "bold",
    r"^(gain|tuned|base) .*": "cyan",
    r"\d+\.\d+ to \d+\.\d+": "bold cyan",
}

console = Console(record=True, width=110, file=io.StringIO())
for line in Path(sys.argv[1]).read_text().splitlines():
    text = Text(line)
    for pattern, style in STYLES.items():
        text.highlight_regex(re.compile(pattern), style)
    console.print(text)
Path(sys.argv[2]).write_text(console.export_svg(title="make demo"))
