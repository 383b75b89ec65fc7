"""Whole steps of GRPO with LoRA (sampling, reward, learning), ours beside TRL's GRPOTrainer with PEFT, in turns.

    python benchmarks/grpo.py [--rounds 4] [--prompts 2] [--kinds short long] [--ways NAME …]

    ours          `slimtune train --task grpo`
    trl           GRPOTrainer, PEFT's LoRA, transformers' `generate`
    trl-paged     the same with transformers' continuous batching

Each way is a process of its own that waits while another one runs; a round runs each way for one whole step, and the
order turns from round to round. All have the same prompts, K = 8, the same longest answer, temperature, base in the
same dtype, r = 16 on all linear maps, AdamW, no weight on the KL divergence (ours measures it, TRL does not), nothing
checkpointed, and a reward that takes no time. The answers of a step are learned in `--parts` passes. Figures are
medians over rounds, ratios are taken round by round, and the first round warms up. Processor time is of the whole
process; peak memory is each process's own, libraries and the base's weights included.

A last line is of decoding alone: a token for each of 16 answers, beside the bare products of the frozen weights with 16
rows, in turns in one process. They read every weight from memory once, so no way of decoding in this dtype is faster.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dpo import LORA, Turns, in_turns, save_base

WAYS = ("ours", "trl", "trl-paged")
KINDS = {"short": ("Prompts of about 45 tokens", 0), "long": ("Prompts of about 300 tokens", 200)}
"""Title, and words that stand before each question."""
NUM_GENERATIONS, MAX_COMPLETION_LENGTH, LEARNING_RATE = 8, 64, 1e-5
DECODED, DECODING_STEPS = 16, 24
REWARD = """
def letters(prompts, completions, **columns):
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [len(set(text)) / 60 for text in texts]
"""
THINGS = ("a lighthouse", "a lost dog", "the winter", "a clock maker", "two friends", "a green train")
WORDS = "time year people way day man thing woman life child world school state family student group".split()  # noqa: SIM905


def make_prompts(count: int, words: int) -> list[list[dict[str, str]]]:
    """Return prompts that ask for a story, each after another text of some words."""
    draw = random.Random(0)
    texts = (" ".join(draw.choices(WORDS, k=words)) for _ in range(count))
    return [
        [{"role": "user", "content": f"{text} Tell me a long story about {THINGS[i % len(THINGS)]} ({i}).".strip()}]
        for i, text in enumerate(texts)
    ]


# --- a way, in its own process ----------------------------------------------------------------------------------------


class Step:
    """The time of one step."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def report(self, turns: Turns, tokens: float) -> None:
        """Report a step that has ended, with the mean tokens of an answer."""
        turns.say(
            seconds=time.perf_counter() - self.wall,
            processor=time.process_time() - self.processor,
            tokens=tokens,
            peak=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )


