"""A classifier against a linear probe: the part of speech of a word, from its definition in The Devil's Dictionary.

    python benchmarks/classification.py [--dict devil.dict.dz] [--model smollm2-135m] [--epochs 4] [--json FILE]

The dictionary is Debian's package `dict-devil`. Words keep their split of `examples/devils-dictionary/make.py`. The
probe is a logistic regression on the frozen base's hidden state of the last token, standardized; its L2 penalty is the
best on the validation rows. Both see the same tokens and balanced class weights. Exit code 1: the classifier is not
better, by the 95 % interval of the difference in accuracy over the same test rows.
"""

import argparse
import gzip
import json
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from slimtune.evaluation.statistics import bootstrap_macro_f1, paired_bootstrap
from slimtune.models.loader import load_base

MAKE = Path(__file__).parents[1] / "examples/devils-dictionary/make.py"
PARTS = {"n": "noun", "v": "verb", "adj": "adjective"}
CLASSES = sorted(PARTS.values())
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def make_rows(dictionary: Path) -> dict[str, list[dict[str, str]]]:
    """Return the labelled definitions of each split."""
    make = runpy.run_path(str(MAKE))
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for head, blocks in make["entries"](gzip.decompress(dictionary.read_bytes()).decode("utf-8", "replace")):
        part = re.match(r"[.,]? ?(n|v|adj)\.", blocks[0])
        text = make["answer"](make["prose"](blocks)) if part else ""
        if part and text and head not in make["LEFT_OUT"]:
            rows[make["split_of"](head)].append({"text": text, "label": PARTS[part[1]]})
    return rows


@torch.no_grad()
def compute_features(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return the hidden state of each text's last token `(N, d)`."""
    found: list[torch.Tensor] = []
    hook = model.score.register_forward_pre_hook(lambda module, args: found.append(args[0][0, -1].float()))
    for text in texts:
        model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=512))
    hook.remove()
    return torch.stack(found)


def fit_probe(x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.nn.Linear:
    """Return the logistic regression with balanced classes and this L2 penalty."""
    probe = torch.nn.Linear(x.shape[1], len(CLASSES))
    torch.nn.init.zeros_(probe.weight)
    weight = len(y) / (len(CLASSES) * torch.bincount(y, minlength=len(CLASSES)).float())
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(x), y, weight) + penalty * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe


def probe_labels(model_name: str, rows: dict[str, list[dict[str, str]]]) -> tuple[list[str], float]:
    """Return the probe's label of each test row, and its penalty."""
    head = {"id2label": dict(enumerate(CLASSES)), "label2id": {c: i for i, c in enumerate(CLASSES)}}
    base = load_base(model_name, task="SEQ_CLS", head=head)
    x = {k: compute_features(base.model, base.tokenizer, [r["text"] for r in v]) for k, v in rows.items()}
    y = {k: torch.tensor([CLASSES.index(r["label"]) for r in v]) for k, v in rows.items()}
    mean, std = x["train"].mean(0), x["train"].std(0) + 1e-6
    x = {k: (v - mean) / std for k, v in x.items()}
    probes = {p: fit_probe(x["train"], y["train"], p) for p in PENALTIES}
    losses = {p: F.cross_entropy(probe(x["validation"]), y["validation"]).item() for p, probe in probes.items()}
    best = min(losses, key=losses.__getitem__)
    return [CLASSES[i] for i in probes[best](x["test"]).argmax(1)], best


def macro_f1(labels: list[str], predicted: list[str]) -> Any:
    one_hot = np.eye(len(CLASSES), dtype=np.int64)
    actual, chosen = (one_hot[[CLASSES.index(name) for name in names]] for names in (labels, predicted))
    return bootstrap_macro_f1(actual * chosen, actual, chosen)


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--dict", type=Path, default=Path("/usr/share/dictd/devil.dict.dz"))
    ask.add_argument("--model", default="smollm2-135m")
    ask.add_argument("--epochs", default="4")
    ask.add_argument("--lr", default="5e-4")
    ask.add_argument("--json", type=Path)
    given = ask.parse_args()
    rows = make_rows(given.dict)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.jsonl") for name in rows}
        for name, file in files.items():
            file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        data = [f"--set=data.{name}={files[name]}" for name in ("train", "validation", "test")]
        slimtune, run = [sys.executable, "-m", "slimtune"], Path(folder, "run")
        train = ["train", given.model, *data, "--task", "classification", "--set=task.class_weights=balanced",
                 "--max-seq-len", "512"]  # fmt: skip
        subprocess.run([*slimtune, *train, "--epochs", given.epochs, "--lr", given.lr, "--out", str(run)], check=True)
        subprocess.run([*slimtune, "eval", str(run)], check=False)
        scores = {s["line"]: s for s in json.loads((run / "scores-test.json").read_text())}
    kept = [i for i in range(len(rows["test"])) if i + 1 in scores]
    labels = [rows["test"][i]["label"] for i in kept]
    tuned = [scores[i + 1]["predicted"] for i in kept]
    probed, penalty = probe_labels(given.model, rows)
    probed = [probed[i] for i in kept]
    right = [[float(a == b) for a, b in zip(labels, names, strict=True)] for names in (tuned, probed)]
    accuracy = paired_bootstrap(*right, [1] * len(labels))
    result = {"model": given.model, "rows": {k: len(v) for k, v in rows.items()}, "penalty": penalty}
    for name, estimate, predicted in (("tuned", accuracy.base, tuned), ("probe", accuracy.tuned, probed)):
        f1 = macro_f1(labels, predicted)
        result |= {f"{name}_accuracy": estimate, f"{name}_macro_f1": f1}
        print(f"{name:8} accuracy {estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
              f"   macro-F1 {f1.value:.3f} ({f1.low:.3f} to {f1.high:.3f})")  # fmt: skip
    gain = accuracy.difference
    result["accuracy_gain"] = gain
    print(
        f"the classifier is right on {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}) of {len(labels)} rows more"
    )
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(gain.low <= 0)


if __name__ == "__main__":
    raise SystemExit(main())
