"""What runs in the process of one reward: `python -m slimtune.extras.rewards.reward_process SPEC`.

It reads a line of JSON for each batch of answers (`prompts`, `completions`, `columns`), and writes a line with their
`rewards`, or with the `error` and the number of the `answer` that it is about. What the reward prints goes to stderr.
"""

import inspect
import json
import math
import os
import sys
from typing import Any

from .reward_errors import RewardColumnError, RewardUnavailableError
from .reward_specs import RewardFunction, format_record, load_reward


def main() -> None:
    """Answer requests until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints, the replies stay whole
    sys.stdout = sys.stderr

    def reply(values: dict[str, Any]) -> None:
        out.write(format_record(values) + "\n")
        out.flush()

    try:
        function = load_reward(sys.argv[1])
    except BaseException as error:
        reply({"error": f"it cannot be loaded: {_describe(error)}", "answer": None})
        return
    reply({"ready": True})
    for line in sys.stdin:
        reply(_score(function, json.loads(line)))


def _score(function: RewardFunction, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the reply to a batch; on an error the answers are scored one by one to find the one at fault."""
    arguments = {"prompts": batch["prompts"], "completions": batch["completions"], **batch["columns"]}
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        names = f"it is called with {', '.join(arguments)} by their names; **columns takes those that it does not use"
        return {"error": f"{error}: {names}", "answer": None}
    try:
        found = function(**arguments)
    except (RewardColumnError, RewardUnavailableError) as error:  # whatever the answer is
        return {"error": str(error), "answer": None}
    except Exception as error:
        for number in range(len(batch["completions"])):
            try:
                function(**_select(batch, number))
            except Exception as own:
                return {"error": f"it raised {_describe(own)}", "answer": number}
        return {"error": f"it raised {_describe(error)}", "answer": None}
    try:
        values = [*found]
    except TypeError:
        return {"error": f"it returned {type(found).__name__}, not a list of numbers", "answer": None}
    count = len(batch["completions"])
    if len(values) != count:
        return {"error": f"it returned {len(values)} numbers for {count} answers", "answer": None}
    rewards = []
    for number, value in enumerate(values):
        try:
            rewards.append(float(value))
        except (TypeError, ValueError):
            return {"error": f"it returned {value!r:.40}, which is no number", "answer": number}
        if not math.isfinite(rewards[-1]):
            return {"error": f"it returned {'NaN' if math.isnan(rewards[-1]) else 'Inf'}", "answer": number}
    return {"rewards": rewards}


def _select(batch: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the arguments for one answer of a batch."""
    columns = {name: values[number : number + 1] for name, values in batch["columns"].items()}
    return {name: batch[name][number : number + 1] for name in ("prompts", "completions")} | columns


def _describe(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


if __name__ == "__main__":
    main()
