"""PeftModel: a base model with adapters.

`get_peft_model(model, config)` returns the same object. Its class becomes a subclass of its own class and of
`PeftModel`, the matched modules become adapted layers (see `layer.py` for the class swap), and the base's parameters
are frozen. So an adapted model still is a `LlamaForCausalLM` and a `PreTrainedModel`: generate, Trainer, pipelines and
TRL accept it unchanged. `unload()` returns the base as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from ..errors import UsageError, format_names, nearest
from ..peft_compat import register_as_peft_subclass, register_with_transformers
from . import layer
from .base import AdapterModule
from .config import PeftConfig
from .conversion import ConversionMixin
from .mixed_batch import BASE_ROW, ActiveAdapters, CallMixin
from .publishing import AdapterPublishing
from .quantized import count_values, disable_cpu_repacking, find_repacking_layers
from .state_dict import SaveLoadMixin
from .targets import MatchReport, select_targets


@dataclass
class AdapterState:
    """The adapters of one model.

    Args:
        base_class: the model's class without adapters.
        was_trainable: `requires_grad` of the base's parameters before the first adapter.
        configs: by adapter name, as are `reports` and `layers`.
        reports: what each adapter matched.
        layers: names and modules that each adapter adapts.
        active: names of the active adapters, in order.
        merged: names of the merged adapters.
        enabled: False inside `disable_adapter()`.
        input_gradients: whether attaching made the embedding output require gradients, for activation checkpointing.
        repacking_layers: 4-bit modules whose CPU repacking is off; see `find_repacking_layers`.
        active_state: what the adapted layers read; all of them share this object.
    """

    base_class: type[nn.Module]
    was_trainable: dict[str, bool]
    configs: dict[str, PeftConfig] = field(default_factory=dict)
    reports: dict[str, MatchReport] = field(default_factory=dict)
    layers: dict[str, list[tuple[str, layer.AdaptedLayer]]] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    enabled: bool = True
    input_gradients: bool = False
    repacking_layers: list[Any] = field(default_factory=list)
    active_state: ActiveAdapters = field(default_factory=ActiveAdapters)

    def trainable_parameters(self, adapter: str) -> Iterator[nn.Parameter]:
        """Yield the parameters that an adapter trains."""
        for _, module in self.layers.get(adapter, []):
            if adapter in module.adapters:
                yield from module.adapters[adapter].trainable_parameters()  # type: ignore[operator]
            if adapter in module.trained_copies:
                yield from module.trained_copies[adapter].parameters()


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
        peft_config: the method's config.
        adapter_name: name of the adapter.
        mixed: accepted for PEFT compatibility; ignored, since adapters of different methods always mix.
        autocast_adapter_dtype: keep the adapter in fp32 above a 16-bit base.
        revision: revision of the base, written to the config.
        low_cpu_mem_usage: accepted for PEFT compatibility; ignored, since adapters are created on their device.

    Raises:
        TargetError: a target, layer index, pattern or module to save matches nothing.
        UsageError: the model already has adapters.
    """
    del mixed, low_cpu_mem_usage
    if isinstance(model, PeftModel):
        raise UsageError(
            f"the model already has adapters: {format_names(model.peft_config)}",
            "a base without adapters",
            "model.add_adapter(name, config) adds another one; model.unload() removes all",
        )
    peft_config.revision = revision or peft_config.revision
    peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or peft_config.base_model_name_or_path
    return PeftModel._attach_first_adapter(model, adapter_name, peft_config, autocast_adapter_dtype, strict=True)


