"""`slimtune models`: the bases that plans know without a download."""

from typing import Annotated, Any

from typer import Option

from ..errors import UsageError, format_names
from ..utils.formatting import format_count
from .common import Json, console, print_fields, table


def models(
    family: Annotated[str | None, Option(help="Only bases whose name begins so, such as qwen3.")] = None,
    sources: Annotated[bool, Option("--sources", help="Also show where each base's facts are from.")] = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """List the bases with a short name: size, licence, context, release, and whether a download needs an account."""
    from ..models.registry import load_known_configs

    known = load_known_configs()
    chosen = {name: facts for name, facts in known.items() if family is None or name.startswith(family.lower())}
    if not chosen:
        families = dict.fromkeys(name.partition("-")[0] for name in known)
        raise UsageError(f"{family!r} is no family of bases", f"one of {format_names(families, len(families))}")
    rows = [
        {
            "name": name,
            "hub": facts["hub"][0],
            "params": facts["params"],
            "context": facts["config"].get("max_position_embeddings") or facts["config"].get("n_positions"),
            "licence": facts["licence"],
            "gated": facts.get("gated"),
            "released": facts.get("released"),
            "model_type": facts["config"]["model_type"],
            "source": facts["source"],
        }
        for name, facts in chosen.items()
    ]
    if not as_json:
        cells = (
            (
                r["name"], format_count(r["params"]), str(r["context"] or "-"), r["released"] or "-", r["licence"],
                {True: "yes", False: "no", None: "-"}[r["gated"]],
            )
            for r in rows
        )  # fmt: skip
        console().print(table("base", "size", "context", "released", "licence", "gated", left=[4, 5], rows=cells))
        console().print("\ngated: the Hub wants an account that has accepted the licence")
        console().print("every command also takes a Hub id, a folder or a GGUF file")
        if sources:
            console().print()
            print_fields((r["name"], f"{r['hub']}: {r['source']}") for r in rows)
    return {"models": rows}
