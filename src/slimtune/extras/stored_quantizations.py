"""Checkpoints that other libraries than bitsandbytes quantized: FP8 is dequantized as it is loaded, others need theirs.

fp8         fp8 values, a scale for each block of 128 x 128 (DeepSeek-V3, Qwen3-FP8): transformers' own code
            dequantizes each weight as it is loaded, so the base is held in 16 or 32 bits
gptq, awq   left to transformers, which needs gptqmodel
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..core.models.quantization import LoadOptions
from ..errors import ModelError, format_names


class Fp8Loader:
    """Loads a base that is stored in FP8, dequantized."""

    def make_load_options(
        self, config: PreTrainedConfig, quantization: str, is_stored: bool, dtype: torch.dtype, device: torch.device
    ) -> LoadOptions:
        """Return the arguments of `from_pretrained`; writes into `config` that weights are dequantized."""
        settings: Any = config.quantization_config
        settings["dequantize"] = True
        return {}

    def prevent_cpu_weight_repacking(self, model: nn.Module) -> None:
        """Nothing is repacked."""


@dataclass(frozen=True)
class LoaderWithPackages:
    """Leaves a base to transformers if the packages that it needs are installed."""

    packages: tuple[str, ...]

    def make_load_options(
        self, config: PreTrainedConfig, quantization: str, is_stored: bool, dtype: torch.dtype, device: torch.device
    ) -> LoadOptions:
        """Return no arguments; raise ModelError if a package is missing."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ModelError(
                f"the checkpoint is stored in {quantization}, and the packages that read it are not installed: "
                f"{format_names(missing)}",
                "those packages, or a checkpoint in 16 or 32 bits, fp8, mxfp4, nf4 or int8",
                f"pip install {' '.join(missing)}; or the base's checkpoint in 16 bits with --quantization nf4",
                code="quantized-base",
            )
        return {}

    def prevent_cpu_weight_repacking(self, model: nn.Module) -> None:
        """Nothing is repacked."""


FP8 = Fp8Loader()
GPTQ = LoaderWithPackages(("gptqmodel", "optimum"))
AWQ = LoaderWithPackages(("gptqmodel",))
