"""Ask every command that gives advice about many bases on many machines: do they answer, and do they agree?

    python benchmarks/advice_agrees.py [--out FILE.jsonl] [--machine GPU ...] [BASE ...]

For each base `choose`, `choose --serve` and `gpus --for` are asked; for each machine `plan --serve`, `plan` of one row
at a time (which `choose` plans), the plan with its first advice, `cost` and `cost --serve`. The commands run in this
process, so that imports, the traces of a base and its model without weights are shared by all machines. FILE gets a
line for each base: verdicts by machine, and what is wrong. Bases that it has are not asked again. Exit code 1: a crash,
a refusal without a reason, or a conflict.
"""

import argparse
import functools
import json
import re
import shlex
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import typer.testing

from slimtune.cli import app
from slimtune.planning import extrapolation, trace_cache
from slimtune.planning.memory_trace import StepTrace, trace_training_step
from slimtune.planning.plan_request import MicroBatchWorkload, PlanRequest

RUNNER = typer.testing.CliRunner()

BASES = (
    "llama-3.1-8b llama3.2:3b llama3.2:1b meta-llama/Llama-3.3-70B-Instruct llama-4-scout llama-2-7b tinyllama",
    "qwen3:8b qwen3:0.6b Qwen/Qwen3-32B qwen3:30b-a3b qwen3-next qwen3-coder:30b qwen3.5:9b qwen3.5:0.8b qwen3.6:27b",
    "qwen3.6:35b-a3b qwen2.5:7b qwen2.5-coder:7b Qwen/Qwen2.5-VL-7B-Instruct qwen3-vl:8b qwq deepseek-r1:7b",
    "deepseek-r1:70b deepseek-v2-lite deepseek-v3 deepseek-v3.2 kimi-k2 gemma3:4b gemma-3-27b gemma-3-270m gemma3n:e4b",
    "gemma-4-e2b gemma-4-12b gemma-4-26b-a4b gemma2:9b gemma-2b mistral:7b mistral-small-24b mixtral:8x7b",
    "ministral-3-8b phi4 phi-4-mini phi-2 gpt2 gpt-oss:20b gpt-oss:120b glm-4.7-flash glm-4.5-air glm-5 minimax-m2",
    "granite-4.0-h-tiny granite-3.3-8b nemotron-nano-9b-v2 falcon-h1-0.5b lfm2-8b-a1b smollm2:135m smollm3 olmo-3-7b",
    "apertus-8b",
)
"""As people write them."""
MACHINES = (
    "rtx-3060-12gb rtx-3090 rtx-4060 rtx-4070-ti rtx-4090 rtx-5070 rtx-5090 t4 a100-80gb h100-sxm h200 b300 rtx-a6000",
    "rtx-pro-6000 mi300x radeon-ai-pro-r9700 rx-7900-xtx rx-9070-xt m1-16gb m4-max-64gb m3-ultra-256gb dgx-spark",
    "strix-halo-128gb jetson-orin-nano arc-pro-b60",
)
ONE_ROW = ("--max-tokens-per-micro-batch", "1")
"""`choose` sends each row through the model by itself."""
SAME_HOURS = 1.2
"""Largest factor between the hours of `choose`, which plans a run once for all GPUs of a kind, and those of `plan`."""


MODELS = 8
"""Models that are kept."""


class SharedModelWorkload(MicroBatchWorkload):
    """A job whose model without weights is that of an earlier job of the same base and settings: plans only read it."""

    models: ClassVar[OrderedDict[str | None, Any]] = OrderedDict()

    def build_model(self) -> Any:
        """Return the model, built once."""
        key = trace_cache._describe(replace(self, lengths=(1,), micro_batches_per_step=1, layer_kinds=()), {})
        if key not in self.models:
            self.models[key] = super().build_model()
        self.models.move_to_end(key)
        while len(self.models) > MODELS:
            self.models.popitem(last=False)
        return self.models[key]


