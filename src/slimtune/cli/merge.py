"""`slimtune merge`: base and adapter as one plain Hugging Face checkpoint."""

import math
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from ..utils.formatting import format_bytes, format_duration
from .common import WARNING, Json, Run, console, error_console
from .inputs import require_run
from .progress import show_progress

MIN_SHARE = 0.9
"""Share of the adapter's effect in the merged model below which there is a warning."""


def merge_run(
    run: Run,
    out: Annotated[Path, Option(help="Folder for the checkpoint; it must not contain files.", show_default=False)],
    dtype: Annotated[str, Option(help="Dtype of the checkpoint: auto, float32, bfloat16, float16.")] = "auto",
    as_json: Json = False,
) -> dict[str, Any]:
    """Write base and adapter as one checkpoint."""
    require_run(run)
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
        share = result["strength"]
        if math.isfinite(share):
            console().print(f"{share:.1%} of the adapter's effect survives in {result['dtype']}")
        if share < MIN_SHARE:
            text = f"warning: {result['dtype']} cannot hold so small a change: {1 - share:.0%} of it is lost"
            error_console().print(f"{text}; --dtype float32 keeps it", style=WARNING)
    return result
