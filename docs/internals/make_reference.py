"""Write the tables of settings in docs/recipe.md from the recipe's schema: `python docs/internals/make_reference.py`.

A table stands between `<!-- settings: SECTION -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from slimtune.core.adapters.config_fields import list_settings
from slimtune.core.config import Recipe
from slimtune.core.config.objective_registry import list_objectives, load_objective_class

PAGE = Path(__file__).parents[1] / "recipe.md"


def settings_table(section: str) -> str:
    """Return the table of a section's settings."""
    lines = ["| setting | flag | takes | default | what it does |", "| --- | --- | --- | --- | --- |"]
    for s in list_settings(Recipe):
        if s.path == section or s.path.startswith(f"{section}."):
            default = "required" if s.required else yaml.safe_dump(s.default).splitlines()[0]
            lines.append(f"| `{s.path}` | `{s.flag}` | {s.expected} | {default} | {s.description} |")
    return "\n".join(lines)


def objectives_table() -> str:
    """Return the table of the objectives' own settings."""
    lines = ["| task | what the rows teach | setting | takes | default | what it does |", "| --- " * 6 + "|"]
    for name in list_objectives():
        cls = load_objective_class(name)
        first = f"`{name}` | {cls.summary}"
        for s in list_settings(cls):
            lines.append(f"| {first} | `task.{s.name}` | {s.expected} | {s.default} | {s.description} |")
            first = " | "
        if not list_settings(cls):
            lines.append(f"| {first} | | | | |")
    return "\n".join(lines)


def update_page(text: str) -> str:
    """Return the page with its tables written again."""
    text = re.sub(
        r"(<!-- objectives -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{objectives_table()}\n{m[2]}",
        text,
        flags=re.DOTALL,
    )
    return re.sub(
        r"(<!-- settings: (\w+) -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{settings_table(m[2])}\n{m[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(update_page(PAGE.read_text()))
