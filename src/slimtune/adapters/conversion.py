"""Adapters into one LoRA: weighted sums of several, and any change of a weight as two thin matrices.

    ΔW_i     what adapter i adds to a layer's weight (out, in): s B A where it has factors, else merged(W) − W
    svd      B A ≈ Σ w_i ΔW_i, the nearest of rank r        any methods, any ranks; exact where r suffices
    cat      A = [w_1 s_1 A_1; w_2 s_2 A_2; …]  B = [B_1, B_2, …]         exact; the ranks add up
    linear   A = Σ ±√|w_i s_i| A_i              B = Σ √|w_i s_i| B_i      rough: also multiplies A_i by B_j

`ties`, `dare_linear`, `dare_ties` and `magnitude_prune` are `linear` on thinned-out A_i and B_i; with `_svd` they thin
out ΔW_i and take the nearest of rank r. The result is always a LoRA whose scale is 1 (alpha = r), layer by layer.

Papers: TIES https://arxiv.org/abs/2306.01708, DARE https://arxiv.org/abs/2311.03099.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import TargetError, UsageError, format_names, nearest
from ..kernels.low_rank import LowRank, nearest_low_rank, weighted_sum
from . import state_dict
from .base import AdapterModule, MergeUnsupported, SharedParameters, Site
from .config import PeftConfig
from .layer import get_site
from .registry import config_class
from .targets import select_targets

Combination = Literal[
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
Pair = tuple[Tensor, Tensor]
"""`A (r, in)` and `B (out, r)` of a LoRA whose scale is 1."""


@dataclass(frozen=True)
class LoraReport:
    """How near a LoRA comes to the adapter it was made from.

    Args:
        adapter: the new adapter.
        source: the adapter it stands for.
        ranks: each layer's rank.
        errors: each layer's ‖ΔW − B A‖ / ‖ΔW‖ (Frobenius norm): 0 is exact, 1 is nothing kept.
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


