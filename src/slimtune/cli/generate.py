"""`slimtune generate` and `slimtune chat`: answers of the tuned model, or of base and tuned model side by side."""

import sys
from collections.abc import Iterable
from typing import Annotated, Any

from rich.console import Console
from typer import Argument, Option

from .common import Json, Run, console, error_console

MaxNewTokens = Annotated[int, Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, Option(min=0.0, help="0: the most likely token; higher: more random.")]
SideBySide = Annotated[bool, Option("--side-by-side", help="Show the base's answer, too.")]
System = Annotated[str | None, Option(help="System message.")]
Seed = Annotated[int, Option(min=0, help="Seed of the random choices.")]
QUIT = ("/exit", "/quit")


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
    from ..evaluation.generate import Generator

    generator = Generator.open(run)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    messages = [*_system_messages(system), {"role": "user", "content": prompt}]
    screen = console(stderr=as_json)
    answers = {}
    for model in ("base", "tuned") if side_by_side else ("tuned",):
        pieces = generator.stream(messages, tuned=model == "tuned", **how)
        answers[model] = _print_stream(pieces, model if side_by_side else "", screen)
    return {"prompt": prompt, "system": system, "temperature": temperature, "seed": seed, **answers}


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
    from ..evaluation.generate import Generator

    generator = Generator.open(run)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    screen = console(stderr=as_json)
    models = ("base", "tuned") if side_by_side else ("tuned",)
    # Each model remembers its own answers: the base must not continue what the tuned model said.
    messages = {model: _system_messages(system) for model in models}
    turns: list[dict[str, str]] = []
    while (line := _read_line()) is not None:
        if line == "/new":
            messages = {model: _system_messages(system) for model in models}
            continue
        turn = {"user": line}
        for model in models:
            messages[model].append({"role": "user", "content": line})
            pieces = generator.stream(messages[model], tuned=model == "tuned", **how)
            turn[model] = _print_stream(pieces, model if side_by_side else "", screen)
            messages[model].append({"role": "assistant", "content": turn[model]})
        turns.append(turn)
    return {"system": system, "temperature": temperature, "seed": seed, "turns": turns}


def _system_messages(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _print_stream(pieces: Iterable[str], name: str, screen: Console) -> str:
    """Print pieces of text as they come, after the model's name if there is one; return the whole text."""
    if name:
        screen.print(f"{name}: ", style="bold", end="")
    text = ""
    for piece in pieces:
        text += piece
        screen.file.write(piece)
        screen.file.flush()
    screen.print()
    return text


def _read_line() -> str | None:
    """Return the next line that is not blank, or None to leave."""
    while True:
        if sys.stdin.isatty():
            error_console().print("you: ", style="bold", end="")
        line = sys.stdin.readline()
        if not line or line.strip() in QUIT:
            return None
        if line.strip():
            return line.strip()
