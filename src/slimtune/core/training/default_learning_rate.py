"""The learning rate of a run whose recipe has none."""

from dataclasses import replace

from ..config import Recipe

FAR_FACTOR = 10
"""A rate this many times off the default is told: a run with it hardly learns, or is lost."""


def compute_default_learning_rate(recipe: Recipe, row_count: int, hidden_size: int) -> float:
    """Return the learning rate that training takes by itself.

    Args:
        recipe: the run's settings; its own learning rate does not count.
        row_count: training rows.
        hidden_size: width of the base's hidden states.
    """
    train, method, objective = recipe.train, recipe.method_config(), recipe.objective()
    rate = method.learning_rate
    # How the best rate depends on the run was measured on language models.
    if objective.task_type == "CAUSAL_LM":
        steps = train.count_steps(row_count)
        epochs = max(1.0, steps * train.rows_per_step / max(row_count, 1))
        rate = method.default_learning_rate(steps, epochs, hidden_size)
    return float(f"{rate * objective.learning_rate_factor:.2g}")


def fill_in_learning_rate(recipe: Recipe, row_count: int, hidden_size: int) -> Recipe:
    """Return the recipe with a number for its learning rate, the default if it has none."""
    if recipe.train.learning_rate != "auto":
        return recipe
    rate = compute_default_learning_rate(recipe, row_count, hidden_size)
    return replace(recipe, train=replace(recipe.train, learning_rate=rate))


def describe_far_learning_rate(rate: float, default: float) -> str:
    """Return that a rate is far from the default and what that does; "": it is not far."""
    if 1 / FAR_FACTOR < rate / default < FAR_FACTOR:
        return ""
    factor, side = (default / rate, "below") if rate < default else (rate / default, "above")
    harm = "it may learn next to nothing" if rate < default else "the loss may rise"
    return f"learning rate {rate:g} is {factor:.3g} times {side} the {default:g} that training takes by itself: {harm}"
