"""AdaptedModelMixin: adding, choosing, merging and removing the adapters of a base model.

It is mixed into the class of the base: see `peft_model.py`. `unload()` returns the base as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ...errors import PeftWarning, UsageError, format_names, suggest
from . import adapted_layer as layer
from .active_adapters import BASE_ROW, ActiveAdapters
from .adapter_module import AdapterModule, MergeUnsupported, UndoableLayerReplication
from .extension_hooks import PeftNameLookupMixin, load_compat_hook
from .generated_classes import PickledByClassFactory
from .merging import (
    group_tied_parameter_names,
    merge_adapters_into_layer,
    retie_equal_merged_parameters,
    unmerge_adapters_from_layer,
    untie_partly_tied_after_merge,
)
from .peft_config import PeftConfig
from .quantized_layers import count_trainable_and_all_parameters, keep_differentiable_4bit_layout
from .targets import TargetMatches, find_tied_embedding_names, match_targets, matches_regex_or_names


@dataclass
class AdapterState:
    """The adapters of one model; the dictionaries are by adapter name.

    `was_trainable` is `requires_grad` of the base's parameters before the first adapter, `layers` the modules that each
    adapter adapts by their names, `training_fingerprints` what a run's adapter was trained on,
    `enabled_input_require_grads` tells whether attaching made the embedding output require gradients. All adapted
    layers share `active_state` and read from it.
    """

    base_class: type[nn.Module]
    was_trainable: dict[str, bool]
    repacking_layers: list[Any]
    configs: dict[str, PeftConfig] = field(default_factory=dict)
    reports: dict[str, TargetMatches] = field(default_factory=dict)
    training_fingerprints: dict[str, str] = field(default_factory=dict)
    layers: dict[str, dict[str, layer.AdaptedLayerMixin]] = field(default_factory=dict)
    inside_disable_adapter: bool = False
    enabled_input_require_grads: bool = False
    base_layer_replication: UndoableLayerReplication | None = None
    active_state: ActiveAdapters = field(default_factory=ActiveAdapters)


class AdaptedModelMixin(PickledByClassFactory, PeftNameLookupMixin):
    """The adapters of a model."""

    @property
    def adapter_state(self) -> AdapterState:
        return self.__dict__["_slimtune"]

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configs by adapter."""
        return self.adapter_state.configs

    @property
    def active_adapters(self) -> list[str]:
        return list(self.adapter_state.active_state.active)

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def merged_adapters(self) -> list[str]:
        return list(self.adapter_state.active_state.merged)

    @property
    def base_model_class(self) -> Any:
        return self.adapter_state.base_class

    def train(self, mode: bool = True) -> Any:
        if mode and (merged := self.merged_adapters):
            text = f"{format_names(merged)} is merged into the base: training changes nothing until unmerge_adapter()"
            warnings.warn(text, PeftWarning, stacklevel=2)
        return super().train(mode)

    def match_report(self, adapter_name: str | None = None) -> TargetMatches:
        """Return which modules an adapter (None: the active one) changes, and which it does not."""
        return self.adapter_state.reports[self.require_adapter(adapter_name or self.active_adapters[0])]

    def adapter_modules(self, adapter_name: str) -> dict[str, AdapterModule]:
        """Return an adapter's modules by the name of the base module that each one adapts."""
        layers: Any = self.adapted_layers(adapter_name)
        return {n: m.adapters[adapter_name] for n, m in layers.items() if adapter_name in m.adapters}

    def adapted_layers(self, adapter_name: str | None = None) -> dict[str, layer.AdaptedLayerMixin]:
        """Return the base modules that an adapter (None: any adapter) adapts, by name."""
        if adapter_name is not None:
            return dict(self.adapter_state.layers[self.require_adapter(adapter_name)])
        return {n: m for layers in self.adapter_state.layers.values() for n, m in layers.items()}

    def trainable_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """Return the parameters that train while this adapter is active."""
        found: list[nn.Parameter] = []
        for module in self.adapted_layers(adapter_name).values():
            if adapter_name in module.adapters:
                found += module.adapters[adapter_name].trainable_parameters()  # type: ignore[operator]
            if adapter_name in module.trained_copies:
                found += module.trained_copies[adapter_name].parameters()
        return found

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return (number of trainable parameters, number of all parameters)."""
        return count_trainable_and_all_parameters(self)

    # --- adding, choosing and removing adapters -----------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        strict: bool = True,
    ) -> TargetMatches:
        """Add another adapter, inactive, and return what it matched.

        `strict` is as in `match_targets`, the other arguments as in `get_peft_model`.
        """
        state = self.adapter_state
        self.require_free_name(adapter_name)
        if not peft_config.name:
            raise UsageError(f"{type(peft_config).__name__} is not the config of a method", "such as LoraConfig")
        if peft_config.prefix and adapter_name in peft_config.prefix:
            what = f"the adapter's name {adapter_name!r} is a part of {peft_config.prefix!r}, the start of its tensors'"
            warnings.warn(f"{what} names: PEFT does not load a file under this name", stacklevel=3)
        autocast_adapter_dtype = autocast_adapter_dtype and peft_config.copies_in_fp32
        self._change_base(peft_config)
        if strict:
            _require_one_with_biases([*state.configs.values(), peft_config])
        peft_config.check_required()
        peft_config.check_model(self)
        peft_config.fill_from_model(self)
        report = match_targets(self, peft_config, require_every_match=strict)
        if getattr(peft_config, "target_modules", ()) is None:  # as in PEFT, a config tells which default it used
            default = peft_config.default_targets(self) or []
            matched = [t for t in default if any(matches_regex_or_names([t], n) for n in report.kinds)]
            vars(peft_config)["target_modules"] = matched or None
        state.configs[adapter_name], state.reports[adapter_name] = peft_config, report
        layers = state.layers[adapter_name] = {}  # filled step by step, so that a failure can be undone
        how = {"autocast": autocast_adapter_dtype, "skip_init": not strict or low_cpu_mem_usage}
        shares_copies = peft_config.trains_every_weight or (
            getattr(peft_config, "ensure_weight_tying", False) and find_tied_embedding_names(self)
        )
        try:
            with self.disable_adapter():  # modules read and copy the base's own weights
                sites = [layer.read_adapter_site(n, kind, self, **how) for n, kind in report.kinds.items()]
                if low_cpu_mem_usage:
                    sites = [replace(site, device=torch.device("meta")) for site in sites]
                modules = dict(zip(report.kinds, peft_config.build_all(sites), strict=True))
                tied: dict[int, nn.Parameter] | None = {} if shares_copies else None
                for name in {**modules, **report.trained_parameter_copies}:
                    adapted = layers[name] = layer.swap_to_adapted_class(
                        self.get_submodule(name), state.active_state, peft_config.name
                    )
                    if name in modules:
                        modules[name].method = peft_config.name
                        adapted.adapters[adapter_name] = modules[name]
                    if name in report.trained_parameter_copies:
                        names = report.trained_parameter_copies[name]
                        layer.copy_parameters_to_adapter(adapted, adapter_name, names, autocast_adapter_dtype, tied)
                self.set_requires_grad(adapter_name, False)
        except BaseException:
            self.detach_adapter(adapter_name)
            raise
        return report

    def copy_biases(self, adapter_name: str, names: list[str]) -> None:
        """Give an adapter its own copies of these biases of the base, such as `model.norm.bias`."""
        state, report = self.adapter_state, self.match_report(adapter_name)
        trains = any(p.requires_grad for p in self.trainable_parameters(adapter_name))
        copied = {name.rpartition(".")[0]: [name.rpartition(".")[2]] for name in names}
        for name, parameters in copied.items():
            method = state.configs[adapter_name].name
            adapted = layer.swap_to_adapted_class(self.get_submodule(name), state.active_state, method)
            state.layers[adapter_name][name] = adapted
            layer.copy_parameters_to_adapter(adapted, adapter_name, parameters, autocast=True, tied=None)
            adapted.trained_copies[adapter_name].requires_grad_(trains)
        biases, copied = (*report.biases, *names), {**report.trained_parameter_copies, **copied}
        state.reports[adapter_name] = replace(report, biases=biases, trained_parameter_copies=copied)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter (or several) and deactivate the others; only active adapters run and train."""
        state = self.adapter_state
        requested = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        names = self.require_adapters(requested)
        if not names:
            raise UsageError("no adapter is given", hint="`with model.disable_adapter():` runs the base alone")
        self._require_different_copies(names)
        if self.merged_adapters:
            text = f"{format_names(self.merged_adapters)} is merged into the base: set_adapter unmerges it first"
            warnings.warn(text, stacklevel=2)
            self.unmerge_adapter()
        self.set_requires_grad([n for n in self.active_adapters if n not in names], False)
        self.set_requires_grad(names, not inference_mode)
        state.active_state.active = names
        self.reset_layer_selections()

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Set whether the parameters of these adapters train."""
        if requires_grad:
            keep_differentiable_4bit_layout(self.adapter_state.repacking_layers)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for p in self.trainable_parameters(name):
                p.requires_grad_(requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base alone inside the `with`; a merge is undone before and made again after."""
        state = self.adapter_state
        before = state.active_state.enabled, state.inside_disable_adapter
        merged = self.merged_adapters
        if any(m.selection.enabled is not before[0] for m in state.active_state.layers_with_own):
            text = "some layers' adapters were enabled or disabled apart from the model's"
            warnings.warn(f"{text}: after disable_adapter all follow the model again", stacklevel=3)
            self.reset_layer_selections()
        self.unmerge_adapter()
        state.active_state.enabled, state.inside_disable_adapter = False, True
        state.active_state.caches.clear()
        try:
            yield
        finally:
            state.active_state.enabled, state.inside_disable_adapter = before
            if merged:
                self.merge_adapter(merged)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove an adapter or several; if no active one is left, the first remaining adapter becomes active."""
        names = self.require_adapters([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        self._require_enabled("delete_adapter")
        if merged := sorted({*names} & {*self.merged_adapters}):
            raise UsageError(
                f"{format_names(merged)} is merged into the base", hint="unmerge_adapter() first", code="merge-differs"
            )
        for name in names:
            self.detach_adapter(name)
        if self.peft_config and not self.active_adapters:
            first, config = next(iter(self.peft_config.items()))
            self.set_adapter(first, inference_mode=config.inference_mode)

    def rename_adapter(self, adapter_name: str, new_name: str) -> None:
        """Rename an adapter; it stays active or merged if it was."""
        state = self.adapter_state
        self.require_free_name(new_name)
        for module in self.adapted_layers(adapter_name).values():
            for modules in (module.adapters, module.trained_copies):
                if adapter_name in modules:
                    modules[new_name] = modules.pop(adapter_name)
        names = {adapter_name: new_name}
        for table in ("configs", "reports", "layers", "training_fingerprints"):
            setattr(state, table, {names.get(n, n): value for n, value in getattr(state, table).items()})
        active = state.active_state
        active.active = [names.get(n, n) for n in active.active]
        active.merged = [names.get(n, n) for n in active.merged]
        self.reset_layer_selections()

    def unload(self) -> Any:
        """Remove all adapters and return the plain base, bit for bit as it was."""
        self._require_enabled("unload")
        self.unmerge_adapter()
        return self._restore_base_class()

    def detach_adapter(self, name: str) -> None:
        """Take an adapter out of all layers; unlike `delete_adapter`, it makes no other adapter active."""
        state = self.adapter_state
        for module in state.layers.pop(name).values():
            layer.remove_adapter_from_layer(module, name)
        del state.configs[name], state.reports[name]
        state.training_fingerprints.pop(name, None)
        state.active_state.active = [n for n in self.active_adapters if n != name]
        self.reset_layer_selections()

    def reset_layer_selections(self) -> None:
        """Make all layers follow the model's active adapters, also those for which others were chosen."""
        state = self.adapter_state.active_state
        for module in state.layers_with_own:
            vars(module)["selection"] = state
        state.layers_with_own = []
        state.caches.clear()

    # --- merging ------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the active adapters (or these) into the base's weights; `unmerge_adapter` restores them bit for bit.

        Raises:
            MergeUnsupported: a method has no merge, the base is quantized, or (safe_merge) the result is not finite.
        """
        self._require_enabled("merge_adapter")
        if self.adapter_state.base_layer_replication is not None:
            raise MergeUnsupported("layers that share weights (layer_replication) cannot take an adapter each")
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}")
        before = self.merged_adapters
        layers = self.adapted_layers()
        names = {n: m.selection.active if adapter_names is None else adapter_names for n, m in layers.items()}
        requested = dict.fromkeys(a for own in names.values() for a in own)
        added = [self.require_adapter(a) for a in requested if a not in before]
        if before:
            more = f"now {format_names(added)} is merged, too" if added else "there is nothing to merge"
            warnings.warn(f"{format_names(before)} is merged already: {more}", stacklevel=2)
        self._require_different_copies([*before, *added])
        try:
            for name, module in layers.items():
                present = [a for a in names[name] if a in module.adapters or a in module.trained_copies]
                if present:
                    merge_adapters_into_layer(name or type(self).__name__, module, present, require_finite=safe_merge)
            retie_equal_merged_parameters(layers.values())
        except BaseException:
            self.unmerge_adapter()
            raise
        self.adapter_state.active_state.merged = [*before, *added]
        self.adapter_state.active_state.caches.clear()

    def unmerge_adapter(self) -> None:
        """Undo a merge: the base gets its original parameter objects back."""
        for module in self.adapted_layers().values():
            unmerge_adapters_from_layer(module)
        self.adapter_state.active_state.merged = []
        self.adapter_state.active_state.caches.clear()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """Merge for good and return the plain base: its own class, no adapters, changed weights."""
        tied = group_tied_parameter_names(self)
        self.unmerge_adapter()
        self.merge_adapter(adapter_names, safe_merge)
        model = self._restore_base_class()
        untie_partly_tied_after_merge(model, tied)
        return model

    # --- internals ----------------------------------------------------------------------------------------------

    def require_adapter(self, name: str) -> str:
        """Return the name, or raise if it is no adapter's."""
        return self.require_adapters([name])[0]

    def require_adapters(self, names: Iterable[str]) -> list[str]:
        """Return each name once, or raise if one is no adapter's."""
        names, known = list(dict.fromkeys(names)), sorted(self.peft_config)
        if unknown := [n for n in names if n not in known]:
            message = f"there is no adapter {unknown[0]!r}{suggest(unknown[0], known)}"
            raise UsageError(message, f"one of {format_names(known)}")
        return names

    def require_free_name(self, name: str) -> None:
        """Raise if a new adapter cannot have this name."""
        if name in self.peft_config:
            raise UsageError(f"the model already has an adapter {name!r}", "another adapter_name")
        # An adapter's name is a part of keys, and the name of its folder.
        plain = name.isprintable() and not set(name) & set('./\\:*?"<>|') and len(name.encode()) <= 200
        if not name or not plain or name == BASE_ROW or hasattr(nn.ModuleDict(), name):
            expected = "a name without dots, slashes and control characters that is not a method of ModuleDict"
            raise UsageError(f"{name!r} cannot be the name of a new adapter", expected)

    def require_unmerged(self) -> None:
        """Raise if an adapter is merged."""
        if merged := self.merged_adapters:
            raise UsageError(
                f"{format_names(merged)} is merged into the base", hint="unmerge_adapter() first", code="merge-differs"
            )

    def _require_enabled(self, what: str) -> None:
        if self.adapter_state.inside_disable_adapter:
            raise UsageError(f"{what} is called inside disable_adapter()", "a call after the `with` block")

    def _require_different_copies(self, names: list[str]) -> None:
        """Raise if two adapters train copies of one module, or of one row: their updates cannot be added."""
        owners: dict[Any, str] = {}
        for adapter in names:
            for name, module in self.adapter_modules(adapter).items():
                both = [r for r in module.replaced_rows() if owners.setdefault((name, r), adapter) != adapter]
                if both:
                    message = f"{owners[name, both[0]]!r} and {adapter!r} both train rows {both[:4]} of {name}"
                    raise UsageError(message, hint="adapters with different tokens, or one of them at a time")
            for name in self.adapter_state.reports[adapter].trained_parameter_copies:
                if owners.setdefault(name, adapter) != adapter:
                    message = f"{owners[name]!r} and {adapter!r} both have their own copy of {name}"
                    raise UsageError(message, hint="activate one of them at a time")

    def _change_base(self, config: PeftConfig) -> None:
        """Change the base as the first adapter asks; further adapters must ask for the same."""
        state, wanted = self.adapter_state, getattr(config, "layer_replication", None)
        here = getattr(state.base_layer_replication, "ranges", None)
        if not state.configs:
            state.base_layer_replication = config.change_base(self)
        elif wanted != here:
            raise UsageError(f"layer_replication is {wanted}, and the model's adapters have {here}", "the same for all")

    def _restore_base_class(self) -> Any:
        state = self.adapter_state
        if state.enabled_input_require_grads:
            self.disable_input_require_grads()
        for module in state.repacking_layers:
            module.support_avx512bf16_for_cpu = True
        for adapted in self.adapted_layers().values():
            layer.restore_base_class(adapted)
        for name, parameter in self.named_parameters():
            # A name may be new: a merge splits a tied tensor into two.
            parameter.requires_grad_(state.was_trainable.get(name, any(state.was_trainable.values())))
        if state.base_layer_replication is not None:
            state.base_layer_replication.undo(self)
        load_compat_hook().restore_backbone_class(self)
        del self.__dict__["_slimtune"]
        self.__class__ = state.base_class  # type: ignore[assignment]
        return self


def _require_one_with_biases(configs: Iterable[Any]) -> None:
    """Raise if two new adapters would train the base's biases, as PEFT does."""
    if (count := sum(getattr(c, "bias", "none") != "none" for c in configs)) > 1:
        message = f"{count} adapters would train the base's biases"
        hint = "adapters with biases that were saved can be loaded together: load_adapter"
        raise UsageError(message, 'bias="none" for all but one', hint)
