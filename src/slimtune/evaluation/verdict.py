"""The verdict: is the tuned model better than its base, and if not, why.

A model is improved if the whole interval of its loss reduction is above 0 and its answers still depend on their
prompts. It passes if it also forgot no more than its budget.
"""

from collections.abc import Mapping
from typing import Any

from .prompt_dependence import MIN_DEPENDENCE


def list_failures(result: Mapping[str, Any]) -> list[str]:
    """Return why the tuned model is not better than the base, one sentence each; empty if it is better."""
    failures = []
    low, high = result["loss_reduction_ci95"]
    if low <= 0:
        what = "is worse than the base" if high < 0 else "is not shown to be better than the base"
        failures.append(
            f"the tuned model {what}: its loss reduction is between {low:.4f} and {high:.4f} nats per token"
        )
    dependence = result["prompt_dependence"]
    if dependence is not None and not dependence["passed"]:
        low, high = dependence["tuned_ci95"]
        if low <= MIN_DEPENDENCE:
            failures.append(
                "the prompt is not shown to help the tuned model predict its answer: by "
                f"{low:.4f} to {high:.4f} nats per token, where more than {MIN_DEPENDENCE} is required"
            )
        else:
            low, high = dependence["change_ci95"]
            failures.append(
                "the tuned model depends less on its prompts: the help of a prompt fell from "
                f"{dependence['base']:.4f} to {dependence['tuned']:.4f} nats per token, by {-high:.4f} to {-low:.4f}"
            )
    return failures


def make_verdict(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"passed": bool, "reasons": [sentence, …]}` of a whole result."""
    reasons = list_failures(result)
    forgetting = result["forgetting"]
    if forgetting is not None and not forgetting["within"]:
        low, high = forgetting["change_ci95"]
        reasons.append(
            f"it forgot more than its budget of {forgetting['budget']:g} nats per token on general text: "
            f"{forgetting['change']:.4f}, between {low:.4f} and {high:.4f}"
        )
    return {"passed": not reasons, "reasons": reasons}
