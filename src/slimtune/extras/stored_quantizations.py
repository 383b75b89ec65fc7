"""Checkpoints that are dequantized as they are loaded, by transformers' own code.

fp8                  fp8 values, a scale for each block of 128 x 128 (DeepSeek-V3, Qwen3-FP8)
compressed-tensors   what llm-compressor writes for vLLM, in any of its formats; needs that package

The base is then held in 16 or 32 bits.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..core.models.quantization import LoadOptions
from ..errors import ModelError, format_names

DEQUANTIZED = ("fp8", "compressed-tensors")
"""Quantizations of checkpoints that are dequantized as they are loaded."""


@dataclass(frozen=True)
class DequantizingLoader:
    """Loads a base, dequantized, if the packages that this needs are installed."""

    packages: tuple[str, ...] = ()

    def make_load_options(
        self, config: PreTrainedConfig, quantization: str, is_stored: bool, dtype: torch.dtype, device: torch.device
    ) -> LoadOptions:
        """Return no arguments; writes into `config` that weights are dequantized. ModelError: a package is missing."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ModelError(
                f"the checkpoint is stored in {quantization}, and the packages that read it are not installed: "
                f"{format_names(missing)}",
                "those packages, or a checkpoint in 16 or 32 bits, fp8, mxfp4, gptq, awq, nf4 or int8",
                f"pip install {' '.join(missing).replace('_', '-')}; or the base's checkpoint in 16 bits with "
                "--quantization nf4",
                code="quantized-base",
            )
        settings: Any = config.quantization_config
        settings["dequantize"] = True
        return {}

    def prevent_cpu_weight_repacking(self, model: nn.Module) -> None:
        """Nothing is repacked."""


FP8 = DequantizingLoader()
COMPRESSED_TENSORS = DequantizingLoader(("compressed_tensors",))
