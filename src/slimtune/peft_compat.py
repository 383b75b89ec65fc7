"""Being recognised: other libraries test `isinstance(x, peft.PeftModel)`; ours pass, with and without `peft` installed.

transformers' Trainer saves, resumes and reloads adapters alone only for a `peft.PeftModel`; accelerate and TRL ask the
same class. Three seams make ours pass, and none changes what those libraries do for objects that are not ours:

1. `peft` installed: `joined(cls, "PeftModel")` is a subclass of `cls` with peft's class at the very end of its method
   resolution order. `isinstance` and `issubclass` see it; since it stands last, nothing of ours is overridden by it.
2. `peft` installed: `peft.get_peft_model(model, config)` called by a library with a config of ours (TRL does) builds
   our model, because `peft.PeftModel.__new__` hands it over; this stands from the first config of ours on.
3. `peft` not installed: the Trainer asks `transformers.trainer_utils`, which is told of our class instead.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any


@cache
def peft_installed() -> bool:
    """Return whether HF PEFT can be imported."""
    spec = find_spec("peft")
    # A mere folder of that name beside a script has no origin.
    return spec is not None and spec.origin is not None


@cache
def register_as_peft_subclass(cls: Any, outsider: str) -> Any:
    """Return a subclass of `cls` that `isinstance` also takes for `peft.<outsider>`; `cls` itself without peft."""
    if not peft_installed() or getattr(cls, "_joined", False):
        return cls
    peft = import_module("peft")
    _hand_over(peft.PeftModel)
    foreign = getattr(peft, outsider)

    class Joined(type(cls)):  # type: ignore[misc]
        def mro(self) -> list[type]:
            own = super().mro()
            # `foreign` alone: its parents, where they matter, are parents of ours already.
            return own if foreign in own else [*own[:-1], foreign, object]

    # The plain `type` call: the metaclass of a config filters keyword arguments in its own __call__.
    body = {"_joined": True, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return Joined(cls.__name__, (cls,), body)


@cache
def register_with_transformers(model_class: type) -> None:
    """Tell transformers of our `PeftModel` where peft is not installed: once, when the first adapter is attached."""
    if not peft_installed():
        _tell_transformers(model_class)


@cache
def _hand_over(foreign: type) -> None:
    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("peft_config", args[1] if len(args) > 1 else None)
        if getattr(type(config), "_joined", False):
            # By the package's public name: the floors above this one are not known here.
            return import_module(__package__).get_peft_model(*args, **kwargs)
        return object.__new__(cls)

    foreign.__new__ = staticmethod(new)  # type: ignore[assignment]


def _tell_transformers(model_class: type) -> None:
    utils, trainer = import_module("transformers.trainer_utils"), import_module("transformers.trainer")
    missing = [n for m, n in ((utils, "_is_peft_model"), (trainer, "_is_peft_model")) if not hasattr(m, n)]
    if missing:
        raise ImportError(
            f"this transformers has no {missing[0]}: install peft beside, or a transformers from 5.0 to 5.24"
        )
    vars(utils).update(is_peft_available=lambda: True, PeftModel=model_class, PeftMixedModel=model_class)
    vars(trainer).update(is_peft_available=lambda: True, PeftModel=model_class)
