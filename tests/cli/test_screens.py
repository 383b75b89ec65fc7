"""The screens of the commands at 80 columns, as reviewed text files in `screens/`: in a pipe and on a terminal.

`pytest tests/cli/test_screens.py --update-screens` writes them anew; look at each change before you commit it. A file
holds the command, its exit code, and stdout and stderr, or what a pseudo-terminal shows, with its colors as escape
sequences: `cat` shows them. Times, memory, versions and paths are replaced.

Other tests compare a sentence or a table with a file there by the fixture `screen`, which the same flag writes anew:
wording is asserted hardly anywhere else (tests/test_structure.py counts it).
"""

import contextlib
import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import sys
import termios
import threading
from pathlib import Path

import pytest
from contrast import contrast
from rich.style import Style

from slimtune.cli import COMMANDS, app, common

FOLDER = Path(__file__).parent / "screens"
SCREENS = {
    **{f"{name}-help": f"{name} --help" for name in COMMANDS},
    "help": "--help",
    "plan": "plan BASE --vram 8GiB --max-seq-len 64",
    "plan-error": "plan llama-3.1-9b",
    "gpus": "gpus --kind laptop",
    "gpus-compare": "gpus 'RTX 3090' m4-max-128gb 'dgx spark'",
    "gpus-error": "gpus --kind desktops",
    "models": "models --family qwen3",
    "models-error": "models --family qwem",
    "choose-error": "choose llama-3.1-8b --kind desktops",
    "cost-error": "cost llama-3.1-8b --gpu 'm4 max 80gb'",
    "data": "data ROWS --model BASE",
    "data-error": "data BROKEN --model BASE",
    "train": "train --model BASE --data ROWS --out new --max-steps 2 --dtype float32",
    "train-error": "train --model BASE --data ROWS --out o --epocs 2 --dtype bf17",
    "train-wrong-values": "train --model BASE --data ROWS --out o --epochs many --dtype bf17 --set method.rnak=3",
    "eval": "eval RUN --split validation --generate 1 --max-new-tokens 8",
    "eval-error": "eval RUNS",
    "report": "report RUN",
    "report-error": "report BASE",
    "compare": "compare recipe.yaml --methods lora,ia3 --seeds 1 --tokens 600 --out compared",
    "compare-error": "compare nowhere.yaml",
    "tune-error": "tune recipe.yaml --over train.learning_rat=1e-5..1e-2",
    "generate": "generate RUN hello --side-by-side --max-new-tokens 8",
    "generate-error": "generate RUN",
    "chat": "chat RUN --max-new-tokens 8",
    "chat-error": "chat RUN --temperature hot",
    "merge": "merge RUN --out merged",
    "merge-error": "merge RUN --out BASE",
    "export": "export RUN --to vllm --out vllm",
    "export-error": "export RUN --to olama --out o",
    "verify": "verify RUN",
    "verify-error": "verify nowhere",
    "check": "check RUN",
    "check-error": "check nowhere",
    "import": "import run/adapter --out imported.yaml",
    "import-error": "import recipe.yaml --out imported.yaml",
    "repair": "repair RUN --for vllm --out repaired",
    "repair-error": "repair RUN --for vlm --out repaired",
    "push": "push RUN me/name --dry-run",
    "push-error": "push RUN name",
    "methods": "methods",
    "methods-one": "methods bitfit",
    "methods-error": "methods lore",
    "doctor": "doctor",
    "doctor-error": "doctor now",
    "explain": "explain no space left on device",
    "explain-error": "explain qwerty",
    "no-command": "",
    "wrong-command": "trian",
}
TYPED = {"chat": ["hello", "/hlep", "/exit"]}
"""Lines that a user types."""
VOLATILE = [
    (r"\x1b\[(\?25[lh]|\d*[AKJ])|\r", ""),
    (r"^(.*[━╸╺].*|.*: \d+ of \d+ \(.* so far\))\n", ""),  # progress, by chance of the moment
    # A bar of progress takes its place, by chance of the moment.
    (r"^\x1b\[2m(loading|writing|checking).*\n", ""),
    (r"(?<=you: \x1b\[0mhello\n).*\n|(?<=8\nexit code 0\n--- stdout\n).*\n(?=--- stderr\nbase with)", "…\n"),
    (r"\bN (to N )?[KMGT]?i?B\b", "N B"),
    (r"\d+(\.\d+)? (to \d+(\.\d+)? )?[KMGT]?i?B\b", "N B"),
    (r"\b\d+(\.\d+)? (min( \d+ s)?|s|h( \d+ min)?)(?=\W|$)", "N s"),
    (r"\(\d+ /s\)|\b\d+ tok(ens)?/s", "N tokens/s"),
    (r"\b\d+\.\d+(e-\d+|[\w.+]*)|\b\d+e-\d+|(?<=[ ±−-])\d+ %", "N"),
    (r"(Linux|macOS|Windows|Darwin)\S+", "OS"),
    (r"\d+ cores, torch uses \d+ threads", "N cores, torch uses N threads"),
    (r"(CPU flags\s+).*", r"\1FLAGS"),
    (r"(Hub token\s+).*", r"\1TOKEN"),
    (r"(?<=in )(bfloat16|float32)$|(bfloat16|float32)(?= on cpu)|(?<=cpu --dtype )\w+", "DTYPE"),
    (r"^.*traini\S* +step \d+/\d+ · .*\n", ""),  # how it is cut depends on its figures
    (r"^((\x1b\[1m)?(base|tuned): |step \d/\d · ).*", r"\1…"),
    (r"^.*\btime to load +.*\n", ""),  # of a tiny base: said if it took long enough to count
    (r"(?<=± N )(memory|size|time)(, (memory|size|time))*", "…"),
    (r"[ \t]+$", ""),
]


