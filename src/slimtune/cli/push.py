"""`slimtune push`: upload a run's adapter and a model card to the Hub, in one commit."""

from typing import Annotated, Any

from typer import Argument, Option

from ..utils.formatting import format_bytes
from .common import Json, Run, console
from .inputs import require_run


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
) -> dict[str, Any]:
    """Upload the adapter and a model card to the Hub, never checkpoints, logs or rows.

    Merged models and GGUF files are uploaded as they are. Log in with `hf auth login`, or set HF_TOKEN.
    """
    if not run.is_dir():
        require_run(run)
    from ..export.hub import push

    how: dict[str, Any] = {"revision": revision, "message": message, "base": base, "private": private or None}
    result = push(run, repo_id, keep_card=keep_card, dry_run=dry_run, **how)
    if not as_json:
        lines = [f"{name}  {format_bytes(size)}" for name, size in result["files"].items()]
        if result["skipped"]:
            lines.append(f"not uploaded: {', '.join(result['skipped'])}")
        if "card" in result:
            lines.append(f"\nnothing was sent; the model card would be:\n\n{result['card']}")
        else:
            place = f"{result['url']} ({'private' if result['private'] else 'public'}), {result['revision']}"
            size = format_bytes(result["bytes"])
            lines.append(f"{place} at {result['commit'][:8]}: {len(result['files'])} files, {size}")
        console().print("\n".join(lines))
    return result
