"""`slimtune serve`: an OpenAI-compatible server for runs and their base."""

import atexit
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ..core.foundation.formatting import format_bytes
from ..errors import UsageError, format_names, suggest
from ..export.export_results import EngineVerdict
from .check_command import print_engine_agreement
from .common import (
    INTERRUPTED,
    WARNING,
    Device,
    Json,
    make_console,
    make_error_console,
    print_progress,
    require_installed_packages,
    showing_progress,
)
from .input_checks import require_base_exists, require_run_and_base_exist

ENGINES = ("torch", "llama.cpp", "vllm")


@dataclass(frozen=True)
class ServeResult:
    """What `serve --json` prints when the server has ended."""

    answers: int
    """Answers that were generated."""
    tokens: int
    """Their tokens."""
    engine: str
    """What computed them: torch or llama.cpp."""
    checks: list[EngineVerdict]
    """Of llama.cpp against the adapters; empty if nothing was compared."""


def serve_runs(
    runs: Annotated[
        list[str] | None,
        Argument(metavar="RUN", help="Runs or adapter folders of one base; NAME=RUN names one.", show_default=False),
    ] = None,
    host: Annotated[
        str, Option(help="Address to listen at; any but this machine's own needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen at; 0: any free one.")] = 8000,
    api_key: Annotated[
        str | None, Option(help="Key that clients must send.", envvar="SLIMTUNE_API_KEY", show_default=False)
    ] = None,
    max_batch: Annotated[int, Option(min=1, help="Most answers at the same time.")] = 16,
    max_waiting: Annotated[int, Option(min=1, help="Most answers that wait.")] = 256,
    max_length: Annotated[int, Option(min=2, help="Most tokens of a prompt and its answer together.")] = 4096,
    timeout: Annotated[float, Option(min=1, help="Seconds until an answer that is not finished ends.")] = 600,
    device: Device = None,
    engine: Annotated[str, Option(help="What computes the answers: torch, llama.cpp.")] = "torch",
    precision: Annotated[
        str | None,
        Option(help="llama.cpp: f32, f16, bf16, q8_0, Q4_K_M …; by default that of a base's GGUF, or f16."),
    ] = None,
    no_verify: Annotated[
        bool, Option("--no-verify", help="llama.cpp: do not compare it with the adapters at the start.")
    ] = False,
    base: Annotated[
        str | None, Option(help="Base to serve in place of runs; --adapters-from adds adapters to it.")
    ] = None,
    dtype: Annotated[str | None, Option(help="Of the weights of --base: auto, float32, bfloat16, float16.")] = None,
    adapters_from: Annotated[
        Path | None,
        Option(
            metavar="FOLDER",
            help="Let requests load the adapters below this folder, as train --sampler does; torch only.",
        ),
    ] = None,
    as_json: Json = False,
) -> ServeResult:
    """Serve runs and their base to OpenAI's clients."""
    runs = runs or []
    _require_engine(engine, runs)
    _require_runs_or_base(runs, base, dtype, adapters_from, engine)
    if engine == "torch" and (precision is not None or no_verify):
        raise UsageError("--precision and --no-verify have no effect with --engine torch", hint="leave them out")
    require_installed_packages("serve", "serve", ("starlette", "uvicorn"))
    if engine == "llama.cpp":
        require_installed_packages("serve --engine llama.cpp", "export-check", ("xllamacpp", "gguf"))
    from ..serving.served_models import parse_run_names

    for path in parse_run_names(runs).values():
        require_run_and_base_exist(path)
    from ..serving.model_server import ModelServer, ServeSettings

    served: Any = engine
    settings = ServeSettings(
        host=host, port=port, api_key=api_key, device=device, max_batch=max_batch, max_waiting=max_waiting,
        max_length=max_length, timeout=timeout, engine=served, precision=precision, verify=not no_verify, base=base,
        dtype=dtype or "auto", adapters_from=adapters_from,
    )  # fmt: skip
    with showing_progress():
        server = ModelServer(runs, settings, print_progress)
    screen = make_console(stderr=as_json)
    if server.checks and not as_json:
        print_engine_agreement(server.checks)
    if engine == "llama.cpp":
        not_proven = [f"{c.engine}: {c.reason}" for c in server.checks if c.passed is None]
        for reason in not_proven or ["the check was left out (--no-verify)"] * no_verify:
            make_error_console().print(f"NOT PROVEN: {reason}", style=f"bold {WARNING}")
    screen.print(f"serving at {server.url}", style="bold")
    for model in server.models:
        notes = ["the base"] if model.parent is None else []
        notes += ["shares no batch with others"] if model in server.unshared else []
        screen.print(f"  {model.name}" + (f"  ({', '.join(notes)})" if notes else ""))
    longest = max(model.max_length for model in server.models)
    cache = "at most " if engine == "torch" else ""
    screen.print(
        f"{max_batch} answers at the same time, of {longest:,} tokens with their prompts: "
        f"{cache}{format_bytes(server.cache_bytes)} of keys and values"
    )
    screen.print("Ctrl-C ends it")
    _run_to_exit(server)
    result = ServeResult(server.queue.finished, server.queue.generated_tokens, engine, server.checks)
    if not as_json:
        screen.print(f"ended after {result.answers} answers with {result.tokens:,} tokens")
    return result


def _run_to_exit(server: Any) -> None:
    """Serve, and see to it that the process ends even if a thread hangs in a step of the model."""
    code = 1
    try:
        server.run()
        code = 0
    except KeyboardInterrupt:
        code = INTERRUPTED
        raise
    finally:
        if not server.has_ended:  # Python's own end would abort the process in the middle of a kernel
            atexit.register(_exit_at_once, code)


def _exit_at_once(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _require_runs_or_base(
    runs: Sequence[str], base: str | None, dtype: str | None, adapters_from: Path | None, engine: str
) -> None:
    """Raise UsageError unless runs are served, or a base that adapters can be loaded on."""
    if bool(runs) == (base is not None):
        problem = "runs and --base are both given" if runs else "neither a run nor --base is given"
        raise UsageError(problem, "runs of one base, or --base with --adapters-from FOLDER")
    if base is None and dtype is not None:
        raise UsageError("--dtype is given without --base", hint="leave it out: the runs say it")
    if engine != "torch" and (base is not None or adapters_from is not None):
        raise UsageError(f"--base and --adapters-from need --engine torch, and it is {engine}", "--engine torch")
    if base is not None and adapters_from is None:
        raise UsageError("--base is given without --adapters-from", "the folder below which adapters will be")
    if adapters_from is not None and not adapters_from.is_dir():
        raise UsageError(f"--adapters-from is {adapters_from}, and there is no such folder", "a folder")
    if base is not None:
        require_base_exists(base)


def _require_engine(engine: str, runs: Sequence[str]) -> None:
    """Raise UsageError unless slimtune serves with an engine; for vLLM it says which commands do."""
    if engine not in ENGINES:
        raise UsageError(f"there is no engine {engine!r}{suggest(engine, ENGINES)}", format_names(ENGINES[:2]))
    if engine == "vllm":
        names = (shlex.quote(run.partition("=")[2] or run) for run in runs)
        exports = "; ".join(f"slimtune export {name} --to vllm --out FOLDER" for name in names)
        hint = f"{exports}; each prints the command that starts vLLM with the adapter"
        raise UsageError("vLLM is a server of its own, which slimtune does not start", "torch or llama.cpp", hint)
