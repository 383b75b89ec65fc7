"""A job: what is to be run, in the numbers that decide how much memory and time it takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from ..adapters.config import PeftConfig
from ..errors import UsageError
from ..setup import build_meta_model
from .fake_quantization import quantize

Device = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True)
class TrainingJob:
    """One fine-tuning job.

    Args:
        base: the base's config.
        method: the method's config; None: every weight of the base trains.
        dtype: of the base's weights.
        lengths: tokens of the rows that are computed in one pass.
        passes: passes in an optimizer step.
        device: kind of device it runs on; kernels are chosen by it.
        checkpointing: activations are computed twice.
        offload: what checkpointing keeps lies in the machine's memory.
        tile: tokens that norms and feed-forwards run at once; None: all.
        optimizer: a name `build.OPTIMIZERS` lists.
        quantization: one of `quantize.KINDS` for the base's linear layers; None: as `dtype` says.
        packing: rows in one sequence; else padded.
    """

    base: PreTrainedConfig
    method: PeftConfig | None
    dtype: torch.dtype
    lengths: tuple[int, ...]
    passes: int = 1
    device: Device = "cpu"
    checkpointing: bool = False
    offload: bool = False
    tile: int | None = None
    optimizer: str = "adamw"
    quantization: str | None = None
    packing: bool = True

    @property
    def depth(self) -> int:
        """Layers of the base."""
        return self.base.get_text_config().num_hidden_layers

    def outline(self) -> Any:
        """Return the job's model on `meta`, adapted as for training.

        Raises:
            UsageError: as `build.outline` and `quantize`; or every weight of a quantized base is to train.
        """
        if self.quantization and self.method is None:
            raise UsageError(
                f"full fine-tuning would train weights that are kept in {self.quantization}",
                "a method that leaves the base as it is",
                "--method lora, or no quantization",
            )
        first = partial(quantize, kind=self.quantization) if self.quantization else None
        return build_meta_model(
            self.base,
            self.method,
            self.dtype,
            checkpointing=self.checkpointing,
            offload=self.offload,
            tile=self.tile,
            first=first,
        )
