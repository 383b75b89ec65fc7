"""How to ship this run: the commands, generated, of the ways that its adapter can go."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from ..record import Record
from ..section import Missing, Section, command


class Way(NamedTuple):
    """One way out: what it makes, the commands in their order, and what to know."""

    what: str
    commands: list[str]
    note: str = ""


def section(run: Record) -> Section:
    """Return the section."""
    use = Way("Use it", [command("chat", run.folder, "--side-by-side"), command("generate", run.folder, "PROMPT")])
    ships = run.result.get("export_formats")
    if not isinstance(ships, dict):
        beside = command("methods", run.recipe.method.name)
        return Section("shipping", "How to ship it", {"ways": [use]}, [Missing("where it ships was not noted", beside)])
    ways = [use, *ways_of(run, ships)]
    return Section(
        "shipping", "How to ship it", {"ways": ways, "method": run.recipe.method.name, "export_formats": ships}
    )


def ways_of(run: Record, ships: dict) -> list[Way]:
    """Return the ways that an adapter can go.

    Args:
        run: the run.
        ships: `merged`, `gguf`, `vllm` and `as_lora`, as training noted them, and `base_kind`.
    """
    name, folder = run.folder.resolve().name, run.folder
    out = {to: f"{name}-{to}" for to in ("merged", "gguf", "ollama", "vllm")}
    of_gguf = ships.get("base_kind") == "gguf"
    by_converter = "" if of_gguf else "The base is no GGUF: LLAMA_CPP has to name a checkout of llama.cpp."
    ways = []
    if ships.get("merged"):
        merged = [command("merge", folder, "--out", out["merged"]), shlex.join(["vllm", "serve", out["merged"]])]
        ways.append(Way("One plain model, for transformers and vLLM", merged))

    def export(to: str, *more: str) -> str:
        return command("export", folder, "--to", to, "--out", out[to], *more)

    if ships.get("gguf"):
        ways.append(Way("llama.cpp, the adapter beside the base", [export("gguf")]))
    elif ships.get("merged"):
        ways.append(Way("llama.cpp, one model", [export("gguf", "--merged")], by_converter))
    if ships.get("gguf") and of_gguf:
        ways.append(Way("Ollama, the adapter beside the base", [export("ollama")]))
    elif ships.get("merged"):
        ways.append(Way("Ollama, one model", [export("ollama", "--merged")], by_converter))
    if ships.get("vllm"):
        ways.append(Way("vLLM, the adapter beside the base", [export("vllm")]))
    elif ships.get("as_lora"):
        loses = "What that loses is measured and said."
        ways.append(Way("vLLM, as the nearest LoRA", [export("vllm", "--as-lora", "64")], loses))
    ways.append(Way("The Hub", [command("push", folder, f"YOUR_NAME/{name}")]))
    if ships.get("merged") or ships.get("gguf"):
        ways.append(Way("Does every way say what was trained?", [command("verify", folder)]))
    return ways
