"""transformers' Trainer with our loss, our checkpoints and our evaluation; the loop itself is theirs.

Overridden: `training_step` (an optimizer step's rows in as many passes as `Collator.packs` divides them into, each loss
a share of the whole step's), `evaluate` (mean over tokens, not over batches) and everything that saves or loads (no
pickle, whole or absent).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerState, TrainingArguments

from ..adapt import checkpoint as adapter_files
from ..adapt.rates import split_by_rate
from ..data.collate import Collator, Example
from ..ops import adamw_8bit
from ..step import accumulated, mean_loss, score
from . import checkpoints


class RowSet(Dataset):
    """Encoded rows, as torch wants them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class SlimTrainer(Trainer):
    """A Trainer for adapters on packed rows.

    Args:
        model: the adapted model.
        args: transformers' arguments; `output_dir` is the folder of the checkpoints, a batch is a whole step's rows.
        train: encoded training rows.
        validation: encoded validation rows; may be empty.
        collator: divides a step's rows into packs.
        keep: checkpoints kept beside the best.
        say: told what a person should know.
        optimizer: "adamw", torch's fused one, or "adamw-8bit", bitsandbytes'.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        train: Sequence[Example],
        validation: Sequence[Example],
        collator: Collator,
        keep: int,
        say: Callable[[str], None],
        callbacks: list[Any],
        optimizer: str = "adamw",
    ) -> None:
        packs: Any = collator.packs
        how: Any = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        super().__init__(
            model,
            args,
            train_dataset=RowSet(train),
            data_collator=packs,
            callbacks=callbacks,
            # By class: by name the Trainer lets bitsandbytes remember every embedding for as long as the process lives.
            optimizer_cls_and_kwargs=(adamw_8bit.theirs(), how) if optimizer == "adamw-8bit" else None,
        )
        self.validation, self.collator, self.keep, self.say = list(validation), collator, keep, say
        self.trained_tokens = self.supervised_tokens = 0
        self.train_seconds = 0.0
        self._begun = 0.0
        # The loss below is normalised over the accumulated batch already.
        self.model_accepts_loss_kwargs = True
        for config in model.peft_config.values():
            config.begins(args.max_steps)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer; a method's parameters get the rates it asks for (LoRA+)."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made:
            split_by_rate(optimizer, self.model)
        return optimizer

    # --- the step -----------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the packs of one optimizer step forwards and backwards; return the step's loss."""
        model.train()
        packs: list[dict[str, Any]] = self._prepare_inputs(inputs)  # type: ignore[assignment]
        # Read here, where a GPU has nothing left to do, not between two passes.
        self.trained_tokens += sum(int(p["tokens"]) for p in packs)
        self.supervised_tokens += sum(len(p["targets"]) for p in packs)
        return accumulated(model, packs, self.accelerator.backward)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """Return None: `training_step` counts for itself."""

    def step_begins(self) -> None:
        """Start the clock of one optimizer step."""
        self._begun = time.perf_counter()

    def stepped(self) -> None:
        """Let the method do its part after an optimizer step, while the gradients are there."""
        model: Any = self.model
        model.update_and_allocate(self.state.global_step + 1)

    def step_ends(self) -> None:
        """Stop it: only training counts, not evaluating or saving."""
        self.train_seconds += time.perf_counter() - self._begun

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return and log the mean loss per supervised token over the validation rows (nats)."""
        if not self.validation:
            return {}
        loss = mean_loss(score(self.model, self.validation, self.collator))
        metrics = {"eval_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def best_step(self) -> int | None:
        """Return the step with the lowest validation loss so far; the first one where several are equal."""
        seen = [(loss, step) for step, loss in self.validated() if math.isfinite(loss)]
        return min(seen)[1] if seen else None

    def validated(self) -> list[tuple[int, float]]:
        """Return `(step, validation loss)` of each evaluation so far."""
        return [(int(h["step"]), h["eval_loss"]) for h in self.state.log_history if "eval_loss" in h]

    def since_best(self) -> int:
        """Return how many evaluations there were since the best one."""
        steps = [step for step, _ in self.validated()]
        best = self.best_step()
        return len(steps) if best is None else len(steps) - 1 - steps.index(best)

    def take_up(self, checkpoint: Path) -> None:
        """Stand where a checkpoint stands, without training on."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        root = Path(str(self.args.output_dir))
        checkpoints.write(root, self.state.global_step, self._fill)
        checkpoints.rotate(root, self.keep, self.best_step())

    def _fill(self, folder: Path) -> None:
        adapter_files.save(self.model, folder, "default")
        checkpoints.save_progress(folder, self.model)
        checkpoints.save_optimizer(folder, self.optimizer.state_dict())  # type: ignore[union-attr]
        checkpoints.save_random(folder)
        (folder / "scheduler.json").write_text(json.dumps(self.lr_scheduler.state_dict()))  # type: ignore[union-attr]
        progress = {
            "trained_tokens": self.trained_tokens,
            "supervised_tokens": self.supervised_tokens,
            "train_seconds": self.train_seconds,
            "room": self.collator.room,
        }
        (folder / "progress.json").write_text(json.dumps(progress))
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_adapter_of(Path(resume_from_checkpoint))
        checkpoints.load_progress(Path(resume_from_checkpoint), self.model)
        progress = json.loads(Path(resume_from_checkpoint, "progress.json").read_text())
        self.trained_tokens, self.supervised_tokens = progress["trained_tokens"], progress["supervised_tokens"]
        self.train_seconds = progress["train_seconds"]
        self.collator.room = progress["room"]  # what was free then: so the steps are divided as they were

    def load_adapter_of(self, folder: Path) -> None:
        """Load the adapter of a checkpoint into the model."""
        tensors, _ = adapter_files.read(folder)
        adapter_files.load(self.model, "default", tensors, where=str(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(checkpoints.load_optimizer(Path(checkpoint)))  # type: ignore[union-attr]
            self.lr_scheduler.load_state_dict(json.loads(Path(checkpoint, "scheduler.json").read_text()))  # type: ignore[union-attr]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_random(Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: weights are bf16 or fp32 (fp16 is refused), adapters fp32."""
