"""transformers' Trainer in turns: one real `train()` over all rounds, that waits before each and reports after it."""

import os
import time
from typing import Any

from transformers import TrainerCallback
from worker import Turns

PLAIN: dict[str, Any] = {
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "train_sampling_strategy": "sequential",  # the same rows a step as every way has
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""What a TrainingArguments needs to run the benchmark's rows, and nothing that changes how it computes."""


class InTurns(TrainerCallback):
    """Wait for a turn before each round and report after it; never go on in another's turn."""

    def __init__(self, turns: Turns, **facts: Any) -> None:
        self.turns, self.facts = turns, facts
        self.losses: list[float] = []
        self.positions = self.left = 0
        self.number = -1
        self.began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Everything is made: say so."""
        self.turns.ready(trained=sum(p.numel() for p in model.parameters() if p.requires_grad), **self.facts)
        self._wait()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin a step's loss."""
        self.losses.append(0.0)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the last step of a round, report, and wait."""
        self.left -= 1
        if self.left == 0:
            self.turns.done(self.number, time.perf_counter() - self.began, self.losses, self.positions)
            self._wait()

    def _wait(self) -> None:
        number = self.turns.wait()
        if number is None:
            os._exit(0)  # out of the middle of a Trainer's loop
        assert number == self.number + 1, "a Trainer runs the rounds in their order"
        self.number, self.left = number, len(self.turns.rounds[number])
        self.losses, self.positions = [], 0
        self.began = time.perf_counter()


def watched(trainer_class: type) -> Any:
    """A Trainer class that tells its `watch` (an `InTurns`) the loss and the positions of each pass."""

    class Watched(trainer_class):
        watch: InTurns

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.watch.positions += inputs["input_ids"].numel()
            loss = super().training_step(model, inputs, *args, **kwargs)
            self.watch.losses[-1] += loss.item()
            return loss

    return Watched
