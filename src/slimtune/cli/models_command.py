"""`slimtune models`: the bases that plans know without a download."""

import textwrap
from typing import Annotated, Any

from typer import Option

from ..core.foundation.formatting import format_count
from ..errors import UsageError, format_names
from .common import Json, console, print_age, print_fields, table


def models(
    family: Annotated[str | None, Option(help="Only a family, such as qwen, or bases whose name begins so.")] = None,
    sources: Annotated[
        bool,
        Option("--sources", help="Also show each base's ids, the source of its facts, and when they were checked."),
    ] = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """List the bases with a short name: size, licence, context, release, and whether a download needs an account."""
    from ..extras.known_models import load_known_models, read_known_config
    from ..planning.gpu_specs import format_checked

    known = load_known_models()
    wanted = (family or "").lower()
    chosen = {name: facts for name, facts in known.items() if facts["family"] == wanted or name.startswith(wanted)}
    if not chosen:
        families = dict.fromkeys(facts["family"] for facts in known.values())
        raise UsageError(f"{family!r} is no family of bases", f"one of {format_names(families, len(families))}")
    rows = []
    for name, facts in chosen.items():
        config = read_known_config(name, facts["hub"][0])
        rows.append(
            {
                "name": name,
                "family": facts["family"],
                "hub": facts["hub"][0],
                "ollama": facts.get("ollama", []),
                "params": facts["params"],
                "context": config.get("max_position_embeddings") or config.get("n_positions"),
                "licence": facts["licence"],
                "gated": facts["gated"],
                "released": facts["released"],
                "model_type": config["model_type"],
                "source": facts["source"],
                "checked": facts["checked"],
            }
        )
    if not as_json:
        cells = (
            (
                r["name"], format_count(r["params"]), str(r["context"]), r["released"],
                "\n".join(textwrap.wrap(r["licence"], 18, break_long_words=False)), "yes" if r["gated"] else "no",
            )
            for r in rows
        )  # fmt: skip
        found = table("base", "size", "context", "released", "licence", "gated", left=[4, 5], rows=cells)
        found.padding = (0, 1, 0, 0)  # room for 18 characters of a licence in 80 columns
        console().print(found)
        console().print("\ngated: the Hub wants an account that has accepted the licence")
        console().print("every command also takes a Hub id, a folder or a GGUF file")
        print_age(r["checked"] for r in rows)
        if sources:
            console().print()
            for r in rows:
                names = ", ".join([r["hub"], *r["ollama"]])
                print_fields([(r["name"], f"{names}: {r['source']} (checked {format_checked(r['checked'])})")])
    return {"models": rows}