def share_between_commands() -> None:
    """Let all plans of this process share models; traces, which use a model up, build their own. Read flags once."""
    typer.testing._get_command = functools.cache(typer.testing._get_command)
    make_job = PlanRequest.job

    def copy_job(job: MicroBatchWorkload, job_class: type[MicroBatchWorkload]) -> MicroBatchWorkload:
        return job_class(**{field.name: getattr(job, field.name) for field in fields(job)})

    def trace(job: MicroBatchWorkload, _: Any = None, **options: Any) -> StepTrace:
        return trace_training_step(copy_job(job, MicroBatchWorkload), **options)

    PlanRequest.job = lambda request: copy_job(make_job(request), SharedModelWorkload)  # type: ignore[method-assign]
    extrapolation.trace_training_step = trace


def ask(*words: str) -> tuple[dict[str, Any], list[str]]:
    """Return the JSON of a command, and what is wrong with it: a crash, or a refusal without a reason."""
    done, command = RUNNER.invoke(app, [*words, "--json"], prog_name="slimtune"), shlex.join(words)
    if not (done.exception is None or isinstance(done.exception, SystemExit)) or done.exit_code not in (0, 1, 2):
        return {"error": {"message": ""}}, [f"{command}: crashed with {done.exception!r}"]
    found = json.loads(done.stdout)
    error = found.get("error")
    without = error and not (error["message"] and (error["expected"] or error["hint"]))
    return found, [f"{command}: refused without a reason: {error}"] if without else []


