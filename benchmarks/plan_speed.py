"""How long a plan takes, and what memory: the formula, the trace of two and three layers, the whole plan; 8B and 70B.

    python benchmarks/plan_speed.py [--json FILE]

Times are processor seconds of a process of its own that has imported everything; a plan uses one core. Of the 8B they
are the least of three processes, since what else runs makes them longer. Exit code 1: a plan of the 8B of 4 s or more,
of the 70B of 18 s or more, or of 2 GB of memory or more.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

JOB = {"rank": 16, "seq_len": 2048, "gradient_accumulation_steps": 4}
PROCESSES = {"llama-3.1-8b": 3, "llama-3.1-70b": 1}
LIMITS = {"llama-3.1-8b": 4.0, "llama-3.1-70b": 18.0}
MAX_BYTES = 2e9


def measured(name: str) -> dict[str, float]:
    """Plan in this process; return seconds and bytes."""
    import torch

    from slimtune import LoraConfig
    from slimtune.core.models.base_config import load_base_config
    from slimtune.planning.extrapolation import extrapolate_step_trace, fit_memory_formula
    from slimtune.planning.gpu_specs import require_gpu_by_name
    from slimtune.planning.plan_request import PlanRequest
    from slimtune.planning.planner import estimate_resources

    torch.set_num_threads(1)
    method = LoraConfig(r=JOB["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    request = PlanRequest(
        load_base_config(name),
        require_gpu_by_name("rtx-3090"),
        method,
        seq_len=JOB["seq_len"],
        gradient_accumulation_steps=JOB["gradient_accumulation_steps"],
        gradient_checkpointing=True,
    )
    job = request.job()
    model = job.build_model()
    extrapolate_step_trace(
        PlanRequest(load_base_config("smollm2-135m"), require_gpu_by_name("rtx-3090"), method).job()
    )  # warm up
    found: dict[str, float] = {}
    for what, run in (
        ("formula", lambda: fit_memory_formula(job, model)),
        ("trace", lambda: extrapolate_step_trace(job)),
        ("plan", lambda: estimate_resources(request)),
    ):
        began = time.process_time()
        run()
        found[what] = time.process_time() - began
    return found | {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def apart(name: str) -> dict[str, float]:
    """Measure in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", name], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one)))
        return
    found = {}
    print("| base | formula, s | trace, s | plan, s | memory, GB |\n| --- | ---: | ---: | ---: | ---: |")
    for name, processes in PROCESSES.items():
        runs = [apart(name) for _ in range(processes)]
        found[name] = each = {key: (max if key == "bytes" else min)(r[key] for r in runs) for key in runs[0]}
        times = " | ".join(f"{each[k]:.2f}" for k in ("formula", "trace", "plan"))
        print(f"| {name} | {times} | {each['bytes'] / 1e9:.2f} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(any(each["plan"] >= LIMITS[name] or each["bytes"] >= MAX_BYTES for name, each in found.items()))


if __name__ == "__main__":
    main()
