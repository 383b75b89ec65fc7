"""Convert adapters into one LoRA: weighted sums of adapters, and low-rank approximations of any weight change.

    ΔW_i     what adapter i adds to a layer's weight (out, in): s B A if it has factors, else merge_into(W) − W
    svd      B A ≈ Σ w_i ΔW_i, the nearest pair of rank r       any methods and ranks; exact if r is large enough
    cat      A = [w_1 s_1 A_1; w_2 s_2 A_2; …]  B = [B_1, B_2, …]        exact; the ranks add up
    linear   A = Σ ±√|w_i s_i| A_i              B = Σ √|w_i s_i| B_i     approximate: also multiplies A_i by B_j

`ties`, `dare_linear`, `dare_ties` and `magnitude_prune` are `linear` on pruned A_i and B_i; with the suffix `_svd` they
prune ΔW_i and take the nearest pair of rank r. The result is a LoRA with scale 1 (alpha = r in every layer); a sum of
(IA)³ without svd_rank is an (IA)³ with l = Σ w_i l_i, as in PEFT.

Papers: TIES https://arxiv.org/abs/2306.01708, DARE https://arxiv.org/abs/2311.03099.
"""

import dataclasses
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..core.adapters.adapted_layer import read_adapter_site
from ..core.adapters.adapter_files import save_adapter
from ..core.adapters.adapter_module import (
    WEIGHT_KINDS,
    AdapterModule,
    AdapterSite,
    MergeUnsupported,
    SharedParameterHolder,
)
from ..core.adapters.adapter_tensors import get_peft_model_state_dict
from ..core.adapters.method_registry import get_method_config_class
from ..core.adapters.peft_config import PeftConfig
from ..core.adapters.peft_model import PeftModel
from ..core.adapters.targets import match_targets
from ..errors import TargetError, UsageError, format_names, suggest
from .low_rank_approximation import LowRankApproximation, combine_weighted_matrices, make_low_rank_approximation

