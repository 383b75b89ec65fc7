"""What was asked: base, method, rows and budget; the whole recipe folded away."""

from __future__ import annotations

from ..record import Record
from ..section import Section


def section(run: Record) -> Section:
    """Return the section."""
    r = run.recipe
    rows_a_step = r.train.batch_size * r.train.gradient_accumulation_steps
    passes = f"{r.train.epochs:g} pass{'es' * (r.train.epochs != 1)} over the rows"
    held = f"linear layers in {r.model.quantization}" if r.model.quantization else f"dtype {r.model.dtype}"
    settings = ", ".join(f"{k} {v}" for k, v in r.method.settings.items() if v not in (None, {}, [], False))
    asked = [
        ("base", f"{r.model.name}, {held}"),
        ("method", f"{r.method.name}{f' ({settings})' if settings else ''}"),
        ("training rows", str(r.data.train)),
        ("validation rows", str(r.data.validation or f"{100 * r.data.validation_fraction:g} % of the training rows")),
        ("test rows", str(r.data.test or "none named")),
        ("longest row", f"{r.data.max_seq_len:,} tokens; longer ones: {r.data.on_overlong}"),
        ("budget", f"{r.train.max_steps} steps" if r.train.max_steps else passes),
        ("rows in a step", f"{rows_a_step}"),
        ("learning rate", f"{r.train.learning_rate:g}, {r.train.lr_scheduler}"),
        ("seed", f"{r.train.seed}"),
    ]
    return Section("asked", "What was asked", {"asked": asked, "recipe": r.to_yaml()})
