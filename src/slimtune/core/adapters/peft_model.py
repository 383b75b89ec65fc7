"""PeftModel: a base model with adapters, its files and its calls.

`get_peft_model(model, config)` returns the same object. Its class becomes a subclass of its own class and of
`PeftModel`, the matched modules become adapted layers (see `adapted_layer.py` for the class swap), and the base's
parameters are frozen. So an adapted model still is a `LlamaForCausalLM` and a `PreTrainedModel`: generate, Trainer,
pipelines and TRL accept it unchanged. Parts add further methods to the class, such as PEFT's (`extension_hooks.py`).
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import UsageError, format_names
from .adapter_files import read_tensors_config_metadata_for_model, require_compatible_config, save_adapter
from .adapter_module import SharedParameterHolder
from .adapter_tensors import LoadResult, load_adapter_tensors
from .extension_hooks import MODEL_MIXINS, load_compat_hook
from .model_with_adapters import AdaptedModelMixin, AdapterState
from .peft_config import PeftConfig, require_folder_to_save_to
from .quantized_layers import find_cpu_repacking_layers


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Add an adapter to `model` in place and return it; the base's weights are frozen and never written.

    Args:
        model: a transformers model, or any module with Linear, Conv1D or Embedding layers.
        mixed: return a `PeftMixedModel`; adapters of different methods always mix.
        low_cpu_mem_usage: create the adapter on the meta device; `set_peft_model_state_dict` then gives it values.
        autocast_adapter_dtype: keep the adapter in fp32 above a 16-bit base.
        revision: revision of the base, written to the config.

    Raises:
        TargetError: a target, layer index, pattern or module to save matches nothing.
    """
    cls = load_compat_hook().find_peft_model_class(None, mixed=True) if mixed else PeftModel
    return cls(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, revision)


