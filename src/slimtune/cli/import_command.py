"""`slimtune import`: a recipe of another trainer's config."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from .common import Json, make_console


def import_config(
    file: Annotated[
        Path,
        Argument(
            metavar="FILE", help="YAML, JSON, a shell script; or a folder with adapter_config.json.", show_default=False
        ),
    ],
    out: Annotated[Path, Option(help="The recipe to write.")] = Path("recipe.yaml"),
    source: Annotated[
        str | None, Option("--from", metavar="TRAINER", help="llama-factory, axolotl, ms-swift, trl, mlx-lm, unsloth.")
    ] = None,
    as_json: Json = False,
) -> Any:
    """Make a recipe of a config of LLaMA-Factory, Axolotl, ms-swift, TRL, mlx-lm or Unsloth.

    Each field is accounted for: taken, without equivalent and why, not needed, or unknown.
    """  # fmt: skip
    from ..extras.config_import import import_config as imports

    result = imports.import_config(file, out, source)
    if not as_json:
        screen = make_console()
        for line in result.lines():
            screen.print(line)
        screen.print(f"\nnext:\n  slimtune plan {out}", soft_wrap=True)
    return result
