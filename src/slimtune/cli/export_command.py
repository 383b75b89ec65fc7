"""What happens to a run after its training: `slimtune export`, `merge` and `push`."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from .check_command import print_engine_agreement
from .command_help import add_flags_of_loaded_runs, build_parameters_later
from .common import WARNING, Json, Run, make_console, make_error_console, print_progress, showing_progress
from .input_checks import require_run_and_base_exist


def _add_format_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--to` and a flag for each option of the export formats; the command gets them as `to` and `options`.

    They are built when the command runs or shows its help: formats of other packages are looked for then.
    """
    signature = inspect.signature(command)
    own = [p for name, p in signature.parameters.items() if name not in ("to", "options")]

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        options = {name: given.pop(name) for name in list(given) if name not in signature.parameters}
        return command(options=options, **given)

    def list_parameters() -> list[inspect.Parameter]:
        (first, *rest), (to, *flags) = own, _iterate_format_flags()
        ordered = [first, to, *rest[:1], *flags, *rest[1:]]
        return [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in ordered]

    return build_parameters_later(run, own, list_parameters, add_flags_of_loaded_runs)


def _iterate_format_flags() -> Iterator[inspect.Parameter]:
    """Yield the parameter of `--to`, then one for each option that a format has."""
    from ..export.export_format import EXPORT_FORMATS, list_export_targets

    *most, last = list_export_targets()
    target = Option("--to", help=f"Target: {', '.join(most)} or {last}.", show_default=False)
    yield inspect.Parameter("to", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, target])
    seen = set()
    for kind in (EXPORT_FORMATS.load(name) for name in (*most, last)):
        types = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name in seen:
                continue
            seen.add(field.name)
            names = field.metadata["names"] or (f"--{field.name.replace('_', '-')}",)
            parse = field.metadata["parse"]
            option: Any = Option(*names, help=field.metadata["help"])
            yield inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[str | None if parse else types[field.name], option],
            )


def _read_format_options(to: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, those that are text read by the format."""
    from ..export.export_format import EXPORT_FORMATS

    parsers = {field.name: field.metadata["parse"] for field in dataclasses.fields(EXPORT_FORMATS.load(to))}
    options = {name: value for name, value in given.items() if value is not None}
    return {name: parse(value) if (parse := parsers.get(name)) else value for name, value in options.items()}


@_add_format_flags
def export_run(
    run: Run,
    to: str,
    out: Annotated[Path, Option(help="Folder to write; it must not contain files.", show_default=False)],
    options: dict[str, Any],
    no_verify: Annotated[bool, Option("--no-verify", help="Do not check the export by the engine.")] = False,
    require_proof: Annotated[
        bool, Option("--require-proof", help="Fail, and write nothing, unless the check proves the export.")
    ] = False,
    threads: Annotated[int | None, Option(help="Threads of llama.cpp during the check.")] = None,
    as_json: Json = False,
) -> Any:
    """Write a run as Ollama, llama.cpp, vLLM or MLX reads it, checked by the engine."""
    from ..export.export_format import require_known_export_target

    require_known_export_target(to)
    options = _read_format_options(to, options)
    require_run_and_base_exist(run)
    from ..export.exporter import export

    checks: dict[str, Any] = {"verify": not no_verify, "require_proof": require_proof, "threads": threads}
    with showing_progress():
        result = export(run, to, out, options, **checks, log=print_progress)
    if not as_json:
        screen = make_console()
        for line in result.lines():
            screen.print(line)
        if result.check.positions:
            print_engine_agreement([result.check])
        if result.check.passed is None:
            text = f"NOT PROVEN: {result.check.reason}"
            make_error_console().print(text, style="dim" if no_verify else f"bold {WARNING}")
        screen.print("\nnext:", *result.commands, sep="\n  ", soft_wrap=True)
    return result


def merge_run(
    run: Run,
    out: Annotated[Path, Option(help="Folder for the checkpoint; it must not contain files.", show_default=False)],
    dtype: Annotated[str, Option(help="Dtype of the checkpoint: auto, float32, bfloat16, float16.")] = "auto",
    as_json: Json = False,
) -> Any:
    """Write base and adapter as one checkpoint."""
    require_run_and_base_exist(run)
    from ..export.merge import merge

    with showing_progress():
        result = merge(run, out, dtype=dtype)
    if not as_json:
        for line in result.lines():
            make_console().print(line)
        if warning := result.warning():
            make_error_console().print(f"warning: {warning}", style=WARNING)
    return result


def push_run(
    run: Run,
    repo_id: Annotated[
        str, Argument(metavar="REPO_ID", help="OWNER/NAME; created if it does not exist.", show_default=False)
    ],
    private: Annotated[
        bool, Option("--private", help="Only you see it. An existing public repository is an error.")
    ] = False,
    revision: Annotated[
        str | None, Option("--revision", "--branch", help="Branch to commit to; created if it does not exist.")
    ] = None,
    message: Annotated[str | None, Option(help="First line of the commit.")] = None,
    base: Annotated[
        str | None, Option(metavar="ORG/NAME", help="Hub id of the base, if the run names it by a path.")
    ] = None,
    keep_card: Annotated[bool, Option("--keep-card", help="Do not replace a README.md in the repository.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Send nothing; show the files and the model card.")] = False,
    as_json: Json = False,
) -> Any:
    """Upload the adapter and a model card to the Hub, never checkpoints, logs or rows.

    Merged models and GGUF files are uploaded as they are. Log in with `hf auth login`, or set HF_TOKEN.
    """
    if not run.is_dir():
        require_run_and_base_exist(run)
    from ..export.push_to_hub import push

    result = push(
        run, repo_id, keep_card=keep_card, dry_run=dry_run, revision=revision, message=message, base_hub_id=base,
        private=private or None,
    )  # fmt: skip
    if not as_json:
        make_console().print("\n".join(result.lines()))
    return result
