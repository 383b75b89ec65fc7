"""PeftModel: a base model with adapters.

`get_peft_model(model, config)` returns the same object. Its class becomes a subclass of its own class and of
`PeftModel`, the matched modules become adapted layers (see `layer.py` for the class swap), and the base's parameters
are frozen. So an adapted model still is a `LlamaForCausalLM` and a `PreTrainedModel`: generate, Trainer, pipelines and
TRL accept it unchanged. `unload()` returns the base as it was.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from typing import Any

import torch
from torch import nn

from ...compat.adapter_status import StatusMixin
from ...compat.base_model import Tuner, TunerNames
from ...compat.peft_registration import register_as_peft_subclass, register_with_transformers
from ...errors import UsageError, format_names, nearest
from ...extras.alora_invocation import find_active_invocation_tokens
from ...extras.layer_replication import Replication, replicate_layers, restore_layers
from ...extras.lora_conversion import LoraConversionMixin
from ...extras.mixed_batch import CallMixin
from . import adapted_layer as layer
from .active_adapters import BASE_ROW, ActiveAdapters
from .adapter_module import AdapterModule, MergeUnsupported, SharedParameterHolder
from .generated_classes import PickledByRecipe
from .merging import merge_adapters, tie_equal_parameters, unmerge_adapters
from .peft_config import PeftConfig
from .prompt import PromptMixin
from .quantized_layers import disable_cpu_repacking, find_repacking_layers
from .state_dict import SaveLoadMixin
from .targets import (
    MatchReport,
    _get_module_names_tied_with_embedding,
    find_tied_modules,
    matches_regex_or_names,
    select_targets,
)


@dataclass
class AdapterState:
    """The adapters of one model; the dictionaries are by adapter name.

    `was_trainable` is `requires_grad` of the base's parameters before the first adapter, `layers` the modules that each
    adapter adapts by their names, `suspended` is True inside `disable_adapter()`, `input_gradients` tells whether
    attaching made the embedding output require gradients. All adapted layers share `active_state` and read from it.
    """

    base_class: type[nn.Module]
    was_trainable: dict[str, bool]
    repacking_layers: list[Any]
    configs: dict[str, PeftConfig] = field(default_factory=dict)
    reports: dict[str, MatchReport] = field(default_factory=dict)
    layers: dict[str, dict[str, layer.AdaptedLayer]] = field(default_factory=dict)
    suspended: bool = False
    input_gradients: bool = False
    replication: Replication | None = None
    active_state: ActiveAdapters = field(default_factory=ActiveAdapters)


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
        mixed: ignored: adapters of different methods always mix.
        low_cpu_mem_usage: create the adapter on the meta device; `set_peft_model_state_dict` then gives it values.
        autocast_adapter_dtype: keep the adapter in fp32 above a 16-bit base.
        revision: revision of the base, written to the config.

    Raises:
        TargetError: a target, layer index, pattern or module to save matches nothing.
    """
    cls = PeftMixedModel if mixed else PeftModel
    return cls(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, revision)


