"""`slimtune merge`: base and adapter as one plain Hugging Face checkpoint."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from ..utils.formatting import format_bytes, format_duration
from .common import Json, Run, console
from .progress import show_progress


def merge_run(
    run: Run,
    out: Annotated[Path, Option(help="Folder for the checkpoint; it must not contain files.", show_default=False)],
    dtype: Annotated[str, Option(help="Dtype of the checkpoint: auto, float32, bfloat16, float16.")] = "auto",
    as_json: Json = False,
) -> dict[str, Any]:
    """Write base and adapter as one checkpoint."""
    from ..export.merge import merge

    with show_progress():
        result = merge(run, out, dtype=dtype)
    if not as_json:
        console().print(
            f"{result['out']}: {format_bytes(result['bytes'])} in {result['dtype']}, "
            f"{format_duration(result['seconds'])}; merged and adapted model differ by {result['mean_difference']:.2g} "
            f"nats on average ({result['max_difference']:.2g} at most), where the adapter changes the base by "
            f"{result['effect']:.2g}"
        )
    return result
