"""What is asked of a plan: a base, a card, methods and the settings of a run."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters.config import PeftConfig
from ..config import Recipe
from ..config.method import method_section
from ..errors import UsageError, format_names, nearest
from ..methods import config_class, method_names
from ..models.dtype import pick_dtype
from ..models.registry import ModelInfo, get_model_info
from ..train_step.loss import TOKENS_ON_CPU, TOKENS_ON_GPU
from ..train_step.optimizer import OPTIMIZERS
from .fake_quantization import quantization_kind
from .gpus import Gpu
from .training_job import TrainingJob

FULL = "full"
LONGEST = 1 << 22
"""No row longer than this is looked for."""


@dataclass(frozen=True)
class PlanRequest:
    """What is asked.

    Args:
        outline: the base.
        card: where it is to run.
        methods: names of methods; "full" trains every weight.
        settings: the method's own settings, by full or short name; those a method does not have are left out where
            several methods are asked for.
        batch: rows at once; with `divide`, at most.
        seq_len: tokens of the longest row.
        gradient_accumulation_steps: batches in an optimizer step.
        dtype: of the base's weights, "auto": bfloat16 where the card has it, else float32.
        optimizer: a name `build.OPTIMIZERS` lists.
        quantization: one of `quantize.KINDS`, or None.
        checkpointing: activations are computed twice.
        offload: what checkpointing keeps lies in the machine's memory.
        tile: tokens that norms and feed-forwards run at once; None: all.
        packing: rows in one sequence.
        divide: a batch may be computed in several passes, as training does by itself.
        keep: checkpoints that a run keeps beside its best.
        lengths: tokens of the longest rows of the data, where they are known; in place of `batch` and `seq_len`.
        room: most tokens in one pass; a longer row goes alone. None: no limit.
        processes: that train together, one on each card.
        divided: the base is divided over them; else each holds it whole.
    """

    outline: ModelInfo
    card: Gpu
    methods: tuple[str, ...] = ("lora",)
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1
    seq_len: int = 1024
    gradient_accumulation_steps: int = 1
    dtype: str = "auto"
    optimizer: str = "adamw"
    quantization: str | None = None
    checkpointing: bool = False
    offload: bool = False
    tile: int | None = None
    packing: bool = True
    divide: bool = True
    keep: int = 2
    lengths: tuple[int, ...] = ()
    room: int | None = None
    processes: int = 1
    divided: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "seq_len", "gradient_accumulation_steps"):
            if getattr(self, name) < (2 if name == "seq_len" else 1):
                raise UsageError(
                    f"{name} is {getattr(self, name)}", f"a whole number from {2 if name == 'seq_len' else 1}"
                )
        if self.seq_len > LONGEST:
            raise UsageError(f"a row of {self.seq_len} tokens", f"at most {LONGEST}", "give the length in tokens")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(
                f"unknown optimizer {self.optimizer!r}{nearest(self.optimizer, OPTIMIZERS)}", format_names(OPTIMIZERS)
            )

    @property
    def weights(self) -> torch.dtype:
        """The dtype of the base's weights."""
        if self.dtype != "auto" or self.card.kind == "cpu":
            return pick_dtype(self.dtype)
        return torch.bfloat16 if self.card.bf16 else torch.float32

    @property
    def rows(self) -> tuple[int, ...]:
        """Tokens of the rows of a batch, the longest first."""
        return tuple(sorted(self.lengths, reverse=True)) or (self.seq_len,) * self.batch

    def job(self, method: str) -> TrainingJob:
        """Return the job of one method, with every row of the batch in one pass.

        Raises:
            UsageError: there is no such method, or its settings are faulty.
        """
        return TrainingJob(
            base=self.outline.config,
            method=None if method == FULL else self._config(method),
            dtype=self.weights,
            lengths=self.rows,
            passes=self.gradient_accumulation_steps,
            device=self.card.device,
            checkpointing=self.checkpointing,
            offload=self.offload,
            tile=self.tile,
            optimizer=self.optimizer,
            quantization=self.quantization,
            packing=self.packing,
        )

    def _config(self, method: str) -> PeftConfig:
        cls = config_class(method)
        given = dict(self.settings)
        if len(self.methods) > 1:
            known = {f.name for f in dataclasses.fields(cls)} | set(getattr(cls, "short_names", {}))
            given = {k: v for k, v in given.items() if k in known}
        section, faults = method_section({"name": method, **given})
        if faults:
            raise UsageError("; ".join(map(str, faults)))
        return cls(**{"task_type": "CAUSAL_LM", **{k: v for k, v in section.items() if k != "name"}})


def build_request(recipe: Recipe, card: Gpu, lengths: Sequence[int] = (), processes: int = 1) -> PlanRequest:
    """Return the request that a recipe is.

    Args:
        recipe: what a run is told.
        card: where it is to run.
        lengths: tokens of every row, where the data were read; else all are as long as the recipe lets them be.
        processes: that train together; each holds the whole base unless the recipe divides it.

    Raises:
        UsageError, ModelError: see `outline_of`; the base's checkpoint is quantized in another way.
    """
    m, t = recipe.model, recipe.train
    outline = get_model_info(m.name, trust_remote_code=m.trust_remote_code, revision=m.revision)
    good = TOKENS_ON_GPU if card.device == "cuda" else TOKENS_ON_CPU
    return PlanRequest(
        outline=outline,
        card=card,
        methods=(recipe.method.name,),
        settings=recipe.method.settings,
        batch=t.batch_size,
        seq_len=recipe.data.max_seq_len,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        dtype=m.dtype,
        optimizer=t.optimizer,
        quantization=quantization_kind(outline.config, m.quantization),
        checkpointing=t.gradient_checkpointing,
        offload=t.offload_activations,
        tile=t.mlp_tile_size,
        packing=t.packing,
        divide=t.max_tokens_per_micro_batch == "auto",
        keep=t.save_total_limit,
        lengths=tuple(heapq.nlargest(t.batch_size, lengths)),
        room=good if t.max_tokens_per_micro_batch == "auto" else t.max_tokens_per_micro_batch,
        processes=processes,
        divided=t.fsdp and processes > 1,
    )


def every_method() -> tuple[str, ...]:
    """Return the names of all methods that can be planned, full fine-tuning last."""
    return (*(n for n in method_names() if n != FULL), FULL)
