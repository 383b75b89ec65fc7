"""Models on the meta device, as plans trace them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from ..core.adapters.peft_config import PeftConfig
from ..core.adapters.peft_model import get_peft_model
from ..core.models.load_errors import silence_and_translate_load_errors
from ..core.models.loader import get_auto_class
from ..core.training.adapted_model import exclude_non_text_modules_in_place
from ..core.training.memory_savings import apply_memory_savings
from ..extras.damaged_config import make_damaged_field_error_or_none

_INITIALIZES = {torch.ops.aten.uniform_, torch.ops.aten.normal_}


class _SkipInitialization(TorchDispatchMode):
    """Leaves out random numbers: on meta there are none, and PyTorch takes as long for them as for ten operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.overloadpacket in _INITIALIZES and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_adapted_meta_model(
    base_config: PreTrainedConfig,
    method_config: PeftConfig | None,
    dtype: torch.dtype,
    *,
    checkpointing: bool = False,
    offload: bool = False,
    tile: int | None = None,
    change_base: Callable[[Any], None] | None = None,
) -> Any:
    """Return the model that training would have, on the meta device: shapes and dtypes without weights.

    Args:
        base_config: the base's config.
        method_config: the method's config; None: no adapter, and every weight trains.
        dtype: dtype of the base's weights.
        checkpointing, offload, tile: as for `apply_memory_savings`.
        change_base: changes the base before the method is attached, such as quantizing it.
    """
    base_config, method_config = copy.deepcopy((base_config, method_config))  # building a model writes into both
    if method_config is not None:
        method_config.defer_initialization()  # the same tensors without data
    # A config class from a base's own code: that code is trusted already, or the class would not be here.
    trusted = type(base_config).__module__.startswith("transformers_modules")
    with torch.device("meta"), _SkipInitialization():
        with silence_and_translate_load_errors(spec := base_config.name_or_path or base_config.model_type):
            task = "SEQ_CLS" if method_config is not None and method_config.task_type == "SEQ_CLS" else "CAUSAL_LM"
            try:
                model: Any = get_auto_class(base_config, task).from_config(
                    base_config, dtype=dtype, trust_remote_code=trusted
                )
            except Exception as error:
                fields = {"model_type": base_config.model_type, **base_config.to_diff_dict()}
                raise make_damaged_field_error_or_none(fields, spec) or error from error
        if change_base is not None:
            change_base(model)
        if method_config is not None:
            exclude_non_text_modules_in_place(model, method_config)
            model = get_peft_model(model, method_config)
    apply_memory_savings(model, checkpointing, offload, tile)
    return model
