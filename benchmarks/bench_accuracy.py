"""What `slimtune plan` predicts after `slimtune bench`, against real runs on this machine.

    python benchmarks/bench_accuracy.py [--rounds 3] [--json FILE]

Real runs train SmolLM2-135M (`slimtune train`) on short rows (The Devil's Dictionary) and on long ones (eight of them
as one conversation), and decode with it in llama.cpp, in three precisions, and in transformers. A round measures the
machine anew (`slimtune bench`) between two such sets of runs, and the next round shares the second. A ratio is the
middle of the predicted range over the geometric mean of the two runs around the measurement: a machine whose speed
drifts within minutes (15 % here) is not counted as an error of the prediction. The medians over the rounds count.
Nothing else must run meanwhile. All processes have the same number of threads.

Exit code 1: a median is off by more than 10 %.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parents[1] / "examples/devils-dictionary/train.jsonl"
BASE, MOST = "smollm2-135m", 0.10
PROMPT, NEW_TOKENS = 64, 96
LLAMA_CPP_PRECISIONS = ("Q4_1", "Q8_0", "F16")


def run_slimtune(*words: object) -> dict[str, Any]:
    """Run a command with --json in a process of its own; return what it prints."""
    command = [sys.executable, "-m", "slimtune", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def write_rows(folder: Path) -> dict[str, Path]:
    """Write the rows of both runs; return their files."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    joined = []
    for at in range(0, len(rows) - 8, 8):
        turns = [turn for row in rows[at : at + 8] for turn in row["messages"] if turn["role"] != "system"]
        joined.append({"messages": turns})
    found = {}
    for name, some in {"short rows": rows[:96], "long rows": joined[:24]}.items():
        found[name] = folder / f"{name.split()[0]}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return found


def middle(band: dict[str, float]) -> float:
    return (band["low"] * band["high"]) ** 0.5


def training_settings(rows: Path) -> list[object]:
    return ["--data", rows, "--max-seq-len", 1024, "--set", "data.validation_fraction=0"]


