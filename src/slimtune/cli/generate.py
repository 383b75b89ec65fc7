"""`slimtune generate`: one answer to one prompt, by the tuned model, or by base and tuned side by side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console

from .common import Json, Run, console, error_console

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; higher is more random.")]
SideBySide = Annotated[bool, typer.Option("--side-by-side", help="Show the base's answer too.")]
System = Annotated[str | None, typer.Option(help="A system message put first.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the random choices at a temperature above 0.")]


def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the user says.", show_default=False)],
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    side_by_side: SideBySide = False,
    system: System = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> dict[str, Any]:
    """Answer one prompt."""
    from ..evaluation.generate import Generator

    speaker = Generator.open(run)
    messages = [*opening(system), {"role": "user", "content": prompt}]
    screen = error_console() if as_json else console()
    answers = {
        voice: say(
            speaker.stream(
                messages, tuned=voice == "tuned", max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            ),
            voice if side_by_side else "",
            screen,
        )
        for voice in voices(side_by_side)
    }
    return {"prompt": prompt, "system": system, "temperature": temperature, "seed": seed, **answers}


def voices(side_by_side: bool) -> tuple[str, ...]:
    """Return who speaks, in order."""
    return ("base", "tuned") if side_by_side else ("tuned",)


def opening(system: str | None) -> list[dict[str, str]]:
    """Return the messages a conversation starts with."""
    return [{"role": "system", "content": system}] if system else []


def say(pieces: Iterable[str], name: str, screen: Console) -> str:
    """Show pieces of text as they come, after the speaker's name where there is one; return the whole."""
    if name:
        screen.print(f"{name}: ", style="bold", end="")
    whole = []
    for piece in pieces:
        whole.append(piece)
        screen.file.write(piece)
        screen.file.flush()
    screen.print()
    return "".join(whole)
