"""Results of evaluations and comparisons, made by hand."""

from typing import Any

from slimtune.evaluation.estimate import Estimate
from slimtune.evaluation.eval_result import EvalVerdict, SFTMeasures, TextOrPairEvalResult
from slimtune.experiments.experiment_results import ComparedMethod, CompareResult, PairedDifference


def make_sft_result(**measures: Any) -> TextOrPairEvalResult:
    """Return an evaluation of 20 rows that is passed; `measures` replace what was measured on the rows."""
    values: dict[str, Any] = {
        "rows": 20, "different_rows": 20, "tokens": 200, "rows_better": 15,
        "base_loss": Estimate(3.0, (2.8, 3.2)), "tuned_loss": Estimate(2.85, (2.7, 3.0)),
        "loss_reduction": Estimate(0.15, (0.1, 0.2)),
        "base_perplexity": Estimate(20.1, (16.4, 24.5)), "tuned_perplexity": Estimate(17.3, (14.9, 20.1)),
        "base_accuracy": Estimate(0.4, (0.35, 0.45)), "tuned_accuracy": Estimate(0.5, (0.45, 0.55)),
        "accuracy_gain": Estimate(0.1, (0.05, 0.15)),
    }  # fmt: skip
    return TextOrPairEvalResult(
        run="runs/mine", task="sft", split="test", data="rows.jsonl", training_rows=0,
        measures=SFTMeasures(**(values | measures)), improved=True, verdict=EvalVerdict(passed=True),
        dropped=0, truncated=0, dtype="float32", quantization=None,
    )  # fmt: skip


def make_method(
    name: str, reduction: float, *, half: float = 0.02, memory=2, size=10, time=60, **more: Any
) -> ComparedMethod:
    """Return a compared method; memory in GiB, size in MiB, time in seconds."""
    values: dict[str, Any] = {
        "method": name, "of": name, "settings": {}, "task": None, "rate": 2e-4, "rate_from": "default",
        "seeds": [1, 2, 3], "ranked": True, "steps": 3, "trained_tokens": [1000, 1010], "trainable_params": 10,
        "total_params": 800, "trained_percent": 1.25, "file_bytes": size << 20, "peak_bytes": memory << 30,
        "train_seconds": time, "time_seconds": time, "tokens_per_second": 100.0, "base_loss": 4.0 + reduction,
        "tuned_loss": 4.0, "loss_reduction": Estimate(reduction, (reduction - half, reduction + half)),
        "loss_reduction_by_seed": [reduction] * 3, "loss_reduction_sd_seeds": 0.01, "oom_events": 0,
        "skipped_steps": 0, "dtype": "bfloat16", "device": "cpu",
    }  # fmt: skip
    return ComparedMethod(**(values | more))


def make_difference(a: str, b: str, low: float, high: float, *, beyond: bool) -> PairedDifference:
    """Return the difference of two compared methods."""
    p = 0.01 if beyond else 0.5
    return PairedDifference(
        a=a, b=b, seeds=[1, 2, 3], difference=(low + high) / 2, ci95=(low, high), p=p, p_corrected=p,
        beyond_noise=beyond,
    )  # fmt: skip


def make_comparison(*methods: ComparedMethod, **more: Any) -> CompareResult:
    """Return a comparison of methods."""
    values: dict[str, Any] = {
        "output_dir": "o", "model": "m", "dtype": "bfloat16", "device": "cpu", "tokens": None, "steps": 3,
        "seeds": [1, 2], "at_once": 1, "rows": 9, "test_tokens": 1234, "base_loss": 4.5, "methods": methods,
        "pairs": [], "advice": "Take lora.", "on": None, "searched": {}, "left_out": [], "failed": [], "seconds": 1.0,
    }  # fmt: skip
    return CompareResult(**(values | more))


def complete_json(schema: dict[str, Any], value: Any) -> Any:
    """Return a JSON value with zero, "" or null for each required key that it lacks, as the schema says."""
    schema = next((s for s in schema.get("anyOf", []) if s.get("type") != "null"), schema)
    if isinstance(value, list):
        return [complete_json(schema.get("items", {}), item) for item in value]
    if not isinstance(value, dict) or "type" not in schema:
        return value
    known, other = schema.get("properties", {}), schema.get("additionalProperties") or {}
    made = {key: complete_json(known.get(key, other if other is not True else {}), item) for key, item in value.items()}
    missing = [key for key in schema.get("required", []) if key not in value]
    intervals = {key: [0.0, 0.0] for key in missing if key.removesuffix("_ci95") in value}
    return {key: _make_empty(known[key]) for key in missing} | intervals | made


def _make_empty(schema: dict[str, Any]) -> Any:
    kinds = schema.get("type", [s.get("type") for s in schema.get("anyOf", [])])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    empty = {"null": None, "boolean": False, "integer": 0, "number": 0.0, "string": "", "array": []}
    if "enum" in schema:
        return schema["enum"][0]
    if "prefixItems" in schema:
        return [_make_empty(item) for item in schema["prefixItems"]]
    return complete_json(schema, {}) if kinds == ["object"] else next(empty[k] for k in empty if k in kinds)
