"""What is asked of a plan: a base, a card, methods and the settings of a run."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..build import OPTIMIZERS
from ..contract.config import PeftConfig
from ..errors import UsageError, listed, nearest
from ..methods import config_class
from ..methods import names as method_names
from ..models.dtype import pick_dtype
from ..models.known import Outline, outline_of
from ..recipe import Recipe
from ..recipe.method import method_section
from ..step import GOOD_ON_CPU, GOOD_ON_GPU
from .cards import Card
from .job import Job
from .quantize import kind_of

FULL = "full"
LONGEST = 1 << 22
"""No row longer than this is looked for."""


@dataclass(frozen=True)
class Request:
    """What is asked.

    Args:
        outline: the base.
        card: where it is to run.
        methods: names of methods; "full" trains every weight.
        settings: the method's own settings, by full or short name; those a method does not have are left out where
            several methods are asked for.
        batch: rows at once; with `divide`, at most.
        seq_len: tokens of the longest row.
        accumulate: batches in an optimizer step.
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

    outline: Outline
    card: Card
    methods: tuple[str, ...] = ("lora",)
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1
    seq_len: int = 1024
    accumulate: int = 1
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
        for name in ("batch", "seq_len", "accumulate"):
            if getattr(self, name) < (2 if name == "seq_len" else 1):
                raise UsageError(
                    f"{name} is {getattr(self, name)}", f"a whole number from {2 if name == 'seq_len' else 1}"
                )
        if self.seq_len > LONGEST:
            raise UsageError(f"a row of {self.seq_len} tokens", f"at most {LONGEST}", "give the length in tokens")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(
                f"unknown optimizer {self.optimizer!r}{nearest(self.optimizer, OPTIMIZERS)}", listed(OPTIMIZERS)
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

    def job(self, method: str) -> Job:
        """Return the job of one method, with every row of the batch in one pass.

        Raises:
            UsageError: there is no such method, or its settings are faulty.
        """
        return Job(
            base=self.outline.config,
            method=None if method == FULL else self._config(method),
            dtype=self.weights,
            lengths=self.rows,
            passes=self.accumulate,
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


def request_of(recipe: Recipe, card: Card, lengths: Sequence[int] = (), processes: int = 1) -> Request:
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
    outline = outline_of(m.name, trust_remote_code=m.trust_remote_code, revision=m.revision)
    good = GOOD_ON_GPU if card.device == "cuda" else GOOD_ON_CPU
    return Request(
        outline=outline,
        card=card,
        methods=(recipe.method.name,),
        settings=recipe.method.settings,
        batch=t.batch_size,
        seq_len=recipe.data.max_seq_len,
        accumulate=t.accumulate,
        dtype=m.dtype,
        optimizer=t.optimizer,
        quantization=kind_of(outline.config, m.quant),
        checkpointing=t.gradient_checkpointing,
        offload=t.offload_checkpoints,
        tile=t.tile_tokens,
        packing=t.packing,
        divide=t.tokens_at_once == "auto",
        keep=t.keep_checkpoints,
        lengths=tuple(heapq.nlargest(t.batch_size, lengths)),
        room=good if t.tokens_at_once == "auto" else t.tokens_at_once,
        processes=processes,
        divided=t.shard_base and processes > 1,
    )


def every_method() -> tuple[str, ...]:
    """Return the names of all methods that can be planned, full fine-tuning last."""
    return (*method_names(), FULL)
