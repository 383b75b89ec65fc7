"""Write docs/first_runs.md from benchmarks/data/first_runs.jsonl, the lines that `benchmarks/first_runs.py` wrote."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/first_runs.md"
RUNS = ROOT / "benchmarks/data/first_runs.jsonl"
JOBS = {
    "abbreviations": ("abbreviations and what they stand for", "400"),
    "clinic-answers": ("a clinic's answers in one tone", "60"),
    "commands": ("what a command does, in one line", "200"),
    "documents": ("paragraphs of a novel, as raw text", "300 documents"),
    "emma": ("paragraphs of another novel, as raw text", "200 documents"),
    "faq": ("questions and answers of Debian's FAQ", "50"),
    "form-of-packages": ("facts about a package as a uniform form", "500"),
    "four-classes": ("definitions in four classes", "300"),
    "glossary": ("a glossary of computing", "1,000"),
    "jargon": ("a glossary of jargon", "300"),
    "json-elements": ("a text about a chemical element as JSON", "77"),
    "json-orders": ("an order's mail as JSON", "200"),
    "manual": ("a manual, as raw text", "150 documents"),
    "prefer-polite": ("pairs: polite answers (DPO)", "80"),
    "prefer-right": ("pairs: right definitions (DPO)", "200"),
    "prefer-source": ("pairs: answers that name their source (DPO)", "200"),
    "prefer-tone": ("pairs: a casual tone (DPO)", "100"),
    "sayings": ("sayings, as plain text", "150"),
    "shop-answers": ("a shop's answers in one tone", "117"),
    "shop-answers-20": ("twenty of the shop's answers", "20"),
    "style": ("definitions in Ambrose Bierce's style", "875"),
    "style-40": ("forty of Bierce's definitions", "40"),
    "three-classes": ("descriptions of programs in three classes", "150"),
    "thumbs": ("whole and cut-off answers with thumbs (KTO)", "200"),
    "thumbs-right": ("definitions with thumbs (KTO)", "200"),
    "translation": ("words, French to English", "2,000"),
}
BASES = {"smollm2-135m": "SmolLM2-135M-Instruct", "gemma-3-270m": "Gemma 3 270M"}
TEXT = """# First runs with nothing set

What do the defaults do on rows like yours? Small jobs made of texts that ship in Debian's packages were trained as a
user trains the first time, with model, data and columns and no other flag:

```sh
slimtune train --model smollm2-135m --data train.csv --column instruction=question --column output=answer
slimtune eval RUN --data held_out.csv
```

*Better* is the verdict of [`eval`](eval.md): on held-out rows the loss falls with an interval above 0 (of pairs and
thumbs: more of them are told apart), and of general text no more than 0.1 nats per token are forgotten. The gain is in
nats per token; for DPO the share of held-out pairs, and for classes that of rows, that are right in addition; for KTO
its own loss.

{tables}
The jobs are made by `benchmarks/first_run_jobs.py`, run by `benchmarks/first_runs.py`, and this page is written by
`docs/internals/make_first_runs.py`. {missing}
"""


def format_gain(run: dict[str, Any]) -> str:
    """Return a run's gain on held-out rows with its interval."""
    for name in ("pairs_gain", "loss_reduction", "accuracy_gain"):
        if run.get(name) is not None:
            low, high = run[f"{name}_ci95"]
            return f"{run[name]:+.2f} ({low:+.2f} to {high:+.2f})"
    return ""


def format_run(run: dict[str, Any]) -> str:
    """Return a run's row of the table."""
    about, rows = JOBS[run["job"]]
    if "error" in run:
        return f"| {about} | {rows} | | | not trained: {run['error'].splitlines()[0].removeprefix('error: ')} |"
    forgotten = "" if run["forgotten"] is None else f"{run['forgotten']:+.3f}"
    verdict = "better" if run["passed"] else f"**no**: {'; '.join(run['reasons'])}"
    verdict += f" ({run['warning']})" if run["warning"] else ""
    return f"| {about} | {rows} | {format_gain(run)} | {forgotten} | {verdict} |"


def format_tables(runs: list[dict[str, Any]]) -> str:
    """Return two tables for each base: jobs that defaults were chosen by, and those that were left out of that."""
    parts = []
    for stem, base in BASES.items():
        own = sorted((r for r in runs if Path(r["base"]).stem == stem and not r["train"]), key=lambda r: r["job"])
        for left_out, kind in ((False, ""), (True, ", jobs that no default was chosen by")):
            some = [r for r in own if r["left_out"] is left_out]
            if some:
                better = sum(r.get("passed", False) for r in some)
                lines = [f"## {base}{kind}: {better} of {len(some)} better", ""]
                lines += ["| rows are | rows | gain | forgotten | verdict |", "|---|---:|---|---:|---|"]
                parts.append("\n".join([*lines, *map(format_run, some)]) + "\n")
    return "\n".join([*parts, *format_flag_tables(runs)])


def format_flag_tables(runs: list[dict[str, Any]]) -> list[str]:
    """Return a table for each job that was run with other methods or tasks: a line for each flag."""
    flagged = [r for r in runs if r["train"]]
    tables = []
    for stem, job in dict.fromkeys((Path(r["base"]).stem, r["job"]) for r in flagged):
        lines = [f"## Other methods and tasks on {BASES[stem]}: {JOBS[job][0]}", ""]
        lines += ["| flag | gain | forgotten | verdict |", "|---|---|---:|---|"]
        for run in (r for r in flagged if (Path(r["base"]).stem, r["job"]) == (stem, job)):
            _, _, gain, forgotten, verdict = (cell.strip() for cell in format_run(run).strip("|").split("|"))
            lines.append(f"| `{run['train']}` | {gain} | {forgotten} | {verdict} |")
        tables.append("\n".join(lines) + "\n")
    return tables


def list_missing(runs: list[dict[str, Any]]) -> str:
    """Return which jobs were not run on a base yet, in a sentence."""
    sentences = []
    for stem, name in BASES.items():
        done = {r["job"] for r in runs if Path(r["base"]).stem == stem and not r["train"]}
        if missing := [job for job in JOBS if job not in done]:
            sentences.append(f"Not run on {name} yet: {', '.join(missing)}.")
    return " ".join(sentences) or "Every job was run on both bases."


def make_page() -> str:
    """Return the page."""
    runs = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()]
    return TEXT.format(tables=format_tables(runs), missing=list_missing(runs))


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