class BaseAudit:
    """What the commands say of a base: first of all machines, then of one after another."""

    def __init__(self, base: str) -> None:
        self.base, self.problems = base, list[str]()
        chosen, served = self.ask("choose"), self.ask("choose", "--serve")
        self.listed = self.ask("gpus", named="--for")
        self.offers = {offer["card"]: offer for way in ("buy", "rent") for offer in chosen.get(way, [])}
        self.served = {offer["card"]: offer["serve"] for way in ("buy", "rent") for offer in served.get(way, [])}
        self.verdicts = {card["name"]: card["verdict"] for card in self.listed.get("cards", [])}
        self.chosen_error, self.served_error = chosen.get("error"), served.get("error")

    def ask(self, command: str, *flags: str, named: str = "") -> dict[str, Any]:
        """Return the JSON of a command about the base; keep what is wrong with it."""
        found, problems = ask(command, *filter(None, (named, self.base)), *flags)
        self.problems += problems
        return found

    def ask_on(self, machine: str) -> list[str]:
        """Ask about a machine; return the verdicts of training and of serving."""
        planned = self.ask("plan", "--gpu", machine, "--serve")
        run, serve = next(iter(planned.get("plans", [])), None), planned.get("serve")
        conflicts = [
            *(self.find_training_conflicts(machine, run) if run is not None else self.find_answers(machine, planned)),
            *(self.find_serving_conflicts(machine, serve, planned)),
        ]
        self.problems += [f"{self.base} on {machine}: {conflict}" for conflict in conflicts]
        return [part["verdict"] if part is not None else "refused" for part in (run, serve)]

    def find_answers(self, machine: str, planned: dict[str, Any]) -> Iterator[str]:
        """Yield which command has an answer for training where `plan` has none."""
        if not (planned.get("unfit") or "error" in planned):
            yield "plan gives no plan and no reason"
        alone, cost = self.ask("plan", "--gpu", machine, *ONE_ROW), self.ask("cost", "--gpu", machine)
        answers = {"plan of one row": "error" not in alone, "cost": "error" not in cost,
                   "gpus --for": machine in self.verdicts, "choose": machine in self.offers}  # fmt: skip
        yield from (f"plan refuses, {command} answers" for command, does in answers.items() if does)

    def find_training_conflicts(self, machine: str, run: dict[str, Any]) -> Iterator[str]:
        """Yield where `plan`, its advice, `gpus --for`, `choose` and `cost` differ about training."""
        alone, cost = self.ask("plan", "--gpu", machine, *ONE_ROW), self.ask("cost", "--gpu", machine)
        if self.verdicts.get(machine) != run["verdict"]:
            yield f"plan: {run['verdict']}, gpus --for: {self.verdicts.get(machine)}"
        has_cost = run["verdict"] != "does not fit" and run["tokens_per_second"] is not None
        if has_cost == ("error" in cost):
            yield f"plan: {run['verdict']}, cost: {cost.get('error', 'answers')}"
        if "error" in alone:
            yield "plan refuses one row at a time"
            return
        rented = "error" not in cost and bool(cost["rent"]) and alone["tokens_per_second"] is not None
        if alone["verdict"] == "fits" and rented and machine not in self.offers:
            yield f"it fits and can be rented, choose does not offer it: {self.chosen_error}"
        if machine in self.offers:
            ours, theirs = self.offers[machine]["cost"]["hours"]["high"], alone["cost"]["hours"]["high"]
            if alone["verdict"] != "fits" or not theirs / SAME_HOURS <= ours <= SAME_HOURS * theirs:
                yield f"choose: fits, {ours} hours; plan of one row: {alone['verdict']}, {theirs} hours"
        for advice in run["advice"][:1]:
            text = re.sub(r" \([^)]*\)", "", advice["change"]).replace("steps as many", f"steps {run['micro_batches']}")
            changed = self.ask("plan", "--gpu", machine, *shlex.split(text.replace(",", "").replace(" and ", " ")))
            if changed.get("verdict") != advice["verdict"]:
                yield f"{text}: then it {advice['verdict']}; plan with it: {changed.get('verdict', changed)}"
        if (smaller := run["smaller_base"]) is not None:
            found, problems = ask("plan", smaller, "--gpu", machine)
            self.problems += problems
            if found.get("verdict") != "fits":
                yield f"{smaller} fits, it says; plan: {found.get('verdict', found)}"

    def find_serving_conflicts(
        self, machine: str, serve: dict[str, Any] | None, planned: dict[str, Any]
    ) -> Iterator[str]:
        """Yield where `plan --serve`, `choose --serve` and `cost --serve` differ."""
        cost = self.ask("cost", "--gpu", machine, "--serve")
        if serve is None:
            if not (planned.get("serve_error") or "error" in planned):
                yield "plan --serve gives no plan and no reason"
            if "error" not in cost or machine in self.served:
                yield "plan --serve refuses, cost --serve or choose --serve answers"
            return
        speed = serve["decode_tokens_per_second"]
        if self.served_error or self.served.get(machine, serve) != serve:
            yield f"plan --serve and choose --serve differ: {self.served_error}"
        if (speed is None) != ("error" in cost) or cost.get("decode", speed) != speed:
            yield f"plan --serve writes {speed} tokens/s, cost --serve: {cost.get('error', cost.get('decode'))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="*", metavar="BASE")
    parser.add_argument("--machine", action="append", metavar="GPU")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")
    args = parser.parse_args()
    share_between_commands()
    lines = args.out.read_text().splitlines() if args.out is not None and args.out.exists() else []
    asked = {line["base"]: line for line in map(json.loads, lines)}
    for base in args.bases or " ".join(BASES).split():
        if base in asked:
            continue
        began, audit = time.process_time(), BaseAudit(base)
        verdicts = {machine: audit.ask_on(machine) for machine in args.machine or " ".join(MACHINES).split()}
        asked[base] = {"base": base, "verdicts": verdicts, "problems": audit.problems}
        print(f"{base}: {len(verdicts)} machines, {time.process_time() - began:.0f} s of CPU", *audit.problems,
              sep="\n  ", flush=True)  # fmt: skip
        if args.out is not None:
            with args.out.open("a") as out:
                out.write(json.dumps(asked[base]) + "\n")
    pairs, wrong = (sum(len(line[part]) for line in asked.values()) for part in ("verdicts", "problems"))
    print(f"{len(asked)} bases, {pairs} pairs of base and machine, {wrong} problems")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
