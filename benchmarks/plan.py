"""Memory of a planned step against a real step, measured by torch's own allocator events.

    python benchmarks/plan.py [METHOD ...] [--base NAME ...] [--json FILE]

Every method with its recipe's defaults, LoRA with DoRA, and full fine-tuning, on four architectures: the real shapes of
SmolLM2-135M and of GPT-2, and Qwen 2 and Gemma 2 made smaller. Dtype, checkpointing, lengths of rows, packing and the
number of micro-batches change from case to case. Weights are random: memory does not depend on their values.

    plan      `slimtune.planning.memory_trace` on fake tensors
    real      bytes allocated after one optimizer step (state), and at the highest point of the next (peak): sums of
              the `[memory]` events that torch's profiler records while the model is built, adapted and trained
              (`plan_ways/referee.py`)

Mean and worst are those of the peak's error. Exit code 1: a mean of 0.5 % or more, or a worst of 2 % or more.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: its profiler would write to stderr

import torch
import transformers as tf
from plan_ways.referee import measured

from slimtune.core.adapters.method_registry import METHODS, get_method_config_class
from slimtune.core.config.method_settings import fill_recipe_defaults
from slimtune.core.foundation.formatting import format_bytes
from slimtune.core.models.base_config import load_convertible_base_config
from slimtune.planning.memory_trace import trace_training_step
from slimtune.planning.plan_request import MicroBatchWorkload

NEEDED = {
    "bitfit": {"new_biases": True},  # Llama has none
    "trainable_tokens": {"token_indices": [1, 2, 198, 520, 4093, 9690]},  # those of SmolLM2's chat template
}
"""Settings of methods whose defaults train nothing on such a base."""
MEAN, WORST = 0.5, 2.0
"""Errors of the peak that are too large, in per cent."""
BASES: dict[str, Any] = {
    "smollm2-135m": lambda: load_convertible_base_config("smollm2-135m"),
    "gpt2": lambda: tf.GPT2Config(),
    "qwen2": lambda: tf.Qwen2Config(
        hidden_size=640, intermediate_size=2560, num_hidden_layers=10, num_attention_heads=10, num_key_value_heads=2,
        vocab_size=64_000, tie_word_embeddings=True,
    ),
    "gemma2": lambda: tf.Gemma2Config(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, vocab_size=64_000, sliding_window=256,
    ),
}  # fmt: skip
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora, DoRA": ("lora", {"use_dora": True}),
    **{name: (name, NEEDED.get(name, {})) for name in METHODS.built_in_names()},
}
OWN = {("bitfit", "gpt2"): {}, ("bitfit", "qwen2"): {}}
"""Settings for bases that have biases."""
KINDS = [(d, c) for d in (torch.float32, torch.bfloat16) for c in (False, True)]
ROWS: list[tuple[tuple[int, ...], bool]] = [  # lengths, and whether they are packed
    ((256,), True),
    ((200, 120, 64), True),
    ((128, 128), False),
    ((512,), True),
    ((160, 96), False),
    ((64,) * 5, True),
    ((640, 128), True),
]
SAVING = ("lora", "bottleneck", "prefix_tuning", "ia3")
"""Methods that run once more on each base, with tiled MLPs and offloaded activations."""


@dataclass(frozen=True)
class Case:
    base: str
    method: str
    dtype: torch.dtype
    checkpointing: bool
    lengths: tuple[int, ...]
    packing: bool
    passes: int
    tile: int | None = None

    def job(self) -> MicroBatchWorkload:
        return MicroBatchWorkload(
            BASES[self.base](), self.config(), self.dtype, self.lengths, self.passes, "cpu", self.checkpointing,
            offload_activations=self.tile is not None, mlp_tile_size=self.tile, packing=self.packing,
        )  # fmt: skip

    def config(self) -> Any:
        name, settings = METHODS[self.method]
        cls = get_method_config_class(name)
        return cls(**fill_recipe_defaults(OWN.get((self.method, self.base), settings), cls))


def cases(methods: list[str], bases: list[str]) -> Iterator[Case]:
    """Yield each method twice on SmolLM2 and once on the others; the other settings rotate."""
    rows, passes = itertools.cycle(ROWS), itertools.cycle((1, 1, 2))
    for number, method in enumerate(METHODS):
        for turn, base in enumerate(["smollm2-135m", *BASES]):
            # Of the two on SmolLM2 one is fp32 and one bf16, one checkpointed and one not.
            kind = number + turn if turn else 2 - number
            (dtype, checkpointing), (lengths, packing) = KINDS[kind % 4], next(rows)
            case = Case(base, method, dtype, checkpointing, lengths, packing, next(passes))
            if method in methods and base in bases:
                yield case
    for turn, (method, base) in enumerate(itertools.product(SAVING, BASES)):
        dtype, (lengths, packing) = KINDS[2 * (turn % 2)][0], next(rows)
        if method in methods and base in bases:
            yield Case(base, method, dtype, True, lengths, packing, next(passes), tile=48)


def compare(case: Case) -> dict[str, Any]:
    trace, real = trace_training_step(case.job()), measured(case.job())
    plan = trace.state_bytes, trace.step
    return {
        "base": case.base,
        "method": case.method,
        "dtype": str(case.dtype).removeprefix("torch."),
        "checkpointing": case.checkpointing,
        "tile": case.tile,
        "lengths": case.lengths,
        "packed": case.packing,
        "passes": case.passes,
        "state_bytes": {"plan": plan[0], "real": real[0]},
        "peak_bytes": {"plan": plan[1], "real": real[1]},
        "state_error_percent": 100 * (plan[0] / real[0] - 1),
        "error_percent": 100 * (plan[1] / real[1] - 1),
        "error_beside_state_percent": 100 * ((plan[1] - plan[0]) / (real[1] - real[0]) - 1),
    }


def format_row(r: dict[str, Any]) -> str:
    rows = "+".join(map(str, r["lengths"])) + ("" if r["packed"] else " padded") + " × 2" * (r["passes"] == 2)
    how = f"{r['dtype'].replace('float', '')}{', checkpointed' if r['checkpointing'] else ''}"
    how += f", tiles of {r['tile']}" if r["tile"] else ""
    plan, real = (format_bytes(r["peak_bytes"][k]) for k in ("plan", "real"))
    return (
        f"{r['base']:13} {r['method']:17} {how:31} {rows:28} {r['state_error_percent']:+9.3f} "
        f"{plan:>10} {real:>10} {r['error_percent']:+8.3f} {r['error_beside_state_percent']:+8.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="which; all, if none is named")
    parser.add_argument("--base", action="append", choices=BASES, help="which; all, if none is named")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    args = parser.parse_args()
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"there is no method {min(unknown)!r}: {', '.join(METHODS)}")
    tf.logging.set_verbosity_error()
    print(f"{'base':13} {'method':17} {'':31} {'rows':28} {'state, %':>9} {'peak: plan':>10} {'real':>10} "
          f"{'error, %':>8} {'no state':>8}")  # fmt: skip
    rows = []
    for case in cases(args.methods or list(METHODS), args.base or list(BASES)):
        rows.append(compare(case))
        print(format_row(rows[-1]), flush=True)
    errors = [abs(r["error_percent"]) for r in rows]
    mean, worst = sum(errors) / len(errors), max(errors)
    print(f"{len(rows)} cases, error of the peak: mean {mean:.3f} %, worst {worst:.3f} %")
    if args.json:
        versions = {"torch": torch.__version__, "transformers": tf.__version__}
        found = {**versions, "mean_percent": mean, "worst_percent": worst, "cases": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(mean >= MEAN or worst >= WORST)


if __name__ == "__main__":
    main()
