"""How many questions and errors of other people `slimtune explain` answers, by part and by kind.

    python benchmarks/asked.py                       # the parts that may be looked at
    python benchmarks/asked.py --part "second test"  # once, when everything else is done
    python benchmarks/asked.py --part development --list
    python benchmarks/asked.py --fit                 # the weights of the confidence

benchmarks/data/asked_questions.jsonl has titles of issues, questions and error lines from threads of about 200
repositories, shortened, each with its address and with the answers that are right ("none" if nothing is). They were
labelled from the pages before `explain` saw them. The hash of the repository's name decides the part, so that a thread
is never in two. Wordings were added for questions of "development" and "second development" alone; the second parts are
of repositories that the first do not have, and were collected later. A list of the nearest answers counts as no
answer. Texts that stood in older collections, or whose wordings the pages already had, were left out.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

from slimtune.diagnostics.knowledge import AnswerAndNearPages, ErrorPage, find_answers, rank_answers
from slimtune.diagnostics.knowledge.guides import QuestionGuide

ASKED = Path(__file__).parent / "data" / "asked_questions.jsonl"
OPEN_PARTS = ("development", "validation", "second development")


def load_asked(parts: tuple[str, ...] = OPEN_PARTS) -> list[dict]:
    rows = [json.loads(line) for line in ASKED.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["part"] in parts]


OUTCOMES = ("right", "beside", "wrong", "listed", "nothing")


def name_answer(answer: ErrorPage | QuestionGuide | None) -> str:
    return "none" if answer is None else answer.name


def judge(right: list[str], answers: AnswerAndNearPages) -> str:
    """Return "right", "beside" (a right one is named as what else may be meant), "wrong", "listed" (no answer, and a
    right one among the nearest) or "nothing"."""
    name = name_answer(answers.found)
    if name in right:
        return "right"
    if name != "none":
        return "beside" if {each.name for each in answers.alternatives} & set(right) else "wrong"
    return "listed" if {name_answer(each) for each in answers.near} & set(right) else "nothing"


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
                if (outcome := judge(row["right"], answers)) != "right":
                    print(f"  {outcome}: {row['text']} -> {name_answer(answers.found)}; right: {row['right']}")


def fit_confidence() -> None:
    """Print the weights of a logistic regression on the open questions; those in the code were fitted before wordings
    were added for the development part."""
    import numpy as np
    from scipy.optimize import minimize

    rows = [row for row in load_asked() if row["kind"] == "question"]
    ranked = [(row, each) for row in rows if (each := rank_answers(row["text"]))]
    features = np.array([each.features for _, each in ranked])
    signs = np.array([1 if next(iter(each.scores)) in row["right"] else -1 for row, each in ranked])
    scales = features.std(0) + (features.std(0) == 0)

    def loss(weights: np.ndarray) -> float:
        return np.logaddexp(0, -signs * (features / scales @ weights)).sum() + 0.3 * (weights[1:] ** 2).sum()

    weights = minimize(loss, np.zeros(features.shape[1])).x / scales
    print("weights", [round(float(weight), 2) for weight in weights])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = (*OPEN_PARTS, "test", "second test")
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
