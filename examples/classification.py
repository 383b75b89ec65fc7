"""A classifier against linear probes and TF-IDF: what kind of thing is it that WordNet's sentence defines?

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    pip install scikit-learn
    python examples/classification.py --out runs/topics

Debian's package `wordnet-base` holds WordNet 3.0 (Princeton University; free for any purpose with its notice). Its
lexicographers sorted the nouns into files: an animal, food, a feeling … A row is a definition, without the word that it
defines and without examples; the label is the file.

`slimtune train` tunes a classifier, and `slimtune eval` measures it on held-out definitions. Beside it, logistic
regressions learn the same rows: on the words (TF-IDF of one and of two words) and on the frozen base's hidden states
(the middle and the last layer; the mean over tokens and the last token). The L2 penalty of each, and the hidden state
that is taken, are those with the best accuracy on the validation rows. Exit code 1: the classifier is not better than
the probe, by the 95 % interval of the difference in accuracy over the same test rows.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from preferences import WORDNET, make_sentence
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from slimtune.core.models.loader import load_base
from slimtune.evaluation.statistics import estimate_macro_f1_with_interval, paired_bootstrap

# The numbers of the nouns' files, lexnames(5WN).
TOPICS = {4: "act", 5: "animal", 6: "artifact", 8: "body", 9: "cognition", 10: "communication", 12: "feeling",
          13: "food", 15: "location", 18: "person", 20: "plant", 27: "substance"}  # fmt: skip
NAMES = sorted(TOPICS.values())
PENALTIES = [10.0**e for e in range(-5, 0)]
"""Factors of the squared weights beside the mean loss of a row."""
Rows = list[dict[str, str]]


def make_rows(folder: Path, per_class: dict[str, int]) -> dict[str, Rows]:
    """Return so many rows of each class for each split, drawn at random; no two definitions are equal."""
    found: dict[str, dict[str, None]] = {name: {} for name in NAMES}
    for line in (folder / "data.noun").read_text().splitlines():
        head, _, gloss = line.partition(" | ")
        topic = TOPICS.get(int(head[9:11])) if gloss else None
        if topic and len(sentence := make_sentence(gloss)) > 20:
            found[topic][sentence] = None
    draw, rows = random.Random(0), {split: [] for split in per_class}
    for name, sentences in found.items():
        drawn = iter(draw.sample(list(sentences), sum(per_class.values())))
        for split, count in per_class.items():
            rows[split] += [{"text": next(drawn), "label": name} for _ in range(count)]
    return rows


@torch.no_grad()
def compute_hidden_states(model_name: str, texts: list[str]) -> dict[str, np.ndarray]:
    """Return the features `(N, d)` of the frozen base."""
    base = load_base(model_name)
    features: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(texts), 32):
        ids = [base.tokenizer(text)["input_ids"] for text in texts[start : start + 32]]
        lengths = torch.tensor(list(map(len, ids)))
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]  # padded on the right: causal tokens do not see it
        states = base.model(padded, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        for layer, name in ((len(states) // 2, "middle layer"), (-1, "last layer")):
            h = states[layer].float()
            mean = (h * mask[..., None]).sum(1) / lengths[:, None]
            features.setdefault(f"{name}, mean", []).append(mean)
            features.setdefault(f"{name}, last token", []).append(h[torch.arange(len(h)), lengths - 1])
    return {name: torch.cat(parts).numpy() for name, parts in features.items()}


def predict(inputs: Any, rows: dict[str, Rows], transform: Any) -> tuple[float, list[str]]:
    """Return the accuracy on the validation rows of the best logistic regression, and its labels of the test rows.

    `inputs` are what `transform` takes of all rows [N, …]; it is fitted to the training rows.
    """
    ends = np.cumsum([0, *map(len, rows.values())])
    x = {split: inputs[start:end] for split, start, end in zip(rows, ends, ends[1:], strict=False)}
    y = {split: [row["label"] for row in some] for split, some in rows.items()}
    best: tuple[float, list[str]] = (-1.0, [])
    for penalty in PENALTIES:
        # scikit-learn sums the losses and halves the penalty
        regression = LogisticRegression(C=1 / (2 * penalty * len(y["train"])), max_iter=2000)
        probe = make_pipeline(transform, regression).fit(x["train"], y["train"])
        accuracy = probe.score(x["validation"], y["validation"])
        if accuracy > best[0]:
            best = accuracy, [*map(str, probe.predict(x["test"]))]
    return best


def macro_f1(labels: list[str], predicted: list[str]) -> Any:
    one_hot = np.eye(len(NAMES), dtype=np.int64)
    actual, chosen = (one_hot[[NAMES.index(name) for name in names]] for names in (labels, predicted))
    return estimate_macro_f1_with_interval(actual * chosen, actual, chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="folder with WordNet's data.noun")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=250, help="training rows of each class")
    parser.add_argument("--epochs", default="3")
    parser.add_argument("--lr", default="3e-4")
    parser.add_argument("--out", type=Path, default=Path("runs/topics"))
    options = parser.parse_args()
    rows = make_rows(options.wordnet, {"train": options.rows, "validation": 20, "test": 125})
    folder = options.out.with_name(f"{options.out.name}-rows")
    folder.mkdir(parents=True, exist_ok=True)
    for split, some in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")

    slimtune = [sys.executable, "-m", "slimtune"]
    data = ["--data", str(folder / "train.jsonl")]
    data += [f"--set=data.{split}={folder / f'{split}.jsonl'}" for split in ("validation", "test")]
    train = ["train", f"--model={options.model}", *data, "--task=classification", f"--out={options.out}"]
    train += [f"--epochs={options.epochs}", f"--lr={options.lr}", "--batch-size=32"]
    if not (options.out / "result.json").is_file():
        subprocess.run([*slimtune, *train], check=True)
    subprocess.run([*slimtune, "eval", str(options.out)], check=False)
    scores = {score["line"]: score for score in json.loads((options.out / "scores-test.json").read_text())}
    labels = [row["label"] for row in rows["test"]]
    predicted = {"tuned classifier": [scores[line]["predicted"] for line in range(1, len(labels) + 1)]}

    texts = [row["text"] for some in rows.values() for row in some]
    states = compute_hidden_states(options.model, texts)
    probes = {name: predict(features, rows, StandardScaler()) for name, features in states.items()}
    best = max(probes, key=lambda name: probes[name][0])
    predicted[f"linear probe ({best})"] = probes[best][1]
    predicted["TF-IDF"] = predict(texts, rows, TfidfVectorizer(ngram_range=(1, 2)))[1]
    right = {name: [float(a == b) for a, b in zip(labels, some, strict=True)] for name, some in predicted.items()}
    tuned, probe, _ = right.values()
    print(f"\n{len(labels)} test rows" + " " * 25 + "accuracy" + " " * 21 + "macro-F1")
    for name, some in predicted.items():
        accuracy, f1 = paired_bootstrap(right[name], probe, [1] * len(labels)).first, macro_f1(labels, some)
        print(f"{name:38}" + "   ".join(f"{e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for e in (accuracy, f1)))
    gain = paired_bootstrap(tuned, probe, [1] * len(labels)).difference
    print(f"the classifier is right on {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}) more than the probe")
    return int(gain.low <= 0)


if __name__ == "__main__":
    raise SystemExit(main())