class PeftModel(PickledByRecipe, CallMixin, LoraConversionMixin, SaveLoadMixin, StatusMixin, PromptMixin):
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
            # PEFT's words.
            renamed = f"The PEFT config's `base_model_name_or_path` was renamed from {given!r} to {own!r}."
            warnings.warn(f"{renamed} Check that the config belongs to this base.", stacklevel=3)
        peft_config.base_model_name_or_path = own or given
        settings = {"strict": True, "low_cpu_mem_usage": low_cpu_mem_usage}
        if isinstance(model, PeftModel):
            model._require_no_loss(adapter_name)
            # PEFT's words.
            text = "You are trying to modify a model with PEFT for a second time."
            warnings.warn(f"{text} model.unload() before removes the first adapter.", stacklevel=3)
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

    # --- properties ---------------------------------------------------------------------------------------------

    @property
    def _adapter_state(self) -> AdapterState:
        return self.__dict__["_slimtune"]

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self._adapter_state.configs

    @property
    def active_adapters(self) -> list[str]:
        return list(self._adapter_state.active_state.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter; a list unless exactly one is active."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def prefix(self) -> str:
        """How the names of the active adapter's tensors start: `"lora_"`; AttributeError without a common start."""
        if not self.active_peft_config.prefix:
            raise AttributeError(f"the tensors of {self.active_peft_config.name} have no common prefix")
        return self.active_peft_config.prefix

    @property
    def peft_type(self) -> str | None:
        return self.active_peft_config.peft_type

    @property
    def merged_adapters(self) -> list[str]:
        return list(self._adapter_state.active_state.merged)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train in full, None if there are none."""
        return {n for r in self._adapter_state.reports.values() for n in r.trained_whole} or None

    _get_module_names_tied_with_embedding = _get_module_names_tied_with_embedding

    @property
    def base_model(self) -> Any:
        """The backbone, as in transformers; `base_model.model` is the whole model, as in PEFT: see `base_model.py`."""
        backbone = self._backbone
        return Tuner(self) if backbone is self and "model" in self._modules else backbone

    @property
    def _backbone(self) -> Any:
        return self._modules.get(getattr(type(self), "base_model_prefix", ""), self)

    @property
    def base_model_class(self) -> type[nn.Module]:
        return self._adapter_state.base_class

    def get_base_model(self) -> Any:
        return self  # the same object

    def __getattr__(self: Any, name: str) -> Any:
        # PEFT's `peft_model.model` is the base, so `peft_model.model.model.layers` are its layers, whether `model` is
        # the name of a child or not.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_slimtune" in vars(self) and name == "model":
                return self
            if "_slimtune" in vars(self) and name in self._backbone._modules:
                return self._backbone._modules[name]
            raise

    def __setattr__(self: Any, name: str, value: Any) -> None:
        backbone = self._backbone
        if name in backbone._modules and name not in self._modules:
            setattr(backbone, name, value)
        else:
            super().__setattr__(name, value)

    def match_report(self, adapter_name: str | None = None) -> MatchReport:
        """Return which modules an adapter (None: the active one) changes, and which it does not."""
        return self._adapter_state.reports[self._require_adapter(adapter_name or self.active_adapters[0])]

    def adapter_modules(self, adapter_name: str) -> dict[str, AdapterModule]:
        """Return an adapter's modules by the name of the base module that each one adapts."""
        layers: Any = self.adapted_layers(adapter_name)
        return {n: m.adapters[adapter_name] for n, m in layers.items() if adapter_name in m.adapters}

    def adapted_layers(self, adapter_name: str | None = None) -> dict[str, layer.AdaptedLayer]:
        """Return the base modules that an adapter (None: any adapter) adapts, by name."""
        if adapter_name is not None:
            return dict(self._adapter_state.layers[self._require_adapter(adapter_name)])
        return {n: m for layers in self._adapter_state.layers.values() for n, m in layers.items()}

    def trainable_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """Return the parameters that train while this adapter is active."""
        found: list[nn.Parameter] = []
        for module in self.adapted_layers(adapter_name).values():
            if adapter_name in module.adapters:
                found += module.adapters[adapter_name].trainable_parameters()  # type: ignore[operator]
            if adapter_name in module.trained_copies:
                found += module.trained_copies[adapter_name].parameters()
        return found

    # --- adding, choosing and removing adapters -----------------------------------------------------------------

    @classmethod
    def _attach_first_adapter(
        cls, model: nn.Module, name: str, config: PeftConfig, autocast: bool, **settings: bool
    ) -> Any:
        of_task = TASK_MODELS.get(config.task_type or "", cls)
        peft_model: Any = _make_peft_model(model, of_task if cls is PeftModel else cls)
        try:
            peft_model.add_adapter(name, config, autocast_adapter_dtype=autocast, **settings)
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

        `strict` is as in `select_targets`, the other arguments as in `get_peft_model`.
        """
        state = self._adapter_state
        self._require_free_name(adapter_name)
        if not peft_config.name:
            raise UsageError(f"{type(peft_config).__name__} is not the config of a method", "such as LoraConfig")
        if peft_config.prefix and adapter_name in peft_config.prefix:
            # PEFT's words.
            what = f"Adapter name '{adapter_name}' should not be contained in the prefix '{peft_config.prefix}'."
            warnings.warn(f"{what} PEFT does not load the file under this name", stacklevel=3)
        self._replicate_layers(getattr(peft_config, "layer_replication", None))
        if strict:
            _require_one_with_biases([*state.configs.values(), peft_config])
        peft_config.check_required()
        peft_config.check_model(self)
        peft_config.fill_from_model(self)
        report = select_targets(self, peft_config, strict=strict)
        if getattr(peft_config, "target_modules", ()) is None:  # as in PEFT, a config tells which default it used
            default = peft_config.default_targets(self) or []
            matched = [t for t in default if any(matches_regex_or_names([t], n) for n in report.kinds)]
            vars(peft_config)["target_modules"] = matched or None
        state.configs[adapter_name], state.reports[adapter_name] = peft_config, report
        layers = state.layers[adapter_name] = {}  # filled step by step, so that a failure can be undone
        how = {"autocast": autocast_adapter_dtype, "loading": not strict or low_cpu_mem_usage}
        shares_copies = peft_config.trains_every_weight or (
            getattr(peft_config, "ensure_weight_tying", False) and find_tied_modules(self)
        )
        try:
            with self.disable_adapter():  # modules read and copy the base's own weights
                sites = [layer.get_site(n, kind, self, **how) for n, kind in report.kinds.items()]
                if low_cpu_mem_usage:
                    sites = [replace(site, device=torch.device("meta")) for site in sites]
                modules = dict(zip(report.kinds, peft_config.build_all(sites), strict=True))
                tied: dict[int, nn.Parameter] | None = {} if shares_copies else None
                for name in {**modules, **report.copied}:
                    adapted = layers[name] = layer.make_adapted(
                        self.get_submodule(name), state.active_state, peft_config.name
                    )
                    if name in modules:
                        modules[name].method = peft_config.name
                        adapted.adapters[adapter_name] = modules[name]
                    if name in report.copied:
                        names = report.copied[name]
                        layer.copy_parameters(adapted, adapter_name, names, autocast_adapter_dtype, tied)
                self.set_requires_grad(adapter_name, False)
        except BaseException:
            self._remove_adapter(adapter_name)
            raise
        return report

    def _copy_biases(self, adapter_name: str, names: list[str]) -> None:
        """Give an adapter its own copies of these biases of the base, such as `model.norm.bias`."""
        state, report = self._adapter_state, self.match_report(adapter_name)
        trains = any(p.requires_grad for p in self.trainable_parameters(adapter_name))
        copied = {name.rpartition(".")[0]: [name.rpartition(".")[2]] for name in names}
        for name, parameters in copied.items():
            method = state.configs[adapter_name].name
            adapted = layer.make_adapted(self.get_submodule(name), state.active_state, method)
            state.layers[adapter_name][name] = adapted
            layer.copy_parameters(adapted, adapter_name, parameters, autocast=True, tied=None)
            adapted.trained_copies[adapter_name].requires_grad_(trains)
        biases, copied = (*report.biases, *names), {**report.copied, **copied}
        state.reports[adapter_name] = replace(report, biases=biases, copied=copied)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter (or several) and deactivate the others; only active adapters run and train."""
        state = self._adapter_state
        requested = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        names = self._require_adapters(requested)
        if not names:
            raise UsageError("no adapter is given", hint="`with model.disable_adapter():` runs the base alone")
        self._require_different_copies(names)
        if self.merged_adapters:
            # The words of PEFT's warning.
            text = "Adapter cannot be set when the model is merged. Unmerging the model first."
            warnings.warn(text, stacklevel=2)
            self.unmerge_adapter()
        self.set_requires_grad([n for n in self.active_adapters if n not in names], False)
        self.set_requires_grad(names, not inference_mode)
        state.active_state.active = names
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
        before = state.active_state.enabled, state.suspended
        merged = self.merged_adapters
        if any(m.active_state.enabled is not before[0] for m in state.active_state.layers_with_own):
            # The words of PEFT's warning.
            text = "The model contains some adapter layers that are enabled and others that are disabled. "
            warnings.warn(f"{text}After disable_adapter all follow the model again", stacklevel=3)
            self._update_active_state()
        self.unmerge_adapter()
        state.active_state.enabled, state.suspended = False, True
        state.active_state.clear_stacked_factors()
        try:
            yield
        finally:
            state.active_state.enabled, state.suspended = before
            if merged:
                self.merge_adapter(merged)

    def disable_adapter_layers(self) -> None:
        """Run the base alone, with frozen adapters, until `enable_adapter_layers` is called."""
        self.unmerge_adapter()
        self.set_requires_grad(self.active_adapters, False)
        self._adapter_state.active_state.enabled = False
        self._update_active_state()

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`: the active adapters run and train."""
        self._adapter_state.active_state.enabled = True
        self.set_requires_grad(self.active_adapters)
        self._update_active_state()

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove an adapter or several; if no active one is left, the first remaining adapter becomes active."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if unknown := [n for n in names if n not in self.peft_config]:
            # PEFT's words.
            message = f"Adapter {unknown[0]} does not exist{nearest(unknown[0], self.peft_config)}"
            raise UsageError(message, f"one of {format_names(self.peft_config)}")
        self._require_active_base("delete_adapter")
        if merged := sorted({*names} & {*self.merged_adapters}):
            message = f"Cannot delete adapter(s) {merged} while they are merged. Please unmerge them first."
            raise UsageError(message, hint="model.unmerge_adapter()")
        for name in names:
            self._remove_adapter(name)
        if self.peft_config and not self.active_adapters:
            first, config = next(iter(self.peft_config.items()))
            self.set_adapter(first, inference_mode=config.inference_mode)

    def rename_adapter(self, adapter_name: str, new_name: str) -> None:
        """Rename an adapter; it stays active or merged if it was."""
        state = self._adapter_state
        self._require_free_name(new_name)
        for module in self.adapted_layers(adapter_name).values():
            layer.rename_adapter(module, adapter_name, new_name)

        names = {adapter_name: new_name}
        for table in ("configs", "reports", "layers"):
            setattr(state, table, {names.get(n, n): value for n, value in getattr(state, table).items()})
        active = state.active_state
        active.active = [names.get(n, n) for n in active.active]
        active.merged = [names.get(n, n) for n in active.merged]
        self._update_active_state()

    def unload(self: Any) -> Any:
        """Remove all adapters and return the plain base, bit for bit as it was."""
        self._require_active_base("unload")
        self.unmerge_adapter()
        return self._restore_base_class()

    # --- merging ------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the active adapters (or these) into the base's weights; `unmerge_adapter` restores them bit for bit.

        Raises:
            MergeUnsupported: a method has no merge, the base is quantized, or (safe_merge) the result is not finite.
        """
        self._require_active_base("merge_adapter")
        if self._adapter_state.replication is not None:
            raise MergeUnsupported("layers that share weights (layer_replication) cannot take an adapter each")
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}")
        before = self.merged_adapters
        layers = self.adapted_layers()
        names = {n: m.active_state.active if adapter_names is None else adapter_names for n, m in layers.items()}
        requested = dict.fromkeys(a for own in names.values() for a in own)
        added = [self._require_adapter(a) for a in requested if a not in before]
        if before:
            # The words of PEFT's warnings.
            more = f"You are now additionally merging {','.join(added)}."
            and_now = f"Already following adapters were merged {','.join(before)}. {more}"
            warnings.warn(and_now if added else "All adapters are already merged, nothing to do.", stacklevel=2)
        self._require_different_copies([*before, *added])
        try:
            for name, module in layers.items():
                present = [a for a in names[name] if a in module.adapters or a in module.trained_copies]
                if present:
                    merge_adapters(name or type(self).__name__, module, present, check=safe_merge)
            tie_equal_parameters(layers.values())
        except BaseException:
            self.unmerge_adapter()
            raise
        self._adapter_state.active_state.merged = [*before, *added]
        self._adapter_state.active_state.clear_stacked_factors()

    def unmerge_adapter(self) -> None:
        """Undo a merge: the base gets its original parameter objects back."""
        for module in self.adapted_layers().values():
            unmerge_adapters(module)
        self._adapter_state.active_state.merged = []
        self._adapter_state.active_state.clear_stacked_factors()

    def merge_and_unload(
        self: Any, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """Merge for good and return the plain base: its own class, no adapters, changed weights."""
        names: dict[int, list[str]] = {}
        for n, p in self.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(n)
        tied = [group for group in names.values() if len(group) > 1]
        self.unmerge_adapter()
        self.merge_adapter(adapter_names, safe_merge)
        merged = dict(self.named_parameters(remove_duplicate=False))
        model = self._restore_base_class()
        split = [group for group in tied if len({id(merged[n]) for n in group}) > 1]
        if split:
            mark_embeddings_untied(model)
        for group in split:
            # Saving writes tensors that share memory once, and a config cannot say that only some are tied (T5, BART).
            seen = {id(merged[group[0]])}
            for name in group[1:]:
                if id(merged[name]) in seen:
                    outer, _, last = name.rpartition(".")
                    model.get_submodule(outer)._parameters[last] = copy.deepcopy(merged[name])
                seen.add(id(merged[name]))
        return model

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Make the output of the input embeddings require gradients, which reentrant checkpointing needs."""
        self._require_input_gradients()

    # --- internals ----------------------------------------------------------------------------------------------

    def _replicate_layers(self: Any, ranges: list[list[int]] | None) -> None:
        """Replicate the base's layers as the first adapter asks; further adapters must ask for the same."""
        state = self._adapter_state
        if not state.configs:
            state.replication = replicate_layers(self, ranges) if ranges else None
        elif ranges != (state.replication.ranges if state.replication else None):
            here = state.replication.ranges if state.replication else None
            raise UsageError(f"layer_replication is {ranges}, and the model's adapters have {here}", "the same for all")

    def _require_adapter(self, name: str) -> str:
        return self._require_adapters([name])[0]

    def _require_adapters(self, names: Iterable[str]) -> list[str]:
        """Return each name once, or raise if one is no adapter's; PEFT's words come first."""
        names, known = list(dict.fromkeys(names)), sorted(self._adapter_state.configs)
        if unknown := [n for n in names if n not in known]:
            message = f"Adapter(s) {unknown} not found, available adapters: {known}{nearest(unknown[0], known)}"
            raise UsageError(message)
        return names

    def _require_free_name(self, name: str) -> None:
        configs = self._adapter_state.configs
        if name in configs:
            raise UsageError(f"Adapter with name {name!r} already exists")  # PEFT's words
        # An adapter's name is a part of keys, and the name of its folder.
        plain = name.isprintable() and not set(name) & set('./\\:*?"<>|') and len(name.encode()) <= 200
        if not name or not plain or name == BASE_ROW or hasattr(nn.ModuleDict(), name):
            expected = "a name without dots, slashes and control characters that is not a method of ModuleDict"
            raise UsageError(f"{name!r} cannot be the name of a new adapter", expected)

    def _require_no_loss(self, name: str) -> None:
        """Raise if an adapter of this name exists and has an effect: attaching another would lose it."""
        if name not in self.peft_config:
            return
        modules = [m for m in self.adapter_modules(name).values() if not isinstance(m, SharedParameterHolder)]
        factors = [m.low_rank_factors() for m in modules]
        if self.match_report(name).copied or any(f is None or (f[0].any() and f[1].any()) for f in factors):
            message = f"the model already has adapters: {format_names(self.peft_config)}"
            hint = "another adapter_name adds one; model.unload() removes all"
            raise UsageError(f"{message}; a second {name!r} would replace the first", hint=hint)

    def _require_unmerged(self) -> None:
        if merged := self.merged_adapters:
            raise UsageError(f"{format_names(merged)} is merged into the base", hint="unmerge_adapter() first")

    def _require_active_base(self, what: str) -> None:
        if self._adapter_state.suspended:
            raise UsageError(f"{what} is called inside disable_adapter()", "a call after the `with` block")

    def _require_different_copies(self, names: list[str]) -> None:
        """Raise if two adapters train copies of one module, or of one row: their updates cannot be added."""
        owners: dict[Any, str] = {}
        for adapter in names:
            for name, module in self.adapter_modules(adapter).items():
                both = [r for r in module.replaced_rows() if owners.setdefault((name, r), adapter) != adapter]
                if both:
                    # PEFT's words.
                    what = f"Token indices of adapter {adapter} are already defined and would result in undefined "
                    what += "merging behavior. Only one adapter can be set at a time for TrainableTokensWrapper: "
                    message = f"{what}{owners[name, both[0]]!r} also has rows {both[:4]} of {name}"
                    raise UsageError(message, hint="adapters with different tokens, or one of them at a time")
            for name in self._adapter_state.reports[adapter].copied:
                if owners.setdefault(name, adapter) != adapter:
                    what = "Only one adapter can be set at a time for ModulesToSaveWrapper"  # PEFT's words
                    message = f"{what}: {owners[name]!r} and {adapter!r} both have their own copy of {name}"
                    raise UsageError(message, hint="activate one of them at a time")

    def _remove_adapter(self, name: str) -> None:
        state = self._adapter_state
        for module in state.layers.pop(name).values():
            layer.remove_adapter(module, name)
        del state.configs[name], state.reports[name]
        state.active_state.active = [n for n in self.active_adapters if n != name]
        self._update_active_state()

    def _update_active_state(self) -> None:
        """Make all layers follow the model's active adapters, also those for which others were chosen."""
        state = self._adapter_state.active_state
        for module in state.layers_with_own:
            vars(module)["active_state"] = state
        state.layers_with_own = []
        state.clear_stacked_factors()

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
        if state.replication is not None:
            restore_layers(self, state.replication)
        backbone = self._backbone
        if backbone is not self:
            del backbone.__dict__["_whole_model"]
            backbone.__class__ = type(backbone).__bases__[1]
        del self.__dict__["_slimtune"]
        self.__class__ = state.base_class
        return self


class PeftModelForSequenceClassification(PeftModel):
    """A model with adapters for `task_type="SEQ_CLS"`."""


class PeftModelForCausalLM(PeftModel):
    """A model with adapters for `task_type="CAUSAL_LM"`."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A model with adapters for `task_type="SEQ_2_SEQ_LM"`."""

    def generate(self, **kwargs: Any) -> Any:  # type: ignore[override]
        """Generate like the base; as in PEFT all arguments have names, for instance `input_ids`."""
        return super().generate(**kwargs)


class PeftModelForTokenClassification(PeftModel):
    """A model with adapters for `task_type="TOKEN_CLS"`."""


class PeftModelForQuestionAnswering(PeftModel):
    """A model with adapters for `task_type="QUESTION_ANS"`."""


class PeftModelForFeatureExtraction(PeftModel):
    """A model with adapters for `task_type="FEATURE_EXTRACTION"`."""


class PeftMixedModel(PeftModel):
    """A model from `get_peft_model(…, mixed=True)`; any model can have adapters of different methods."""


TASK_MODELS: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}
"""The class of a model by the task type of its first adapter's config."""


def _require_one_with_biases(configs: Iterable[Any]) -> None:
    """Raise if two new adapters would train the base's biases, as PEFT does."""
    if sum(getattr(c, "bias", "none") != "none" for c in configs) > 1:
        message = "slimtune supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' for all"
        raise UsageError(message, hint="adapters with biases that were saved can be loaded together: load_adapter")


def mark_embeddings_untied(model: Any) -> None:
    """Record in the config that input and output embeddings are two tensors, so that saving writes both."""
    config = getattr(model, "config", None)
    if config is None:
        return
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


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
    register_with_transformers(PeftModel)
    base_class: Any = type(model)
    was_trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(False)
    model.__class__ = register_as_peft_subclass(_make_subclass(base_class, cls), "PeftModel")
    model.__dict__["_slimtune"] = AdapterState(base_class, was_trainable, find_repacking_layers(model))
    assert isinstance(model, PeftModel)
    backbone = model._backbone
    if backbone is not model:
        backbone.__dict__["_whole_model"] = model
        backbone.__class__ = _make_subclass(backbone.__class__, TunerNames)
    return model


@cache
def _make_subclass(base: Any, mixin: Any) -> Any:
    # It has the base's name, which the Trainer and its checkpoints use.
    body = {"__module__": base.__module__, "__doc__": base.__doc__, "_recipe": (_make_subclass, base, mixin)}
    if issubclass(mixin, PeftModel):

        @wraps(base.forward)
        def forward(self: Any, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
            if adapter_names is not None:
                return self(*args, adapter_names=adapter_names, **kwargs)
            state = vars(self).get("_slimtune")  # None: a wrapper kept this forward after the adapters were removed
            if (
                state
                and state.active_state.changed_tokens is None
                and find_active_invocation_tokens(state.active_state, state.configs)
            ):
                return self(*args, **kwargs)  # called directly, the tokens of an activated LoRA are not known yet
            return base.forward(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
        body["forward"] = forward
    return type(base.__name__, (mixin, base), body)