COLOR = r"\x1b\[[\d;]*m"


def replace_volatile(text: str) -> str:
    for pattern, replacement in VOLATILE:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


KINDS = [
    pytest.param(
        name,
        terminal,
        id=name + ".terminal" * terminal,
        marks=[] if "help" in name or "explain" in name else [pytest.mark.slow],
    )
    for terminal in (False, True)
    for name in SCREENS
]


def run_on_terminal(words: list[str], typed: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run a command on a pseudo-terminal of 80 columns; return its exit code and what the terminal shows."""
    lines, shown = iter(typed), bytearray()
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def show() -> None:
        with contextlib.suppress(OSError):  # the terminal is closed
            while piece := os.read(master, 1 << 16):
                shown.extend(piece)
                if shown.endswith(b"you: \x1b[0m") and (line := next(lines, None)) is not None:
                    os.write(master, line.encode() + b"\n")

    for variable, value in {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80"}.items():
        monkeypatch.setenv(variable, value)
    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    with os.fdopen(slave, "r") as stdin, os.fdopen(os.dup(slave), "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        for stream in ("stdout", "stderr"):
            patch.setattr(sys, stream, stdout)
        with pytest.raises(SystemExit) as ended:
            app(args=words, prog_name="slimtune")
        stdout.flush()
    reader.join(timeout=5)
    os.close(master)
    return int(ended.value.code or 0), shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(("name", "terminal"), KINDS)
def test_screen(name, terminal, home, slimtune, tmp_path, monkeypatch, request):
    places = {"BASE": "base", "ROWS": "rows.jsonl", "BROKEN": "broken.jsonl", "RUN": "run"}
    for file in ("recipe.yaml", "held_out.jsonl", *places.values()):
        source = home / file
        shutil.copytree(source, tmp_path / file) if source.is_dir() else shutil.copy(source, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # otherwise doctor warns of other programs, if there are any
    words, typed = [places.get(word, word) for word in shlex.split(SCREENS[name])], TYPED.get(name, [])
    if terminal:
        code, shown = run_on_terminal(words, typed, monkeypatch)
    else:
        done = slimtune(*words, stdin="\n".join(typed))
        code, shown = done.exit_code, f"--- stdout\n{done.stdout}--- stderr\n{done.stderr}"
    text = f"$ slimtune {' '.join(words)}\nexit code {code}\n{shown}"
    text = replace_volatile(text.replace(str(home), "HOME").replace(str(tmp_path), "HERE"))
    file = FOLDER / f"{name}{'.terminal' if terminal else ''}.txt"
    if request.config.getoption("--update-screens"):
        FOLDER.mkdir(exist_ok=True)
        file.write_bytes(text.encode())
    kept, hint = file.read_bytes().decode(), "look at it, then run pytest tests/cli/test_screens.py --update-screens"
    if terminal:  # where its lines break depends on the figures that are replaced
        assert set(re.findall(COLOR, text)) == set(re.findall(COLOR, kept)), hint
        text, kept = (replace_volatile(" ".join(re.sub(COLOR, " ", each).split())) for each in (text, kept))
    assert text == kept, hint
    assert "bug in slimtune" not in text


def test_colors_are_readable_on_white_and_on_black():
    """WCAG's contrast of 3.5 and more, for every color of a screen that has no background of its own."""
    for style in (common.ERROR, common.WARNING, common.GOOD):
        color = Style.parse(style).color
        assert color.number > 15, "a terminal's theme chooses the first sixteen"
        assert min(contrast(color.get_truecolor().hex, other) for other in ("#fff", "#000")) > 3.5, style
    screens = [file.read_text() for file in FOLDER.glob("*.terminal.txt")]
    codes = {code for screen in screens for code in re.findall(r"\x1b\[([\d;]*)m", screen) if "48;" not in code}
    numbers = {Style.parse(s).color.number for s in (common.ERROR, common.WARNING, common.GOOD)}
    allowed = {"", "0", "1", "2", "4", *(p for n in numbers for p in (f"38;5;{n}", f"1;38;5;{n}", f"4;38;5;{n}"))}
    assert codes <= allowed
