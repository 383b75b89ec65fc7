"""PeftModel: a base with adapters, in place.

`get_peft_model(model, config)` returns the same object, adapted: its class becomes a subclass of its own class and of
`PeftModel` (torch's FSDP2 and `parametrize` do so, too), the matched modules become adapted layers, the rest freezes.
So the adapted model still is a `LlamaForCausalLM` and a `PreTrainedModel`: generate, Trainer, pipelines and TRL take it
as it is. `unload()` gives back the very base that came in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

from torch import nn

from ..errors import UsageError, format_names, nearest
from ..peft_compat import register_as_peft_subclass, register_with_transformers
from . import layer
from .base import AdapterModule
from .config import PeftConfig
from .conversion import AdapterCombining
from .mixed_batch import BASE_ROW, AdapterCalls
from .publishing import AdapterPublishing
from .quantized import count_values, disable_cpu_repacking, find_repacking_layers
from .state_dict import AdapterFiles
from .targets import MatchReport, select_targets


class AdapterMerging:
    """The part of a `PeftModel` that merges."""

    def merge_adapter(self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold the active adapters (or these) into the base's weights; `unmerge_adapter` restores them bit for bit.

        Raises:
            MergeRefused: a method cannot be merged, the base is quantized, or (safe_merge) a result is not finite.
        """
        at = self._attached
        if at.merged:
            return
        self._enabled("merge_adapter")
        names = [self._known(n) for n in dict.fromkeys(adapter_names or at.active)]
        self._no_module_twice(names)
        members = {n: m for a in names for n, m in at.members[a]}
        try:
            for name, module in members.items():
                layer.merge(name or type(self).__name__, module, names, check=safe_merge)
            at.merged = names
            self._rerun()
        finally:
            if not at.merged:
                for module in members.values():
                    layer.unmerge(module)

    def unmerge_adapter(self: Any) -> None:
        """Take a merge out again: the base's parameters are the very objects they were."""
        at = self._attached
        for module in at.modules().values():
            layer.unmerge(module)
        at.merged = []
        self._rerun()

    def merge_and_unload(
        self: Any, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """Merge for good and return the plain base: its own class, no adapters, its weights changed."""
        del progressbar
        names: dict[int, list[str]] = {}
        for n, p in self.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(n)
        shared = [group for group in names.values() if len(group) > 1]
        self.unmerge_adapter()
        self.merge_adapter(adapter_names, safe_merge)
        after = dict(self.named_parameters(remove_duplicate=False))
        model = self._strip()
        if any(len({id(after[n]) for n in group}) > 1 for group in shared):
            mark_embeddings_untied(model)
        return model


def mark_embeddings_untied(model: Any) -> None:
    """Say in the config that embeddings and head are two tensors now, so that saving keeps both."""
    config = getattr(model, "config", None)
    if config is None:
        return
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


@dataclass
class Attached:
    """What is attached to a model: configs, reports and adapted modules by adapter name, and what is active."""

    base_class: type[nn.Module]
    was_trainable: dict[str, bool]
    configs: dict[str, PeftConfig] = field(default_factory=dict)
    reports: dict[str, MatchReport] = field(default_factory=dict)
    members: dict[str, list[tuple[str, layer.AdaptedLayer]]] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    enabled: bool = True
    input_grads: bool = False
    """Whether attaching made the embeddings' output carry a gradient, for activation checkpointing."""
    repacking: list[Any] = field(default_factory=list)
    """4-bit modules that would leave the layout gradients pass through, if they were let."""
    running: layer.ActiveAdapters = field(default_factory=layer.ActiveAdapters)
    """What the adapted modules run with; each of them holds this object."""

    def modules(self) -> dict[str, layer.AdaptedLayer]:
        """Every adapted module by name."""
        return {n: m for members in self.members.values() for n, m in members}

    def deltas(self, adapter: str) -> dict[str, AdapterModule]:
        """An adapter's deltas by the names of their modules."""
        return {n: m.adapters[adapter] for n, m in self.members[adapter] if adapter in m.adapters}  # type: ignore[misc]

    def trained(self, adapter: str) -> Iterator[nn.Parameter]:
        """The parameters an adapter trains."""
        for _, module in self.members.get(adapter, []):
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
    """Adapt `model` in place and return it; its own weights are frozen and never written.

    Args:
        model: a transformers model, or any module with Linear, Conv1D or Embedding layers.
        peft_config: the method's config.
        adapter_name: name of the adapter.
        mixed: taken for PEFT's sake; adapters of different methods mix in any case.
        autocast_adapter_dtype: keep the adapter in fp32 above a 16-bit base.
        revision: revision of the base, noted in the config.
        low_cpu_mem_usage: taken for PEFT's sake; an adapter is made once, where it belongs.

    Raises:
        TargetError: a target, layer index, pattern or module to save matches nothing.
        UsageError: the model has adapters already.
    """
    del mixed, low_cpu_mem_usage
    if isinstance(model, PeftModel):
        raise UsageError(
            f"the model already has adapters: {format_names(model.peft_config)}",
            "a base without adapters",
            "model.add_adapter(name, config) for another one, or model.unload() first",
        )
    peft_config.revision = revision or peft_config.revision
    peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or peft_config.base_model_name_or_path
    return PeftModel._adopt(model, adapter_name, peft_config, autocast_adapter_dtype, strict=True)


class PeftModel(AdapterCalls, AdapterMerging, AdapterCombining, AdapterFiles, AdapterPublishing):
    """Mixed into the class of a base that has adapters; PEFT's names.

    `PeftModel(model, config)` is `get_peft_model(model, config)`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Adapt the model given; without arguments (copying) make a bare object."""
        if not args and not kwargs:
            return object.__new__(cls)
        return get_peft_model(*args, **kwargs)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Do nothing: the base was initialised when it was made."""

    # --- what is attached ---------------------------------------------------------------------------------------

    @property
    def _attached(self) -> Attached:
        return self.__dict__["_slimtune"]

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configs by adapter name."""
        return self._attached.configs

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in the order they are applied."""
        return list(self._attached.active)

    @property
    def active_adapter(self) -> str:
        """Name of the (first) active adapter."""
        return self._attached.active[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        """Config of the (first) active adapter."""
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> str:
        """PEFT's name of the active adapter's method."""
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str]:
        """Names of the modules trained whole."""
        return {n for r in self._attached.reports.values() for n in r.trained_whole}

    @property
    def base_model(self) -> Any:
        """The base's backbone, as transformers means it; `base_model.model` is the whole model, as PEFT means it."""
        return getattr(self, getattr(self, "base_model_prefix", "") or "\0", self)

    def get_base_model(self) -> Any:
        """Return the base: this very object, since adapting happens in place."""
        return self

    def match_report(self, adapter_name: str | None = None) -> MatchReport:
        """Return what an adapter changes and what it leaves."""
        return self._attached.reports[self._known(adapter_name or self.active_adapter)]

    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        """Return (trained parameters, all parameters)."""
        counts = [(count_values(p), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's words."""
        trained, every = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {100 * trained / every:.4f}")

    # --- what each adapter added, for the rest of the library ---------------------------------------------------

    def adapter_modules(self, adapter_name: str) -> dict[str, AdapterModule]:
        """Return an adapter's modules by the name of the base module each one adapts."""
        return self._attached.deltas(self._known(adapter_name))

    def adapted_layers(self, adapter_name: str | None = None) -> dict[str, layer.AdaptedLayer]:
        """Return the base modules that an adapter (None: any adapter) adapts, by name."""
        if adapter_name is None:
            return self._attached.modules()
        return dict(self._attached.members[self._known(adapter_name)])

    def trainable_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """Return the parameters that train when this adapter is active."""
        return list(self._attached.trained(self._known(adapter_name)))

    @property
    def base_model_class(self) -> type[nn.Module]:
        """Class of the model before adapters were attached."""
        return self._attached.base_class

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters whose updates are merged into the base's weights now."""
        return list(self._attached.merged)

    # --- the life of adapters -----------------------------------------------------------------------------------

    def _first(self, name: str, config: PeftConfig, autocast: bool, *, strict: bool) -> Self:
        try:
            self.add_adapter(name, config, autocast_adapter_dtype=autocast, strict=strict)
        except BaseException:
            self.unload()
            raise
        self.set_adapter(name, inference_mode=config.inference_mode)
        if any(getattr(m, "gradient_checkpointing", False) for m in self.modules()):  # type: ignore[attr-defined]
            self._inputs_carry_gradients()
        return self

    def add_adapter(
        self: Any,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        strict: bool = True,
    ) -> MatchReport:
        """Attach one more adapter, inactive, and return what it matched.

        Raises:
            UsageError: the name is taken or cannot be a module's name.
            TargetError: see `get_peft_model`.
        """
        del low_cpu_mem_usage
        at = self._attached
        self._free(adapter_name)
        if not peft_config.name:
            raise UsageError(f"{type(peft_config).__name__} adds nothing to layers", "a method's config: LoraConfig")
        peft_config.infer_from_model(self)
        report = select_targets(self, peft_config, strict=strict)
        at.configs[adapter_name], at.reports[adapter_name], at.members[adapter_name] = peft_config, report, []
        try:
            with self.disable_adapter():  # what is copied and read is the base's own
                self._attach(adapter_name, {"autocast": autocast_adapter_dtype}, loading=not strict)
        except BaseException:
            self._drop(adapter_name)
            raise
        return report

    def _attach(self: Any, adapter: str, how: dict[str, bool], *, loading: bool) -> None:
        at, modules = self._attached, dict(self.named_modules())
        report, members = at.reports[adapter], at.members[adapter]
        placed: dict[str, layer.AdaptedLayer] = {}

        def adapted(name: str) -> layer.AdaptedLayer:
            if name not in placed:
                placed[name] = layer.make_adapted(modules[name], at.running)
                members.append((name, placed[name]))  # at once: what fails later is taken back by them
            return placed[name]

        sites = [layer.get_site(n, kind, self, **how, loading=loading) for n, kind in report.kinds.items()]
        for site, delta in zip(sites, at.configs[adapter].build_all(sites), strict=True):
            adapted(site.name).adapters[adapter] = delta
        tied: dict[int, nn.Parameter] | None = {} if at.configs[adapter].trains_every_weight else None
        for name, parameters in _owned(report, modules).items():
            layer.own(adapted(name), adapter, parameters, tied=tied, **how)
        for parameter in at.trained(adapter):
            parameter.requires_grad_(False)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter (or several) the active one: it alone is applied, and it alone trains."""
        at = self._attached
        given = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        names = [self._known(n) for n in dict.fromkeys(given)]
        if not names:
            raise UsageError(
                "no adapter is named",
                f"one or more of {format_names(at.configs)}",
                "`with model.disable_adapter():` runs the base alone",
            )
        self._no_module_twice(names)
        self._unmerged()
        before, at.active = at.active, names
        if not inference_mode:
            disable_cpu_repacking(at.repacking)
        for name in {*before, *names}:
            for p in at.trained(name):
                p.requires_grad_(name in names and not inference_mode)
        self._rerun()

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Let the parameters of these adapters train, or not."""
        if requires_grad:
            disable_cpu_repacking(self._attached.repacking)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for p in self._attached.trained(self._known(name)):
                p.requires_grad_(requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base alone inside the `with`; a merge is taken out and put back."""
        at = self._attached
        merged, was = list(at.merged), at.enabled
        self.unmerge_adapter()
        at.enabled = False
        self._rerun()
        try:
            yield
        finally:
            at.enabled = was
            self._rerun()
            if merged:
                self.merge_adapter(merged)  # which is refused while disabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the active one, the first that is left becomes active."""
        at = self._attached
        self._known(adapter_name)
        self._enabled("delete_adapter")
        if len(at.configs) == 1:
            raise UsageError(
                f"{adapter_name!r} is the only adapter", "at least one is left", "model.unload() gives the base"
            )
        self._unmerged()
        self._drop(adapter_name)
        if not at.active:
            first, config = next(iter(at.configs.items()))
            self.set_adapter(first, inference_mode=config.inference_mode)

    def rename_adapter(self, adapter_name: str, new_name: str) -> None:
        """Give an adapter another name; what is active and merged stays so."""
        at = self._attached
        self._known(adapter_name)
        self._free(new_name)
        for _, module in at.members[adapter_name]:
            layer.rename(module, adapter_name, new_name)
        for table in (at.configs, at.reports, at.members):
            named = [(new_name if n == adapter_name else n, v) for n, v in table.items()]
            table.clear()
            table.update(named)  # type: ignore[arg-type]
        at.active, at.merged = ([new_name if n == adapter_name else n for n in ns] for ns in (at.active, at.merged))
        self._rerun()

    def unload(self) -> Any:
        """Remove every adapter and return the plain base, bit for bit as it was attached to."""
        self._enabled("unload")
        self.unmerge_adapter()
        return self._strip()

    # --- inside -------------------------------------------------------------------------------------------------

    @classmethod
    def _adopt(cls, model: nn.Module, name: str, config: PeftConfig, autocast: bool, *, strict: bool) -> Any:
        return _become_peft(model)._first(name, config, autocast, strict=strict)

    def _known(self, name: str) -> str:
        if name not in self._attached.configs:
            raise UsageError(
                f"there is no adapter {name!r}{nearest(name, self._attached.configs)}",
                f"one of {format_names(self._attached.configs)}",
            )
        return name

    def _free(self, name: str) -> None:
        taken = name in self._attached.configs or name == BASE_ROW or hasattr(nn.ModuleDict(), name)
        if taken or not name or "." in name:
            raise UsageError(
                f"{name!r} cannot name a new adapter",
                f"a name without dots, no method of a ModuleDict, other than {format_names(self._attached.configs)}",
                "delete_adapter(name) first to replace one",
            )

    def _unmerged(self) -> None:
        merged = self._attached.merged
        if merged:
            raise UsageError(
                f"{format_names(merged)} is merged into the base", "an unmerged model", "unmerge_adapter() first"
            )

    def _enabled(self, what: str) -> None:
        if not self._attached.enabled:
            raise UsageError(f"{what} inside disable_adapter()", "a call after the `with`")

    def _no_module_twice(self, names: list[str]) -> None:
        """Deltas add up; two whole copies of one module do not."""
        owners: dict[str, str] = {}
        for adapter in names:
            for name, module in self._attached.members[adapter]:
                if adapter in module.trained_copies and owners.setdefault(name, adapter) != adapter:
                    raise UsageError(
                        f"adapters {owners[name]!r} and {adapter!r} both train {name} whole",
                        "active adapters that own different modules",
                        "activate one of them at a time",
                    )

    def _drop(self, name: str) -> None:
        """Take one adapter out; the others keep what they are, trained or frozen, merged or not."""
        at = self._attached
        for _, module in at.members.pop(name):
            layer.remove(module, name)
        del at.configs[name], at.reports[name]
        at.active = [n for n in at.active if n != name]
        self._rerun()

    def _rerun(self) -> None:
        """Let the adapted modules run with what is active now."""
        at = self._attached
        at.running.active = tuple(at.merged or at.active) if at.enabled else ()
        at.running.forget()

    def _strip(self: Any) -> Any:
        at = self._attached
        if at.input_grads:
            self.disable_input_require_grads()
        for module in at.repacking:
            module.support_avx512bf16_for_cpu = True
        for module in at.modules().values():
            layer.restore(module)
        for name, parameter in self.named_parameters():
            # A name that is new: a tied tensor that a merge made two.
            parameter.requires_grad_(at.was_trainable.get(name, any(at.was_trainable.values())))
        backbone = self.base_model
        if backbone.__dict__.pop("_whole", None) is not None:
            backbone.__class__ = type(backbone).__bases__[0]
        elif backbone.__dict__.get("model") is self:
            del backbone.__dict__["model"]
        del self.__dict__["_slimtune"]
        self.__class__ = at.base_class
        return self


def _become_peft(model: nn.Module) -> PeftModel:
    register_with_transformers(PeftModel)
    base_class: Any = type(model)
    was_trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(False)
    model.__class__ = register_as_peft_subclass(_peft_class(base_class), "PeftModel")
    model.__dict__["_slimtune"] = Attached(base_class, was_trainable, repacking=find_repacking_layers(model))
    assert isinstance(model, PeftModel)
    backbone = model.base_model
    if not hasattr(backbone, "model"):  # PEFT's idiom `base_model.model`; not registered, so no cycle of modules
        if backbone is model:
            model.__dict__["model"] = model
        else:
            backbone.__dict__["_whole"] = model
            backbone.__class__ = _backbone_class(backbone.__class__)
    return model


@cache
def _backbone_class(base: Any) -> Any:
    # A backbone stays its own `base_model`: transformers looks for that under `model`, and would find the whole again.
    body = {"model": property(lambda self: self.__dict__["_whole"]), "base_model": property(lambda self: self)}
    return type(base.__name__, (base,), {**body, "__module__": base.__module__, "__doc__": base.__doc__})


@cache
def _peft_class(base: Any) -> Any:
    # The base's name: transformers' Trainer and its checkpoints go by it.
    return type(base.__name__, (PeftModel, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _owned(report: MatchReport, modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Which parameters of which modules an adapter copies: those trained whole, and trained biases."""
    trained_copies: dict[str, list[str]] = {}
    for whole in report.trained_whole:
        for name, module in modules.items():
            if name == whole or name.startswith(f"{whole}."):
                own = [n for n, p in module._parameters.items() if p is not None]
                if own and not {"adapters", "trained_copies"} & set(name.split(".")):
                    trained_copies[name] = own
    for bias in report.biases:
        name = bias.removesuffix(".bias")
        trained_copies.setdefault(name, [])
        if "bias" not in trained_copies[name]:
            trained_copies[name].append("bias")
    return trained_copies
