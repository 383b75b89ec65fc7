"""A run folder with every file that the report reads, as training and evaluation write them."""

import math
from pathlib import Path
from typing import Any

from train_results import make_train_result

from slimtune.core.config import Recipe
from slimtune.core.foundation.files import write_json
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.training.run_dir import RunDir

GIB = 2**30


def estimate_resources() -> dict[str, Any]:
    parts = {"weights": 269030272, "adapters": 19537920, "gradients": 19537920, "optimizer": 39077520,
             "activations": 671368829, "logits": 201129984, "runtime": 800000000}  # fmt: skip
    return {
        "plan": {
            "model": "smollm2-135m", "method": "lora", "card": "this machine", "dtype": "bfloat16", "batch": 4,
            "seq_len": 251, "trainable_params": 4884480, "total_params": 139399488, "adapter_bytes": 19593096,
            "parts": parts, "allocated_bytes": 1219682445, "usable_bytes": {"low": 23.0e9, "high": 23.0e9},
            "need_bytes": {"low": 1669682445, "high": 2529700811}, "verdict": "fits",
            "reason": "it needs 1.6 GiB to 2.4 GiB of 21.6 GiB", "tokens_per_second": {"low": 400.0, "high": 600.0},
        },
        "probe": {"tokens": 911, "bytes": 1902055424, "low": 1630604925, "high": 2529700811, "as_planned": True},
    }  # fmt: skip


def make_result(path: Path, **changes: Any) -> dict[str, Any]:
    """Return result.json of a run."""
    paths = {"run": str(path), "adapter": str(path / "adapter")}
    return to_json_dict(make_train_result()) | paths | changes


def make_data_report(file: str, text: str) -> dict[str, Any]:
    """Return a data report as `slimtune data FILE --json` prints it."""
    return {
        "file": file, "format": "chat", "model": "smollm2-135m", "rows": 781, "invalid_count": 2,
        "invalid_rows": [{"line": 17, "cause": f"the assistant's message is empty {text}", "code": "empty-content"},
                    {"line": 90, "cause": "not JSON", "code": "bad-json"}],
        "tokens": 64700, "supervised_tokens": 36400, "supervised_share": 0.5626,
        "lengths": {"min": 31, "median": 74, "p90": 131, "p99": 208, "max": 251, "histogram": [
            {"from": 31 + 22 * i, "to": 52 + 22 * i, "rows": n} for i, n in enumerate(
                [96, 230, 190, 112, 74, 40, 21, 9, 5, 2])]},
        "max_seq_len": 200, "overlong": {"rows": 3, "lines": [101, 202, 303]},
        "shared_prefix": {"tokens": 24, "text": f"system: you define words {text}"},
        "packing": {"packed_tokens": 46100, "saved_share": 0.287},
        "issues": [
            {"code": "special-token", "severity": "error", "what": f"a message contains a special token {text}",
             "lines": [4, 8], "count": 2, "hint": f"take it out {text}"},
            {"code": "near-duplicates", "severity": "warning", "what": "near duplicates",
             "lines": list(range(20)), "count": 44, "hint": "keep one of each"},
        ],
        "samples": [{"line": 1, "pieces": [
            {"text": f"<|im_start|>user\nDefine: love {text}<|im_end|>\n<|im_start|>assistant\n", "supervised": False},
            {"text": f"A temporary insanity curable by marriage. {text}<|im_end|>", "supervised": True}]}],
        "verdict": "errors", "seconds": 0.8,
    }  # fmt: skip


