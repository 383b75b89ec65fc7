"""Make other libraries recognise our classes as PEFT's, with and without `peft` installed.

transformers' Trainer saves, resumes and reloads adapters only for a `peft.PeftModel`; accelerate and TRL test for the
same class. Three mechanisms make our models pass. None changes what those libraries do with other objects.

1. `peft` is installed: `make_subclass_with_peft_parent(cls, "PeftModel")` returns a subclass that has PEFT's class
   at the end of its method resolution order. `isinstance` and `issubclass` find it there; being last, it overrides
   nothing.
2. `peft` is installed: `peft.get_peft_model(model, config)` with a slimtune config (TRL calls it) returns a slimtune
   model, because `peft.PeftModel.__new__` is replaced by a function that passes such calls on. This happens when
   the first slimtune config is created.
3. `peft` is not installed: the Trainer asks functions in `transformers.trainer_utils`, which are replaced.

The commands of `slimtune` call none of these libraries and use `skip_registering_classes_as_peft`: importing peft, or
the Trainer, takes seconds.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_skipped = False


def skip_registering_classes_as_peft() -> None:
    """Make no class known to other libraries in this process."""
    global _skipped
    _skipped = True


@cache
def is_peft_installed() -> bool:
    """Return whether HF PEFT can be imported."""
    spec = find_spec("peft")
    # A folder named peft next to a script has no origin.
    return spec is not None and spec.origin is not None


@cache
def make_subclass_with_peft_parent(cls: Any, peft_class_name: str) -> Any:
    """Return a subclass of `cls` that is also an instance of `peft.<peft_class>`; `cls` itself without peft."""
    if _skipped or not is_peft_installed() or getattr(cls, "_joined", False):
        return cls
    peft = import_module("peft")
    _patch_peft_new(peft.PeftModel)
    foreign = getattr(peft, peft_class_name)

    class Joined(type(cls)):  # type: ignore[misc]
        def mro(self) -> list[type]:
            own = super().mro()
            # Only `foreign` itself: where its parents matter, they are parents of `cls` already.
            return own if foreign in own else [*own[:-1], foreign, object]

    # A plain call of the metaclass: a config's metaclass checks keyword arguments in its own __call__.
    body = {"_joined": True, "_factory_call": (make_subclass_with_peft_parent, cls, peft_class_name)}
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return Joined(cls.__name__, (cls,), body)


@cache
def register_peft_model_with_trainer(model_class: type) -> None:
    """Make transformers' Trainer recognise our `PeftModel` if peft is not installed."""
    if _skipped or is_peft_installed():
        return
    utils, trainer = import_module("transformers.trainer_utils"), import_module("transformers.trainer")
    if not (hasattr(utils, "_is_peft_model") and hasattr(trainer, "_is_peft_model")):
        raise ImportError(
            "this transformers has no _is_peft_model: install peft as well, or a transformers from 5.0 to 5.24"
        )
    vars(utils).update(is_peft_available=lambda: True, PeftModel=model_class, PeftMixedModel=model_class)
    vars(trainer).update(is_peft_available=lambda: True, PeftModel=model_class)


@cache
def _patch_peft_new(peft_model: type) -> None:
    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("peft_config", args[1] if len(args) > 1 else None)
        if getattr(type(config), "_joined", False):
            # By the package's public name, since this module must not import the modules above it.
            return import_module(__package__.partition(".")[0]).get_peft_model(*args, **kwargs)
        return object.__new__(cls)

    peft_model.__new__ = staticmethod(new)  # type: ignore[assignment]
