"""PEFT's `base_model`: a tuner around the whole model, which is its `model`. In transformers it is the backbone.

A backbone that is a child of the model is both: its class gets the names of `PeftTunerNamesOnBackboneMixin`. A
model that is its own backbone is both, too, because its `model` is itself. Where it has a child of this name, its
`base_model` is a `PeftTunerOfModel`.
"""

from functools import cache
from typing import Any

from torch import nn

from ..core.adapters.extension_hooks import PeftNameLookupMixin
from ..core.adapters.generated_classes import PickledByClassFactory


class PeftTunerOfModel(nn.Module):
    """PEFT's `base_model` of a model that is its own backbone and has a child named `model`.

    Its `model` is the whole model; every other name, assignment and call goes to the whole model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules["model"] = model
        del vars(self)["training"]

    base_model = property(lambda self: self)

    def __getattr__(self, name: str) -> Any:
        model = super().__getattr__("model")
        return model if name == "model" else getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.model, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class PeftTunerNamesOnBackboneMixin(PickledByClassFactory, PeftNameLookupMixin):
    """Mixed into the backbone's class, so that `peft_model.base_model` is both what transformers and what PEFT mean.

    In transformers `base_model` is the backbone, and called it returns hidden states. In PEFT it is a tuner around the
    whole model, which is its `model`; so names that the backbone lacks are those of the whole model: see `hook.py`.
    """

    _whole_model: Any

    # transformers gives every model its own functions with these names.
    active_adapter = _active_adapter = property(lambda self: self._whole_model.active_adapter)
    active_adapters = property(lambda self: self._whole_model.active_adapters)
    add_adapter = property(lambda self: self._whole_model.add_adapter)
    delete_adapter = property(lambda self: self._whole_model.delete_adapter)
    load_adapter = property(lambda self: self._whole_model.load_adapter)
    set_adapter = property(lambda self: self._whole_model.set_adapter)
    base_model = property(lambda self: self)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the backbone's own output embeddings, not those of the whole model, if it has any."""
        head = super().get_output_embeddings()  # type: ignore[misc]
        return head if any(m is head for m in self.modules()) else None


def get_backbone(model: Any) -> Any:
    """Return the module that transformers calls the base model; the model itself if it has none."""
    return model._modules.get(getattr(type(model), "base_model_prefix", ""), model)


def add_peft_names_to_backbone(model: Any) -> None:
    """Give the backbone of an adapted model the names of PEFT's tuner, if it is a child of the model."""
    backbone = get_backbone(model)
    if backbone is not model:
        backbone.__dict__["_whole_model"] = model
        backbone.__class__ = _make_backbone_class(backbone.__class__)


def restore_backbone_class(model: Any) -> None:
    """Set the backbone's own class again."""
    backbone = get_backbone(model)
    if backbone is not model:
        del backbone.__dict__["_whole_model"]
        backbone.__class__ = type(backbone).__bases__[1]


@cache
def _make_backbone_class(base: Any) -> Any:
    body = {"__module__": base.__module__, "__doc__": base.__doc__, "_factory_call": (_make_backbone_class, base)}
    return type(base.__name__, (PeftTunerNamesOnBackboneMixin, base), body)
