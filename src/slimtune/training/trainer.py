"""transformers' Trainer with our loss, our checkpoints and our evaluation; the loop itself is theirs.

Overridden: `training_step` (an optimizer step's rows in as many passes as `Collator.packs` divides them into, each loss
a share of the whole step's), `evaluate` (mean over tokens, not over batches) and everything that saves or loads (no
pickle, whole or absent). Each of them goes through `Relief`, which does it again where memory ran out.

Several processes: each runs the Trainer as if it were alone, over the same rows in the same order, and takes its share
of each step (data/step_sharding.py); the gradients are summed before the optimizer sees them. Nothing is wrapped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerState, TrainingArguments

from ..adapters import state_dict as adapter_files
from ..adapters.architectures import text_config
from ..adapters.optimizer import group_by_learning_rate
from ..data.collator import Collator, Example
from ..data.step_sharding import StepSharder
from ..kernels import adamw
from ..kernels.dropout import get_rng_states, preserve_rng_state, set_rng_states
from ..kernels.unbroken import retry_optimizer_step
from ..train_step.loss import EVAL_TOKENS, batched, forward_backward, mean_loss, score_batch
from ..utils import distributed
from . import checkpoint as checkpoints
from .oom_recovery import LESS, OomRecovery


class RowSet(Dataset):
    """Encoded rows, as torch wants them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class StepBatch:
    """The rows of one optimizer step; they are laid when the step is run, for the room there is then.

    No list, so that nothing on their way to the step walks through their tokens.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples


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
        relief: does again what memory ran out of; of the same collator.
        optimizer: "adamw", torch's fused one, or "adamw-8bit", bitsandbytes'.
    """

    streams = False
    """Whether a checkpoint is written from where its tensors lie, being too large to be put together in memory."""

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
        relief: OomRecovery,
        callbacks: list[Any],
        optimizer: str = "adamw",
    ) -> None:
        width = getattr(text_config(model), "hidden_size", 1024)
        self.shares = StepSharder(collator, width, distributed.world_size(), distributed.rank())
        rows: Any = StepBatch
        how: Any = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        super().__init__(
            model,
            args,
            train_dataset=RowSet(train),
            data_collator=rows,
            callbacks=callbacks,
            # By class: by name the Trainer lets bitsandbytes remember every embedding for as long as the process lives.
            optimizer_cls_and_kwargs=(adamw.theirs(), how) if optimizer == "adamw-8bit" else None,
        )
        self.validation, self.collator, self.keep, self.say = validation, collator, keep, say
        self.trained_tokens = self.supervised_tokens = 0
        self.train_seconds = self.train_cpu_seconds = 0.0
        self.relief = relief
        relief.way_on = self._way_on
        self._rows: Sequence[Example] = ()
        self._whole = False  # the gradients are the step's, neither a part of them nor clipped
        self._steady = True  # the weights are those of `global_step` steps
        self._begun = self._begun_cpu = 0.0
        self.stop_asked = self._stop_agreed = False
        # The loss below is normalised over the accumulated batch already.
        self.model_accepts_loss_kwargs = True
        for config in getattr(model, "peft_config", {}).values():
            config.on_train_begin(args.max_steps)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer; a method's parameters get the rates it asks for (LoRA+)."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made:
            group_by_learning_rate(optimizer, self.model)
            retry_optimizer_step(optimizer, self._optimizer_step)
        return optimizer

    def _optimizer_step(self, step: Callable[[], Any], undo: Callable[[], Any] | None) -> Any:
        self._steady = False
        return self.relief.again("the optimizer's step", step, undo)

    # --- the step -----------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run this process's packs of one optimizer step forwards and backwards; return the whole step's loss."""
        model.train()
        self._rows, self.relief.step = inputs.examples, self.state.global_step
        loss, tokens, targets = self._gradients(model)
        self.trained_tokens += tokens
        self.supervised_tokens += targets
        return loss

    def _gradients(self, model: Any) -> tuple[Tensor, int, int]:
        """Fill the gradients from zero; return the whole step's loss, its tokens and its supervised tokens."""

        def work() -> tuple[Tensor, int, int]:
            share: dict[str, Any] = self._prepare_inputs(self.shares(self._rows))
            how = {"targets": share["targets"], "weights": share["weights"], "penalized": distributed.is_main_process()}
            with self._own_draws(share["packs"][0]["targets"].device), distributed.translate_peer_errors():
                loss = forward_backward(model, share["packs"], self.accelerator.backward, **how)
            return loss, share["tokens"], share["targets"]

        self._start = get_rng_states(self.args.device)
        loss, tokens, targets = self.relief.passes("a training step", self._rows, work, self._no_gradients)
        self._whole = True
        return self._summed(loss), tokens, targets

    def _summed(self, loss: Tensor) -> Tensor:
        """Return the loss of all processes' packs, their gradients summed, and agree on whether to stop."""
        if distributed.world_size() == 1:
            return loss
        total, stops = distributed.all_reduce_sum([loss.item(), float(self.stop_asked)])
        self._stop_agreed = stops > 0
        distributed.sum_gradients(p for p in self.model.parameters() if p.requires_grad)  # type: ignore[union-attr]
        return torch.full_like(loss, total)

    @contextmanager
    def _own_draws(self, device: torch.device) -> Iterator[None]:
        """Draw dropout by seed, step and process, and leave random numbers elsewhere the same in all processes.

        So a run goes on the same from a checkpoint, which one process writes.
        """
        if distributed.world_size() == 1:
            yield
            return
        with preserve_rng_state(device):
            # 2 ** 20 steps and 2 ** 12 processes apart.
            torch.manual_seed((self.args.seed << 32) + (self.state.global_step << 12) + distributed.rank())
            yield

    def _no_gradients(self) -> None:
        for parameter in self.model.parameters():  # type: ignore[union-attr]
            parameter.grad = None

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients; where memory runs out, some are scaled and some not, so they are found anew."""
        norm_of = super()._clip_grad_norm

        def work() -> Any:
            if not self._whole:
                set_rng_states(self._start)
                self._gradients(model)
            self._whole = False
            return norm_of(model)

        # The gradients of several processes cannot be found anew by one of them.
        return self.relief.again("clipping", work, self._no_gradients if distributed.world_size() == 1 else None)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: they are asked for before anything is laid, and told nowhere."""
        return 0

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """Return None: `training_step` counts for itself."""

    def stopping(self) -> bool:
        """Return whether the run is to end after this step: one process of it was asked to, and all know."""
        return self.stop_asked if distributed.world_size() == 1 else self._stop_agreed

    def step_begins(self) -> None:
        """Start the clock of one optimizer step."""
        self._begun, self._begun_cpu = time.perf_counter(), time.process_time()

    def on_step_end(self) -> None:
        """Let the method do its part after an optimizer step, while the gradients are there."""
        model: Any = self.model
        model.update_and_allocate(self.state.global_step + 1)

    def step_ends(self) -> None:
        """Stop it: only training counts, not evaluating or saving."""
        self._steady = True
        self.train_seconds += time.perf_counter() - self._begun
        self.train_cpu_seconds += time.process_time() - self._begun_cpu

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return and log the mean loss per supervised token over the validation rows (nats)."""
        if not self.validation:
            return {}
        self.relief.step = self.state.global_step
        loss = mean_loss(self._scores())
        metrics = {"eval_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _scores(self) -> list[tuple[float, int]]:
        """Return what `score` does for the validation rows, each process having run its share of them."""

        def work() -> dict[int, tuple[float, int]]:
            found: dict[int, tuple[float, int]] = {}
            with distributed.translate_peer_errors():
                for number, some in enumerate(batched(self.validation)):
                    done = score_batch(self.model, some, self.collator, self.shares.turns(some)[0])
                    found |= {number * EVAL_TOKENS + i: row for i, row in done.items()}
            return found

        mine = self.relief.passes("evaluation", self.validation, work, lambda: None, grad=False)
        found = {i: row for part in distributed.all_gather_object(mine) for i, row in part.items()}
        return [found[i] for i in range(len(self.validation))]

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
        if not distributed.is_main_process():
            return  # there is one checkpoint of a run; the others wait for its writer in their next step
        root, step = Path(str(self.args.output_dir)), self.state.global_step
        self.relief.step = step
        self.relief.again("writing a checkpoint", lambda: checkpoints.write(root, step, self._fill), lambda: None)
        checkpoints.rotate(root, self.keep, self.best_step())

    def _way_on(self) -> str:
        """Write a checkpoint where the weights are whole and one is missing; return how the run can go on."""
        root, step = Path(str(self.args.output_dir)), self.state.global_step
        newest = [checkpoints.step_of(f) for f in checkpoints.folders(root)][-1:]
        if step and newest != [step] and self._steady and distributed.is_main_process():
            try:
                checkpoints.write(root, step, self._fill)
                newest = [step]
            except Exception as error:  # no memory for it, a full disk: what ends the run is told all the same
                self.say(f"no checkpoint of step {step} could be written: {error}")
        if not newest:
            return LESS
        return (
            f"checkpoint-{newest[0]} is whole: free memory, then slimtune train {root.parent / 'recipe.yaml'} "
            f"--resume; or start anew with {LESS}"
        )

    def save_weights(self, folder: Path) -> None:
        """Write what trains into a checkpoint's folder, and what the method goes on from beside it."""
        adapter_files.save_adapter(self.model, folder, "default")
        checkpoints.save_progress(folder, self.model)

    def load_weights(self, folder: Path) -> None:
        """Take up what `save_weights` wrote."""
        self.load_adapter_of(folder)
        checkpoints.load_progress(folder, self.model)

    def _fill(self, folder: Path) -> None:
        self.save_weights(folder)
        state = self.optimizer.state_dict()  # type: ignore[union-attr]
        checkpoints.save_optimizer(folder, state, stream=self.streams)
        checkpoints.save_random(folder)
        (folder / "scheduler.json").write_text(json.dumps(self.lr_scheduler.state_dict()))  # type: ignore[union-attr]
        progress = {
            "trained_tokens": self.trained_tokens,
            "supervised_tokens": self.supervised_tokens,
            "train_seconds": self.train_seconds,
            "train_cpu_seconds": self.train_cpu_seconds,
            "room": self.collator.room,
            "rows": self.collator.rows,
            "checkpointing": self.relief.checkpointing,
        }
        (folder / "progress.json").write_text(json.dumps(progress))
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))
        progress = json.loads(Path(resume_from_checkpoint, "progress.json").read_text())
        self.trained_tokens, self.supervised_tokens = progress["trained_tokens"], progress["supervised_tokens"]
        self.train_seconds = progress["train_seconds"]
        self.train_cpu_seconds = progress.get("train_cpu_seconds", 0.0)

    def take_room(self, checkpoint: Path) -> None:
        """Divide steps as they were when a checkpoint was written: by what was free then, and by what had run out."""
        progress = json.loads((checkpoint / "progress.json").read_text())
        self.collator.room, self.collator.rows = progress["room"], progress.get("rows", self.collator.rows)
        if progress.get("checkpointing"):
            self.relief.turn_on()

    def load_adapter_of(self, folder: Path) -> None:
        """Load the adapter of a checkpoint into the model."""
        tensors, _ = adapter_files.read_adapter_file(folder)
        adapter_files.load_adapter_tensors(self.model, "default", tensors, where=str(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(checkpoints.load_optimizer(Path(checkpoint)))  # type: ignore[union-attr]
            self.lr_scheduler.load_state_dict(json.loads(Path(checkpoint, "scheduler.json").read_text()))  # type: ignore[union-attr]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_random(Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: weights are bf16 or fp32 (fp16 is refused), adapters fp32."""
