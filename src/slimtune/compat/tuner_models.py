"""PEFT's tuner: what `peft_model.base_model` is there, `isinstance(base_model, LoraModel)`, and PEFT's functions on it.

Here the tuner is no object of its own: `peft_model.base_model` is the backbone, which also answers to the tuner's names
(see `base_model.py`), and the classes of this module are for isinstance.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.adapters.peft_config import PeftConfig
from ..core.adapters.peft_model import PeftModel, get_peft_model
from ..core.adapters.targets import match_targets
from ..core.foundation.json_results import JsonObject
from ..errors import UsageError
from .base_model_wrapper import PeftTunerNamesOnBackboneMixin, PeftTunerOfModel
from .model_names import PeftMixedModel
from .public_names import map_peft_class_prefixes_by_method
from .tuner_layers import LORA_LIKE, BaseTunerLayer
from .utility_functions import DUMMY_MODEL_CONFIG


class _TunerMeta(type):
    """Metaclass of PEFT's tuner classes: the `base_model` of a PeftModel is their instance by its active adapter."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if (
            not isinstance(instance, PeftTunerOfModel | PeftTunerNamesOnBackboneMixin | PeftModel)
            or instance.base_model is not instance
        ):
            return False
        whole = instance.model
        return bool(whole.peft_config) and cls.accepts_as_instance(whole)  # type: ignore[attr-defined]

    def __call__(
        cls,
        model: nn.Module,
        peft_config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Add an adapter to a model and return what `base_model` of the PeftModel is."""
        config = peft_config[adapter_name] if isinstance(peft_config, Mapping) else peft_config
        return inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage, state_dict).base_model


class BaseTuner(metaclass=_TunerMeta):
    """The `base_model` of a PeftModel whose adapters belong to layers."""

    method: ClassVar[str] = ""
    """Name of the method of the active adapter; empty: any."""
    uses_shared_state: ClassVar[bool] = False
    """Whether `inject_adapter_in_model` refuses the method, as PEFT does where layers share tensors: never here."""

    @classmethod
    def accepts_as_instance(cls, model: Any) -> bool:
        """Return whether the active adapter of a whole model makes its `base_model` an instance."""
        config = model.peft_config[(model.active_adapters or list(model.peft_config))[0]]
        return not config.is_prompt_learning and config.name == (cls.method or config.name)

    @staticmethod
    def get_model_config(model: Any) -> JsonObject:
        """Return a model's config as a dictionary; DUMMY_MODEL_CONFIG if it has none."""
        config = getattr(model, "config", DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            return config.to_dict()
        return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config  # type: ignore[arg-type]


def _make_tuner_types() -> dict[str, Any]:
    """Return the class `XModel` of each method that PEFT has and that changes layers, by its name."""
    made: dict[str, Any] = {}
    for method, stem in sorted(map_peft_class_prefixes_by_method().items(), key=lambda item: item[0] in LORA_LIKE):
        body = {
            "method": method,
            "__module__": __name__,
            "__doc__": f"Class of `base_model` if the active adapter is of the method {method}.",
        }
        base = made["LoraModel"] if method in LORA_LIKE else BaseTuner
        made[f"{stem}Model"] = _TunerMeta(f"{stem}Model", (base,), body)
    return made


TUNER_TYPES = _make_tuner_types()
"""PEFT's `LoraModel`, `VeraModel`, …, by name."""
globals().update(TUNER_TYPES)


class MixedModel(BaseTuner):
    """The `base_model` of a PeftMixedModel."""

    @classmethod
    def accepts_as_instance(cls, model: Any) -> bool:
        return isinstance(model, PeftMixedModel)


# --- functions ------------------------------------------------------------------------------------------------------


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Any:
    """Add an adapter to `model` in place, activate it, and return the model; a second call adds another adapter.

    Args:
        low_cpu_mem_usage: create the adapter's parameters on the meta device, for tensors that are loaded next.
        state_dict: tensors of an adapter: the modules that they belong to are adapted, whatever the config targets.
    """
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise UsageError(f"{peft_config.name} adds no adapters to layers", hint="get_peft_model(model, config)")
    if state_dict is not None:
        start = f".{peft_config.prefix}"
        keys = [k.removeprefix("base_model.model.") for k in state_dict if start in k]
        if not keys:
            raise UsageError(f"state_dict has no tensors of {peft_config.name}", f"keys with {start!r}")
        # A pattern, which matches whole names: a list would also match their endings.
        names = dict.fromkeys(k.split(start)[0] for k in keys)
        _warn_about_targets(peft_config, model, names)
        pattern = "|".join(re.escape(name) for name in names)
        vars(peft_config).update(target_modules=pattern, exclude_modules=None)
    if not isinstance(model, PeftModel):
        return get_peft_model(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    model.add_adapter(adapter_name, peft_config, low_cpu_mem_usage)
    model.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    return model


def _warn_about_targets(config: PeftConfig, model: nn.Module, names: Iterable[str]) -> None:
    """Warn where the modules that a config targets are not those whose tensors are given."""
    targeted, given = set(match_targets(model, config, require_every_match=False).adapted), set(names)
    more = [("PEFT config", targeted - given), ("state_dict", given - targeted)]
    found = [f"The {who} contained these additional target modules: {sorted(extra)}. " for who, extra in more if extra]
    if found:
        text = "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
        text += "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
        warnings.warn(text + "".join(found), RuntimeWarning, stacklevel=3)


def set_adapter(
    model: Any, adapter_name: str | list[str], inference_mode: bool = False, layer_cls: type = BaseTunerLayer
) -> None:
    """Activate adapters; `layer_cls` has no meaning here."""
    model.set_adapter(adapter_name, inference_mode=inference_mode)


def delete_adapter(model: Any, adapter_name: str, prefix: str, layer_cls: type = BaseTunerLayer) -> list[str]:
    """Remove an adapter and return the names of those that are active; prefix and layer_cls have no meaning here."""
    model.delete_adapter(adapter_name)
    return model.active_adapters


def set_requires_grad(model: Any, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
    """Set whether the parameters of these adapters train."""
    model.set_requires_grad(adapter_names, requires_grad)
