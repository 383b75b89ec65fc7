"""`slimtune check`: whether an adapter of any trainer is what was trained, and whether an engine applies it."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ..errors import UsageError
from .common import ERROR, GOOD, WARNING, Json, NegativeVerdictResult, make_console, print_progress, showing_progress
from .export_command import print_engine_agreement
from .input_checks import require_base_exists

COLORS = {"fault": ERROR, "warning": WARNING}


def check_adapter(
    adapter: Annotated[
        Path, Argument(metavar="ADAPTER", help="An adapter folder of any trainer, or a run.", show_default=False)
    ],
    base: Annotated[
        str | None, Option(help="The base to compare it with; by default the one that the adapter names.")
    ] = None,
    at: Annotated[str | None, Option(metavar="URL", help="Address of a server that serves it.")] = None,
    name: Annotated[str | None, Option(help="The adapter's name at the server.")] = None,
    gguf: Annotated[Path | None, Option(help="A GGUF of base and adapter as one model.")] = None,
    merged: Annotated[Path | None, Option(help="A folder with base and adapter as one checkpoint.")] = None,
    mlx: Annotated[
        Path | None, Option(help="A folder of MLX: base and adapter as one, or an adapter of mlx-lm.")
    ] = None,
    precision: Annotated[str, Option(help="Of the weights that the server has: f32, f16, bf16, q8_0, Q4_K_M.")] = "f16",
    timeout: Annotated[float, Option(min=0.1, help="Seconds that an answer of the server may take.")] = 60.0,
    as_json: Json = False,
) -> Any:
    """Check an adapter of any trainer: whether its tensors reach their modules, and whether an engine applies it.

    Without --at, --gguf, --merged or --mlx the file is checked, and no weights of the base are loaded. Exit code 1: a
    fault.
    """
    given = [each for each in (at, gguf, merged, mlx) if each is not None]
    if len(given) > 1:
        message = "more than one of --at, --gguf, --merged and --mlx is given"
        raise UsageError(message, "one place that serves the adapter")
    for path in (gguf, merged, mlx):
        if path is not None and not path.exists():
            raise UsageError(f"there is no {path}", "what serves the adapter")
    if base is not None:
        require_base_exists(base, need_weights=bool(given))
    from ..export.adapter_check import check_adapter as checks
    from ..export.adapter_check.check_engine import ServedPlace

    place = None
    if given:
        place = ServedPlace(at, gguf, merged, name, timeout, precision, mlx)
    with showing_progress():
        result = checks.check_adapter(adapter, base, place, print_progress)
    if not as_json:
        screen = make_console()
        for line in result.lines():
            screen.print(line, style=COLORS.get(line.partition(":")[0]))
        screen.print()
        if result.engine is not None:
            print_engine_agreement([result.engine])
            screen.print(f"verdict: {result.engine.cause or 'not-proven'}")
            if result.engine.reason:
                screen.print(result.engine.reason)
            if result.repair and not result.findings:
                screen.print(f"to mend it: {result.repair}", soft_wrap=True)
        elif result.right:
            screen.print("right: no fault was found in the file", style=GOOD)
    if result.right:
        return result
    causes = [f.code for f in result.findings if f.severity == "fault"]
    if result.engine is not None and result.engine.passed is not True:
        causes.append(f"the engine: {result.engine.cause or 'not-proven'}")
    make_console(stderr=True).print(f"error: the adapter is not right: {', '.join(causes)}", style=ERROR)
    return NegativeVerdictResult(result)
