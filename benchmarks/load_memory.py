"""How much memory a large base takes from loading to its first step, beside what `slimtune plan` says.

    python benchmarks/load_memory.py                   # 4.6 GB of bfloat16, loaded as bfloat16
    python benchmarks/load_memory.py --stored float32 --dtype bfloat16
    python benchmarks/load_memory.py --layers 4        # a small one, to try it

Makes a checkpoint shaped as a Llama (random weights; hidden 2048, MLP 8192, 32,000 tokens, untied, files of 500 MB) in
`--stored`, and in a process of its own loads it in `--dtype`, attaches a LoRA of rank 16 and does one optimizer step
as `slimtune train` does. From outside that process's memory is read every 5 ms, apart by what it is:

    anonymous   RssAnon of /proc/PID/status: what only this process can give back
    files       RssFile: pages of libraries and of weights that are views of their files, which the system can drop

Weights loaded in the dtype they are stored in stay views of their files and come in as the step reads them; others are
anonymous, and the files' pages go with the loading. The plan counts weights once, wherever they lie. So it is held
against the most anonymous memory while loading and attaching, and against both kinds in the step, all of it over what
there was once everything was imported. Exit code 1 where the most is further than 10 % from the plan's. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from merge_memory import make_base

OFF = 0.10
ROWS = 2
TOKENS = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def work(base: str, dtype: str) -> None:
    """Load, attach, and do one step; say each phase's end on stdout, and wait to be read."""
    from slimtune import LoraConfig, get_peft_model
    from slimtune.core.attention.attention_functions import using_packed_attention
    from slimtune.core.foundation.device import disable_malloc_trim
    from slimtune.core.models.loader import load_base
    from slimtune.core.training.loss import forward_backward, make_collator, move_batch_to_device
    from slimtune.core.training.optimizer import build_optimizer

    def said(phase: str) -> None:
        print(phase, flush=True)
        sys.stdin.readline()

    said("imports")
    loaded = load_base(base, dtype=dtype, device="cpu")
    disable_malloc_trim()
    said("loading")
    torch.manual_seed(0)
    model = get_peft_model(loaded.model, LoraConfig(**method()))
    model.train()
    said("attaching")
    rows = [[(7 * i * i + 11 * r) % 259 for i in range(TOKENS)] for r in range(ROWS)]
    packs = make_collator(model, 0, share_prefix=False).make_micro_batches(
        [{"input_ids": r, "labels": r} for r in rows]
    )
    optimizer = build_optimizer(model)
    with using_packed_attention(model):
        forward_backward(model, [move_batch_to_device(p, torch.device("cpu")) for p in packs])
    optimizer.step()
    optimizer.zero_grad()
    said("step")


def method() -> dict[str, Any]:
    """Return the settings of the LoRA."""
    return {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def measured(base: Path, dtype: str) -> dict[str, dict[str, int]]:
    """Return the most bytes of each kind in each phase, by the phase's name."""
    command = [sys.executable, __file__, "--work", str(base), "--dtype", dtype]
    found: dict[str, dict[str, int]] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        import selectors

        watch = selectors.DefaultSelector()
        watch.register(process.stdout, selectors.EVENT_READ)
        most: dict[str, int] = {}  # of each kind, and of both together
        while True:
            now = held(process.pid)
            most = {k: max(most.get(k, 0), v) for k, v in now.items()}
            if not watch.select(0.005):
                continue
            phase = process.stdout.readline().strip()
            if not phase:
                break
            found[phase] = {**most, "end": held(process.pid)["RssAnon"], "files": held(process.pid)["RssFile"]}
            most = {}
            process.stdin.write("\n")
            process.stdin.flush()
    if process.returncode:
        sys.exit("the process failed")
    return found


def held(pid: int) -> dict[str, int]:
    """Return what a process holds now, bytes of each kind; all 0 where it is gone."""
    kinds = ("RssAnon", "RssFile", "VmHWM")
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        lines = []
    read = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.split(":")[0] in kinds}
    return {**{k: read.get(k, 0) for k in kinds}, "both": read.get("RssAnon", 0) + read.get("RssFile", 0)}


def planned(base: Path, dtype: str) -> dict[str, int]:
    """Return the plan's bytes at the start and in the step."""
    from transformers import AutoConfig

    from slimtune.core.adapters.method_registry import get_method_config_class
    from slimtune.planning.memory_trace import trace_training_step
    from slimtune.planning.plan_request import MicroBatchWorkload

    config = get_method_config_class("lora")(**method())
    traced = trace_training_step(
        MicroBatchWorkload(AutoConfig.from_pretrained(base), config, DTYPES[dtype], (TOKENS,) * ROWS, device="cpu")
    )
    start = traced.state["weights"] + traced.state.get("adapters", 0)
    return {"loading": traced.state["weights"], "attaching": start, "step": traced.peak}


def main() -> int:
    """Make the base, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--stored", choices=DTYPES, default="bfloat16")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.dtype)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        make_base(base, given.layers, DTYPES[given.stored])
        files = [f.stat().st_size for f in base.glob("*.safetensors")]
        print(f"base: {sum(files) / 1e9:.2f} GB of {given.stored} in {len(files)} files, loaded as {given.dtype}")
        plan, start = planned(base, given.dtype), time.perf_counter()
        found = measured(base, given.dtype)
        took = time.perf_counter() - start
    anonymous, files_before = found["imports"]["end"], found["imports"]["files"]
    print(f"measured in {took:.0f} s, over {_gb(anonymous)} anonymous and {_gb(files_before)} of files after imports:")
    print(f"{'phase':12}{'anonymous':>12}{'files':>12}{'both':>12}{'counted':>12}{'planned':>12}")
    counted = {}
    for phase in ("loading", "attaching", "step"):
        f = found[phase]
        both = f["both"] - anonymous - files_before
        counted[phase] = both if phase == "step" else f["RssAnon"] - anonymous
        shown = (f["RssAnon"] - anonymous, f["RssFile"] - files_before, both, counted[phase], plan[phase])
        print(f"{phase:12}" + "".join(f"{_gb(n):>12}" for n in shown))
    most, said = max(counted.values()), max(plan.values())
    off = most / said - 1
    print(f"at most {_gb(most)}, planned {_gb(said)}: {off:+.1%} (VmHWM {_gb(found['step']['VmHWM'])})")
    print(json.dumps({"counted": counted, "planned": plan, "off": off}))
    return int(abs(off) > OFF)


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
