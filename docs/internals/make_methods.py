"""Write what the docs compute from the methods; a method without a page gets one, with TODO where a person writes.

    python docs/internals/make_methods.py

It writes the table of fields on each page in docs/methods, the lists of docs/methods/README.md, a row for each method
in docs/internals/step.md, the menu of the site and the number of methods in README.md; then docs/api.md (make_api.py)
and the table of docs/export.md.
"""

import dataclasses
import inspect
import re
import runpy
from pathlib import Path

from slimtune.core.adapters.config_fields import list_settings
from slimtune.core.adapters.method_registry import METHODS, get_method_config_class
from slimtune.core.adapters.peft_config import PeftConfig, TargetedConfig
from slimtune.extras.prompt_learning.prompt_config import PromptLearningConfig

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/methods"
FIELDS_HEAD = "| field | default | meaning |\n| --- | --- | --- |\n"
STEP_HEAD = (
    "| method | kept | each micro-batch | how its change is computed | what it does not use, and why |\n"
    "| --- | --- | --- | --- | --- |\n"
)
LAYERS_HEAD = "| method | linear | embedding | conv | attention |\n| --- | --- | --- | --- | --- |\n"
NEW_PAGE = """# {title}

    y = W x + b + TODO        what trains, with shapes

TODO: how it works, and that the model starts unchanged. Paper: [{title}](https://arxiv.org/abs/TODO).

**Parameters added**: TODO per adapted layer.

**When**: TODO.

**Where**: linear layers and GPT-2's `Conv1D`.

**File**: TODO: keys, and whether PEFT reads it.

**Export**: TODO, or merged ([merge.md](../merge.md)).
"""


def get_summary(cls: type[PeftConfig]) -> str:
    """Return the first line of a config's docstring, without what it says of PEFT."""
    first_line = (inspect.getdoc(cls) or "").partition("\n")[0]
    return re.sub(r"; PEFT.s [^;]*$", "", first_line.rstrip("."))


def make_method_list() -> str:
    """Return the list of the methods with the first line of each docstring."""
    names = METHODS.built_in_names()
    return "".join(f"- [{n}]({n}.md): {get_summary(get_method_config_class(n))}\n" for n in names)


def make_layer_table() -> str:
    """Return which kinds of layers each method that changes layers takes."""
    rows = []
    for name in METHODS.built_in_names():
        kinds = get_method_config_class(name).kinds
        cells = ["yes" if kind in kinds else "" for kind in ("linear", "embedding", "conv", "weight")]
        rows += [f"| {name} | {' | '.join(cells)} |\n"] if any(cells) else []
    return LAYERS_HEAD + "".join(rows)


def make_field_table(cls: type[PeftConfig]) -> str:
    """Return the fields that a method declares, without those every method has; "" if there are none."""
    common = PromptLearningConfig if issubclass(cls, PromptLearningConfig) else PeftConfig
    shared = {f.name for base in (common, TargetedConfig) for f in dataclasses.fields(base)} - {"num_virtual_tokens"}
    rows = []
    for spec in list_settings(cls):
        if spec.name not in shared:
            meaning = "; ".join(part for part in (spec.description, spec.limits) if part).replace("|", "\\|")
            rows.append(f"| `{spec.name}` | `{spec.default!r}` | {meaning} |\n")
    return FIELDS_HEAD + "".join(rows) if rows else ""


def make_step_table(page: str) -> str:
    """Return the table of step.md, with a row that a person completes for each method that it lacks."""
    rows = page.partition(STEP_HEAD)[2].partition("\n\n")[0].splitlines()
    for name in METHODS.built_in_names():
        link = f"| [{name}](../methods/{name}.md)"
        if not any(row.startswith(link) for row in rows):
            rows.append(f"{link} | TODO: python benchmarks/kept.py {name} | TODO | TODO | TODO |")
    rows.sort(key=lambda row: (not row.startswith("| [lora]"), row))
    return STEP_HEAD + "".join(f"{row}\n" for row in rows)


def replace_table(text: str, head: str, table: str) -> str:
    """Return the text with the one table under this head replaced."""
    return re.sub(re.escape(head) + r"(\|[^\n]*\n)*", lambda _: table, text, count=1)


def make_page(cls: type[PeftConfig], text: str | None) -> str:
    """Return a method's page with its fields; `text` is the page as it is, None if there is none."""
    text = text or NEW_PAGE.format(title=get_summary(cls).partition(":")[0])
    table = make_field_table(cls)
    if table and FIELDS_HEAD not in text:
        text = text.replace("**Export**", f"**Fields**:\n\n{FIELDS_HEAD}\n**Export**", 1)
    return replace_table(text, FIELDS_HEAD, table)


def make_files() -> dict[Path, str]:
    """Return the text of every file that this script writes, but those of the other scripts."""
    classes = {name: get_method_config_class(name) for name in METHODS.built_in_names()}
    files = {}
    for name, cls in classes.items():
        page = PAGES / f"{name}.md"
        files[page] = make_page(cls, page.read_text(encoding="utf-8") if page.exists() else None)
    titles = {page.stem: text.partition("\n")[0].removeprefix("# ") for page, text in files.items()}

    index = (PAGES / "README.md").read_text(encoding="utf-8")
    index = re.sub(r"(- \[\w+\]\(\w+\.md\)[^\n]*\n)+", lambda _: make_method_list(), index, count=1)
    files[PAGES / "README.md"] = replace_table(index, LAYERS_HEAD, make_layer_table())

    step = (PAGES.parent / "internals/step.md").read_text(encoding="utf-8")
    files[PAGES.parent / "internals/step.md"] = replace_table(step, STEP_HEAD, make_step_table(step))

    names = sorted(titles, key=lambda name: (name != "lora", titles[name].strip("(").lower()))
    menu = "".join(f'    {{ "{titles[name]}" = "methods/{name}.md" }},\n' for name in names)
    entries = r'(    \{ "[^"]+" = "methods/(?!README|comparison)\w+\.md" \},\n)+'
    site = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    files[ROOT / "zensical.toml"] = re.sub(entries, lambda _: menu, site, count=1)

    count = sum(not cls.trains_every_weight for cls in classes.values())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files[ROOT / "README.md"] = re.sub(r"\*\*\d+ methods\*\*", f"**{count} methods**", readme, count=1)
    return files


if __name__ == "__main__":
    for file, new_text in make_files().items():
        file.write_text(new_text, encoding="utf-8")
    for script in ("docs/internals/make_api.py", "tests/export/test_export_formats.py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
