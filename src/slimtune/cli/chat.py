"""`slimtune chat`: a conversation with the tuned model, or with base and tuned side by side."""

from __future__ import annotations

import sys
from typing import Any

from .common import Json, Run, console, error_console
from .generate import MaxNewTokens, Seed, SideBySide, System, Temperature, opening, say, voices

LEAVE = {"/exit", "/quit"}


def chat(
    run: Run,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    side_by_side: SideBySide = False,
    system: System = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> dict[str, Any]:
    """Talk, a line at a time.

    /new starts over; /exit or the end of the input (Ctrl-D) leaves.
    """
    from ..evaluation.generate import Generator

    speaker = Generator.open(run)
    screen = error_console() if as_json else console()
    speaking = voices(side_by_side)
    # Each remembers its own answers: the base must not be led by what the tuned model said.
    told = {voice: opening(system) for voice in speaking}
    turns: list[dict[str, str]] = []
    while (line := _ask()) is not None:
        if line == "/new":
            told = {voice: opening(system) for voice in speaking}
            continue
        turn = {"user": line}
        for voice in speaking:
            told[voice].append({"role": "user", "content": line})
            pieces = speaker.stream(
                told[voice], tuned=voice == "tuned", max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
            turn[voice] = say(pieces, voice if side_by_side else "", screen)
            told[voice].append({"role": "assistant", "content": turn[voice]})
        turns.append(turn)
    return {"system": system, "temperature": temperature, "seed": seed, "turns": turns}


def _ask() -> str | None:
    """Return the next line that says something, or None to leave."""
    while True:
        if sys.stdin.isatty():
            error_console().print("you: ", style="bold", end="")
        line = sys.stdin.readline()
        if not line or line.strip() in LEAVE:
            return None
        if line.strip():
            return line.strip()
