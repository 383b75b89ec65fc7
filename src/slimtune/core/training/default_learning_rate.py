"""The learning rate of a run whose recipe has none."""

from dataclasses import replace

from ..config import Recipe


def fill_in_learning_rate(recipe: Recipe, row_count: int, hidden_size: int) -> Recipe:
    """Return the recipe with a number for its learning rate.

    Args:
        recipe: the run's settings.
        row_count: training rows.
        hidden_size: width of the base's hidden states.
    """
    train = recipe.train
    if train.learning_rate != "auto":
        return recipe
    method, objective = recipe.method_config(), recipe.objective()
    rate = method.learning_rate
    # How the best rate depends on the run was measured on language models.
    if objective.task_type == "CAUSAL_LM":
        steps = train.count_steps(row_count)
        epochs = max(1.0, steps * train.rows_per_step / max(row_count, 1))
        rate = method.default_learning_rate(steps, epochs, hidden_size)
    rate *= objective.learning_rate_factor
    return replace(recipe, train=replace(train, learning_rate=float(f"{rate:.2g}")))
