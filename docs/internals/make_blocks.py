"""Write the output in console blocks of README and docs anew: `make_blocks.py [PAGE …]`.

A command that only answers (plan, choose, gpus, cost, models, methods, --version) is run as a page's reader would run
it, without a network and without a measurement of this machine, and what it prints replaces the page's lines. `…`
stands for lines that are left out: what follows it begins at the first line with the same label, and as many lines are
shown as the page has, or all to the end if no `…` follows. On the pages in `SESSIONS` all commands of slimtune are run,
in order, in a folder of their own: figures that depend on the machine and answers that a model writes differ a little
there.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ANSWERS = {"plan", "choose", "gpus", "cost", "models", "methods", "--version"}
ROWS = {"rows.csv": "docs/first_rows.csv"}
TRAIN_MINE = (
    "train --model smollm2-135m --data rows.csv --column instruction=question --column output=answer "
    "--forgetting-budget null --max-steps 1 --out mine"
)
SESSIONS: dict[str, tuple[dict[str, str], str]] = {
    "docs/first_adapter.md": (ROWS, ""),
    "docs/ollama.md": (ROWS, TRAIN_MINE),
    "docs/vllm.md": (ROWS, TRAIN_MINE),
}
"""Pages whose commands need a run: files that the reader has, by their source, and a command that he gave before."""
TODAY = "2026-11-30"
"""The day the pages are of: on a later one more prices are old."""
RUN = f"""import sys, types, datetime
import slimtune.planning.gpu_specs as gpu_specs
class Date(datetime.date):
    today = classmethod(lambda cls: cls.fromisoformat({TODAY!r}))
gpu_specs.datetime = types.SimpleNamespace(date=Date)
from slimtune.cli import main
main()"""


class Command(NamedTuple):
    """A command of a console block, and what the page shows of its output."""

    text: str
    """Lines from the prompt on, with continued ones."""
    shown: list[str]

    @property
    def words(self) -> list[str]:
        """Return its words; environment variables before the program are left out."""
        words = shlex.split(re.sub(r"\\\n", " ", self.text.removeprefix("$ ")))
        return words[next(i for i, word in enumerate(words) if "=" not in word) :]


def split_block(block: str) -> Iterator[Command]:
    """Yield the commands of a console block."""
    for found in re.finditer(r"^(\$ (?:.*\\\n)*.*\n)((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
        yield Command(found[1], found[2].splitlines())


def choose_lines(shown: Sequence[str], printed: list[str]) -> list[str]:
    """Return the printed lines that a page shows, by those that it shows now.

    Raises:
        ValueError: nothing is printed with the label of a line that follows a `…`.
    """
    if "…" not in shown:
        return printed
    lines: list[str] = []
    at, count = 0, len(shown)
    for i, line in enumerate(shown):
        if line == "…":
            lines.append(line)
            if i + 1 < count:
                label = get_label(shown[i + 1])
                found = [j for j in range(at, len(printed)) if get_label(printed[j]) == label]
                if not found:
                    raise ValueError(f"no line begins with {label!r}: {printed}")
                at = found[0]
        elif at < len(printed):
            lines.append(printed[at])
            at += 1
    return lines if shown[-1] == "…" else [*lines, *printed[at:]]


def get_label(line: str) -> str:
    """Return the words of a line before its first figure, column or quotation mark."""
    return re.split(r"\d|  |⟦", line.strip())[0].strip()


def run_command(words: list[str], folder: Path) -> list[str]:
    """Return the lines that a command of slimtune prints; those of an error if it prints nothing else."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLIMTUNE_")}
    env |= {"COLUMNS": "200", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "SLIMTUNE_BENCH": str(folder / "no-bench.json")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words], capture_output=True, text=True, env=env, cwd=folder, check=False
    )
    if "Traceback" in done.stderr:
        raise RuntimeError(f"slimtune {shlex.join(words)}:\n{done.stderr}")
    printed = done.stdout if done.stdout.strip() else done.stderr
    printed = printed.replace(str(folder), "/…").replace(os.path.expanduser("~"), "/…")
    return [line.rstrip() for line in printed.strip("\n").splitlines()]


def make_page(page: str) -> tuple[str, dict[str, str]]:
    """Return a page with today's output, and files that its commands wrote, by their path in the tree."""
    files, before = SESSIONS.get(page, ({}, ""))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "docs").mkdir()
        (folder / "examples").symlink_to(ROOT / "examples")
        for name, source in files.items():
            shutil.copy(ROOT / source, folder / name)
        if before:
            run_command(shlex.split(before), folder)

        def renew(block: re.Match[str]) -> str:
            made = ""
            for command in split_block(block[1]):
                shown, words = command.shown, command.words
                if words[0] == "slimtune" and shown and (page in SESSIONS or words[1] in ANSWERS):
                    shown = choose_lines(shown, run_command(words[1:], folder))
                made += command.text + "".join(f"{line}\n" for line in shown)
            return f"```console\n{made}```"

        text = CONSOLE.sub(renew, (ROOT / page).read_text(encoding="utf-8"))
        return text, {str(f.relative_to(folder)): f.read_text() for f in folder.glob("docs/*.svg")}


def list_answers(text: str) -> list[Command]:
    """Return a page's commands that only answer, with what it shows of their output."""
    commands = (c for block in CONSOLE.findall(text) for c in split_block(block))
    return [c for c in commands if c.words[:1] == ["slimtune"] and c.words[1] in ANSWERS]


def list_pages() -> list[str]:
    """Return the pages with a command whose output a script can write, as paths in the tree."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    pages = {str(f.relative_to(ROOT)): f.read_text(encoding="utf-8") for f in files}
    return [page for page, text in pages.items() if page in SESSIONS or list_answers(text)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=list_pages(), metavar="PAGE")
    for name in parser.parse_args().pages:
        page_text, pictures = make_page(name)
        for path, content in {name: page_text, **pictures}.items():
            (ROOT / path).write_text(content, encoding="utf-8")
