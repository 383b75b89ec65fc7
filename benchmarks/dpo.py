"""One step of DPO with LoRA, ours beside TRL's DPOTrainer with PEFT: same pairs, same machine, in turns.

    python benchmarks/dpo.py [--rounds 5] [--pairs 8] [--model smollm2-135m] [--ways NAME …]

    ours                 `slimtune train --task dpo`'s step, the reference computed before
    trl                  DPOTrainer with PEFT's LoRA, the reference computed in each step with the adapter disabled
    trl-precomputed      the same with precompute_ref_log_probs=True

Each way is a process of its own that waits while another one runs; a round runs each way for one optimizer step, and
the order turns from round to round. TRL's best is a pair in a micro-batch (`--parts`): nothing is padded to another
pair's length then, and its padding_free is switched off in TRL itself. Two tables: prompts as long as answers, and
prompts a tenth as long as answers.
Figures are medians over rounds, the first round warms up. r = 16 on all linear maps, AdamW, nothing checkpointed.
Peak memory is each process's own, libraries and the base's weights included. The reference's own time is not in a step:
`prepare` is the time it takes for all pairs, where it is computed before. The first losses have to agree with ln 2.
"""

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS = ("ours", "trl", "trl-precomputed")
KINDS = {"Prompts as long as answers": (128, 128), "Prompts a tenth as long as answers": (20, 200)}
"""Words of a prompt and of an answer, on average."""
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
BETA, LEARNING_RATE = 0.1, 1e-4
PEERS = Path(__file__).parents[1] / ".venv-peers/bin/python"
"""The peers' Python, without slimtune; without it they run in the environment of slimtune."""