class PeftModel(CallMixin, ConversionMixin, SaveLoadMixin, AdapterPublishing):
    """A base model with adapters, with PEFT's method names; mixed into the base's class.

    `PeftModel(model, config)` is `get_peft_model(model, config)`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Add an adapter to the given model; without arguments (copying) create an empty object."""
        if not args and not kwargs:
            return object.__new__(cls)
        return get_peft_model(*args, **kwargs)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Do nothing: the base is already initialised."""

    # --- properties ---------------------------------------------------------------------------------------------

    @property
    def _adapter_state(self) -> AdapterState:
        return self.__dict__["_slimtune"]

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configs by adapter name."""
        return self._adapter_state.configs

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in the order in which they are applied."""
        return list(self._adapter_state.active)

    @property
    def active_adapter(self) -> str:
        """Name of the (first) active adapter."""
        return self._adapter_state.active[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        """Config of the (first) active adapter."""
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> str:
        """PEFT's name of the active adapter's method."""
        return self.active_peft_config.peft_type

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into the base's weights."""
        return list(self._adapter_state.merged)

    @property
    def modules_to_save(self) -> set[str]:
        """Names of the modules that adapters train in full."""
        return {n for r in self._adapter_state.reports.values() for n in r.trained_whole}

    @property
    def base_model(self) -> Any:
        """The backbone, as in transformers; `base_model.model` is the whole model, as in PEFT."""
        return getattr(self, getattr(self, "base_model_prefix", "") or "\0", self)

    def get_base_model(self) -> Any:
        """Return the base model, which is this object."""
        return self

    @property
    def base_model_class(self) -> type[nn.Module]:
        """Class of the model without adapters."""
        return self._adapter_state.base_class

    def match_report(self, adapter_name: str | None = None) -> MatchReport:
        """Return which modules an adapter (None: the active one) changes, and which it does not."""
        return self._adapter_state.reports[self._require_adapter(adapter_name or self.active_adapter)]

    def adapter_modules(self, adapter_name: str) -> dict[str, AdapterModule]:
        """Return an adapter's modules by the name of the base module that each one adapts."""
        members = self._adapter_state.layers[self._require_adapter(adapter_name)]
        return {n: m.adapters[adapter_name] for n, m in members if adapter_name in m.adapters}  # type: ignore[misc]

    def adapted_layers(self, adapter_name: str | None = None) -> dict[str, layer.AdaptedLayer]:
        """Return the base modules that an adapter (None: any adapter) adapts, by name."""
        if adapter_name is not None:
            return dict(self._adapter_state.layers[self._require_adapter(adapter_name)])
        return {n: m for members in self._adapter_state.layers.values() for n, m in members}

    def trainable_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """Return the parameters that train while this adapter is active."""
        return list(self._adapter_state.trainable_parameters(self._require_adapter(adapter_name)))

    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        """Return (number of trainable parameters, number of all parameters)."""
        counts = [(count_values(p), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's format."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    # --- adding, choosing and removing adapters -----------------------------------------------------------------

    @classmethod
    def _attach_first_adapter(
        cls, model: nn.Module, name: str, config: PeftConfig, autocast: bool, *, strict: bool
    ) -> Any:
        peft_model = _make_peft_model(model)
        try:
            peft_model.add_adapter(name, config, autocast_adapter_dtype=autocast, strict=strict)
        except BaseException:
            peft_model.unload()
            raise
        peft_model.set_adapter(name, inference_mode=config.inference_mode)
        if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            peft_model._require_input_gradients()
        return peft_model

    def add_adapter(
        self: Any,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        strict: bool = True,
    ) -> MatchReport:
        """Add another adapter, inactive, and return what it matched.

        Raises:
            UsageError: the name is taken or cannot be the name of a module.
            TargetError: see `get_peft_model`.
        """
        del low_cpu_mem_usage
        state = self._adapter_state
        self._require_free_name(adapter_name)
        if not peft_config.name:
            raise UsageError(f"{type(peft_config).__name__} is not the config of a method", "such as LoraConfig")
        peft_config.check_model(self)
        peft_config.infer_from_model(self)
        report = select_targets(self, peft_config, strict=strict)
        state.configs[adapter_name], state.reports[adapter_name] = peft_config, report
        state.layers[adapter_name] = []
        try:
            with self.disable_adapter():  # modules read and copy the base's own weights
                self._add_modules(adapter_name, autocast=autocast_adapter_dtype, loading=not strict)
        except BaseException:
            self._remove_adapter(adapter_name)
            raise
        return report

    def _add_modules(self: Any, adapter: str, *, autocast: bool, loading: bool) -> None:
        state, modules = self._adapter_state, dict(self.named_modules())
        report, members = state.reports[adapter], state.layers[adapter]
        adapted: dict[str, layer.AdaptedLayer] = {}

        def get_adapted(name: str) -> layer.AdaptedLayer:
            if name not in adapted:
                adapted[name] = layer.make_adapted(modules[name], state.active_state)
                members.append((name, adapted[name]))  # immediately, so that a later failure can be undone
            return adapted[name]

        sites = [layer.get_site(n, k, self, autocast=autocast, loading=loading) for n, k in report.kinds.items()]
        for site, module in zip(sites, state.configs[adapter].build_all(sites), strict=True):
            get_adapted(site.name).adapters[adapter] = module
        tied: dict[int, nn.Parameter] | None = {} if state.configs[adapter].trains_every_weight else None
        for name, parameters in _find_copied_parameters(report, modules).items():
            layer.copy_parameters(get_adapted(name), adapter, parameters, autocast=autocast, tied=tied)
        for parameter in state.trainable_parameters(adapter):
            parameter.requires_grad_(False)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter (or several) and deactivate the others; only active adapters run and train."""
        state = self._adapter_state
        requested = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        names = [self._require_adapter(n) for n in dict.fromkeys(requested)]
        if not names:
            raise UsageError(
                "no adapter is given",
                f"one or more of {format_names(state.configs)}",
                "`with model.disable_adapter():` runs the base alone",
            )
        self._require_different_copies(names)
        self._require_unmerged()
        before, state.active = state.active, names
        if not inference_mode:
            disable_cpu_repacking(state.repacking_layers)
        for name in {*before, *names}:
            for p in state.trainable_parameters(name):
                p.requires_grad_(name in names and not inference_mode)
        self._update_active_state()

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Set whether the parameters of these adapters train."""
        if requires_grad:
            disable_cpu_repacking(self._adapter_state.repacking_layers)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for p in self.trainable_parameters(name):
                p.requires_grad_(requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base alone inside the `with`; a merge is undone before and made again after."""
        state = self._adapter_state
        merged, was_enabled = list(state.merged), state.enabled
        self.unmerge_adapter()
        state.enabled = False
        self._update_active_state()
        try:
            yield
        finally:
            state.enabled = was_enabled
            self._update_active_state()
            if merged:
                self.merge_adapter(merged)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the active one, the first remaining adapter becomes active."""
        state = self._adapter_state
        self._require_adapter(adapter_name)
        self._require_enabled("delete_adapter")
        if len(state.configs) == 1:
            raise UsageError(
                f"{adapter_name!r} is the only adapter", "at least one adapter remains", "model.unload() removes it"
            )
        self._require_unmerged()
        self._remove_adapter(adapter_name)
        if not state.active:
            first, config = next(iter(state.configs.items()))
            self.set_adapter(first, inference_mode=config.inference_mode)

    def rename_adapter(self, adapter_name: str, new_name: str) -> None:
        """Rename an adapter; it stays active or merged if it was."""
        state = self._adapter_state
        self._require_adapter(adapter_name)
        self._require_free_name(new_name)
        for _, module in state.layers[adapter_name]:
            layer.rename_adapter(module, adapter_name, new_name)
        for table in (state.configs, state.reports, state.layers):
            items = [(new_name if n == adapter_name else n, v) for n, v in table.items()]
            table.clear()
            table.update(items)  # type: ignore[arg-type]
        for names in (state.active, state.merged):
            names[:] = [new_name if n == adapter_name else n for n in names]
        self._update_active_state()

    def unload(self) -> Any:
        """Remove all adapters and return the plain base, bit for bit as it was."""
        self._require_enabled("unload")
        self.unmerge_adapter()
        return self._restore_base_class()

    # --- merging ------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the active adapters (or these) into the base's weights; `unmerge_adapter` restores them bit for bit.

        Raises:
            MergeUnsupported: a method has no merge, the base is quantized, or (safe_merge) the result is not finite.
        """
        state = self._adapter_state
        if state.merged:
            return
        self._require_enabled("merge_adapter")
        names = [self._require_adapter(n) for n in dict.fromkeys(adapter_names or state.active)]
        self._require_different_copies(names)
        layers = {n: m for a in names for n, m in state.layers[a]}
        try:
            for name, module in layers.items():
                layer.merge_adapters(name or type(self).__name__, module, names, check=safe_merge)
            state.merged = names
            self._update_active_state()
        finally:
            if not state.merged:
                for module in layers.values():
                    layer.unmerge_adapters(module)

    def unmerge_adapter(self) -> None:
        """Undo a merge: the base gets its original parameter objects back."""
        for module in self.adapted_layers().values():
            layer.unmerge_adapters(module)
        self._adapter_state.merged = []
        self._update_active_state()

    def merge_and_unload(
        self: Any, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """Merge for good and return the plain base: its own class, no adapters, changed weights."""
        del progressbar
        names: dict[int, list[str]] = {}
        for n, p in self.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(n)
        tied = [group for group in names.values() if len(group) > 1]
        self.unmerge_adapter()
        self.merge_adapter(adapter_names, safe_merge)
        merged = dict(self.named_parameters(remove_duplicate=False))
        model = self._restore_base_class()
        if any(len({id(merged[n]) for n in group}) > 1 for group in tied):
            mark_embeddings_untied(model)
        return model

    # --- internals ----------------------------------------------------------------------------------------------

    def _require_adapter(self, name: str) -> str:
        configs = self._adapter_state.configs
        if name not in configs:
            raise UsageError(f"there is no adapter {name!r}{nearest(name, configs)}", f"one of {format_names(configs)}")
        return name

    def _require_free_name(self, name: str) -> None:
        configs = self._adapter_state.configs
        if not name or "." in name or name == BASE_ROW or name in configs or hasattr(nn.ModuleDict(), name):
            raise UsageError(
                f"{name!r} cannot be the name of a new adapter",
                f"a name without dots that is not a method of ModuleDict and not one of {format_names(configs)}",
                "delete_adapter(name) first to replace one",
            )

    def _require_unmerged(self) -> None:
        if self._adapter_state.merged:
            raise UsageError(
                f"{format_names(self._adapter_state.merged)} is merged into the base",
                "an unmerged model",
                "unmerge_adapter() first",
            )

    def _require_enabled(self, what: str) -> None:
        if not self._adapter_state.enabled:
            raise UsageError(f"{what} is called inside disable_adapter()", "a call after the `with` block")

    def _require_different_copies(self, names: list[str]) -> None:
        """Raise if two adapters train copies of one module: their updates cannot be added."""
        owners: dict[str, str] = {}
        for adapter in names:
            for name, module in self._adapter_state.layers[adapter]:
                if adapter in module.trained_copies and owners.setdefault(name, adapter) != adapter:
                    raise UsageError(
                        f"adapters {owners[name]!r} and {adapter!r} both have their own copy of {name}",
                        "active adapters with copies of different modules",
                        "activate one of them at a time",
                    )

    def _remove_adapter(self, name: str) -> None:
        state = self._adapter_state
        for _, module in state.layers.pop(name):
            layer.remove_adapter(module, name)
        del state.configs[name], state.reports[name]
        state.active = [n for n in state.active if n != name]
        self._update_active_state()

    def _update_active_state(self) -> None:
        """Tell the adapted layers which adapters run now."""
        state = self._adapter_state
        state.active_state.names = tuple(state.merged or state.active) if state.enabled else ()
        state.active_state.clear_cache()

    def _restore_base_class(self: Any) -> Any:
        state = self._adapter_state
        if state.input_gradients:
            self.disable_input_require_grads()
        for module in state.repacking_layers:
            module.support_avx512bf16_for_cpu = True
        for module in self.adapted_layers().values():
            layer.restore_base_class(module)
        for name, parameter in self.named_parameters():
            # A name may be new: a merge splits a tied tensor into two.
            parameter.requires_grad_(state.was_trainable.get(name, any(state.was_trainable.values())))
        backbone = self.base_model
        if backbone.__dict__.pop("_whole_model", None) is not None:
            backbone.__class__ = type(backbone).__bases__[0]
        elif backbone.__dict__.get("model") is self:
            del backbone.__dict__["model"]
        del self.__dict__["_slimtune"]
        self.__class__ = state.base_class
        return self


def mark_embeddings_untied(model: Any) -> None:
    """Record in the config that input and output embeddings are two tensors, so that saving writes both."""
    config = getattr(model, "config", None)
    if config is None:
        return
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _make_peft_model(model: nn.Module) -> PeftModel:
    """Swap the class of a base for a PeftModel subclass and freeze its parameters."""
    register_with_transformers(PeftModel)
    base_class: Any = type(model)
    was_trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(False)
    model.__class__ = register_as_peft_subclass(_make_peft_class(base_class), "PeftModel")
    model.__dict__["_slimtune"] = AdapterState(base_class, was_trainable, repacking_layers=find_repacking_layers(model))
    assert isinstance(model, PeftModel)
    backbone = model.base_model
    if not hasattr(backbone, "model"):  # scripts written for PEFT use `base_model.model`
        if backbone is model:
            model.__dict__["model"] = model  # not a registered submodule, which would be a cycle
        else:
            backbone.__dict__["_whole_model"] = model
            backbone.__class__ = _make_backbone_class(backbone.__class__)
    return model


@cache
def _make_backbone_class(base: Any) -> Any:
    # transformers looks for a model's backbone under `model`. The backbone's `base_model` stays the backbone itself, so
    # that the search ends there.
    body = {"model": property(lambda self: self.__dict__["_whole_model"]), "base_model": property(lambda self: self)}
    return type(base.__name__, (base,), {**body, "__module__": base.__module__, "__doc__": base.__doc__})


@cache
def _make_peft_class(base: Any) -> Any:
    # It has the base's name, which the Trainer and its checkpoints use.
    return type(base.__name__, (PeftModel, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _find_copied_parameters(report: MatchReport, modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Return which parameters of which modules an adapter copies: modules it trains in full, and trained biases."""
    found: dict[str, list[str]] = {}
    for whole in report.trained_whole:
        for name, module in modules.items():
            if name == whole or name.startswith(f"{whole}."):
                own = [n for n, p in module._parameters.items() if p is not None]
                if own and not {"adapters", "trained_copies"} & set(name.split(".")):
                    found[name] = own
    for bias in report.biases:
        names = found.setdefault(bias.removesuffix(".bias"), [])
        if "bias" not in names:
            names.append("bias")
    return found
