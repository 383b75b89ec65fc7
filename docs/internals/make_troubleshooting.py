"""Write docs/troubleshooting.md from the pages of `slimtune explain`: `make_troubleshooting.py`."""

import re
from pathlib import Path

from slimtune.diagnostics.knowledge import load_error_pages

PAGE = Path(__file__).parents[1] / "troubleshooting.md"
HEAD = """# Troubleshooting

`slimtune doctor` looks at this machine and says what is wrong. `slimtune explain` finds the page of an error:

```sh
slimtune explain cuda-out-of-memory
slimtune explain "Driver/library version mismatch"
slimtune explain - < traceback.txt
```

The last line of an error of slimtune names its page. In the commands `…` stands for your recipe, or for the flags of
your command. These are the pages:

| page | about |
| --- | --- |
"""


def make_page() -> str:
    """Return the index of the pages, and each page under its code."""
    pages = load_error_pages().values()
    rows = "".join(f"| [{page.code}](#{page.code}) | {page.title} |\n" for page in pages)
    # Not headings: the site's search shows the heading over what it found, which has to be the page's name.
    bodies = {page.code: re.sub(r"^## (.+)\n", r"**\1**\n\n", page.body, flags=re.MULTILINE) for page in pages}
    texts = (f"\n## {page.code}\n\n**{page.title}.**\n\n{bodies[page.code]}\n" for page in pages)
    return HEAD + rows + "".join(texts)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
