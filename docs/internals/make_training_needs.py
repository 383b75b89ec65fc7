"""Write planning/training_needs.json: `make_training_needs.py [BASE …]`; without names for all bases (20 minutes).

For each known base the bytes that LoRA with its defaults needs to train on one row of 1,024 tokens with gradient
checkpointing: on a GPU with the base in bfloat16 and in NF4, on a Mac and on a CPU in bfloat16.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from slimtune.cli.planned_jobs import load_run_to_plan
from slimtune.core.attention.attention_functions import packing_unsupported_reason_or_empty
from slimtune.extras.known_models import list_alias_names
from slimtune.planning.extrapolation import extrapolate_step_trace, find_layer_kinds
from slimtune.planning.gpu_specs import GpuSpec, require_gpu_by_name
from slimtune.planning.interval import Interval
from slimtune.planning.known_base_fits import ROW_TOKENS
from slimtune.planning.plan_request import build_plan_request
from slimtune.planning.planner import RUNTIME, estimate_peak_allocated_and_reserved

FILE = Path(__file__).parents[2] / "src/slimtune/planning/training_needs.json"
HUGE = 1 << 50
DEVICES = {
    "cuda": require_gpu_by_name("b300"),
    "mps": require_gpu_by_name("m3-ultra-512gb"),
    "cpu": GpuSpec("a CPU", "cpu", "", "", HUGE, HUGE, auto_bf16=True),
}
WAYS = (("cuda", "bfloat16"), ("cuda", "nf4"), ("mps", "bfloat16"), ("cpu", "bfloat16"))


def plan_need(base: str, device: str, weights: str) -> Interval:
    """Return the bytes that a run needs at least and at most."""
    settings = {
        "train.gradient_checkpointing": True, "train.batch_size": 1, "data.max_seq_len": ROW_TOKENS,
        "train.max_tokens_per_micro_batch": 1, **({"model.quantization": weights} if weights == "nf4" else {}),
    }  # fmt: skip
    jobs = load_run_to_plan(base, settings)
    (recipe,) = jobs.recipes.values()
    request = build_plan_request(recipe, DEVICES[device], [], 1, jobs.row_composition)
    job = request.job()
    model = job.build_model()
    job = replace(job, layer_kinds=find_layer_kinds(job, model))
    if packing_unsupported_reason_or_empty(model):
        job = replace(job, packing=False)
    _, reserved = estimate_peak_allocated_and_reserved(job, extrapolate_step_trace(job, model))
    return reserved + RUNTIME[job.device]


def plan_needs(base: str) -> dict[str, list[int]]:
    """Return the needs of a base on each kind of device; those that cannot be planned are left out."""
    found = {}
    for device, weights in WAYS:
        try:
            found[f"{device} {weights}"] = [round(end) for end in plan_need(base, device, weights)]
        except Exception as error:  # the base's code runs on tensors without values, and may do anything with them
            print(f"{base}, {device} {weights}: {error!r}", file=sys.stderr)
    return found


def write_needs(bases: Iterable[str]) -> None:
    """Plan these bases and write them beside those that the file has."""
    needs = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for base in bases:
        needs[base] = plan_needs(base)
        text = ",\n".join(f"{json.dumps(name)}: {json.dumps(needs[name])}" for name in sorted(needs))
        FILE.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
        print(base, flush=True)


if __name__ == "__main__":
    write_needs(sys.argv[1:] or sorted(list_alias_names()))