def count_tokens_of_a_pass(spec: dict[str, Any]) -> int:
    """Return the tokens of `--parts` of a step's prompts with all their answers: TRL learns as many in a pass."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    prompts = (tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in spec["prompts"])
    return (max(map(len, prompts)) + NUM_GENERATIONS * MAX_COMPLETION_LENGTH) * spec["batch"] // spec["parts"]


def run_ours(spec: dict[str, Any], turns: Turns) -> None:
    """Run the loop of `slimtune train`, a step at a time."""
    from slimtune.core.config import Recipe
    from slimtune.core.training.prepare_run import prepare_run
    from slimtune.core.training.training_loop import TrainingLoop

    recipe = Recipe.from_dict(
        {
            "model": {"name": spec["base"], "dtype": spec["dtype"], "device": "cpu"},
            "data": {"train": spec["rows"]},
            "task": {
                "name": "grpo",
                "rewards": [f"{spec['reward']}:letters"],
                "num_generations": NUM_GENERATIONS,
                "max_completion_length": MAX_COMPLETION_LENGTH,
            },
            "method": {"name": "lora", "r": LORA["r"], "lora_alpha": LORA["lora_alpha"]},
            "train": {
                "batch_size": spec["batch"],
                "max_tokens_per_micro_batch": count_tokens_of_a_pass(spec),
                "max_steps": spec["steps"],
                "learning_rate": LEARNING_RATE,
                "forgetting_budget": None,
                "save_steps": 10**6,
                "logging_steps": 10**6,
            },
            "output_dir": spec["out"],
        }
    )
    with prepare_run(recipe) as prepared:
        loop = TrainingLoop(prepared)
        turns.say(ready=True)
        step = None
        for _ in loop.iterate_steps():
            if step is not None:
                step.report(turns, prepared.objective.measure_steps()["completions/mean_length"])
            if not turns.wait():
                os._exit(0)
            step = Step()
        assert step is not None
        step.report(turns, prepared.objective.measure_steps()["completions/mean_length"])


def run_trl(spec: dict[str, Any], turns: Turns) -> None:
    """Run one real `GRPOTrainer.train()` that waits before each step and reports after it."""
    import peft
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class InTurns(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.say(ready=True)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            pass

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step[0].report(turns, trainer._metrics["train"]["completions/mean_length"][-1])
            step.clear()

    class Watched(GRPOTrainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:  # the first pass of a step samples, before its begin
            if not step:
                if not turns.wait():
                    os._exit(0)  # out of the middle of a Trainer's loop
                step.append(Step())
            return super().training_step(*args, **kwargs)

    step: list[Step] = []
    namespace: dict[str, Any] = {}
    exec(REWARD, namespace)  # the same code as in ours
    model = AutoModelForCausalLM.from_pretrained(
        spec["base"], dtype=getattr(torch, spec["dtype"]), attn_implementation="sdpa"
    )
    answers = spec["batch"] * NUM_GENERATIONS
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            folder,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=answers // spec["parts"],
            gradient_accumulation_steps=spec["parts"],
            max_steps=spec["steps"],
            num_generations=NUM_GENERATIONS,
            max_completion_length=MAX_COMPLETION_LENGTH,
            beta=0.0,
            use_transformers_continuous_batching=spec["way"] == "trl-paged",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            shuffle_dataset=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Watched(
            model,
            args=arguments,
            reward_funcs=namespace["letters"],
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in spec["prompts"]]),
            processing_class=AutoTokenizer.from_pretrained(spec["base"]),
            peft_config=peft.LoraConfig(**LORA),
            callbacks=[InTurns()],
        )
        trainer.train()


def run_decoding(spec: dict[str, Any], turns: Turns) -> None:
    """Report the seconds of a token for each of 16 answers, and of the frozen weights' bare products, in turns."""
    import torch

    import slimtune
    from slimtune.core.models.loader import load_base
    from slimtune.generation.answer_queue import GeneratedAnswer, SamplingParams
    from slimtune.generation.generation_models import make_generation_model
    from slimtune.generation.text_generator import TextGenerator

    base = load_base(spec["base"], dtype=spec["dtype"], device="cpu")
    model: Any = slimtune.get_peft_model(base.model, slimtune.LoraConfig(**LORA)).eval()
    linear = [
        module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.weight.shape[0] > 16
    ]
    inputs = {n: torch.randn(DECODED, n, dtype=base.dtype) for n in {module.weight.shape[1] for module in linear}}
    answering = make_generation_model(model, base.tokenizer, "default")
    prompts = [base.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
               for prompt in spec["prompts"][: DECODED // NUM_GENERATIONS]]  # fmt: skip
    params = SamplingParams(
        max_new_tokens=DECODING_STEPS + 2, temperature=1.0, top_logprobs=0, logprobs_at_temperature=True
    )
    answers = [GeneratedAnswer(answering, ids, params) for ids in prompts for _ in range(NUM_GENERATIONS)]
    generator = TextGenerator(model, max_batch=DECODED)
    generator.submit(answers)
    generator.step()  # the prompts
    steps, products = [], []
    with torch.no_grad():
        for _ in range(DECODING_STEPS):
            if generator.count()["running"] < DECODED:
                break
            started = time.process_time()
            generator.step()
            between = time.process_time()
            for module in linear:
                torch.nn.functional.linear(inputs[module.weight.shape[1]], module.weight)
            steps.append(between - started)
            products.append(time.process_time() - between)
    turns.say(steps=statistics.median(steps), products=statistics.median(products), count=len(steps))


# --- the ways in turns ------------------------------------------------------------------------------------------------


def describe_step(step: dict[str, Any]) -> str:
    """Return the time of a step by the clock, and of the processor."""
    return f"{step['seconds']:.1f} s ({step['processor']:.1f} s CPU)"


def measure_decoding(folder: Path, common: dict[str, Any], **environment: str) -> dict[str, float]:
    """Measure decoding in a process of its own, and print its share of what the products allow."""
    spec = folder / "decoding.json"
    spec.write_text(json.dumps({**common, "way": "decoding"}))
    command = [sys.executable, __file__, "--worker", str(spec)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    share = found["products"] / found["steps"]
    print(
        f"Decoding a token for each of {DECODED} answers takes {1000 * found['steps']:.0f} ms of processor time, the "
        f"bare products of the weights {1000 * found['products']:.0f} ms: {share:.2f} of what they allow."
    )
    return found


def format_table(title: str, found: dict[str, list[dict[str, Any]]], prompts: int) -> str:
    """Return the table of docs/grpo.md: speeds by the clock and by processor time, and memory."""
    lines = [
        f"| {title} | prompts/s | ours is faster | by processor time | tokens an answer | peak memory | ours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    ours = found["ours"]
    for way, steps in found.items():

        def ratio(name: str, steps: list[dict[str, Any]] = steps) -> float:
            return statistics.median(b[name] / a[name] for a, b in zip(ours, steps, strict=True))

        seconds, peak = statistics.median(s["seconds"] for s in steps), steps[-1]["peak"]
        tokens = statistics.fmean(s["tokens"] for s in steps)
        own = (ratio("seconds"), ratio("processor"), ours[-1]["peak"] / peak)
        faster, by_processor, memory = ["" if way == "ours" else f"{value:.2f}×" for value in own]
        lines.append(
            f"| {way} | {prompts / seconds:.2f} | {faster} | {by_processor} | {tokens:.0f} "
            f"| {peak / 2**30:.2f} GiB | {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the base's weights")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=2, help="prompts a step, each with 8 answers")
    parser.add_argument("--parts", type=int, default=2, help="passes in which the answers of a step are learned")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["ours", "trl"])
    parser.add_argument("--threads", type=int, help="of each way; default: what it takes by itself")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        spec = json.loads(args.worker.read_text())
        {"ours": run_ours, "decoding": run_decoding}.get(spec["way"], run_trl)(spec, Turns())
        return
    environment = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_base(args.model, args.dtype, folder / "base")
        (folder / "letters.py").write_text(REWARD)
        for kind in args.kinds:
            title, words = KINDS[kind]
            prompts = make_prompts(args.prompts * (args.rounds + 1), words)
            rows = folder / f"{kind}.jsonl"
            rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
            common = {
                "base": str(folder / "base"), "dtype": args.dtype, "batch": args.prompts, "parts": args.parts,
                "steps": args.rounds + 1, "rows": str(rows), "prompts": prompts, "reward": str(folder / "letters.py"),
                "out": str(folder / f"run-{kind}"),
            }  # fmt: skip
            specs = {way: folder / f"{kind}-{way}.json" for way in args.ways}
            for way, file in specs.items():
                file.write_text(json.dumps({**common, "way": way}))
            said = in_turns(specs, args.rounds, describe_step, **environment)
            results[kind] = {way: steps[2:] for way, steps in said.items()}  # after the start and the warm-up
            print(format_table(title, results[kind], args.prompts), end="\n\n", flush=True)
        results["decoding"] = measure_decoding(folder, common, **environment)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
