"""A person's path over the pages, from rows to chat: for the test in a browser, and for the pictures of the docs."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parents[2] / "docs/first_rows.csv"
WAIT = 300_000
"""Milliseconds that a command may take."""


def make_home(folder: Path) -> Path:
    """Make a folder with rows."""
    folder.mkdir(parents=True)
    shutil.copy(ROWS, folder / "rows.csv")
    return folder


@contextmanager
def serve_page(folder: Path, killed: bool = False) -> Iterator[str]:
    """Run `slimtune ui` for a folder, and yield the address that it prints; end it by Ctrl-C, or kill it."""
    command = [sys.executable, "-m", "slimtune", "ui", str(folder), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert server.stderr is not None
    with server.stderr as lines:
        try:
            yield next(found[0] for line in lines if (found := re.search(r"http://\S+", line)))
        finally:
            server.send_signal(signal.SIGKILL if killed else signal.SIGINT)
            server.wait(120)  # a busy machine


def walk(page: Any, url: str, seen: Callable[[str], None], *, steps: int = 2, tokens: int = 8) -> None:
    """Check rows, plan, train and chat; call `seen` with the name of each page when it shows its result.

    Args:
        page: a page of Playwright.
        url: the address with the token.
        seen: called with the name of a page.
        steps: of the training.
        tokens: of an answer.
    """
    page.set_default_timeout(30_000)  # a busy machine
    page.goto(url)
    assert "token" not in page.url
    page.get_by_label("Base model").fill("smollm2-135m")
    page.get_by_label("Rows", exact=True).fill("rows.csv")
    page.get_by_label("Rows", exact=True).press("Tab")
    page.get_by_text("Which column is what").wait_for()
    assert page.get_by_label("Instruction").input_value() == "question"
    assert page.get_by_label("Output").input_value() == "answer"
    page.get_by_role("button", name="Check the rows").click()
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("link", name="Next: plan").wait_for(timeout=WAIT)
    seen("rows")

    page.get_by_role("link", name="Next: plan").click()
    page.get_by_role("textbox", name="Steps").fill(str(steps))
    page.get_by_text("More settings").click()
    page.get_by_label("One a line").fill("train.save_steps=1\ntrain.batch_size=2")
    page.get_by_role("button", name="Plan the run").click()
    page.get_by_role("link", name="Next: train").wait_for(timeout=WAIT)
    seen("plan")

    page.get_by_role("link", name="Next: train").click()
    page.get_by_role("button", name="Start the training").click()
    page.get_by_role("progressbar").wait_for(timeout=WAIT)
    page.reload()
    page.get_by_role("link", name="Next: evaluate").wait_for(timeout=WAIT)
    seen("train")

    page.goto(page.url.split("/train")[0] + "/chat")
    page.get_by_role("button", name="Load").click()
    page.get_by_text("with the lora adapter in runs/first").wait_for(timeout=WAIT)
    page.get_by_text("How they answer").click()
    page.get_by_label("Longest answer").fill(str(tokens))
    page.get_by_label("Your message").fill("How do I boil an egg?")
    page.get_by_label("Your message").press("Control+Enter")
    page.get_by_role("button", name="Stop the answer").wait_for(state="detached", timeout=WAIT)
    seen("chat")
