"""The compat hook of the core (`core/adapters/extension_hooks.py`): what PEFT's users expect of adapted objects."""

from typing import Any

from torch import nn

from ..core.adapters.peft_model import PeftModel
from . import model_names, tuner_layers
from .base_model_wrapper import add_peft_names_to_backbone as add_peft_names_to_backbone
from .base_model_wrapper import restore_backbone_class as restore_backbone_class
from .peft_registration import make_subclass_with_peft_parent, register_peft_model_with_trainer
from .tuner_layers import format_layer_like_peft as format_layer_like_peft


def get_peft_attribute(layer_or_model: nn.Module, name: str) -> Any:
    """Return what PEFT calls `name` on an adapted layer, model or backbone; an object can be two of these."""
    attributes = vars(layer_or_model)
    is_layer = "adapters" in attributes.get("_modules", ())
    if name == "modules_to_save" and name in attributes.get("_modules", ()):
        return tuner_layers.get_modules_to_save(layer_or_model) if is_layer else layer_or_model._modules[name]
    cause = None
    try:
        if "_slimtune" in attributes:
            return model_names.get_peft_model_attribute(layer_or_model, name)  # type: ignore[arg-type]
        if "_whole_model" in attributes and not name.startswith("_"):
            whole = attributes["_whole_model"]
            return whole if name == "model" else getattr(whole, name)
    except AttributeError as e:
        cause = e
    if is_layer:
        try:
            return tuner_layers.get_peft_layer_attribute(layer_or_model, name)
        except AttributeError as e:
            cause = e
    try:
        raise AttributeError(f"{type(layer_or_model).__name__!r} object has no attribute {name!r}") from cause
    finally:
        # Its traceback holds this frame. In a cycle with the variable, the tensors of all frames below would live until
        # the garbage collector runs; `hasattr` comes here in every layer of every forward pass.
        del cause


def find_peft_model_class(task_type: str | None, mixed: bool = False) -> Any:
    """Return PEFT's class of a model for this task, or of one for adapters of different methods, else None."""
    return model_names.PeftMixedModel if mixed else model_names.TASK_MODELS.get(task_type or "")


def make_peft_model_subclass(adapted_model_class: Any) -> Any:
    """Return the class or a subclass of it that the Trainer, accelerate and TRL recognise as a `peft.PeftModel`."""
    register_peft_model_with_trainer(PeftModel)
    return make_subclass_with_peft_parent(adapted_model_class, "PeftModel")
