"""The screens of the commands at 80 columns, as reviewed text files in `screens/`: in a pipe and on a terminal.

`pytest tests/cli/test_screens.py --update-screens` writes them anew; look at each change before you commit it. A file
holds the command, its exit code, stdout and stderr. Colors of the terminal are written as `[bold red]`; times, memory,
versions and paths are replaced.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from rich.text import Text
from tiny_run import write_rows

from slimtune.cli import COMMANDS

FOLDER = Path(__file__).parent / "screens"
SCREENS = {
    **{f"{name}-help": f"{name} --help" for name in COMMANDS},
    "help": "--help",
    "plan": "plan BASE --vram 8GiB --max-seq-len 64",
    "plan-error": "plan llama-3.1-9b",
    "gpus": "gpus --kind laptop",
    "gpus-error": "gpus --kind desktops",
    "data": "data ROWS --model BASE",
    "data-error": "data BROKEN --model BASE",
    "train": "train --model BASE --data ROWS --out new --max-steps 2 --dtype float32",
    "train-error": "train --model BASE --data ROWS --out o --epocs 2 --dtype bf17",
    "train-wrong-values": "train --model BASE --data ROWS --out o --epochs many --dtype bf17 --set method.rnak=3",
    "eval": "eval RUN --split validation --generate 1 --max-new-tokens 8",
    "eval-error": "eval RUNS",
    "report": "report RUN",
    "report-error": "report BASE",
    "compare-error": "compare nowhere.yaml",
    "generate": "generate RUN hello --side-by-side --max-new-tokens 8",
    "generate-error": "generate RUN",
    "chat-error": "chat RUN --temperature hot",
    "merge": "merge RUN --out merged",
    "merge-error": "merge RUN --out BASE",
    "export": "export RUN --to vllm --out vllm",
    "export-error": "export RUN --to olama --out o",
    "verify-error": "verify nowhere",
    "push": "push RUN me/name --dry-run",
    "push-error": "push RUN name",
    "methods": "methods",
    "methods-one": "methods bitfit",
    "methods-error": "methods lore",
    "doctor": "doctor",
    "doctor-error": "doctor now",
    "no-command": "",
    "wrong-command": "trian",
}
TERMINAL = {"help", "plan", "plan-error", "gpus", "data", "data-error", "train-error", "eval", "doctor"}
"""Screens that are also kept as a terminal shows them."""
VOLATILE = [
    (r"\d+(\.\d+)? (to \d+(\.\d+)? )?[KMGT]?i?B\b", "N B"),
    (r"\b\d+(\.\d+)? (min( \d+ s)?|s|h( \d+ min)?)(?=\W|$)", "N s"),
    (r"\(\d+ /s\)|\b\d+ tok(ens)?/s", "N tokens/s"),
    (r"\b\d+\.\d+[\w.+]*|\b\d+e-\d+|(?<=[ ±−-])\d+ %", "N"),
    (r"(Linux|macOS|Windows|Darwin)\S+", "OS"),
    (r"\d+ cores, torch uses \d+ threads", "N cores, torch uses N threads"),
    (r"(CPU flags\s+).*", r"\1FLAGS"),
    (r"(?<=in )(bfloat16|float32)$|(bfloat16|float32)(?= on cpu)|(?<=cpu --dtype )\w+", "DTYPE"),
    (r"^.*traini\S* +step \d+/\d+ · .*\n", ""),  # how it is cut depends on its figures
    (r"^((base|tuned): |step \d/\d · ).*", r"\1…"),
    (r"[ \t]+$", ""),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_llama, tiny_tokenizer, slimtune) -> Path:
    folder = tmp_path_factory.mktemp("screens")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_rows(folder / "rows.jsonl", 40)
    (folder / "broken.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\nno row\n')
    done = slimtune("train", "--model", folder / "base", "--data", folder / "rows.jsonl", "--out", folder / "run",
                    "--max-steps", 1, "--dtype", "float32")  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


KINDS = [
    pytest.param(name, terminal, id=name + ".terminal" * terminal, marks=[] if "help" in name else [pytest.mark.slow])
    for terminal in (False, True)
    for name in SCREENS
    if not terminal or name in TERMINAL
]


@pytest.mark.parametrize(("name", "terminal"), KINDS)
def test_screen(name, terminal, home, slimtune, tmp_path, monkeypatch, request):
    command = SCREENS[name]
    places = {"BASE": "base", "ROWS": "rows.jsonl", "BROKEN": "broken.jsonl", "RUN": "run"}
    for file in places.values():
        source = home / file
        shutil.copytree(source, tmp_path / file) if source.is_dir() else shutil.copy(source, tmp_path)
    monkeypatch.chdir(tmp_path)
    words = [places.get(word, word) for word in shlex.split(command)]
    if terminal:
        for variable, value in {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TERM": "xterm-256color"}.items():
            monkeypatch.setenv(variable, value)
    done = slimtune(*words)
    text = (
        f"$ slimtune {' '.join(words)}\nexit code {done.exit_code}\n--- stdout\n{done.stdout}--- stderr\n{done.stderr}"
    )
    if terminal:
        text = "\n".join(Text.from_ansi(line).markup for line in text.split("\n"))
    text = text.replace(str(home), "HOME").replace(str(tmp_path), "HERE")
    for pattern, replacement in VOLATILE:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    file = FOLDER / f"{name}{'.terminal' if terminal else ''}.txt"
    if request.config.getoption("--update-screens"):
        FOLDER.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), "look at the screen, then run pytest tests/cli/test_screens.py --update-screens"
    assert "bug in slimtune" not in text
