"""Is it better? What the figures have to say together, and why not where they do not.

Better is an adapter whose gain lies above 0 with its whole interval and whose answers still follow from their prompts
(prompts.py); it passes if it also forgot no more than its budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .prompt_dependence import LEAST

Result = Mapping[str, Any]


def against(result: Result) -> list[str]:
    """Return why the tuned model is not better than the base, a sentence each; none: it is."""
    low, high = result["loss_reduction_ci95"]
    found = []
    if low <= 0:
        what = "is worse than the base" if high < 0 else "is not shown to be better than the base"
        found.append(f"the tuned model {what}: its gain lies between {low:.4f} and {high:.4f} nats a token")
    use = result.get("prompt_dependence")
    if use is not None and not use["kept"]:
        found.append(_unprompted(use))
    return found


def make_verdict(result: Result) -> dict[str, Any]:
    """Return `{"passed": bool, "reasons": [sentence, …]}` of a whole result."""
    reasons = against(result)
    forgot = result.get("forgetting")
    if forgot is not None and not forgot["within"]:
        low, high = forgot["change_ci95"]
        reasons.append(
            f"it forgot more than its budget of {forgot['budget']:g} nats a token on general text: "
            f"{forgot['change']:.4f}, between {low:.4f} and {high:.4f}"
        )
    return {"passed": not reasons, "reasons": reasons}


def _unprompted(use: Result) -> str:
    low, high = use["tuned_ci95"]
    if low <= LEAST:
        told = f"between {low:.4f} and {high:.4f} nats a token, of which {LEAST} are wanted"
        return f"a prompt is not shown to tell the tuned model anything of its answer: {told}"
    low, high = use["change_ci95"]
    return (
        "the tuned model learned to answer past the prompt: what a prompt tells of its answer fell from "
        f"{use['base']:.4f} to {use['tuned']:.4f} nats a token, by {-high:.4f} to {-low:.4f}"
    )
