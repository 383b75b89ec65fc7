"""Models on the meta device, as plans trace them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..core.adapters.peft_config import PeftConfig
from ..core.adapters.peft_model import get_peft_model
from ..core.models.load_errors import silence_and_translate_load_errors
from ..core.models.loader import get_auto_class
from ..core.training.adapted_model import exclude_non_text_modules_in_place
from ..core.training.memory_savings import apply_memory_savings
from ..extras.damaged_config import find_damaged_field


def build_adapted_meta_model(
    config: PreTrainedConfig,
    method: PeftConfig | None,
    dtype: torch.dtype,
    *,
    checkpointing: bool = False,
    offload: bool = False,
    tile: int | None = None,
    change_base: Callable[[Any], None] | None = None,
) -> Any:
    """Return the model that training would have, on the meta device: shapes and dtypes without weights.

    Args:
        config: the base's config.
        method: the method's config; None: no adapter, and every weight trains.
        dtype: dtype of the base's weights.
        checkpointing, offload, tile: as for `apply_memory_savings`.
        change_base: changes the base before the method is attached, such as quantizing it.
    """
    config, method = copy.deepcopy((config, method))  # building a model writes into both
    if method is not None:
        method.defer_initialization()  # the same tensors without data
    # A config class from a base's own code: that code is trusted already, or the class would not be here.
    trusted = type(config).__module__.startswith("transformers_modules")
    with torch.device("meta"):
        with silence_and_translate_load_errors(spec := config.name_or_path or config.model_type):
            task = "SEQ_CLS" if method is not None and method.task_type == "SEQ_CLS" else "CAUSAL_LM"
            try:
                model: Any = get_auto_class(config, task).from_config(config, dtype=dtype, trust_remote_code=trusted)
            except Exception as error:
                fields = {"model_type": config.model_type, **config.to_diff_dict()}
                raise find_damaged_field(fields, spec) or error from error
        if change_base is not None:
            change_base(model)
        if method is not None:
            exclude_non_text_modules_in_place(model, method)
            model = get_peft_model(model, method)
    apply_memory_savings(model, checkpointing, offload, tile)
    return model
