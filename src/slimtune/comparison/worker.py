"""One cell of a comparison, in a process of its own: `python -m slimtune.comparison.worker RECIPE`, and flags.

So the peak memory is the cell's alone, and what ends a cell ends nothing else. It goes on from its newest checkpoint,
and ends with the process that started it. Whether it worked is its exit code; an error is one JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import traceback
from pathlib import Path


def run(recipe_file: Path, *, full: bool = False, trial: bool = False, force: bool = False) -> None:
    """Train what a recipe says and measure it on the test rows; what is done already is not done again.

    Args:
        recipe_file: its `out` is the run folder.
        full: every weight of the base trains, whatever the recipe says of a method.
        trial: leave the test rows alone: the validation loss of training is what is asked.
        force: train on data that a survey finds faulty.

    Raises:
        SlimtuneError: the work found a fault.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written.
    """
    from ..config import load_recipe
    from ..evaluation.evaluate import EvalSettings, evaluate
    from ..training.train import train

    recipe = load_recipe(recipe_file)
    if full:
        recipe = recipe.model_copy(update={"method": type(recipe.method)(name="full")})
    folder = Path(recipe.output_dir)
    if not (folder / "result.json").is_file():
        begun = (folder / "checkpoints").is_dir() or (folder / "recipe.yaml").is_file()
        if folder.is_dir() and not begun:
            shutil.rmtree(folder)  # killed before there was anything to go on from
        train(recipe, resume=begun, force=force)
    if not trial:
        evaluate(folder, EvalSettings(split="test", skip_prompt_test=True))  # only losses are compared
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def main() -> None:
    """Run the cell that the arguments name and exit: 0 done, 1 or 2 as the error says, 130 interrupted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    from ..errors import SlimtuneError

    code = 0
    try:
        run(args.recipe, full=args.full, trial=args.trial, force=args.force)
    except KeyboardInterrupt:
        code = 130
    except SlimtuneError as e:
        print(json.dumps({"message": e.message, "expected": e.expected, "hint": e.hint}))
        code = e.exit_code
    except Exception as e:
        traceback.print_exc()
        print(json.dumps({"message": f"{type(e).__name__}: {e}", "expected": "", "hint": ""}))
        code = 1
    sys.stdout.flush()
    # Past the interpreter's own end, which would wait for the thread that reads.
    os._exit(code)


def _end_with_the_parent() -> None:
    """Wait until the other end of stdin is closed, which is when the process that started this one is gone."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