def make_evaluation(path: Path, text: str, generations: int = 6) -> dict[str, Any]:
    """Return what `slimtune eval RUN --generate 6 --json` prints."""
    return {
        "run": str(path), "task": "sft", "split": "test", "data": "test.jsonl", "training_rows": 0, "rows": 93,
        "different_rows": 93, "tokens": 3868, "base_loss": 4.524,
        "tuned_loss": 3.728, "loss_reduction": 0.796, "loss_reduction_ci95": [0.72, 0.89],
        "base_loss_ci95": [4.38, 4.66], "tuned_loss_ci95": [3.61, 3.85], "base_perplexity": 92.2,
        "tuned_perplexity": 41.6,
        "base_perplexity_ci95": [79.9, 105.6], "tuned_perplexity_ci95": [37.0, 47.0], "base_accuracy": 0.243,
        "base_accuracy_ci95": [0.22, 0.26], "tuned_accuracy_ci95": [0.3, 0.33], "preference": None, "tasks": None,
        "win_rate": None, "tuned_accuracy": 0.318, "accuracy_gain": 0.075, "accuracy_gain_ci95": [0.061, 0.09],
        "rows_better": 93,
        "prompt_dependence": {"rows": 93, "base": 0.18, "base_ci95": [0.15, 0.21], "tuned": 0.204,
                       "tuned_ci95": [0.17, 0.24], "change": 0.024, "change_ci95": [-0.01, 0.06], "passed": True},
        "improved": True, "dropped": 0, "truncated": 0, "dtype": "bfloat16", "quantization": None, "seconds": 14.6,
        "forgetting": {"text": f"plain prose {text}", "tokens": 20111, "base_loss": 3.1, "tuned_loss": 3.143,
                       "change": 0.043, "change_ci95": [0.031, 0.055], "budget": 0.1, "within": True, "kinds": {}},
        "generations": [
            {"line": i, "prompt": [{"role": "system", "content": f"Be Bierce. {text}"},
                                   {"role": "user", "content": f"Define: word {i} {text}"}],
             "reference": f"What the book says. {text}", "base": f"A word is a unit of language. {text}",
             "tuned": f"A noise by which fools signal to each other. {text}",
             "checks": {"length": {"base": 31, "tuned": 44}, f"ended {text}": {"base": False, "tuned": True}}}
            for i in range(generations)],
        "generation_summary": {"length": {"base": 31.0, "tuned": 44.0}, "ended": {"base": 0.0, "tuned": 1.0}},
        "verdict": {"passed": True, "reasons": [f"the loss reduction is above 0 {text}"],
                    "warning": f"over only 6 rows {text}"},
    }  # fmt: skip


def make_full_run(path: Path, text: str = "", steps: int = 40, **result: Any) -> RunDir:
    """Write a run with every file; every free text of it contains `text`."""
    recipe = Recipe.from_dict(
        {
            "model": f"smollm2-135m{text}",
            "data": {"train": f"/data/{text.replace('/', '')}rows.jsonl", "test": "/data/test.jsonl"},
            "method": "lora",
            "train": {"max_steps": steps},
            "output_dir": str(path),
        }
    )
    run = RunDir.create(path, recipe)
    for i in range(1, steps + 1):
        run.append_metrics(
            {"step": i, "epoch": i / 98, "train_loss": 3.6 + 1.1 * math.exp(-i / 15) + 0.12 * math.sin(2.3 * i),
             "grad_norm": 0.7 + 0.2 * math.cos(i), "learning_rate": 5e-4 * (1 - i / steps),
             "trained_tokens": 670 * i, "tokens_per_second": 504 + 9 * math.sin(i), "memory_bytes": 2 * GIB}
        )  # fmt: skip
        if i % 10 == 0:
            run.append_metrics({"step": i, "epoch": i / 98, "validation_loss": 3.8 + 0.6 * math.exp(-i / 15)})
    run.append_metrics(
        {"event": "out of memory", "step": 12, "where": "a step", "tokens": 911, "rows": 4, "room_before": 989,
         "room_after": 455, "checkpointing": False, "held_bytes": 2 * GIB, "planned_bytes": 2 * GIB,
         "error": f"OutOfMemoryError: {text}", "text": f"after step 12 memory ran out in a step {text}"}
    )  # fmt: skip
    write_json(run.plan_file, estimate_resources())
    write_json(run.result_file, make_result(path, **result))
    write_json(run.data_file, {"train": make_data_report("train.jsonl", text), "validation": None})
    write_json(run.evaluation_file("test"), make_evaluation(path, text))
    return run
