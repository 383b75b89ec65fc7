"""Every `slimtune …` command in README and docs is one that the command line takes: flags, values and settings.

Nothing is run. Those in fenced blocks are checked, and those in the code of tables and sentences.
"""

import functools
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from slimtune.cli import app
from slimtune.cli.command_help import require_flags_given_once
from slimtune.cli.train_command import TASK_FLAGS
from slimtune.core.config.recipe import parse_recipe_sections
from slimtune.core.config.recipe_loading import parse_override_path_and_value, set_tree_value
from slimtune.core.foundation.strict_yaml import parse_yaml

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
NAMED_FILE = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```", re.MULTILINE | re.DOTALL)
GROUP = typer.main.get_command(app)
SHELL = {"|", "<", ">", ">>", "&&", ";", "2>", "&"}
NEEDED = {"model.name": "smollm2-135m", "data.train": "rows.jsonl", "output_dir": "runs/first"}
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
NO_COMMAND = re.compile(r"does not |export RUN --to \w+$")  # a line that is printed, and titles of pages


def find_commands(text: str) -> Iterator[str]:
    """Yield the commands of a page without `slimtune`, those in sentences only if they have flags or arguments."""
    for language, block in FENCED.findall(text):
        lines = re.sub(r" *\\\n *", " ", block) if language in ("", "sh", "console") else ""
        prompt = r"\$ " if re.search(r"^ *\$ ", lines, re.MULTILINE) else ""  # the other lines are output
        yield from re.findall(rf"^ *{prompt}(?:\w+=\S+ )*slimtune (.+)", lines, re.MULTILINE)
    yield from re.findall(r"(?<!`)`slimtune (\w+ [^`\n]+)`", FENCED.sub("", text))


def find_console_commands(block: str) -> list[str]:
    """Return what the site's copy button copies of a console block: Pygments marks the other lines as output."""
    return re.findall(r"^ *\$ ((?:.*\\\n)*.*)$", block, re.MULTILINE)


@functools.cache
def build_command(name: str) -> Any:
    """Return a command with the flags of its settings."""
    return GROUP.resolve_command(click.Context(GROUP), [name])[1]


def check_command(line: str) -> None:
    """Raise what the command line raises for these words before it does any work."""
    words = shlex.split(line, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in SHELL), len(words))]
    if words[0] == "COMMAND" or words in (["--help"], ["--version"]):
        return
    name, *rest = words
    command = build_command(name)
    if "--help" in rest:
        return
    require_flags_given_once(command, rest)
    given = command.make_context(name, rest).params
    settings = {
        key.replace("__", ".", 1): parse_yaml(value, key) if isinstance(value, str) else value
        for key, value in given.items()
        if "__" in key and value not in (None, [], ()) and key != "data__columns"
    } | dict(parse_override_path_and_value(text) for text in given.get("set_") or [])
    settings |= {f"task.{field}": given[flag] for flag, field in TASK_FLAGS.items() if given.get(flag)}
    methods = str(settings.pop("method.name", "lora")).split(",") if name == "plan" else ["lora"]
    if name == "compare":  # `--set dora.r=8` sets a field of one of its entries
        entries = {"dora": "method", "dpo": "task"}
        parts = {path: path.partition(".") for path in settings}
        if any(entry == "dpo" for entry, _, _ in parts.values()):
            settings["task.name"] = "dpo"
        settings = {
            f"{entries[parts[path][0]]}.{parts[path][2]}" if path in parts and parts[path][0] in entries else path: v
            for path, v in settings.items()
        }
    for method in methods if methods != ["all"] else []:
        tree: dict = {}
        for path, value in (NEEDED | {"method.name": method} | settings).items():
            set_tree_value(tree, path, value)
        # It raises for a setting that does not exist; `data` has no task, which may not take the format.
        parse_recipe_sections(tree, line, partial=name == "data")


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_ones_that_exist(page, tmp_path, monkeypatch):
    wrong, text = {}, (ROOT / page).read_text()
    if files := NAMED_FILE.findall(text):  # commands read what the reader has written
        monkeypatch.chdir(tmp_path)
    for name, code in files:
        Path(name).write_text(code)
    for line in find_commands(text):
        if NO_COMMAND.match(line):
            continue
        try:
            check_command(line)
        except Exception as e:
            wrong[line] = str(e)
    assert wrong == {}


@pytest.mark.parametrize("page", PAGES)
def test_copied_commands_are_whole(page):
    """docs/extra.css hides prompts and output from the copy button in blocks of the language console."""
    for language, block in FENCED.findall((ROOT / page).read_text()):
        commands = find_console_commands(block)
        assert (language == "console") == bool(commands), block
        for command in commands:
            assert shlex.split(command)  # raises where a quote stays open


def test_questions_are_those_of_the_script():
    script = runpy.run_path(str(ROOT / "docs" / "internals" / "make_questions.py"))
    lines = (ROOT / "docs" / "questions.md").read_text().removeprefix(script["HEAD"]).splitlines()
    starts = [script["start_line"](row) for row in script["ROWS"]]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts, (
        "python docs/internals/make_questions.py"
    )


def test_every_extra_that_is_named_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for file in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.py")):
        text = file.read_text()
        named = re.findall(r"slimtune\[([\w,-]+)\]'|install_command\(\"(.+?)\"\)|pip install '\.\[(.+?)\]", text)
        assert {extra for found in named for extra in "".join(found).split(",")} <= {*extras}, file
        if file.suffix == ".md" and file.name not in ("install.md", "troubleshooting.md"):
            assert "install 'slimtune[" not in text, f"{file}: before slimtune is installed, only ./slimtune is found"


def test_readme_and_site_install_the_same_extras():
    lines = {name: re.search(r"^pip install '(?:\.|\./slimtune)\[(.+)\]'", (ROOT / name).read_text(), re.MULTILINE)[1]
             for name in ("README.md", "docs/install.md")}  # fmt: skip
    assert len(set(lines.values())) == 1, lines