def make_pairs(count: int, prompt: int, answer: int) -> list[dict[str, str]]:
    """Return pairs of random words, half to one and a half times as many as on average."""
    draw = random.Random(0)
    words = ("time year people way day man thing woman life child world school state family student group").split()  # noqa: SIM905

    def text(mean: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(mean // 2, mean + mean // 2)))

    return [
        {"prompt": f"{i} {text(prompt)}", "chosen": f" {text(answer)}", "rejected": f" {text(answer)}"}
        for i in range(count)
    ]


# --- a way, in its own process ----------------------------------------------------------------------------------------


class Turns:
    """The worker's talk with the parent: a line `go` on stdin, a JSON object on stdout."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints goes to stderr

    def say(self, **facts: Any) -> None:
        """Write one object."""
        self.out.write(json.dumps(facts) + "\n")
        self.out.flush()

    def wait(self) -> bool:
        """Wait for a turn; return whether there is one."""
        return sys.stdin.readline().startswith("go")

    def done(self, seconds: float, loss: float) -> None:
        """Report a step."""
        self.say(seconds=seconds, loss=loss, peak=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def run_ours(spec: dict[str, Any], turns: Turns) -> None:
    """Run `slimtune train`'s step in a plain loop."""
    import torch

    import slimtune
    from slimtune.compat.peft_registration import skip_registering_classes_as_peft
    from slimtune.core.attention.attention_functions import using_packed_attention
    from slimtune.core.config.objective_registry import load_objective_class
    from slimtune.core.data.example_lengths import count_tokens_per_row
    from slimtune.core.data.rows import Row
    from slimtune.core.data.tokenize import tokenize_dataset
    from slimtune.core.foundation.device import disable_malloc_trim
    from slimtune.core.models.loader import load_base
    from slimtune.core.training.loss import (
        choose_sufficient_micro_batch_tokens,
        forward_backward,
        make_collator,
        score_row_logps_by_example_index,
    )
    from slimtune.core.training.memory_savings import apply_memory_savings

    skip_registering_classes_as_peft()
    base = load_base(spec["base"], dtype=spec["dtype"], device="cpu")
    disable_malloc_trim()
    model: Any = slimtune.get_peft_model(base.model, slimtune.LoraConfig(**LORA))
    apply_memory_savings(model)
    rows = [Row([], i, **pair) for i, pair in enumerate(spec["pairs"], 1)]
    data, _ = tokenize_dataset(rows, base.tokenizer, max_seq_len=10**6, source_path="pairs")
    collator = make_collator(model, base.tokenizer.pad_token_id)
    collator.max_tokens = choose_sufficient_micro_batch_tokens(
        model, collator, max(map(max, map(count_tokens_per_row, data.example_lengths)))
    )
    started = time.perf_counter()
    with model.disable_adapter():
        reference = score_row_logps_by_example_index(model, data, collator)
    prepare = time.perf_counter() - started
    examples = [e | {"reference": reference[i]} for i, e in enumerate(data)]
    objective: Any = load_objective_class("dpo")(beta=BETA)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, fused=True)
    size, at = spec["batch"], 0
    turns.say(ready=True, prepare=prepare)
    model.train()
    with using_packed_attention(model):
        while turns.wait():
            step = examples[at : at + size]
            at += size
            started = time.perf_counter()
            loss = forward_backward(model, collator.make_micro_batches(step), objective=objective, num_items=size)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            turns.done(time.perf_counter() - started, loss.item())


def run_trl(spec: dict[str, Any], turns: Turns) -> None:
    """Run one real `DPOTrainer.train()` that waits before each step and reports after it."""
    import peft
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class InTurns(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.say(ready=True, prepare=prepare if precomputed else 0.0)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not turns.wait():
                os._exit(0)  # out of the middle of a Trainer's loop
            losses.clear()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.done(time.perf_counter() - self.started, sum(losses) / len(losses))

    class Watched(DPOTrainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            losses.append(float(found[0] if isinstance(found, tuple) else found))
            return found

    losses: list[float] = []
    precomputed = spec["way"].endswith("precomputed")
    dtype = getattr(torch, spec["dtype"])
    model = AutoModelForCausalLM.from_pretrained(spec["base"], dtype=dtype, attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            folder,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=spec["batch"] // spec["parts"],
            gradient_accumulation_steps=spec["parts"],
            max_steps=spec["steps"],
            max_length=None,
            precompute_ref_log_probs=precomputed,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        started = time.perf_counter()
        trainer = Watched(
            model,
            args=arguments,
            train_dataset=Dataset.from_list(spec["pairs"]),
            processing_class=AutoTokenizer.from_pretrained(spec["base"]),
            peft_config=peft.LoraConfig(**LORA),
            callbacks=[InTurns()],
        )
        if precomputed:
            trainer.get_train_dataloader()
        prepare = time.perf_counter() - started
        trainer.train()


# --- the ways in turns ------------------------------------------------------------------------------------------------


def in_turns(
    specs: dict[str, Path], rounds: int, describe: Callable[[dict[str, Any]], str], **environment: str
) -> dict[str, list[dict[str, Any]]]:
    """Run the ways of a benchmark round by round, each in its worker; return what each says: at its start, then steps.

    Args:
        specs: a file with the settings of each way, which its worker gets as `--worker`.
        rounds: after the first, which warms up.
        describe: returns a step in a few words.
        environment: further variables of the workers.
    """
    from slimtune.core.foundation.cpu import CPU_SETTINGS  # a peer's own Python, which runs this file, has no slimtune

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **environment}
    workers: dict[str, Any] = {}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in specs}
    try:
        for way, spec in specs.items():
            python = str(PEERS) if way != "ours" and PEERS.exists() else sys.executable
            command = [python, sys.argv[0], "--worker", str(spec)]
            settings = CPU_SETTINGS if way == "ours" else {}
            with spec.with_suffix(".log").open("w") as log:
                pipe = subprocess.PIPE
                workers[way] = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=log, text=True, env={**environment, **settings}
                )
            found[way].append(answer(workers[way], spec))  # one after the other: each has the machine to itself
        names = list(specs)
        for number in range(rounds + 1):
            for way in names[number % len(names) :] + names[: number % len(names)]:
                workers[way].stdin.write("go\n")
                workers[way].stdin.flush()
                found[way].append(answer(workers[way], specs[way]))
            steps = (f"{way} {describe(f[-1])}" for way, f in found.items())
            print(f"round {number} of {rounds}", *steps, file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait(30)
    return found


def take_medians(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return the medians of each way; the first losses have to agree."""
    for way, (_, first, *_) in found.items():
        assert abs(first["loss"] - math.log(2)) < 0.01, f"{way}: the first loss is {first['loss']}, not ln 2"
    return {
        way: {
            "seconds": statistics.median(step["seconds"] for step in steps[2:]),
            "peak": steps[-1]["peak"],
            "prepare": steps[0]["prepare"],
            "loss": steps[-1]["loss"],
        }
        for way, steps in found.items()
    }


def answer(worker: Any, spec: Path) -> dict[str, Any]:
    """Return a worker's next object; exit with its log if it has ended."""
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{spec.stem} ended with {worker.wait()}:\n{spec.with_suffix('.log').read_text()[-3000:]}")
    found: dict[str, Any] = json.loads(line)
    return found


def save_base(model: str, dtype: str, folder: Path) -> None:
    """Save the base as a Hugging Face folder, in a process that ends."""
    code = (
        "import sys\nfrom slimtune.core.models.loader import load_base\n"
        "base = load_base(sys.argv[1], dtype=sys.argv[2], device='cpu')\n"
        "for key in ('quantization_config', 'is_quantized', 'hf_quantizer'):\n"
        "    for owner in (base.model.config, base.model):\n"
        "        if hasattr(owner, key): delattr(owner, key)\n"
        "base.model.save_pretrained(sys.argv[3]); base.tokenizer.save_pretrained(sys.argv[3])\n"
    )
    subprocess.run([sys.executable, "-c", code, model, dtype, str(folder)], check=True, stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base's weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step")
    parser.add_argument("--parts", type=int, help="micro-batches of TRL's step; default: one for each pair")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        spec = json.loads(args.worker.read_text())
        (run_ours if spec["way"] == "ours" else run_trl)(spec, Turns())
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_base(args.model, args.dtype, Path(folder, "base"))
        for title, (prompt, answer_words) in KINDS.items():
            steps = args.rounds + 1
            common = {
                "base": f"{folder}/base",
                "dtype": args.dtype,
                "batch": args.pairs,
                "parts": args.parts or args.pairs,
                "steps": steps,
            }
            common["pairs"] = make_pairs(args.pairs * steps, prompt, answer_words)
            specs = {way: Path(folder, f"{way}.json") for way in args.ways}
            for way, file in specs.items():
                file.write_text(json.dumps({**common, "way": way}))
            said = in_turns(specs, args.rounds, lambda step: f"{step['seconds']:.1f} s")
            results[title] = found = take_medians(said)
            print(
                f"\n{title}\n\n| | pairs/s | of ours | peak memory | of ours | reference before |\n"
                "|---|---|---|---|---|---|"
            )
            ours = found.get("ours", next(iter(found.values())))
            for way, f in found.items():
                speed, memory = ours["seconds"] / f["seconds"], f["peak"] / ours["peak"]
                print(
                    f"| {way} | {args.pairs / f['seconds']:.2f} | {speed:.2f} | {f['peak'] / 2**30:.2f} GiB "
                    f"| {memory:.2f} | {f['prepare']:.1f} s |"
                )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
