"""The course of training: losses, learning rate, speed and gradient norm over steps."""

from __future__ import annotations

from ..charts import Curves, curves
from ..record import Record
from ..section import Missing, Section, command


def section(run: Record) -> Section:
    """Return the section."""

    def of(key: str) -> list[tuple[float, float]]:
        return [(m["step"], m[key]) for m in run.metrics if m.get(key) is not None and "step" in m]

    loss = curves(
        "Loss",
        "nats a learned token",
        [("training", "one", of("train_loss"), False), ("validation", "two", of("validation_loss"), True)],
    )
    scheduler = run.recipe.train.lr_scheduler.replace("_", " ")
    others: list[Curves | None] = [
        curves("Learning rate", scheduler, [("learning rate", "one", of("learning_rate"), False)]),
        curves("Speed", "trained tokens a second", [("speed", "one", of("tokens_per_second"), False)]),
        curves("Gradient norm", "before clipping", [("gradient norm", "one", of("grad_norm"), False)]),
    ]
    if loss is None:
        again = command("train", run.folder / "recipe.yaml", "--resume")
        return Section("course", "Course of training", missing=[Missing("no loss was logged", again)])
    missing = [] if of("validation_loss") else [
        Missing("no validation loss", command("train", "--validation", "ROWS.jsonl"))
    ]  # fmt: skip
    return Section("course", "Course of training", {"loss": loss, "others": [c for c in others if c]}, missing)