class PeftModel(AdaptedModelMixin):
    """A base model with adapters, with PEFT's method names; mixed into the base's class.

    `PeftModel(model, config)` is `get_peft_model(model, config)`.
    """

    def __new__(
        cls,
        model: Any = None,
        peft_config: Any = None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        revision: str | None = None,
    ) -> Any:
        if model is None and peft_config is None:
            return object.__new__(cls)  # an empty object, which copying and pickle fill
        if not isinstance(model, nn.Module):
            raise UsageError(f"the base is a {type(model).__name__}", "a torch module, such as a transformers model")
        peft_config.revision = revision or peft_config.revision
        given, own = peft_config.base_model_name_or_path, getattr(model, "name_or_path", None)
        if given and own and given != own:
            what = (
                f"base_model_name_or_path of the config is {given!r}, and the model is {own!r}, which takes its place"
            )
            warnings.warn(f"{what}: does the config belong to this base?", stacklevel=3)
        peft_config.base_model_name_or_path = own or given
        settings = {"strict": True, "low_cpu_mem_usage": low_cpu_mem_usage}
        if isinstance(model, PeftModel):
            _require_no_loss(model, adapter_name)
            text = f"the model already has adapters ({format_names(model.peft_config)})"
            warnings.warn(f"{text}: model.unload() before removes them", stacklevel=3)
            if adapter_name in model.peft_config and len(model.peft_config) > 1:
                model.delete_adapter(adapter_name)
            if list(model.peft_config) != [adapter_name]:
                model.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype, **settings)
                model.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
                return model
            model = model.unload()
        return cls._attach_first_adapter(model, adapter_name, peft_config, autocast_adapter_dtype, **settings)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass  # the base is already initialised

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model like its base; in training, the methods' regularization is added to the loss."""
        out = super().__call__(*args, **kwargs)
        state = self.adapter_state
        for name in state.active_state.row_adapters or state.active_state.names:
            config: Any = state.configs.get(name)  # None: the base
            if config is not None and config.is_prompt_learning and "encoder_outputs" not in kwargs:
                config.require_reached(self.adapter_modules(name))
        if self.training and getattr(out, "loss", None) is not None:
            penalty = self.regularization_loss()
            if penalty is not None:
                out.loss = out.loss + penalty
        return out

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate like the base."""
        return self.base_model_class.generate(self, *args, **kwargs)

    def must_prepare_call(self, kwargs: Mapping[str, Any]) -> bool:
        """Return whether a call of `forward` has to go through `__call__`; parts that prepare a call extend this."""
        return False

    def regularization_loss(self) -> Tensor | None:
        """Return the sum of what the active adapters' methods add to a training loss, or None."""
        state = self.adapter_state
        names = state.active_state.active if state.active_state.enabled else []
        terms = [state.configs[n].regularization_loss(self.adapter_modules(n)) for n in names]
        found = [t for t in terms if t is not None]
        return sum(found[1:], found[0]) if found else None

    def update_and_allocate(self, global_step: int) -> None:
        """Run the active methods' step hooks (AdaLoRA reallocates rank).

        Call it after `optimizer.step()` and before the gradients are cleared; `global_step` counts from 1.
        """
        for name in self.active_adapters:
            self.peft_config[name].on_step_end(self.adapter_modules(name), global_step)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        # Both public functions of transformers call this one. Reentrant checkpointing computes no gradients unless
        # an input requires one, so the frozen embedding's output must; the other kind does not need that.
        super()._set_gradient_checkpointing(enable=enable, **kwargs)  # type: ignore[misc]
        settings = getattr(kwargs.get("gradient_checkpointing_func"), "keywords", {})
        if enable and settings.get("use_reentrant", True):
            self.require_input_gradients()

    def require_input_gradients(self) -> None:
        """Make the output of the input embeddings require gradients, which reentrant checkpointing needs."""
        if not self.adapter_state.enabled_input_require_grads and hasattr(self, "enable_input_require_grads"):
            self.enable_input_require_grads()
            self.adapter_state.enabled_input_require_grads = True

    # --- files --------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        save_embedding_layers: str | bool = "auto",
        path_initial_model_for_weight_conversion: str | None = None,
        **_: Any,
    ) -> None:
        """Write the adapters' files; adapters not named "default" go to subfolders.

        `path_initial_model_for_weight_conversion`, the folder of the adapter before its training, writes a LoRA whose
        init_lora_weights is "pissa", "olora", "corda" or "lora_ga" as the equal plain LoRA of twice the rank. The start
        is read from the adapter itself, which has it.

        Args:
            save_embedding_layers: whether the base's embeddings are written, too. "auto": those that an adapter changes
                or, if there are none, those that were resized; a warning says so.
        """
        save_to = require_folder_to_save_to(save_directory)
        if path_initial_model_for_weight_conversion is not None:
            PeftConfig.from_pretrained(path_initial_model_for_weight_conversion)  # it has to be an adapter
        if not safe_serialization:
            raise UsageError("safe_serialization=False requests a pickle", "safetensors", "omit the argument")
        for name in (selected_adapters or self.peft_config) if is_main_process else []:
            folder = Path(save_to, "" if name == "default" else self.require_adapter(name))
            convert_to_zero_init = path_initial_model_for_weight_conversion is not None
            save_adapter(self, folder, name, state_dict, save_embedding_layers, convert_to_zero_init)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        ignore_mismatched_sizes: bool = False,
        **hub: Any,
    ) -> Any:
        """Load an adapter from a folder or a Hub repository onto its base `model`, in place.

        Args:
            is_trainable: True to continue training; False freezes the adapter and sets evaluation mode.
            config: the adapter's config, if it is already loaded.
            autocast_adapter_dtype: keep the adapter in fp32 above a 16-bit base.
            ignore_mismatched_sizes: leave out, with a warning, the tensors whose shapes differ.
            hub: where on the Hub: subfolder, revision, token, …

        Raises:
            UsageError: the folder or repository does not exist, or an argument is unknown.
            AdapterError: the adapter belongs to another base, its config, keys or shapes do not fit, or it is a pickle.
        """
        if isinstance(model, PeftModel):
            settings: dict[str, Any] = {"autocast_adapter_dtype": autocast_adapter_dtype, "config": config, **hub}
            settings["ignore_mismatched_sizes"] = ignore_mismatched_sizes
            model.load_adapter(model_id, adapter_name, is_trainable, **settings)
            return model
        tensors, config, metadata = read_tensors_config_metadata_for_model(model, model_id, config, is_trainable, hub)
        adapted = cls._attach_first_adapter(model, adapter_name, config, autocast_adapter_dtype, strict=False)
        try:
            load_adapter_tensors(adapted, adapter_name, tensors, str(model_id), ignore_mismatched_sizes)
        except BaseException:
            adapted.unload()
            raise
        adapted.note_loaded_adapter(adapter_name, str(model_id), metadata)
        return adapted if is_trainable else adapted.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        torch_device: Any = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        config: PeftConfig | None = None,
        ignore_mismatched_sizes: bool = False,
        **hub: Any,
    ) -> LoadResult:
        """Load another adapter, inactive. If the name exists, load the tensors into the existing adapter.

        That adapter must have the same settings. Other arguments and errors are those of `from_pretrained`.
        """
        tensors, config, metadata = read_tensors_config_metadata_for_model(self, model_id, config, is_trainable, hub)
        if adapter_name in self.peft_config:
            require_compatible_config(self.peft_config[adapter_name], config, model_id)
            if adapter_name in self.merged_adapters:
                raise UsageError(
                    f"{adapter_name!r} is merged into the base", hint="unmerge_adapter() first", code="merge-differs"
                )
            result = load_adapter_tensors(self, adapter_name, tensors, str(model_id), ignore_mismatched_sizes)
            self.note_loaded_adapter(adapter_name, str(model_id), metadata)
            return result
        self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype, strict=False)
        try:
            result = load_adapter_tensors(self, adapter_name, tensors, str(model_id), ignore_mismatched_sizes)
        except BaseException:
            self.detach_adapter(adapter_name)
            raise
        self.note_loaded_adapter(adapter_name, str(model_id), metadata)
        self.set_requires_grad(adapter_name, is_trainable)
        if not is_trainable:
            self.eval()
        return result

    def note_loaded_adapter(self, adapter_name: str, source: str, metadata: Mapping[str, str]) -> None:
        """Hear that an adapter was loaded from a file with this metadata; parts that compare it extend this."""

    @classmethod
    def _attach_first_adapter(
        cls, model: nn.Module, name: str, config: PeftConfig, autocast: bool, **settings: bool
    ) -> Any:
        of_task = load_compat_hook().find_peft_model_class(config.task_type) if cls is PeftModel else None
        peft_model = _make_peft_model(model, of_task or cls)
        try:
            peft_model.add_adapter(name, config, autocast_adapter_dtype=autocast, **settings)
        except BaseException:
            peft_model.unload()
            raise
        peft_model.set_adapter(name, inference_mode=config.inference_mode)
        if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            peft_model.require_input_gradients()
        return peft_model


