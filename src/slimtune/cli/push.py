"""`slimtune push`: a run's adapter and its model card on the Hub, in one commit."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..utils.formatting import format_bytes
from .common import Json, Run, console


def push_run(
    run: Run,
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME; made if it is not there.", show_default=False)
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Only you see it. A repository that is public already is refused.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", "--branch", help="Branch to commit to; made if it is not there.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="The base's Hub id, where the run knows it by a path.")
    ] = None,
    keep_card: Annotated[
        bool, typer.Option("--keep-card", help="Leave a README.md that the repository has already.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Send nothing; show the files and the model card.")
    ] = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Upload the adapter and a model card to the Hub, never checkpoints, logs or rows.

    An export or a merged folder goes as it is. Log in by `hf auth login`, or set HF_TOKEN.
    """
    from ..export.hub import push

    result = push(
        run,
        repo_id,
        private=True if private else None,
        revision=revision,
        message=message,
        base=base,
        keep_card=keep_card,
        dry_run=dry_run,
    )
    if not as_json:
        _show(result)
    return result


def _show(result: dict[str, Any]) -> None:
    screen = console()
    for name, size in result["files"].items():
        screen.print(f"{name}  {format_bytes(size)}", markup=False)
    if result["left"]:
        screen.print(f"stays here: {', '.join(result['left'])}", markup=False)
    if "card" in result:
        screen.print(f"\nnothing was sent; the model card would be:\n\n{result['card']}", markup=False)
        return
    seen = "private" if result["private"] else "public"
    screen.print(
        f"{result['url']} ({seen}), {result['revision']} at {result['commit'][:8]}: "
        f"{len(result['files'])} files, {format_bytes(result['bytes'])}",
        markup=False,
    )
