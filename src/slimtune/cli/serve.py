"""`slimtune serve`: an OpenAI-compatible server for runs and their base."""

from typing import Annotated, Any

from typer import Argument, Option

from ..utils.formatting import format_bytes
from .common import Device, Json, console
from .inputs import require_packages, require_run


def serve_runs(
    runs: Annotated[
        list[str],
        Argument(metavar="RUN", help="Runs or adapter folders of one base; NAME=RUN names one.", show_default=False),
    ],
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
    as_json: Json = False,
) -> dict[str, Any]:
    """Serve runs and their base to OpenAI's clients."""
    require_packages("serve", "serve", ("starlette", "uvicorn"))
    from ..serving.models import name_runs

    for path in name_runs(runs).values():
        require_run(path)
    from ..serving.server import ModelServer, ServeSettings

    settings = ServeSettings(
        host=host, port=port, api_key=api_key, device=device, max_batch=max_batch, max_waiting=max_waiting,
        max_length=max_length, timeout=timeout,
    )  # fmt: skip
    server = ModelServer(runs, settings)
    screen = console(stderr=as_json)
    screen.print(f"serving at {server.url}", style="bold")
    for model in server.models:
        notes = ["the base"] if model.parent is None else []
        notes += ["shares no batch with others"] if model in server.unshared else []
        screen.print(f"  {model.name}" + (f"  ({', '.join(notes)})" if notes else ""))
    longest = max(model.max_length for model in server.models)
    screen.print(
        f"{max_batch} answers at the same time, of {longest:,} tokens with their prompts: "
        f"at most {format_bytes(server.cache_bytes)} of keys and values"
    )
    screen.print("Ctrl-C ends it")
    result = server.run()
    if not as_json:
        screen.print(f"ended after {result['answers']} answers with {result['tokens']:,} tokens")
    return result
