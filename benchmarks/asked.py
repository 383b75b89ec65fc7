"""How many questions and errors of other people `slimtune explain` answers, by part and by kind.

    python benchmarks/asked.py                       # the parts that may be looked at
    python benchmarks/asked.py --part "second test"  # once, when everything else is done
    python benchmarks/asked.py --part development --list
    python benchmarks/asked.py --fit                 # the weights of the confidence

benchmarks/data/asked_questions.jsonl has titles of issues, questions and error lines from threads of about 200
repositories, shortened, each with its address and with the answers that are right ("none" if nothing is). They were
labelled from the pages before `explain` saw them. The hash of the repository's name decides the part, so that a thread
is never in two. Wordings were added for questions of the open parts alone; later parts were collected from threads that
the earlier ones do not have. Texts that stood in older collections,
or whose wordings the pages already had, were left out.
"""

import argparse
import hashlib
import itertools
import json
import math
from collections import Counter
from pathlib import Path

from slimtune.diagnostics.knowledge import FoundAnswers, find_answers, rank_answers

ASKED = Path(__file__).parent / "data" / "asked_questions.jsonl"
FORMER = Path(__file__).parents[1] / "tests" / "cli"
OPEN_PARTS = ("development", "validation", "second development", "third development")
TEST_PARTS = ("test", "second test", "third test", "fourth test", "fifth test", "sixth test", "seventh test")
"""Asked once before their texts were looked at; after that, wordings were added for them as well."""


def load_asked(parts: tuple[str, ...] = OPEN_PARTS) -> list[dict]:
    rows = [json.loads(line) for line in ASKED.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["part"] in parts]


OUTCOMES = ("right", "among", "wrong", "listed", "nothing")


def judge(right: list[str], answers: FoundAnswers) -> str:
    """Return "right", "among" (up to five answers are given, one of them right), "wrong" (what is given is not right),
    "listed" (nothing is given, and a right one is named among the nearest) or "nothing"."""
    given = {answers.sure.name} if answers.sure else {each.name for each in answers.probable}
    if given:
        return "wrong" if given.isdisjoint(right) else "right" if answers.sure else "among"
    if right == ["none"]:
        return "right"
    return "listed" if {each.name for each in answers.near} & set(right) else "nothing"


def count_outcomes(rows: list[dict]) -> Counter[str]:
    return Counter(judge(row["right"], find_answers(row["text"])) for row in rows)


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share."""
    z, share = 1.96, count / total
    middle, spread = share + z * z / (2 * total), z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    return max(middle - spread, 0) / (1 + z * z / total), (middle + spread) / (1 + z * z / total)


def print_figures(parts: tuple[str, ...], listed: bool) -> None:
    for part in parts:
        for kind in ("question", "error"):
            rows = [row for row in load_asked((part,)) if row["kind"] == kind]
            outcomes = count_outcomes(rows)
            shares = [
                f"{name} {outcomes[name]} ({low:.0%} to {high:.0%})"
                for name in OUTCOMES
                for low, high in [wilson_interval(outcomes[name], len(rows))]
            ]
            print(f"{part}, {len(rows)} {kind}s: {', '.join(shares)}")
            for row in rows if listed else ():
                answers = find_answers(row["text"])
                if (outcome := judge(row["right"], answers)) not in ("right", "among"):
                    given = [each.name for each in ((answers.sure,) if answers.sure else answers.probable)]
                    print(f"  {outcome}: {row['text']} -> {given}; right: {row['right']}")


def load_texts_to_fit() -> list[dict]:
    """Return the open texts, those of former collections, and texts about other subjects."""
    rows = load_asked((*OPEN_PARTS, *TEST_PARTS))
    for name in ("asked_questions", "forum_questions", "issue_texts", "collected_texts"):
        rows += [json.loads(line) for line in (FORMER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    foreign = (FORMER / "foreign_texts.txt").read_text(encoding="utf-8").splitlines()
    return rows + [{"text": text, "right": ["none"]} for text in foreign]


def fit_confidence() -> None:
    """Print the weights of two logistic regressions: whether the first answer is right, and one of the first three; and
    what ten folds over repositories, none of which saw its own texts, give for some thresholds."""
    import numpy as np
    from scipy.optimize import minimize

    ranked = [(row, each) for row in load_texts_to_fit() if (each := rank_answers(row["text"]))]
    features = np.array([each.features for _, each in ranked])
    scales = features.std(0) + (features.std(0) == 0)
    repositories = ["/".join(row.get("source", row["text"]).split("/")[:5]) for row, _ in ranked]
    folds = np.array([int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 for name in repositories])

    def fit(signs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        def loss(weights: np.ndarray) -> float:
            fits = np.logaddexp(0, -signs[chosen] * (features[chosen] / scales @ weights)).sum()
            return fits + 0.3 * (weights[1:] ** 2).sum()

        return minimize(loss, np.zeros(features.shape[1])).x / scales

    estimates, rights = [], []
    for most in (1, 3):
        rights.append(np.array([bool({*list(each.scores)[:most]} & {*row["right"]}) for row, each in ranked]))
        signs = 2 * rights[-1] - 1
        print(f"first {most}:", [round(float(weight), 2) for weight in fit(signs, folds >= 0)])
        estimates.append(np.zeros(len(ranked)))
        for fold in range(10):
            logits = features[folds == fold] @ fit(signs, folds != fold)
            estimates[-1][folds == fold] = 1 / (1 + np.exp(-logits))
    foreign = np.array([row["right"] == ["none"] for row, _ in ranked])
    for least_sure, least_probable in itertools.product((0.9, 0.93, 0.95, 0.97), (0.3, 0.4, 0.5, 0.6, 0.7)):
        alone = estimates[0] >= least_sure
        three = ~alone & (estimates[1] >= least_probable)
        print(
            f"{least_sure} {least_probable} of {(~foreign).sum()}: alone {(alone & ~foreign).sum()}, right "
            f"{(alone & rights[0]).sum()}; three {(three & ~foreign).sum()}, right one among them "
            f"{(three & rights[1]).sum()}; of {foreign.sum()} about other subjects: alone {(alone & foreign).sum()}, "
            f"three {(three & foreign).sum()}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = (*OPEN_PARTS, *TEST_PARTS)
    parser.add_argument("--part", choices=parts, help="one part; all open ones otherwise")
    parser.add_argument("--list", action="store_true", help="name what was not right")
    parser.add_argument("--fit", action="store_true", help="fit the weights of the confidence")
    arguments = parser.parse_args()
    if arguments.fit:
        fit_confidence()
    else:
        print_figures((arguments.part,) if arguments.part else OPEN_PARTS, arguments.list)


if __name__ == "__main__":
    main()