class AdapterCombining:
    """The part of a `PeftModel` that makes one LoRA of other adapters."""

    def add_weighted_adapter(
        self: Any,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Combination = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add a LoRA that does what a weighted sum of adapters does, inactive.

        A module that one of them trains whole is copied as it is.

        Args:
            adapters: names of the adapters.
            weights: a factor for each; negative ones subtract.
            adapter_name: name of the new adapter.
            combination_type: see the top of `adapters/conversion.py`; one adapter alone is "linear" unless svd_rank is given.
            svd_rank: rank of the result for "svd" and the like, 1 and up; None: the largest of the adapters' ranks.
            svd_clamp: quantile in (0, 1] of the result's values beyond which they are cut off.
            svd_full_matrices: taken for PEFT's sake: the result is the same.
            svd_driver: cuSOLVER's method, on CUDA; see `torch.linalg.svd`.
            density: share in (0, 1] of the values that thinning out leaves.
            majority_sign_method: for "ties": the sign of the sum ("total"), or the most frequent one ("frequency").

        Raises:
            UsageError: a name, number or combination that cannot be; an adapter that is no change of a weight.
        """
        del svd_full_matrices
        names = [self._known(n) for n in adapters]
        self._free(adapter_name)
        _check(names, weights, combination_type, svd_rank, svd_clamp, density, majority_sign_method)
        with base_weights_only(self):
            layers = get_weight_deltas(self, names, weights)
            kind = _kind_for(layers, combination_type, svd_rank, single=len(names) == 1)
            dense = kind.removesuffix("svd").removesuffix("_")
            how = None if kind == "svd" else {"kind": dense, "density": density or 1, "sign_by": majority_sign_method}
            if kind.endswith("svd"):
                rank = svd_rank or _largest_rank(layers, names)
                pairs = {n: _nearest(terms, rank, how, svd_clamp, svd_driver)[:2] for n, terms in layers.items()}
            elif how is None or kind == "cat":
                pairs = {n: _side_by_side(terms) for n, terms in layers.items()}
            else:
                pairs = {n: _factor_by_factor(terms, how) for n, terms in layers.items()}
            _attach(self, adapter_name, names, pairs)

    def to_lora(self: Any, adapter_name: str, rank: float, new_name: str | None = None) -> LoraReport:
        """Add a LoRA that stands for an adapter of any method that changes weights, inactive; say how near it comes.

        Args:
            adapter_name: the adapter; a LoRA is taken, too, and gets another rank.
            rank: rank of the result (int), 1 and up; or (float, in (0, 1]) the share of ‖ΔW‖² each layer keeps, which
                gives each the smallest rank that does.
            new_name: name of the new adapter; None: `<adapter_name>_lora`.

        Raises:
            UsageError: a rank that cannot be, or an adapter that is no change of a weight.
        """
        new_name = new_name or f"{self._known(adapter_name)}_lora"
        self._known(adapter_name)
        self._free(new_name)
        share = isinstance(rank, float)
        if isinstance(rank, bool) or (not 0 < rank <= 1 if share else rank < 1):
            raise UsageError(f"rank is {rank!r}", "a whole number, 1 and up; or a share in (0, 1]")
        with base_weights_only(self):
            found = {n: _nearest(terms, rank) for n, terms in get_weight_deltas(self, [adapter_name], [1.0]).items()}
            _attach(self, new_name, [adapter_name], {n: f[:2] for n, f in found.items()})
        lost, all_of_it = sum(f.lost for f in found.values()), sum(f.norm for f in found.values())
        return LoraReport(
            new_name,
            adapter_name,
            {n: f.A.shape[0] for n, f in found.items()},
            {n: math.sqrt(f.lost / f.norm) if f.norm else 0.0 for n, f in found.items()},
            math.sqrt(lost / all_of_it) if all_of_it else 0.0,
        )


def convert_to_lora(
    model: Any, rank: float, adapter_name: str = "default", progressbar: bool = False, compile_kwargs: Any = None
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return a LoRA that stands for an adapter: its config, and its tensors by their keys in a file.

    Args:
        model: the model with the adapter, which stays as it is.
        rank: see `PeftModel.to_lora`.
        adapter_name: the adapter.
        progressbar, compile_kwargs: taken for PEFT's sake.
    """
    del progressbar, compile_kwargs
    new = _unused(model, adapter_name)
    model.to_lora(adapter_name, rank, new)
    try:
        return model.peft_config[new], state_dict.get_peft_model_state_dict(model, adapter_name=new)
    finally:
        model._drop(new)


def save_as_lora(
    path: str | os.PathLike,
    model: Any,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> LoraReport:
    """Write a LoRA that stands for an adapter into the folder `path`; see `convert_to_lora`."""
    del progressbar, compile_kwargs
    new = _unused(model, adapter_name)
    report = model.to_lora(adapter_name, rank, new)
    try:
        state_dict.save_adapter(model, Path(path), new)
    finally:
        model._drop(new)
    return report


def _unused(model: Any, name: str) -> str:
    names = (f"{name}_as_lora{'_' * n}" for n in range(len(model.peft_config) + 1))
    return next(n for n in names if n not in model.peft_config)


# --- sums ----------------------------------------------------------------------------------------------------------


def _check(names: list, weights: list, kind: str, rank: Any, clamp: Any, density: float | None, sign_by: str) -> None:
    if not names or len(names) != len(weights):
        raise UsageError(f"{len(names)} adapters and {len(weights)} weights are given", "one weight for each adapter")
    if kind not in get_args(Combination):
        raise UsageError(f"combination_type is {kind!r}{nearest(kind, get_args(Combination))}",
                         f"one of {format_names(get_args(Combination))}")  # fmt: skip
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise UsageError(f"svd_rank is {rank!r}", "a whole number, 1 and up")
    if clamp is not None and not 0 < clamp <= 1:
        raise UsageError(f"svd_clamp is {clamp!r}", "a quantile in (0, 1]")
    thins = kind.startswith(("ties", "dare", "magnitude"))
    if thins and not (density is not None and 0 < density <= 1):
        raise UsageError(f"density is {density!r}", f"a share in (0, 1], which combination_type={kind!r} needs")
    if sign_by not in ("total", "frequency"):
        raise UsageError(f"majority_sign_method is {sign_by!r}", "'total' or 'frequency'")


def _kind_for(layers: Mapping[str, list[WeightDelta]], kind: str, rank: int | None, single: bool) -> str:
    """Return the combination to make; refuse one that needs factors, or equal ranks, where there are none."""
    if single and rank is None and all(t.low_rank_factors() is not None for terms in layers.values() for t in terms):
        return "linear"
    if kind.endswith("svd"):
        return kind
    for name, terms in layers.items():
        found = [t.low_rank_factors() for t in terms]
        bare = [t.adapter for t, f in zip(terms, found, strict=True) if f is None]
        if bare:
            raise UsageError(
                f"combination_type={kind!r} combines A and B, and adapter {bare[0]!r} has none at {name}",
                "low-rank adapters",
                'combination_type="svd" with a svd_rank',
            )
        ranks = {t.adapter: f[0].shape[0] for t, f in zip(terms, found, strict=True) if f is not None}
        if kind != "cat" and len(set(ranks.values())) > 1:
            raise UsageError(
                f"combination_type={kind!r} adds up A and B, whose ranks at {name} are {ranks}",
                "equal ranks",
                'combination_type="cat" or "svd"',
            )
    return kind


def _largest_rank(layers: Mapping[str, list[WeightDelta]], names: Sequence[str]) -> int:
    ranks: dict[str, int] = dict.fromkeys(names, 0)
    for terms in layers.values():
        for term in terms:
            found = term.low_rank_factors()
            if found is None:
                raise UsageError(
                    f"svd_rank is not given, and adapter {term.adapter!r} has no rank at {term.site.name}",
                    "a svd_rank, such as 32",
                )
            ranks[term.adapter] = max(ranks[term.adapter], found[0].shape[0])
    return max(ranks.values())


def _side_by_side(terms: list[WeightDelta]) -> Pair:
    found = [(t.weight, t.low_rank()) for t in terms]
    return torch.cat([A * (w * s) for w, (A, _, s) in found]), torch.cat([B for _, (_, B, _) in found], dim=1)


def _factor_by_factor(terms: list[WeightDelta], how: dict[str, Any]) -> Pair:
    found = [t.low_rank() for t in terms]
    scales = [t.weight * s for t, (_, _, s) in zip(terms, found, strict=True)]
    # The sign goes to one side alone: on both it would cancel itself.
    A = weighted_sum([A for A, _, _ in found], [math.copysign(math.sqrt(abs(s)), s) for s in scales], **how)
    return A, weighted_sum([B for _, B, _ in found], [math.sqrt(abs(s)) for s in scales], **how)


def _nearest(
    terms: list[WeightDelta],
    rank: float,
    how: dict[str, Any] | None = None,
    clamp: float | None = None,
    driver: str | None = None,
) -> LowRank:
    """Return the LoRA nearest to a sum of changes, thinned out first where `how` says so."""
    found = [t.low_rank_factors() for t in terms]
    site = terms[0].site
    thin = sum(f[0].shape[0] for f in found if f is not None) < min(site.in_features, site.out_features)
    if how is None and clamp is None and thin and None not in found:
        return nearest_low_rank(_side_by_side(terms), rank)
    dense = weighted_sum([t.dense() for t in terms], [t.weight for t in terms], **(how or {}))
    return nearest_low_rank(dense, rank, clamp, driver)


# --- the new adapter -----------------------------------------------------------------------------------------------


def rank_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return a LoraConfig's fields for layers of these ranks whose scale is 1."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    tails = Counter(n.rpartition(".")[2] for n in ranks)
    # A pattern matches the end of a name; `^` where another layer's name ends in this one's.
    odd = {
        f"^{n}" if tails[n.rpartition(".")[2]] > 1 and any(m.endswith(f".{n}") for m in ranks) else n: k
        for n, k in ranks.items()
        if k != r
    }
    return {"r": r, "lora_alpha": r, "rank_pattern": odd, "alpha_pattern": dict(odd), "use_rslora": False}


def _attach(model: Any, name: str, sources: Sequence[str], pairs: Mapping[str, Pair]) -> None:
    """Add the new adapter with these values; modules trained whole come with the one that trains them."""
    config = _config(model, sources, {n: A.shape[0] for n, (A, _) in pairs.items()})
    model.add_adapter(name, config, strict=False)
    with torch.no_grad():
        for layer, module in model._attached.members[name]:
            if layer in pairs:
                for into, tensor in zip(module.adapters[name].low_rank_factors(), pairs[layer], strict=False):
                    into.copy_(tensor)
            if name in module.trained_copies:
                owner = next(s for s in sources if s in module.trained_copies)
                for n, p in module.trained_copies[name].named_parameters():
                    p.copy_(module.trained_copies[owner].get_parameter(n))


def _config(model: Any, sources: Sequence[str], ranks: Mapping[str, int]) -> PeftConfig:
    configs: list[PeftConfig] = [model.peft_config[s] for s in sources]
    whole = dict.fromkeys(m for c in configs for m in (getattr(c, "modules_to_save", None) or []))
    notes = {n: getattr(configs[0], n) for n in ("base_model_name_or_path", "revision")}
    task = next((c.task_type for c in configs if c.task_type), None)
    same: dict[str, Any] = {
        "fan_in_fan_out": getattr(configs[0], "fan_in_fan_out", False),
        "modules_to_save": list(whole) or None,
        **rank_settings(ranks),
    }
    for targets in (*_short_targets(configs), list(ranks), "|".join(map(re.escape, ranks))):
        config = config_class("lora")(target_modules=targets, task_type=task, **same, **notes)
        with suppress(TargetError):  # as people wrote them, less what they excluded, they may mean more
            if set(select_targets(model, config, strict=False).adapted) == set(ranks):
                return config
    raise AssertionError("a pattern of full names matches those names")


def _short_targets(configs: list[PeftConfig]) -> list[list[str] | str]:
    """Return what the adapters' own targets come to together, as people wrote them."""
    given = [getattr(c, "target_modules", None) for c in configs]
    if all(isinstance(g, list) for g in given):
        return [list(dict.fromkeys(n for g in given for n in g))]  # type: ignore[union-attr]
    return [given[0]] if isinstance(given[0], str) and all(g == given[0] for g in given) else []


@dataclass(frozen=True)
class WeightDelta:
    """One adapter's change of one layer's weight, and its factor in the sum."""

    adapter: str
    weight: float
    delta: AdapterModule
    site: Site

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that sums are made in: the adapter's, fp32 at least."""
        kept = next((p.dtype for p in self.delta.parameters()), torch.float32)
        return torch.promote_types(kept, torch.float32)

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """`A (r, in), B (out, r), scale`, fp32 at least, None where the change has no such form."""
        found = self.delta.low_rank_factors()
        return None if found is None else (found[0].to(self.dtype), found[1].to(self.dtype), float(found[2]))

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """The same, where it is known to have that form."""
        found = self.low_rank_factors()
        assert found is not None
        return found

    def dense(self) -> Tensor:
        """`ΔW (out, in)`, without the factor in the sum."""
        found = self.low_rank_factors()
        if found is not None:
            return (found[1] @ found[0]) * found[2]
        # A small difference of large numbers: float64.
        before, bias = self.site.weight().double(), self.site.bias()
        try:
            after, bias_after = self.delta.merge_into(before, bias)
        except MergeUnsupported as e:
            raise no_weight(self.adapter, self.site.name, str(e)) from e
        if bias_after is not bias:
            raise no_weight(self.adapter, self.site.name, "it changes the bias")
        return (after.double() - before).to(self.dtype)


def base_weights_only(model: Any) -> AbstractContextManager[None]:
    """Let the base's own weights stand for a while: no adapter's copies in their place."""
    model._unmerged()
    return model.disable_adapter()


def get_weight_deltas(model: Any, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, list[WeightDelta]]:
    """Return for each layer the adapters' changes, in the model's order."""
    at = model._attached
    owners: dict[str, str] = {}
    terms: dict[str, list[WeightDelta]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        report = at.reports[adapter]
        if report.biases:
            raise no_weight(adapter, report.biases[0], "it trains biases")
        for name, module in at.members[adapter]:
            if adapter in module.trained_copies and owners.setdefault(name, adapter) != adapter:
                raise UsageError(
                    f"adapters {owners[name]!r} and {adapter!r} both train {name} whole",
                    "at most one that trains a module whole",
                )
            delta = module.adapters[adapter] if adapter in module.adapters else None  # noqa: SIM401 (a ModuleDict)
            if delta is None or isinstance(delta, SharedParameters):
                continue
            kind = report.kinds[name]
            if kind not in ("linear", "embedding"):
                raise no_weight(adapter, name, f"what it changes is a {kind}")
            terms.setdefault(name, []).append(WeightDelta(adapter, float(weight), delta, get_site(name, kind, model)))
    if not terms:
        raise UsageError(f"{format_names(adapters)} change no layer's weight", "an adapter that does")
    return {n: terms[n] for n, _ in model.named_modules() if n in terms}


def no_weight(adapter: str, name: str, why: str) -> UsageError:
    """Return the error that says why an adapter is no change of weights alone."""
    return UsageError(
        f"adapter {adapter!r} cannot become a LoRA, at {name or 'the model'}: {why}",
        "an adapter that changes weights of linear maps and embeddings alone",
    )