def predict(rows: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Return the predicted range of tokens a second of each run."""
    plans = {name: run_slimtune("plan", BASE, *training_settings(file)) for name, file in rows.items()}
    training = {f"training, {name}": plan["tokens_per_second"] for name, plan in plans.items()}
    return training | run_itself("--predict-decoding")


def measure_real(rows: dict[str, Path], folder: Path) -> dict[str, float]:
    """Return the real tokens a second of each run."""
    found = {}
    for name, file in rows.items():
        with tempfile.TemporaryDirectory(dir=folder) as out:
            words = ["--model", BASE, *training_settings(file), "--out", f"{out}/run", "--epochs", 1]
            found[f"training, {name}"] = run_slimtune("train", *words)["tokens_per_second"]
    return found | run_itself("--measure-decoding", folder)


def run_itself(*words: object) -> dict[str, Any]:
    """Run a part of this script in a process of its own, as each run is; return what it prints."""
    command = [sys.executable, __file__, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def time_llama_cpp(file: Path, threads: int) -> float:
    """Return the tokens a second that llama.cpp decodes."""
    from slimtune.generation.inference_engines import InProcessLlamaCppEngine

    engine = InProcessLlamaCppEngine(file, max_tokens=512, threads=threads, cache="f16")
    seconds = [engine.measure_seconds(PROMPT, NEW_TOKENS)[1] for _ in range(4)][1:]
    engine.close()
    return 1 / statistics.median(seconds)


def decoding_files(folder: Path) -> dict[str, Path]:
    """Return the GGUF files of the base by precision; those that are not there are written."""
    from slimtune.core.models.loader import load_base
    from slimtune.core.models.model_source import resolve_model_source
    from slimtune.export.gguf import write_gguf_from_template

    template = Path(resolve_model_source(BASE).path)
    files = {"Q4_1": template}
    for precision in ("Q8_0", "F16"):
        files[precision] = file = folder / f"{precision}.gguf"
        if not file.exists():
            write_gguf_from_template(template, load_base(BASE, dtype="float32").model, file, precision.lower())
            os.sync()  # else the system writes it to the disk while decoding is timed
    return files


def predict_decoding() -> dict[str, dict[str, float]]:
    """Return the predicted range of tokens a second of decoding, by engine and precision."""
    from slimtune.core.foundation.json_results import to_json_dict
    from slimtune.core.models.loader import load_base
    from slimtune.planning.serving_cache import count_request_kv_cache_bytes
    from slimtune.planning.serving_memory import count_weight_bytes_and_macs_per_token
    from slimtune.planning.serving_speed import estimate_decode_and_prefill_speed
    from slimtune.planning.this_machine import detect_gpu_or_cpu_spec

    gpu, found = detect_gpu_or_cpu_spec(), {}
    model: Any = load_base(BASE).model
    for engine, precision in [*(("llama.cpp", p) for p in LLAMA_CPP_PRECISIONS), ("transformers", name_dtype(model))]:
        read, weights = count_weight_bytes_and_macs_per_token(model, "F16" if precision == "BF16" else precision)
        cached = (
            count_request_kv_cache_bytes(model.config, 25600, "llama.cpp", "f16") / 25600 * (PROMPT + NEW_TOKENS / 2)
        )
        if precision == "F32":
            cached *= 2
        speed = estimate_decode_and_prefill_speed(
            gpu, engine, weight_bytes_per_token=read, kv_bytes_per_request=cached,
            matmul_weight_count=weights, precision=precision, layers=model.config.num_hidden_layers,
            vocab_size=model.config.vocab_size,
        )  # fmt: skip
        assert speed is not None, "bench measured no such engine"
        found[f"decoding, {engine} {precision}"] = to_json_dict(speed.decode)
    return found


def measure_decoding(folder: Path) -> dict[str, float]:
    """Return the real tokens a second of decoding, by engine and precision."""
    import torch

    from slimtune.core.models.loader import load_base

    found = {}
    files = decoding_files(folder)
    for precision in LLAMA_CPP_PRECISIONS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # without torch's threads
            real = process.submit(time_llama_cpp, files[precision], torch.get_num_threads()).result()
        found[f"decoding, llama.cpp {precision}"] = real
    model: Any = load_base(BASE).model.eval()
    prompt = torch.ones(1, PROMPT, dtype=torch.long, device=model.device)
    model.generation_config.eos_token_id = None
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(4):
            for new, taken in zip((1, 1 + NEW_TOKENS), times, strict=True):
                start = time.perf_counter()
                model.generate(prompt, max_new_tokens=new, **settings)
                taken.append(time.perf_counter() - start)
    first, whole = (statistics.median(taken[1:]) for taken in times)
    found[f"decoding, transformers {name_dtype(model)}"] = NEW_TOKENS / (whole - first)
    return found


def name_dtype(model: Any) -> str:
    return {"torch.bfloat16": "BF16", "torch.float32": "F32"}[str(model.dtype)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--predict-decoding", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure-decoding", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.predict_decoding:
        print(json.dumps(predict_decoding()))
        return
    if args.measure_decoding is not None:
        print(json.dumps(measure_decoding(args.measure_decoding)))
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["SLIMTUNE_BENCH"] = str(folder / "bench.json")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        rows = write_rows(folder)
        before = measure_real(rows, folder)
        for number in range(args.rounds):
            measured = run_slimtune("bench")
            predictions, after = predict(rows), measure_real(rows, folder)
            for what, predicted in predictions.items():
                real = (before[what] * after[what]) ** 0.5
                ratio = middle(predicted) / real
                line = {"what": what, "predicted": predicted, "before": before[what], "after": after[what]}
                found.append({**line, "round": number + 1, "ratio": ratio, "threads": measured["threads"]})
                figures = f"predicted {middle(predicted):7.1f}, real {before[what]:7.1f}, {after[what]:7.1f} tokens/s"
                print(f"round {number + 1}  {what:28} {figures}, ratio {ratio:.3f}", flush=True)
            before = after
    print("\n| run | predicted / real, median | rounds |\n| --- | ---: | --- |")
    worst = 0.0
    for what in dict.fromkeys(r["what"] for r in found):
        ratios = [r["ratio"] for r in found if r["what"] == what]
        median = statistics.median(ratios)
        worst = max(worst, abs(median - 1))
        print(f"| {what} | {median:.3f} | {', '.join(f'{r:.3f}' for r in ratios)} |")
    print(f"\nThe worst median is off by {100 * worst:.1f} %.")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(worst > MOST)


if __name__ == "__main__":
    main()
