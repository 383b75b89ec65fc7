"""The pages in docs/methods: each method has one, with its fields as the config declares them.

`python tests/methods/test_docs.py` writes the lists and tables into the pages.
"""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from slimtune.core.adapters.config_fields import list_settings
from slimtune.core.adapters.method_registry import METHODS, get_method_config_class
from slimtune.core.adapters.peft_config import PeftConfig, TargetedConfig
from slimtune.extras.prompt_learning.prompt_config import PromptLearningConfig

DOCS = Path(__file__).parents[2] / "docs/methods"
TABLE = re.compile(r"\| field \| default \| meaning \|\n(\|[^\n]*\n)+")


def method_list() -> str:
    lines = []
    for name in METHODS.built_in_names():
        summary = (inspect.getdoc(get_method_config_class(name)) or "").partition("\n")[0].rstrip(".")
        lines.append(f"- [{name}]({name}.md): {re.sub(r'; PEFT.s [^;]*$', '', summary)}\n")
    return "".join(lines)


def layer_table() -> str:
    """Which kinds of layers each method that changes layers takes."""
    lines = ["| method | linear | embedding | conv | attention |", "| --- | --- | --- | --- | --- |"]
    kinds = ("linear", "embedding", "conv", "weight")
    for name in METHODS.built_in_names():
        cells = ["yes" if kind in get_method_config_class(name).kinds else "" for kind in kinds]
        lines += [f"| {name} | {' | '.join(cells)} |"] if any(cells) else []
    return "\n".join(lines) + "\n"


def field_table(name: str) -> str:
    """The fields that the method declares, without those every method has."""
    cls = get_method_config_class(name)
    common = PromptLearningConfig if issubclass(cls, PromptLearningConfig) else PeftConfig
    shared = {f.name for base in (common, TargetedConfig) for f in dataclasses.fields(base)} - {"num_virtual_tokens"}
    rows = ["| field | default | meaning |", "| --- | --- | --- |"]
    for spec in list_settings(cls):
        if spec.name not in shared:
            meaning = "; ".join(part for part in (spec.description, spec.limits) if part).replace("|", "\\|")
            rows.append(f"| `{spec.name}` | `{spec.default!r}` | {meaning} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else ""


def test_the_index_lists_every_method():
    assert method_list() in (DOCS / "README.md").read_text()
    assert layer_table() in (DOCS / "README.md").read_text()


@pytest.mark.parametrize("name", METHODS.built_in_names())
def test_the_page_has_the_fields(name):
    assert field_table(name) in (DOCS / f"{name}.md").read_text()


if __name__ == "__main__":
    index = DOCS / "README.md"
    text = re.sub(r"(- \[[^\n]*\n)+", lambda _: method_list(), index.read_text())
    index.write_text(re.sub(r"(\|[^\n]*\n)+", lambda _: layer_table(), text))
    for method in METHODS.built_in_names():
        page = DOCS / f"{method}.md"
        page.write_text(TABLE.sub(lambda _, method=method: field_table(method), page.read_text()))
