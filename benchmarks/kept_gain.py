"""How much of what training gained on held-out rows is left in few bits, in llama.cpp, by each way of shipping them.

    python benchmarks/kept_gain.py RUN [RUN ...] [--data ROWS] [--precision q8_0 Q4_0] [--way merged beside]
    python benchmarks/kept_gain.py QAT_RUN --gain-of RUN --way trained --precision Q4_0
    python benchmarks/kept_gain.py --table kept_gain.jsonl

A run is of one data set and one objective; `export/kept_gain.py` says what is measured, on the rows that the run held
out or on those of a file. Each result is a JSON line of `--out` (kept_gain.jsonl), with the name of the run's folder; a
result that the file has is not measured again. A way is a function in `WAYS`:

    rows      base and adapter as one model, rounded with the run's rows: `export`
    merged    rounded by llama.cpp's quantizer alone: `export --without-rows`
    imatrix   the same, errors weighted by the inputs that the run's rows give: `export --imatrix`
    beside    the base rounded, the adapter beside it in f32: two files
    trained   a run of `method.qat`, with the weights that its training saw: `export`

With `--gain-of` the shares are of the gain of another run, on its held-out rows: of the same rows without `method.qat`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from torch import Tensor

from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.training.trained_model import TrainedModel
from slimtune.export.gguf import write_adapter_gguf
from slimtune.export.gguf_roundings import is_trained_precision
from slimtune.export.kept_gain import (
    estimate_kept_gain,
    list_held_out_rows,
    measure_unrounded_nats,
    sum_supervised_nats,
)
from slimtune.export.llama_cpp_scorer import LlamaCppScorer
from slimtune.export.merge import (
    load_run_for_export,
    measure_input_importances,
    record_second_moments_by_gguf_name,
    write_base_gguf,
    write_merged_gguf,
)

Files = tuple[Path, Path | None]  # a model, and an adapter beside it


MOMENTS: dict[Path, dict[str, Tensor] | str] = {}  # by run: they serve every precision


def write_merged_with_rows(loaded: TrainedModel, run: Path, folder: Path, precision: str) -> Files:
    if run not in MOMENTS:
        started = time.process_time()
        MOMENTS[run] = record_second_moments_by_gguf_name(loaded)
        print(f"inputs of {run}: {time.process_time() - started:.0f} s of processor time", flush=True)
    if isinstance(moments := MOMENTS[run], str):
        raise SystemExit(f"{run}: {moments}")
    started = time.process_time()
    rounded = write_merged_gguf(loaded, run, folder / "rows.gguf", precision, second_moments=moments)
    print(f"{run} in {precision}: {time.process_time() - started:.0f} s of processor time", flush=True)
    print(f"{len(rounded)} matrices rounded with rows")
    return folder / "rows.gguf", None


def write_merged(loaded: TrainedModel, run: Path, folder: Path, precision: str) -> Files:
    write_merged_gguf(loaded, run, folder / "model.gguf", precision)
    return folder / "model.gguf", None


def write_merged_with_imatrix(loaded: TrainedModel, run: Path, folder: Path, precision: str) -> Files:
    importances = measure_input_importances(loaded, run)
    write_merged_gguf(loaded, run, folder / "imatrix.gguf", precision, importances)
    return folder / "imatrix.gguf", None


def write_beside(loaded: TrainedModel, run: Path, folder: Path, precision: str) -> Files:
    write_adapter_gguf(folder / "adapter.gguf", loaded.model)
    return folder / "base.gguf", folder / "adapter.gguf"


def write_as_trained(loaded: TrainedModel, run: Path, folder: Path, precision: str) -> Files:
    if not is_trained_precision(loaded.model, precision):
        raise SystemExit(f"{run} was not trained to be exported in {precision}")
    write_merged_gguf(loaded, run, folder / "trained.gguf", precision)
    return folder / "trained.gguf", None


WAYS: dict[str, Callable[[TrainedModel, Path, Path, str], Files]] = {
    "rows": write_merged_with_rows,
    "merged": write_merged,
    "imatrix": write_merged_with_imatrix,
    "beside": write_beside,
    "trained": write_as_trained,
}
TITLES = {
    "rows": "rounded with rows",
    "merged": "`--without-rows`",
    "imatrix": "`--imatrix`",
    "beside": "adapter beside the base",
    "trained": "`method.qat`",
}


def measure_run(
    run: Path, precisions: list[str], ways: list[str], out: Path, gain_of: Path | None = None, data: Path | None = None
) -> None:
    done = {(r["run"], r["precision"], r["way"]) for r in read_results(out)}
    wanted = [(p, w) for p in precisions for w in ways if (run.name, p, w) not in done]
    if not wanted:
        return
    loaded = load_run_for_export(run)
    rows = list_held_out_rows(loaded, data)
    if isinstance(rows, str):
        print(f"{run}: not measured: {rows}")
        return
    assert loaded.recipe is not None
    tuned = loaded if gain_of is None else load_run_for_export(gain_of)
    unrounded, longest = measure_unrounded_nats(tuned, rows.texts), max(len(text.input_ids) for text in rows.texts) + 1
    for precision in dict.fromkeys(p for p, _ in wanted):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_base_gguf(loaded, folder / "base.gguf", precision)

            def sum_nats(model: Path, adapter: Path | None) -> list[float]:
                with closing(LlamaCppScorer(model, adapter, max_tokens=longest, threads=1)) as scorer:
                    return sum_supervised_nats(scorer, rows.texts, "rows")

            rounded_base = sum_nats(folder / "base.gguf", None)
            for way in (w for p, w in wanted if p == precision):
                files = WAYS[way](loaded, run, folder, precision)
                kept = estimate_kept_gain(rows, unrounded, sum_nats(*files), rounded_base)
                names = {
                    "run": run.name,
                    **({"gain_of": gain_of.name} if gain_of else {}),
                    "base": loaded.recipe.model.name,
                    "objective": loaded.recipe.task.name,
                }
                size = sum(f.stat().st_size for f in files if f is not None)
                line = {**names, "precision": precision, "way": way, "bytes": size, **to_json_dict(kept)}
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{run} {precision} {way}: {kept.describe()}", flush=True)


def read_results(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def format_table(results: list[dict]) -> str:
    """Return a Markdown table: a line for each run whose gain is shared and each precision, a column for each way."""
    ways = [way for way in WAYS if any(r["way"] == way for r in results)]
    lines = [
        f"| rows | precision | base alone | {' | '.join(TITLES[way] for way in ways)} |",
        f"| --- | --- | --- |{' --- |' * len(ways)}",
    ]
    groups: dict[tuple[str, str], dict[str, dict]] = {}
    for r in results:
        groups.setdefault((r.get("gain_of", r["run"]), r["precision"]), {})[r["way"]] = r
    for (run, precision), found in sorted(groups.items(), key=lambda group: group[0][0]):
        some = next(iter(found.values()))
        unit = "nats per token" if some["objective"] == "sft" else "per pair"
        rows = f"{run}: {some['objective']}, gain {some['base_loss'] - some['tuned_loss']:.3f} {unit}"
        base = f"{some['rounded_base_loss'] - some['base_loss']:+.3f}"
        cells = [rows, precision, base, *(format_share(found.get(way)) for way in ways)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_share(result: dict | None) -> str:
    """Return a share of the gain with its interval, or why there is none."""
    if result is None:
        return ""
    if result["share"] is None:
        return result["reason"]
    low, high = result["share_ci95"]
    return f"{result['share']:.1%} ({low:.1%} to {high:.1%})".replace("%", " %").replace(" % to", " to")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--precision", nargs="+", default=["q8_0", "Q4_K_M", "Q4_0"])
    parser.add_argument("--way", nargs="+", default=[way for way in WAYS if way != "trained"], choices=WAYS)
    parser.add_argument("--gain-of", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, metavar="ROWS", help="held-out rows; default: those of the run")
    parser.add_argument("--out", type=Path, default=Path("kept_gain.jsonl"))
    parser.add_argument("--table", type=Path, help="print the results of a file")
    args = parser.parse_args()
    for run in args.runs:
        measure_run(run, args.precision, args.way, args.out, args.gain_of, args.data)
    if args.table or args.runs:
        print(format_table(read_results(args.table or args.out)))


if __name__ == "__main__":
    main()