CombinationType = Literal[
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
LoraPair = tuple[Tensor, Tensor]
"""`A (r, in)` and `B (out, r)` of a LoRA with scale 1."""


@dataclass(frozen=True)
class _LoraReport:
    """How well a LoRA approximates the adapter it was made from.

    Args:
        adapter, source: names of the LoRA and of the original adapter.
        ranks: rank by layer.
        errors: ‖ΔW − B A‖ / ‖ΔW‖ (Frobenius norm) by layer: 0 is exact, 1 means nothing is left.
        error: the same over all layers together.
    """

    adapter: str
    source: str
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float

    def __str__(self) -> str:
        low, high, worst = min(self.ranks.values()), max(self.ranks.values()), max(self.errors, key=self.errors.get)  # type: ignore[arg-type]
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        return (
            f"{self.source!r} as a LoRA {self.adapter!r} of {ranks} on {len(self.ranks)} modules: relative error "
            f"{self.error:.2e}, at most {self.errors[worst]:.2e} ({worst})"
        )


class _NotConvertible(UsageError, TypeError):
    """An adapter does more than a LoRA can."""


class _WeightDelta:
    """One adapter's change ΔW of one layer's weight, and its coefficient in a weighted sum.

    `factors` are `A (r, in)`, `B (out, r)` in fp32 or wider and the scale; None if the change has no such form.
    """

    def __init__(
        self, adapter: str, coefficient: float, module: Any, site: AdapterSite, activated: bool = False
    ) -> None:
        self.adapter, self.coefficient, self.module, self.site = adapter, coefficient, module, site
        own = next((p.dtype for p in module.parameters()), torch.float32)
        self.dtype = torch.promote_types(own, torch.float32)
        # All activated LoRAs of a sum change the same tokens, and so does the sum.
        self.factors: Any = (*module.low_rank(), module.scale) if activated else module.low_rank_factors()
        if self.factors is not None:
            A, B, scale = self.factors
            self.factors = A.to(self.dtype), B.to(self.dtype), float(scale)

    def unscaled_dense(self) -> Tensor:
        """Return `ΔW (out, in)` without the coefficient."""
        if self.factors is not None:
            return (self.factors[1] @ self.factors[0]) * self.factors[2]
        # float64, since this is a small difference of large numbers.
        before, bias = self.site.weight().double(), self.site.bias()
        try:
            after, bias_after = self.module.merge_into(before, bias)
        except MergeUnsupported as e:
            raise _not_a_weight_change(self.adapter, self.site.name, str(e)) from e
        if bias_after is not bias:
            raise _not_a_weight_change(self.adapter, self.site.name, "it changes the bias")
        return (after.double() - before).to(self.dtype)


class PeftModelToLoraMixin(PeftModel):
    """Mixed into adapted models: makes a LoRA from other adapters."""

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: CombinationType = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add a LoRA that computes a weighted sum of adapters, inactive. Modules trained in full are copied.

        Args:
            adapters: names of the adapters.
            weights: a coefficient for each adapter; a negative one subtracts.
            adapter_name: name of the new adapter.
            combination_type: see the top of this file; one adapter without svd_rank is always "linear".
            svd_rank: rank of the result for "svd" types, 1 and up; None: the largest rank of the adapters.
            svd_clamp: quantile in (0, 1] of the result's values above which they are clamped.
            svd_full_matrices: ignored: it does not change the result.
            svd_driver: cuSOLVER method on CUDA; see `torch.linalg.svd`.
            density: fraction in (0, 1] of the values that pruning keeps.
            majority_sign_method: for "ties": the sign of the sum ("total") or the most frequent sign ("frequency").

        Raises:
            AdapterError: the adapters' files say that they were trained on different bases.
        """
        names = [self.require_adapter(n) for n in adapters]
        self.require_free_name(adapter_name)
        for name in names:
            if "parameters" in self.match_report(name).kinds.values():
                message = f"adapter {name!r} has target_parameters, which a weighted sum does not support"
                raise TargetError(message, "adapters without target_parameters")
        kind, kinds = str(combination_type), get_args(CombinationType)
        counts = f"{len(names)} adapters and {len(weights)} weights are given"
        _require(bool(names) and len(names) == len(weights), counts, "one weight for each adapter")
        is_finite = all(isinstance(w, int | float | Tensor) and math.isfinite(w) for w in weights)
        _require(is_finite, f"weights is {weights!r}", "finite numbers")
        _require(kind in kinds, f"combination_type is {kind!r}{suggest(kind, kinds)}", f"one of {format_names(kinds)}")
        is_rank = svd_rank is None or (isinstance(svd_rank, int) and svd_rank >= 1)
        _require(is_rank, f"svd_rank is {svd_rank!r}", "a whole number, 1 and up")
        _require(svd_clamp is None or 0 < svd_clamp <= 1, f"svd_clamp is {svd_clamp!r}", "a quantile in (0, 1]")
        is_density = not kind.startswith(("ties", "dare", "magnitude")) or (density is not None and 0 < density <= 1)
        _require(is_density, f"density is {density!r}", f"a fraction in (0, 1], which {kind!r} requires")
        is_method = majority_sign_method in ("total", "frequency")
        _require(is_method, f"majority_sign_method is {majority_sign_method!r}", "'total' or 'frequency'")
        self.require_unmerged()
        fingerprint = _find_what_was_trained_on(self, names, adapter_name)
        if kind == "svd" and svd_rank is None and all(self.peft_config[n].sums_parameters for n in names):
            _add_parameter_sum(self, adapter_name, list(zip(names, weights, strict=True)))
            self.adapter_state.training_fingerprints |= fingerprint
            return
        with self.disable_adapter():
            shared = _find_shared_fields([self.peft_config[n] for n in names])
            deltas = _collect_weight_deltas(self, names, weights, shared)
            kind, rank = _resolve_type(deltas, kind, svd_rank, single=len(names) == 1)
            pruning = kind.removesuffix("svd").removesuffix("_")
            how: dict[str, Any] = {"combination": pruning, "density": density or 1, "sign_by": majority_sign_method}
            pairs: dict[str, LoraPair]
            if kind == "cat":
                pairs = {n: _concatenate(layer) for n, layer in deltas.items()}
            elif kind.endswith("svd"):
                prune = how if pruning else None
                found = {n: _approximate(layer, rank, prune, svd_clamp, svd_driver) for n, layer in deltas.items()}
                # As in PEFT, the rank is the same also where the weight is smaller.
                padding = {n: rank - f.A.shape[0] for n, f in found.items()}
                pairs = {n: (F.pad(f.A, (0, 0, 0, padding[n])), F.pad(f.B, (0, padding[n]))) for n, f in found.items()}
            else:
                pairs = {n: _sum_factors(layer, how) for n, layer in deltas.items()}
            _add_lora(self, adapter_name, names, pairs, shared)
            for name, module in self.adapter_modules(adapter_name).items():
                if module.replaced_rows() and "trainable_token_indices" in shared:
                    _sum_token_rows(self, module, name, zip(names, weights, strict=True))
        self.adapter_state.training_fingerprints |= fingerprint

    def to_lora(
        self, adapter_name: str, rank: float, new_name: str | None = None, progressbar: bool = False
    ) -> _LoraReport:
        """Add a LoRA that approximates an adapter of any method that changes weights, inactive; report its error.

        Args:
            adapter_name: the adapter; a LoRA is accepted too, to change its rank.
            rank: int, 1 and up: rank of the result; or float in (0, 1]: the fraction of ‖ΔW‖² that each layer keeps,
                with the smallest rank that keeps it.
            new_name: name of the LoRA; None: `<adapter_name>_lora`.
            progressbar: show how many layers are done.
        """
        new_name = new_name or f"{adapter_name}_lora"
        self.require_adapter(adapter_name)
        self.require_free_name(new_name)
        is_rank = not isinstance(rank, bool) and (0 < rank <= 1 if isinstance(rank, float) else rank >= 1)
        _require(is_rank, f"rank is {rank!r}", "a whole number, 1 and up; or a fraction in (0, 1]")
        self.require_unmerged()
        with self.disable_adapter():
            deltas = _collect_weight_deltas(self, [adapter_name], [1.0])
            layers = tqdm(deltas.items(), desc="Converting to LoRA", disable=not progressbar)
            found = {n: _approximate(d, rank) for n, d in layers}
            _add_lora(self, new_name, [adapter_name], {n: f[:2] for n, f in found.items()}, {})
        self.adapter_state.training_fingerprints |= _find_what_was_trained_on(self, [adapter_name], new_name)
        lost, total = sum(f.squared_error for f in found.values()), sum(f.squared_norm for f in found.values())
        ranks = {n: f.A.shape[0] for n, f in found.items()}
        errors = {n: math.sqrt(f.squared_error / f.squared_norm) if f.squared_norm else 0.0 for n, f in found.items()}
        return _LoraReport(new_name, adapter_name, ranks, errors, math.sqrt(lost / total) if total else 0.0)


def convert_to_lora(
    model: Any, rank: float, adapter_name: str = "default", progressbar: bool = False, compile_kwargs: Any = None
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return a LoRA that approximates an adapter: its LoraConfig, and its tensors by their keys in a file.

    The model is not changed. `rank` is as in `PeftModel.to_lora`; PEFT's compile_kwargs are ignored.
    """
    with _temporary_lora(model, adapter_name, rank, progressbar) as report:
        return model.peft_config[report.adapter], get_peft_model_state_dict(model, adapter_name=report.adapter)


def save_as_lora(
    path: str | os.PathLike,
    model: Any,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> _LoraReport:
    """Write a LoRA that approximates an adapter into the folder `path`; see `convert_to_lora`."""
    with _temporary_lora(model, adapter_name, rank, progressbar) as report:
        save_adapter(model, Path(path), report.adapter)
        return report


@contextmanager
def _temporary_lora(model: Any, adapter: str, rank: float, progressbar: bool) -> Iterator[_LoraReport]:
    config = getattr(model, "peft_config", {}).get(adapter)
    if config is None or config.is_prompt_learning or config.is_adaption_prompt:
        message = f"the model has no adapter {adapter!r} that a LoRA could approximate"
        raise _NotConvertible(message, "an adapter that changes weights")
    if config.name == "lora":
        warnings.warn(f"{adapter!r} is a LoRA already: the conversion changes only its rank", stacklevel=4)
    names = (f"{adapter}_as_lora{'_' * n}" for n in range(len(model.peft_config) + 1))
    report = model.to_lora(adapter, rank, next(n for n in names if n not in model.peft_config), progressbar)
    try:
        yield report
    finally:
        model.detach_adapter(report.adapter)


def _collect_weight_deltas(
    model: Any, adapters: Sequence[str], coefficients: Sequence[float], shared: Collection[str] = ()
) -> dict[str, list[_WeightDelta]]:
    """Return the weight changes of some adapters by layer, in the model's order.

    `shared` are the fields of `_find_shared_fields`: the changes that they describe are not among the result.

    Raises:
        UsageError: an adapter changes something other than weights, or two adapters train a module in full.
    """
    copied = Counter(name for adapter in adapters for name in model.match_report(adapter).trained_parameter_copies)
    if both := [name for name, count in copied.items() if count > 1]:
        raise UsageError(f"several of the adapters train {format_names(both)} in full", "one that does at most")
    found: dict[str, list[_WeightDelta]] = {}
    for adapter, coefficient in zip(adapters, coefficients, strict=True):
        report = model.match_report(adapter)
        if report.biases:
            raise _not_a_weight_change(adapter, report.biases[0], "it trains biases")
        for name, module in model.adapter_modules(adapter).items():
            kind = report.kinds[name]
            if isinstance(module, SharedParameterHolder):
                continue
            if module.replaced_rows() and "trainable_token_indices" in shared:
                continue
            if kind not in WEIGHT_KINDS:
                raise _not_a_weight_change(adapter, name, f"it changes a {kind}")
            activated = "alora_invocation_tokens" in shared
            delta = _WeightDelta(adapter, float(coefficient), module, read_adapter_site(name, kind, model), activated)
            found.setdefault(name, []).append(delta)
    if not found:
        raise UsageError(f"{format_names(adapters)} does not change any weight", "an adapter that does")
    return {n: found[n] for n, _ in model.named_modules() if n in found}


def make_lora_config_rank_fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields of a LoraConfig for layers of these ranks with scale 1."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    last_parts = Counter(n.rpartition(".")[2] for n in ranks)
    # A pattern matches the end of a name: `^` is needed if another layer's name ends with this one's.
    patterns = {}
    for name, rank in ranks.items():
        if rank != r:
            ambiguous = last_parts[name.rpartition(".")[2]] > 1 and any(m.endswith(f".{name}") for m in ranks)
            patterns[f"^{name}" if ambiguous else name] = rank
    return {"r": r, "lora_alpha": r, "rank_pattern": patterns, "alpha_pattern": dict(patterns), "use_rslora": False}


def _require(condition: bool, message: str, expected: str) -> None:
    if not condition:
        raise UsageError(message, expected)


def _resolve_type(
    deltas: Mapping[str, list[_WeightDelta]], kind: str, rank: int | None, single: bool
) -> tuple[str, int]:
    """Return the combination type and the svd rank to use; raise if the adapters lack the factors or ranks it needs."""
    every = [d for layer in deltas.values() for d in layer]
    without = next((d for d in every if d.factors is None), None)
    if single and rank is None and without is None:
        return "linear", 0
    if without is not None and not kind.endswith("svd"):
        where = f"which adapter {without.adapter!r} does not have at {without.site.name}"
        raise UsageError(
            f"combination_type={kind!r} needs A and B, {where}", hint='combination_type="svd" with an svd_rank'
        )
    if without is not None and rank is None:
        message = f"svd_rank is not given, and adapter {without.adapter!r} has no rank at {without.site.name}"
        raise UsageError(message, "an svd_rank, such as 32")
    if kind.endswith("svd"):
        return kind, rank or max(d.factors[0].shape[0] for d in every)
    for name, layer in deltas.items():
        ranks = {d.adapter: d.factors[0].shape[0] for d in layer}
        if kind != "cat" and len(set(ranks.values())) > 1:
            message = f"combination_type={kind!r} adds A and B, whose ranks at {name} are {ranks}"
            raise UsageError(message, "equal ranks", 'combination_type="cat" or "svd"')
    return kind, 0


def _concatenate(deltas: list[_WeightDelta]) -> LoraPair:
    pairs = [(A * (d.coefficient * s), B) for d in deltas for A, B, s in [d.factors]]
    return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)


def _sum_factors(deltas: list[_WeightDelta], how: dict[str, Any]) -> LoraPair:
    As, Bs, _ = zip(*[d.factors for d in deltas], strict=True)
    scales = [d.coefficient * d.factors[2] for d in deltas]
    roots = [math.sqrt(abs(s)) for s in scales]
    # The sign goes into A only: in both factors it would cancel out.
    signed_roots = [math.copysign(r, s) for r, s in zip(roots, scales, strict=True)]
    return combine_weighted_matrices(As, signed_roots, **how), combine_weighted_matrices(Bs, roots, **how)


def _approximate(
    deltas: list[_WeightDelta], rank: float, prune: dict | None = None, clamp: float | None = None, driver: Any = None
) -> LowRankApproximation:
    """Return the low-rank pair nearest to a weighted sum of changes, pruned before if `prune` is given."""
    site, factors = deltas[0].site, [d.factors for d in deltas]
    total_rank = sum(f[0].shape[0] for f in factors if f is not None)
    is_low_rank = None not in factors and total_rank < min(site.in_features, site.out_features)
    if is_low_rank and prune is None and clamp is None:
        return make_low_rank_approximation(_concatenate(deltas), rank)
    total = combine_weighted_matrices(
        [d.unscaled_dense() for d in deltas], [d.coefficient for d in deltas], **(prune or {})
    )
    return make_low_rank_approximation(total, rank, clamp, driver)


def _find_shared_fields(configs: Sequence[Any]) -> dict[str, Any]:
    """Return the fields of LoRAs on the tokens that they change: a sum of LoRAs with the same tokens has them, too."""
    fields = ("alora_invocation_tokens", "trainable_token_indices")
    values = {f: [getattr(c, f, None) for c in configs] for f in fields}
    return {f: v[0] for f, v in values.items() if v[0] and all(other == v[0] for other in v)}


@torch.no_grad()
def _sum_token_rows(model: Any, module: AdapterModule, layer: str, weights: Iterable[tuple[str, float]]) -> None:
    """Set new trained rows, which are the base's W, to `W + Σ w_i (V_i − W)`."""
    for name, rows in module.named_parameters():
        sources = [(model.adapter_modules(source)[layer].get_parameter(name), w) for source, w in weights]
        rows.add_(torch.stack([w * (source - rows) for source, w in sources]).sum(0))


@torch.no_grad()
def _add_parameter_sum(model: Any, name: str, weights: Sequence[tuple[str, float]]) -> None:
    """Add an adapter whose parameters are the weighted sums of those of others of the same method."""
    configs, targets = [model.peft_config[source] for source, _ in weights], ("target_modules", "feedforward_modules")
    config = dataclasses.replace(configs[0], **{f: _join_names([getattr(c, f) for c in configs]) for f in targets})
    model.add_adapter(name, config, strict=False)
    for layer, module in model.adapter_modules(name).items():
        sources = [(m, w) for source, w in weights if (m := model.adapter_modules(source).get(layer)) is not None]
        for parameter_name, parameter in module.named_parameters():
            parts = [w * m.get_parameter(parameter_name) for m, w in sources]
            if any(part.shape != parameter.shape for part in parts):
                model.detach_adapter(name)
                raise UsageError(f"one adapter scales the input of {layer}, another one its output: they have no sum")
            parameter.copy_(sum(parts[1:], parts[0]))
    _copy_modules_to_save(model, name, [source for source, _ in weights])


def _join_names(given: Sequence[Any]) -> Any:
    """Return lists of names as one; patterns have to be equal."""
    if all(names == given[0] for names in given):
        return given[0]
    if any(isinstance(names, str) for names in given):
        raise UsageError(f"the adapters' patterns differ: {format_names(given)}", "lists of names, or equal patterns")
    return sorted({name for names in given for name in names or ()})


def _add_lora(
    model: Any, name: str, sources: Sequence[str], pairs: Mapping[str, LoraPair], shared: Mapping[str, Any]
) -> None:
    """Add a LoRA with these factors; modules that a source trains in full are copied from it."""
    config = _make_lora_config(model, sources, {n: A.shape[0] for n, (A, _) in pairs.items()}, shared)
    model.add_adapter(name, config, strict=False)
    with torch.no_grad():
        for layer_name, module in model.adapter_modules(name).items():
            if layer_name in pairs:
                A, B = module.low_rank()
                factors = module.low_rank_factors()  # None if it is activated
                A.copy_(pairs[layer_name][0])
                B.copy_(pairs[layer_name][1] / (module.scale if factors is None else factors[2]))
    _copy_modules_to_save(model, name, sources)


def _find_what_was_trained_on(model: Any, sources: Sequence[str], name: str) -> dict[str, str]:
    """Return what adapters that become the adapter `name` were trained on, by that name; {} if none says so.

    Raises:
        AdapterError: they were trained on different bases.
    """
    known = model.adapter_state.training_fingerprints
    if not any(source in known for source in sources):
        return {}
    from .training_fingerprint import combine_training_fingerprints  # imports what a training needs

    return {name: combine_training_fingerprints({source: known.get(source) for source in sources})}


def _copy_modules_to_save(model: Any, name: str, sources: Sequence[str]) -> None:
    with torch.no_grad():
        for layer in model.adapted_layers(name).values():
            if name in layer.trained_copies:
                source = next(s for s in sources if s in layer.trained_copies)
                values = layer.trained_copies[source].state_dict()
                for n, p in layer.trained_copies[name].state_dict(keep_vars=True).items():
                    p.copy_(values[n])


def _make_lora_config(
    model: Any, sources: Sequence[str], ranks: Mapping[str, int], shared: Mapping[str, Any]
) -> PeftConfig:
    configs: list[Any] = [model.peft_config[s] for s in sources]
    copied = dict.fromkeys(m for c in configs for m in (getattr(c, "modules_to_save", None) or []))
    fields: dict[str, Any] = {
        "base_model_name_or_path": configs[0].base_model_name_or_path,
        "revision": configs[0].revision,
        "task_type": next((c.task_type for c in configs if c.task_type), None),
        "fan_in_fan_out": getattr(configs[0], "fan_in_fan_out", False),
        "modules_to_save": list(copied) or None,
        **make_lora_config_rank_fields(ranks),
        **shared,
    }
    # The shortest description of the targets that matches exactly the layers in `ranks`.
    given: list[Any] = [getattr(c, "target_modules", None) for c in configs]
    candidates: list[Any] = [list(ranks), "|".join(map(re.escape, ranks))]
    if all(isinstance(t, set | list) for t in given):
        candidates.insert(0, {n for t in given for n in t})
    elif isinstance(given[0], str) and all(t == given[0] for t in given):
        candidates.insert(0, given[0])
    for targets in candidates:
        config = get_method_config_class("lora")(target_modules=targets, **fields)
        with suppress(TargetError):
            if {*match_targets(model, config, require_every_match=False).adapted} - {
                *config.extra_targets(model)
            } == set(ranks):
                return config
    raise AssertionError("a pattern of all full names matches those names")


def _not_a_weight_change(adapter: str, name: str, why: str) -> UsageError:
    message = f"adapter {adapter!r} cannot become a LoRA, at {name or 'the model'}: {why}"
    return _NotConvertible(message, "an adapter that only changes weights of linear layers and embeddings")
