"""Full fine-tuning, so that methods have what they are measured against: every weight of the base trains.

Training computes in the base's dtype as every method does, by the same trainer, passes and rows. AdamW steps on masters
in fp32 (`kernels/master_adamw.py`). What is kept is a plain Hugging Face folder, `model/`, in the base's dtype.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ..attention.packed_layout import packed_attention
from ..config import Recipe
from ..errors import DataError, RunError, UsageError
from ..evaluation.statistics import paired_bootstrap, perplexity
from ..kernels.master_adamw import MasterAdamW
from ..models.loader import Base, load_base
from ..run_dir import RunDir, to_json, write_atomic
from ..setup import (
    apply_memory_savings,
    build_collator,
    load_base_from_recipe,
    load_datasets,
    load_eval_dataset,
    load_tokenizer_from_recipe,
)
from ..train_step.loss import score_rows
from ..training import checkpoint
from ..training.callbacks import ProgressLogger, stop_on_interrupt
from ..training.memory_probe import peak_bytes
from ..training.train import Interrupted, build_trainer, figures, load_best_checkpoint
from ..training.trainer import SlimTrainer
from ..utils.files import fsync_tree, translate_disk_full
from ..utils.memory import is_out_of_memory

WEIGHTS = "model.safetensors"


class FullTrainer(SlimTrainer):
    """The trainer of a model without an adapter, all of whose parameters train."""

    streams = True

    def create_optimizer(self, *_: Any, **__: Any) -> Any:
        """Make AdamW on fp32 masters; matrices decay, vectors do not."""
        if self.optimizer is None:
            a, trained = self.args, [p for p in self.model.parameters() if p.requires_grad]  # type: ignore[union-attr]
            groups = [
                {"params": [p for p in trained if (p.dim() > 1) is matrices], "weight_decay": a.weight_decay * matrices}
                for matrices in (True, False)
            ]
            how: dict[str, Any] = {"lr": a.learning_rate, "betas": (a.adam_beta1, a.adam_beta2), "eps": a.adam_epsilon}
            self.optimizer = MasterAdamW([g for g in groups if g["params"]], **how)
            # A copy of all that a step changes, as methods keep one, would be as large as the run itself: a step that
            # memory runs out in is not done again.
            self.optimizer.register_step_pre_hook(lambda *_: setattr(self, "_steady", False))
        return self.optimizer

    def on_step_end(self) -> None:
        """Do nothing: no method has a part in the step."""

    def _way_on(self) -> str:
        super()._way_on()
        return "free memory, then give the same command again: it goes on from the last checkpoint"

    def save_weights(self, folder: Path) -> None:
        """Write every parameter, tied ones once."""
        live = self.model.named_parameters()  # type: ignore[union-attr]
        save_file({n: p.detach().to("cpu").contiguous() for n, p in live}, folder / WEIGHTS)

    def load_weights(self, folder: Path) -> None:
        """Take up what `save_weights` wrote."""
        kept, own = load_file(folder / WEIGHTS), dict(self.model.named_parameters())  # type: ignore[union-attr]
        if kept.keys() != own.keys():
            raise RunError(f"{folder / WEIGHTS} holds other tensors than the model", "a checkpoint of this base")
        for name, tensor in kept.items():
            own[name].data.copy_(tensor)


def train_full(recipe: Recipe, *, resume: bool = False) -> dict[str, Any]:
    """Train every weight of a recipe's base; what the recipe says of a method does not count.

    Args:
        recipe: the base, the rows and the run.
        resume: go on from the newest whole checkpoint in the run folder.

    Returns:
        What `slimtune train --json` prints; `adapter_bytes` is the size of the model's file.

    Raises:
        UsageError: the base is quantized.
        DataError: no row is left to train on.
        RunError: memory or the disk ran out; the best checkpoint is damaged.
        Interrupted: Ctrl-C; a checkpoint was written.
    """
    if recipe.model.quantization is not None:
        raise UsageError(
            f"full fine-tuning would train weights that are kept in {recipe.model.quantization}",
            "a base in plain floats",
            "leave full out, or --set model.quantization=null",
        )
    began = time.perf_counter()
    rows = load_datasets(recipe, load_tokenizer_from_recipe(recipe))
    if not rows.train:
        raise DataError(f"{recipe.data.train} leaves no row to train on", "at least one row")
    base = load_base_from_recipe(recipe)
    model: Any = base.model.requires_grad_(True)
    t = recipe.train
    apply_memory_savings(model, t.gradient_checkpointing, t.offload_activations, t.mlp_tile_size)
    run = RunDir(Path(recipe.output_dir))
    run.path.mkdir(parents=True, exist_ok=True)
    watch = ProgressLogger(run, base.device)
    trainer: Any
    trainer, pace = build_trainer(recipe, run, base, rows, model, watch, None, FullTrainer)
    start = checkpoint.newest_sound(run.checkpoints, watch.say) if resume else None
    if start is not None:
        trainer.take_room(start)
        kept = [m for m in run.load_metrics() if m.get("step", 0) <= checkpoint.step_of(start)]
        write_atomic(run.metrics_file, "".join(to_json(m) + "\n" for m in kept))
    prepared = time.perf_counter() - began
    with stop_on_interrupt(pace, watch), translate_disk_full(run.path), packed_attention(model):
        try:
            if start is not None and checkpoint.step_of(start) >= trainer.args.max_steps:
                trainer.take_up(start)
            else:
                trainer.train(resume_from_checkpoint=str(start) if start else None)
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            short = trainer.relief.shortage(e)
            raise trainer.relief.exhausted("training", short, "the optimizer's step, or what lies between two") from e
        finally:
            watch.close()
    if trainer.stop_asked and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step}")
    result = _result(recipe, run, base, trainer, len(rows.train), peak_bytes(base.device), prepared)
    write_atomic(run.result_file, to_json(result, indent=2) + "\n")
    return result


def evaluate_full(recipe: Recipe) -> dict[str, Any]:
    """Measure the trained model against its base as `evaluate` does an adapter; kept under the same names.

    Raises:
        DataError: the test rows are faulty.
    """
    began = time.perf_counter()
    run, path = RunDir(Path(recipe.output_dir)), recipe.data.test
    assert path is not None
    scores, tuned_base = [], None
    for which in (recipe.model.name, str(run.path / "model")):
        tuned_base = load_base_from_recipe(recipe) if which == recipe.model.name else load_base(
            which, dtype=recipe.model.dtype, device=recipe.model.device, chat_template=recipe.data.chat_template
        )  # fmt: skip
        examples, report = load_eval_dataset(recipe, tuned_base.tokenizer, path)
        longest = int(examples.lengths.max())
        collator = build_collator(recipe, tuned_base.model, tuned_base.tokenizer, longest)
        scores.append(score_rows(tuned_base.model, examples, collator))
    assert tuned_base is not None
    base, tuned = scores
    found = paired_bootstrap([s for s, _ in base], [s for s, _ in tuned], [n for _, n in base])
    result = {
        "run": str(run.path),
        "split": "test",
        "data": str(path),
        "rows": len(examples),
        "tokens": sum(n for _, n in base),
        "base_loss": found.base.value,
        "base_loss_ci95": found.base.interval,
        "tuned_loss": found.tuned.value,
        "tuned_loss_ci95": found.tuned.interval,
        "loss_reduction": found.difference.value,
        "loss_reduction_ci95": found.difference.interval,
        "base_perplexity": perplexity(found.base.value),
        "tuned_perplexity": perplexity(found.tuned.value),
        "rows_better": found.rows_better,
        "dropped": report.dropped,
        "truncated": report.truncated,
        "dtype": str(tuned_base.dtype).removeprefix("torch."),
        "quantization": None,
        "seconds": round(time.perf_counter() - began, 3),
    }
    each = [
        {"line": e["line"], "tokens": n, "base": b, "tuned": u}
        for e, (b, n), (u, _) in zip(examples, base, tuned, strict=True)
    ]
    write_atomic(run.evaluation_file("test"), to_json(result, indent=2) + "\n")
    write_atomic(run.scores_file("test"), to_json(each) + "\n")
    return result


def _result(
    recipe: Recipe, run: RunDir, base: Base, trainer: SlimTrainer, rows: int, most: int, prepared: float
) -> dict[str, Any]:
    """Take the best weights, write the model, and return the result."""
    load_best_checkpoint(run, trainer, trainer.load_weights)
    model: Any = trainer.model
    every = sum(p.numel() for p in model.parameters())
    return {
        **figures(recipe, run, base, trainer, rows, prepared, most),
        "adapter_bytes": _save(model, base, run.path / "model"),
        "trainable_params": every,
        "total_params": every,
    }


def _save(model: Any, base: Base, folder: Path) -> int:
    """Write a plain Hugging Face folder, whole or absent; return the bytes of its weights."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    with translate_disk_full(folder):
        model.save_pretrained(partial)
        base.tokenizer.save_pretrained(partial)
        fsync_tree(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))
