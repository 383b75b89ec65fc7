"""What happens to a run after its training: `slimtune export`, `verify`, `merge` and `push`."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Argument, Option

from .command_help import CommandWithOptionGroups, add_flags_of_loaded_runs
from .common import (
    ERROR,
    WARNING,
    Json,
    NegativeVerdictResult,
    Run,
    make_console,
    make_error_console,
    make_table,
    print_progress,
    showing_progress,
)
from .input_checks import require_row_files_exist, require_run_and_base_exist

if TYPE_CHECKING:
    from ..export.export_results import EngineVerdict

VERDICTS = {True: "passed", False: "FAILED", None: ""}
LEGEND = """prompts: how many become the same tokens; d: difference of log p from that of
the trained adapter, in nats; strength: share of the adapter's effect that arrives"""
HELP = "A run, an adapter, or what export or merge wrote."


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

    def build_command(name: str, epilog: str | None) -> Any:
        (first, *rest), flags = own, list(_iterate_format_flags())
        ordered = [first, *flags[:1], *rest[:1], *flags[1:], *rest[1:]]
        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in ordered]
        run.__signature__ = signature.replace(parameters=keywords)  # type: ignore[attr-defined]
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        app.command(name, cls=CommandWithOptionGroups, epilog=epilog)(add_flags_of_loaded_runs(run))
        return typer.main.get_command(app)

    run.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    run.build_command = build_command  # type: ignore[attr-defined]
    return run


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

    fields = {field.name: field for field in dataclasses.fields(EXPORT_FORMATS.load(to))}
    options = {name: value for name, value in given.items() if value is not None}
    for name in options.keys() & fields.keys():
        if (parse := fields[name].metadata["parse"]) is not None:
            options[name] = parse(options[name])
    return options


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


def verify_run(
    path: Annotated[Path, Argument(metavar="RUN", help=HELP, show_default=False)],
    data: Annotated[Path | None, Option(help="Rows to compare on; by default the run's held-out rows.")] = None,
    vllm: Annotated[str | None, Option(help="Address of a vLLM server that serves it.")] = None,
    vllm_model: Annotated[str | None, Option(help="Its name there; by default the folder's.")] = None,
    threads: Annotated[int | None, Option(help="Threads of llama.cpp; by default half of the cores.")] = None,
    as_json: Json = False,
) -> Any:
    """Compare exported models with the trained adapter, engine by engine; exit code 1 if one differs."""
    from ..export.manifest import read_export_manifest

    manifest = read_export_manifest(path)
    if manifest is None:
        require_run_and_base_exist(path)
    require_row_files_exist(data, run_giving_format=path if manifest is None else manifest.run)
    from ..export.verify import verify

    if manifest is None:
        print_progress(
            f"exporting {path} three ways into a temporary folder, and comparing each with the trained adapter: this "
            "takes minutes even for a small base. `slimtune verify FOLDER` checks only the export in FOLDER."
        )
    with showing_progress():
        result = verify(path, rows_file=data, vllm=vllm, vllm_model=vllm_model, threads=threads, log=print_progress)
    if not as_json:
        print_engine_agreement(result.checks)
        for check in result.checks:
            if check.reason:
                make_console().print(f"{check.engine}: {check.reason}")
            elif check.kept_gain is not None:
                make_console().print(f"{check.engine}: {check.kept_gain.describe()}")
    if result.passed:
        return result
    make_error_console().print(f"error: {result.explain_failure()}", style=ERROR)
    return NegativeVerdictResult(result)


def make_engine_agreement_table(verdicts: "Sequence[EngineVerdict]") -> Table:
    """Return the verdicts as a table of at most 80 columns; `LEGEND` says what the numbers are."""
    rows = make_table("engine", "weights", "prompts", "d mean", "d max", "strength", "verdict", text_column_indices=[0])
    rows.padding = (0, 1, 0, 0)
    for c in verdicts:
        numbers, verdict = ["-"] * 4, VERDICTS[c.passed] or "NOT PROVEN" * c.failed
        if c.positions:
            numbers = [f"{c.prompts_equal} of {c.prompts}", f"{c.mean_difference:.2g}", f"{c.max_difference:.2g}"]
            numbers.append(f"{c.strength:.0%}" if c.strength is not None else "-")
            verdict = verdict or "NOT PROVEN"
        rows.add_row(c.engine, c.precision, *numbers, verdict or "not checked")
    return rows


def print_engine_agreement(checks: "Sequence[EngineVerdict]") -> None:
    """Print the verdicts and what their numbers are."""
    make_console().print(make_engine_agreement_table(checks))
    if any(c.positions for c in checks):
        make_console().print(LEGEND, style="dim")


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