def _require_no_loss(model: PeftModel, name: str) -> None:
    """Raise if an adapter of this name exists and has an effect: attaching another would lose it."""
    if name not in model.peft_config:
        return
    modules = [m for m in model.adapter_modules(name).values() if not isinstance(m, SharedParameterHolder)]
    factors = [m.low_rank_factors() for m in modules]
    if model.match_report(name).trained_parameter_copies or any(
        f is None or (f[0].any() and f[1].any()) for f in factors
    ):
        message = f"the model already has adapters: {format_names(model.peft_config)}"
        hint = "another adapter_name adds one; model.unload() removes all"
        raise UsageError(f"{message}; a second {name!r} would replace the first", hint=hint)


def find_modules_without_gradient(model: nn.Module) -> list[str]:
    """Return the names of the adapted modules that a backward pass gave no gradient, so that training changes nothing.

    Call it after a backward pass and before the gradients are set to None. Such a module was not called, or the model
    read its weight instead of calling it.
    """
    trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    places = (re.split(r"\.?(?:adapters|modules_to_save)\.", n)[0] for n, p in trained if p.grad is None)
    return list(dict.fromkeys(place or "the model" for place in places))


def _make_peft_model(model: nn.Module, cls: Any) -> PeftModel:
    """Swap the class of a base for a PeftModel subclass and freeze its parameters."""
    base_class: Any = type(model)
    was_trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(False)
    model.__class__ = load_compat_hook().make_peft_model_subclass(_make_model_class(base_class, cls))
    model.__dict__["_slimtune"] = AdapterState(base_class, was_trainable, find_cpu_repacking_layers(model))
    assert isinstance(model, PeftModel)
    load_compat_hook().add_peft_names_to_backbone(model)
    return model


@cache
def _make_model_class(base: Any, cls: type[PeftModel]) -> Any:
    """Return a subclass of `cls`, of the parts' mixins and of the base's class `base`."""

    @wraps(base.forward)
    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        # Without a state, a wrapper kept this forward after the adapters were removed.
        if "_slimtune" in vars(self) and self.must_prepare_call(kwargs):
            return self(*args, **kwargs)
        return base.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    # It has the base's name, which the Trainer and its checkpoints use.
    body = {"__module__": base.__module__, "__doc__": base.__doc__, "_factory_call": (_make_model_class, base, cls)}
    # The mixins are subclasses of PeftModel, which therefore is no base beside them.
    first = () if cls is PeftModel else (cls,)
    return type(base.__name__, (*first, *MODEL_MIXINS.load_all().values(), base), {**body, "forward": forward})
