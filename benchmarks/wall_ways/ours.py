"""One training by `slimtune train`'s own function; prints its seconds without imports and loading the base."""

import contextlib
import json
import sys
import time

from slimtune.core.config import Recipe
from slimtune.core.training.train import train


def main() -> None:
    _, _, base, rows, out = sys.argv
    recipe = Recipe.from_dict(
        {
            "model": {"name": base, "dtype": "bfloat16"},
            "data": {"train": rows, "validation_fraction": 0},
            "method": {"name": "lora", "rank": 16},
            "train": {"epochs": 1, "batch_size": 8},
            "output_dir": out,
        }
    )
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        result = train(recipe)
    seconds = time.perf_counter() - began
    load = result.load_seconds + result.prepare_seconds
    print(json.dumps({"seconds": seconds - load, "prepare": result.start_seconds - load, "load": load}))


if __name__ == "__main__":
    main()
