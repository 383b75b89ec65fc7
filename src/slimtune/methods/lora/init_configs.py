"""The values of `init_lora_weights`, and the settings of those that need some; `lora_init.py` computes the starts."""

import os
import re
from dataclasses import dataclass
from typing import Any, Literal

from ...core.adapters.config_fields import DeclaredSettings, config_field

NAMED_INITS = ("gaussian", "eva", "pissa", "olora", "orthogonal", "mica", "corda", "lora_ga", "loftq")
PISSA_NITER = re.compile(r"pissa_niter_([0-9]{1,3})")  # typically 4 to 16


def is_valid_lora_init(init: Any) -> bool:
    """Return whether `init` is a value that init_lora_weights accepts."""
    return isinstance(init, bool) or init in NAMED_INITS or bool(PISSA_NITER.fullmatch(init))


def is_init_subtracted_from_base(init: Any) -> bool:
    """Return whether A and B start as a part of the base's weight, which has to be subtracted again."""
    return isinstance(init, str) and (init.startswith("pissa") or init in ("olora", "corda", "lora_ga"))


@dataclass
class EvaConfig(DeclaredSettings):
    """Settings of EVA; PEFT's field names and defaults."""

    rho: float = config_field(
        2.0, "a layer's largest rank, as a multiple of its own; 1 leaves all ranks as they are", ge=1
    )
    tau: float = config_field(0.99, "cosine similarity from which a direction has converged", ge=0, le=1)
    use_label_mask: bool = config_field(True, "ignore positions whose label is label_mask_value")
    label_mask_value: int = config_field(-100, "the label that means no label")
    whiten: bool = config_field(False, "divide each direction by the square root of its singular value")
    adjust_scaling_factors: bool = config_field(True, "change alpha with the rank, so that alpha / r stays")


@dataclass
class CordaConfig(DeclaredSettings):
    """Settings of CorDA; PEFT's field names and defaults."""

    cache_file: str | os.PathLike | None = config_field(
        None, "safetensors file of the components of all layers: read if it exists, else written"
    )
    covariance_file: str | os.PathLike | None = config_field(
        None, "safetensors file of the inputs' covariances, for any rank: read if it exists, else written"
    )
    corda_method: Literal["ipm", "kpm"] = config_field(
        "ipm", '"ipm" learns fastest, "kpm" keeps most of what was known'
    )
    verbose: bool = config_field(False, "show the progress of the decompositions")
    use_float16_for_covariance: bool = config_field(False, "half the memory for the covariances, less exact")
    prune_temporary_fields: bool = config_field(True, "do not leave covariances and counts on the layers")

    def normalize(self) -> None:
        for name in ("cache_file", "covariance_file"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, os.fspath(path))


@dataclass
class LoraGAConfig(DeclaredSettings):
    """Settings of LoRA-GA; PEFT's field names and defaults."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = config_field("ArB2r", "which components A and B start as")
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = config_field("stable", "how the start is scaled")
    stable_gamma: int = config_field(16, 'γ of scale="stable"', gt=0)


@dataclass
class LoftQConfig(DeclaredSettings):
    """PEFT's settings for `init_lora_weights="loftq"`, which quantizes a float base itself.

    Here the base is loaded in NF4 or int8, and then `replace_lora_weights_loftq` initializes the adapter.
    """

    loftq_bits: int = config_field(4, "bits of a weight", ge=2, le=8)
    loftq_iter: int = config_field(1, "how often quantization and approximation alternate", ge=1)
