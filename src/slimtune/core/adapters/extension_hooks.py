"""How parts around the core add to adapted models and layers; the core imports none of them.

COMPAT          PEFT's users: names that adapted objects lack, and classes that other libraries recognise
MODEL_MIXINS    subclasses of `PeftModel` that every adapted model's class gets, such as calls of mixed batches
FOLDER_WRITERS  functions that write further files beside a saved adapter, such as its model card
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from ..foundation.registry import Registry

if TYPE_CHECKING:
    from .peft_config import PeftConfig


class PeftCompatHook(Protocol):
    """What PEFT's users expect of adapted objects beyond the core; implemented by the module `compat/hook.py`."""

    def get_peft_attribute(self, layer_or_model: nn.Module, name: str) -> Any:
        """Return what PEFT calls `name` on an adapted layer, an adapted model or its backbone, which lack the name.

        Raises:
            AttributeError: PEFT has no such name there.
        """

    def format_layer_like_peft(self, layer: Any, base_module_text: str) -> str:
        """Return the text of an adapted layer in `print(model)`; `base_module_text` is the base module's."""

    def find_peft_model_class(self, task_type: str | None, mixed: bool = False) -> Any:
        """Return PEFT's class of a model for this task, or of one for adapters of different methods, else None."""

    def make_peft_model_subclass(self, adapted_model_class: Any) -> Any:
        """Return the class or a subclass of it that the Trainer, accelerate and TRL recognise as a `peft.PeftModel`."""

    def add_peft_names_to_backbone(self, model: Any) -> None:
        """Give the backbone of a new adapted model the names of PEFT's `base_model`."""

    def restore_backbone_class(self, model: Any) -> None:
        """Undo `add_peft_names_to_backbone`."""


COMPAT: Registry[PeftCompatHook] = Registry("slimtune.compat", "library")
MODEL_MIXINS: Registry[type] = Registry("slimtune.model_mixins", "part of an adapted model")
FOLDER_WRITERS: Registry[Callable[[PeftConfig, Path, Sequence[str]], None]] = Registry(
    "slimtune.folder_writers", "file beside an adapter"
)


@cache
def load_compat_hook() -> PeftCompatHook:
    """Return the hook; it is imported with the first adapted model."""
    return COMPAT.load("peft")


class PeftNameLookupMixin(nn.Module):
    """Mixed into adapted layers, models and backbones: asks the hook for a name that the object itself lacks."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = super().__getattr__(name)
        except AttributeError:
            return load_compat_hook().get_peft_attribute(self, name)
        # The child of this name has bare parameters; PEFT's are modules of the base's class.
        return load_compat_hook().get_peft_attribute(self, name) if name == "modules_to_save" else value
