"""Write docs/silent_faults.md from the registries of the tests, and from what was recorded of each walk.

    python docs/internals/make_silent_faults.py

`pytest tests/export/adapter_check/test_fault_walk.py -m "" --update-screens` records the walks.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/silent_faults.md"
DIALECTS = {
    "vllm": "vLLM's", "echo": "SGLang's", "answers": "LM Studio's", "ollama": "Ollama's", "mlx": "mlx-lm's",
    "chat": "chats alone", "greedy": "words alone",
}  # fmt: skip
TEXT = """# Silent faults that are reproduced

An adapter can be loaded, served or merged wrongly while nothing says so. Each of these faults was reported by somebody,
is made again by a test, and is named by [`slimtune check`](applied.md). This page is written from the tests' own lists.

## In the adapter's file

{files} faults. `check` names {named} by this code without an engine. {silent} are silent in PEFT {peft}: it loads the
file without an error, and its log-probabilities over HTTP are not those of the training, or a part that was trained is
not in the file. **`slimtune repair` mends {repaired}**, and PEFT computes the trained adapter of the new file. The
others are refused by name: what was not saved stays lost.

| fault | reported in | `check` says | PEFT computes of it | after `repair` |
| --- | --- | --- | --- | --- |
{file_rows}

## In what serves it

{engines} set-ups: {real} in real engines ({real_engines}), {replayed} with an engine's protocol replayed.

| fault | reported in | engine | `check` says |
| --- | --- | --- | --- |
{engine_rows}

## Right adapters

No false alarm on {pairs} pairs of a base and an adapter, of {families} families. All but {alone} of these
families were also computed by an engine that loads the file (PEFT, mlx-lm): its log-probabilities are the trained
adapter's.

| written by | pairs | families |
| --- | --- | --- |
{pair_rows}
"""


def link(issue: str) -> str:
    """Return a link to an issue or a pull request of GitHub; "" without one."""
    repository, _, number = issue.partition("#")
    return f"[{issue}](https://github.com/{repository}/issues/{number})" if issue else "a variant"


def make_page() -> str:
    """Return the page."""
    sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "tests/export", "tests/export/adapter_check")]
    import peft
    from mlx_bases import ALL_FAMILIES
    from test_fault_walk import RECORD
    from test_llama_server import LLAMA_CPP_FAULTS
    from test_mlx_faults import MLX_FAULTS, SERVER_FAULTS
    from test_repaired_adapters import MORE_FAULTS
    from test_right_adapters import FILE_ALONE, WRITERS
    from test_served_adapters import SERVED_FAULTS
    from test_silent_faults import FAULTS
    from test_trainer_adapters import ADAPTERS

    walks, faults = json.loads(RECORD.read_text()), {**FAULTS, **MORE_FAULTS}
    file_rows = [
        f"| {name} | {link(issue)} | `{code}` | {walks[name]['peft']} | {walks[name]['repaired']} |"
        for name, (code, _, issue, _) in faults.items()
    ]
    real = {"llama.cpp's server": LLAMA_CPP_FAULTS, "mlx-lm": MLX_FAULTS, "`mlx_lm.server`": SERVER_FAULTS}
    engine_rows = [
        f"| {name} | {link(issue)} | {engine} | `{cause}` |"
        for engine, registry in real.items()
        for name, (cause, issue, *_) in registry.items()
    ]
    engine_rows += [
        f"| {name} | {link(issue)} | {DIALECTS[dialect]} protocol | `{cause}` |"
        for name, (cause, issue, dialect, *_) in SERVED_FAULTS.items()
    ]
    written = {writer: list(pairs) for writer, (pairs, _) in WRITERS.items()}
    written["mlx-lm, LoRA and DoRA"] = [family for family in ALL_FAMILIES for _ in range(2)]
    written["LLaMA-Factory and ms-swift"] = ["llama"] * len(ADAPTERS)
    pair_rows = [
        f"| {writer} | {len(families)} | {', '.join(dict.fromkeys(families))} |" for writer, families in written.items()
    ]
    silent = [w for w in walks.values() if not w["peft"].startswith(("PEFT raises", "applied"))]
    return TEXT.format(
        files=len(faults),
        named=len([n for n in faults if faults[n][0] in walks[n]["file"]]),
        silent=len(silent),
        peft=peft.__version__,
        repaired=len([w for w in walks.values() if w["repaired"] == "applied"]),
        file_rows="\n".join(file_rows),
        engines=len(engine_rows),
        real=sum(map(len, real.values())),
        real_engines=", ".join(real),
        replayed=len(SERVED_FAULTS),
        engine_rows="\n".join(engine_rows),
        alone=len(FILE_ALONE),
        pairs=sum(map(len, written.values())),
        families=len({family for families in written.values() for family in families}),
        pair_rows="\n".join(pair_rows),
    )


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
