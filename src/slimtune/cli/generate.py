"""`slimtune generate` and `slimtune chat`: answers of the tuned model, or of base and tuned model side by side."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from .common import Json, Run, console, error_console

MaxNewTokens = Annotated[int, Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, Option(min=0.0, help="0: the most likely token; higher: more random.")]
SideBySide = Annotated[bool, Option("--side-by-side", help="Show the base's answer, too.")]
System = Annotated[str | None, Option(help="System message.")]
Seed = Annotated[int, Option(min=0, help="Seed of the random choices.")]


def generate(
    run: Run,
    prompt: Annotated[str, Argument(metavar="PROMPT", help="The user's message.", show_default=False)],
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    side_by_side: SideBySide = False,
    system: System = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> dict[str, Any]:
    """Answer one prompt."""
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    (turn,) = _converse(run, [prompt], system, side_by_side, how, as_json)
    del turn["user"]
    return {"prompt": prompt, "system": system, "temperature": temperature, "seed": seed, **turn}


def chat(
    run: Run,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    side_by_side: SideBySide = False,
    system: System = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> dict[str, Any]:
    """Hold a conversation, one line at a time.

    /new starts over; /exit or the end of the input (Ctrl-D) leaves.
    """
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    turns = _converse(run, _read_lines(), system, side_by_side, how, as_json)
    return {"system": system, "temperature": temperature, "seed": seed, "turns": turns}


def _converse(
    run: Path, lines: Iterable[str | None], system: str | None, side_by_side: bool, how: dict[str, Any], as_json: bool
) -> list[dict[str, str]]:
    """Answer the user's lines, printing the text as it comes, and return them with the answers; None starts over."""
    from ..evaluation.generate import Generator

    generator = Generator.open(run)
    screen = console(stderr=as_json)
    models = ("base", "tuned") if side_by_side else ("tuned",)
    turns: list[dict[str, str]] = []
    # Each model remembers its own answers: the base must not continue what the tuned model said.
    messages: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        if line is None:
            messages = {}
            continue
        turn = {"user": line}
        for model in models:
            history = messages.setdefault(model, [{"role": "system", "content": system}] if system else [])
            history.append({"role": "user", "content": line})
            if side_by_side:
                screen.print(f"{model}: ", style="bold", end="")
            turn[model] = ""
            for piece in generator.stream(history, tuned=model == "tuned", **how):
                turn[model] += piece
                screen.file.write(piece)
                screen.file.flush()
            screen.print()
            history.append({"role": "assistant", "content": turn[model]})
        turns.append(turn)
    return turns


def _read_lines() -> Iterator[str | None]:
    """Yield the lines of the user that are not blank, None for /new."""
    while True:
        if sys.stdin.isatty():
            error_console().print("you: ", style="bold", end="")
        line = sys.stdin.readline()
        if not line or line.strip() in ("/exit", "/quit"):
            return
        if text := line.strip():
            yield None if text == "/new" else text
