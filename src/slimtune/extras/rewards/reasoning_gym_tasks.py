"""Tasks of the package reasoning-gym: their rows, and the reward that scores answers to them.

    python -m slimtune.extras.rewards.reasoning_gym_tasks chain_sum --rows 400 --seed 0 --set max_terms=2 > sums.jsonl
    slimtune train --data sums.jsonl --task grpo --reward reasoning-gym:chain_sum …

A row has the task's question as `prompt`, its `answer`, and its `metadata`, which the scorer reads.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...core.foundation.strict_yaml import parse_yaml
from ...errors import SlimtuneError, UsageError, suggest
from .reward_errors import RewardArgumentError, RewardColumnError

INSTALL = "pip install 'slimtune[reasoning-gym]'"


def load_tasks() -> Any:
    """Return a mapping from the name of each task to its dataset and config class."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise RewardArgumentError("the package reasoning-gym is not installed", INSTALL) from error
    return DATASETS


def require_task(name: str) -> Any:
    """Return the dataset and the config class of a task; raise RewardArgumentError if there is none."""
    tasks = load_tasks()
    if name not in tasks:
        near = suggest(name, tasks)
        raise RewardArgumentError(f"reasoning-gym has no task {name!r}{near}", "reasoning-gym:TASK, such as chain_sum")
    return tasks[name]


def make_reasoning_gym_reward(name: str) -> Callable[..., list[float]]:
    """Return the reward of a task: what its own scorer says of the text inside of <answer>, or of the whole answer."""
    dataset_class, config_class = require_task(name)
    dataset = dataset_class(config_class())

    def reasoning_gym(prompts: Sequence[Any], completions: Sequence[str], **columns: list[Any]) -> list[float]:
        for column in ("answer", "metadata"):
            if column not in columns:
                raise RewardColumnError(f"rows have no column {column!r}, which the rows of reasoning-gym have")
        rows = zip(prompts, completions, columns["answer"], columns["metadata"], strict=True)
        return [
            float(dataset.score_answer(find_answer(text), {"question": p, "answer": right, "metadata": metadata}))
            for p, text, right, metadata in rows
        ]

    return reasoning_gym


def find_answer(text: str) -> str:
    """Return what an answer has inside of its last <answer>, or all of it."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return (found[-1] if found else text).strip()


def make_rows(name: str, count: int, seed: int, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield rows of a task with these settings of its config."""
    dataset_class, config_class = require_task(name)
    known = [field for field in vars(config_class()) if field not in ("size", "seed")]
    if unknown := next((field for field in settings if field not in known), None):
        problem = f"reasoning-gym's {name} has no setting {unknown!r}{suggest(unknown, known)}"
        raise UsageError(problem, f"--set of {', '.join(known)}")
    try:
        dataset = dataset_class(config_class(size=count, seed=seed, **settings))
    except (TypeError, AssertionError, ValueError) as error:
        raise UsageError(f"reasoning-gym's {name}: {error}", "settings that it takes") from None
    for entry in dataset:
        yield {"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}


def main() -> int:
    """Print rows of a task as lines of JSON."""
    parser = argparse.ArgumentParser(description="Print rows of a task of reasoning-gym as lines of JSON.")
    parser.add_argument("task")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the task")
    args = parser.parse_args()
    try:
        pairs = (text.partition("=")[::2] for text in args.set)
        settings = {name: parse_yaml(value, f"--set {name}") for name, value in pairs}
        for row in make_rows(args.task, args.rows, args.seed, settings):
            print(json.dumps(row, default=str))
    except RewardArgumentError as error:
        print(f"{error}; expected: {error.expected}", file=sys.stderr)
        return 2
    except SlimtuneError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
