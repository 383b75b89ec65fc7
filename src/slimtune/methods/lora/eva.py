"""EVA: A starts as the main directions of a layer's inputs, and each layer gets the rank its inputs need.

    inputs x of a layer, over batches → incremental PCA → A = the first directions, B = 0

A budget of ranks (the sum of all layers') is handed out by explained variance: the directions of all layers are sorted
by it, the first ones win; a layer may get `rho` times its rank, or none and be left alone. Layers with the same inputs
(q, k, v) share one analysis. Stops when the directions of all layers have settled (cosine similarity `tau`).

Paper: https://arxiv.org/abs/2410.07170. The file is a LoRA's, with a `rank_pattern`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, UsageError
from ...kernels.low_rank import IncrementalPca


@dataclass
class EvaConfig:
    """Settings of EVA; PEFT's field names and defaults.

    Args:
        rho: a layer's largest rank over its own, 1 and up; 1 keeps all ranks.
        tau: cosine similarity, 0 to 1, from which a direction has settled.
        use_label_mask: leave positions out whose label is `label_mask_value`.
        label_mask_value: the label that means "none".
        whiten: divide each direction by the root of its singular value.
        adjust_scaling_factors: change alpha as the rank changes, so that alpha / r stays.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ConfigError(f"rho is {self.rho}", "1 and up")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"tau is {self.tau}", "0 to 1")


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] | None = None,
    adapter_name: str = "default",
    max_batches: int | None = None,
    **moot: Any,
) -> None:
    """Give a LoRA adapter with `init_lora_weights="eva"` its start and its ranks, from batches of inputs.

    Args:
        model: the adapted model.
        dataloader: batches, as dictionaries of the model's inputs; run over again until all directions have settled.
        eva_state_dict: the directions by layer name, where `get_eva_state_dict` found them before.
        forward_fn: `(model, batch)` → anything; runs the model. None: `model(**batch)`.
        adapter_name: the adapter.
        max_batches: stop after so many batches and take the directions as they are; None: no limit.
        moot: PEFT's arguments on progress bars and several processes.

    Raises:
        UsageError: the adapter was not made for EVA, or there are no batches.
    """
    if [adapter_name] != list(model.active_adapters):
        raise UsageError(f"active are {model.active_adapters}", f"{adapter_name!r} alone", "model.set_adapter(name)")
    if eva_state_dict is None:
        found = get_eva_state_dict(model, dataloader, forward_fn, adapter_name, max_batches, **moot)
    else:
        found = dict(eva_state_dict)
    config = model.peft_config[adapter_name]
    found = {n.removeprefix("base_model.model."): w for n, w in found.items()}
    layers = model.adapter_modules(adapter_name)
    ranks = {n: found[n].shape[0] if n in found else config.rank_of(n) for n in layers}
    alphas = {n: _alpha(config, n, rank) for n, rank in ranks.items() if rank}
    changed = dataclasses.replace(
        config,
        target_modules=list(alphas),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={n: r for n, r in ranks.items() if r not in (0, config.r)},
        alpha_pattern={n: a for n, a in alphas.items() if a != config.lora_alpha},
    )
    # A rank is a size: the adapter is made anew, beside the old one, and takes its name.
    model.add_adapter("eva_start", changed)
    for name, delta in model.adapter_modules("eva_start").items():
        if name in found:
            delta.lora_A.weight.copy_(found[name])
    model.set_adapter("eva_start")
    model.delete_adapter(adapter_name)
    model.rename_adapter("eva_start", adapter_name)


@torch.no_grad()
def get_eva_state_dict(
    model: Any,
    dataloader: Iterable | None,
    forward_fn: Callable[[Any, Any], Any] | None = None,
    adapter_name: str = "default",
    max_batches: int | None = None,
    show_progress_bar: bool = False,
    gather_distributed_inputs: bool = True,
) -> dict[str, Tensor]:
    """Return the directions `(rank, in)` by layer name; the arguments are those of `initialize_lora_eva_weights`."""
    del show_progress_bar, gather_distributed_inputs
    config = model.peft_config[adapter_name]
    if getattr(config, "init_lora_weights", None) != "eva":
        raise UsageError(
            f"adapter {adapter_name!r} was not made for EVA",
            "an adapter with init_lora_weights='eva'",
            "get_peft_model(base, LoraConfig(init_lora_weights='eva', …)), then this call",
        )
    if dataloader is not None and not isinstance(dataloader, Sized):
        dataloader = list(dataloader)
    if not dataloader:
        raise UsageError("there are no batches", "a dataloader that gives the model's inputs")
    layers = {n: m for n, m in model.adapted_layers().items() if hasattr(m.adapters[adapter_name], "lora_A")}
    seen = _Seen(layers, config, forward_fn or (lambda m, batch: m(**batch)))
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            return seen.run(model, dataloader, max_batches)
    finally:
        model.train(was_training)


def max_size_increase(deltas: Mapping[str, Any], config: Any) -> int:
    """Return how many bytes larger than now EVA can make an adapter, whatever the data: large layers get the ranks.

    Args:
        deltas: the adapter's by layer name, before EVA.
        config: its config.
    """
    layers = {n: d for n, d in deltas.items() if hasattr(d, "lora_A")}
    most: dict[int, int] = {}
    for name, delta in layers.items():  # of layers that share an analysis each can get the largest rank
        width = delta.lora_A.in_features
        most[width] = max(most.get(width, 0), round(config.rank_of(name) * config.eva_config.rho))
    left, grown = sum(config.rank_of(n) for n in layers), 0
    sizes = {n: d.lora_A.weight[0].nbytes + d.lora_B.weight[:, 0].nbytes for n, d in layers.items()}
    for name in sorted(layers, key=sizes.__getitem__, reverse=True):
        rank = min(left, most[layers[name].lora_A.in_features])
        left -= rank
        grown += (rank - config.rank_of(name)) * sizes[name]
    return grown


class _Seen:
    """The analysis of every layer's inputs, over batches."""

    def __init__(self, layers: dict[str, nn.Module], config: Any, forward: Callable[[Any, Any], Any]) -> None:
        self.layers, self.config, self.forward = layers, config, forward
        self.settings: EvaConfig = config.eva_config
        self.most = {n: round(config.rank_of(n) * self.settings.rho) for n in layers}
        self.budget = sum(config.rank_of(n) for n in layers)
        self.leader: dict[str, str] = {}
        """Each layer's first layer with the same inputs."""

    def run(self, model: Any, dataloader: Any, max_batches: int | None) -> dict[str, Tensor]:
        self._find_leaders(model, next(iter(dataloader)))
        parts = {n: IncrementalPca(self.most[n]) for n in dict.fromkeys(self.leader.values())}
        settled: dict[str, Tensor] = {}
        ranks = dict(self.most)
        again = itertools.chain.from_iterable(itertools.repeat(dataloader))
        for seen, batch in enumerate(again):
            wanted = [n for n in parts if n not in settled or not settled[n][: self._needed(n, ranks)].all()]
            if not wanted or seen == max_batches:
                break
            for name, inputs in self._inputs(model, batch, wanted).items():
                settled[name] = parts[name].add(inputs) >= self.settings.tau
            if all(p.components is not None for p in parts.values()):
                ranks = self._ranks(parts)
            elif seen + 1 == len(dataloader):  # no batch was large enough, and none will be
                break
        return {n: self._directions(parts[self.leader[n]], rank) for n, rank in ranks.items()}

    def _needed(self, leader: str, ranks: dict[str, int]) -> int:
        return max(ranks[n] for n, first in self.leader.items() if first == leader)

    def _find_leaders(self, model: Any, batch: Any) -> None:
        firsts: list[tuple[str, Tensor]] = []
        for name, inputs in self._inputs(model, batch, list(self.layers)).items():
            same = (n for n, x in firsts if x.shape == inputs.shape and torch.equal(x, inputs))
            self.leader[name] = next(same, name)
            if self.leader[name] == name:
                firsts.append((name, inputs))
        for first in set(self.leader.values()):
            most = max(self.most[n] for n, f in self.leader.items() if f == first)
            self.most |= {n: most for n, f in self.leader.items() if f == first}

    def _inputs(self, model: Any, batch: Any, names: list[str]) -> dict[str, Tensor]:
        """Return the inputs `(positions, in)` of layers in one batch."""
        found: dict[str, Tensor] = {}
        mask = self._mask(batch)

        def hook(name: str) -> Any:
            def keep(_: nn.Module, args: tuple) -> None:
                x = args[0]
                found[name] = (x[mask] if mask is not None else x.reshape(-1, x.shape[-1])).float()

            return keep

        handles = [self.layers[n].register_forward_pre_hook(hook(n)) for n in names]
        try:
            self.forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _mask(self, batch: Any) -> Tensor | None:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            return None
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        if self.settings.use_label_mask and batch.get("labels") is not None:
            mask = mask & (batch["labels"] != self.settings.label_mask_value)
        return mask

    def _ranks(self, parts: dict[str, IncrementalPca]) -> dict[str, int]:
        """Hand the budget out by explained variance."""
        order = [*parts, *(n for n in self.leader if n not in parts)]
        shares = [(n, s) for n in order for s in parts[self.leader[n]].explained_variance_ratio[: self.most[n]]]
        best = torch.stack([s for _, s in shares]).argsort(descending=True)[: self.budget]
        count = Counter(shares[i][0] for i in best.tolist())
        ranks = {n: count.get(n, 0) for n in order}
        for name in order:  # where several share one analysis, the first gets the largest rank
            first = self.leader[name]
            if ranks[first] < ranks[name]:
                ranks[first], ranks[name] = ranks[name], ranks[first]
        return ranks

    def _directions(self, pca: IncrementalPca, rank: int) -> Tensor:
        if pca.components is None:
            raise UsageError(
                f"a layer needs {pca.n_components} positions in one batch for EVA, and no batch had them",
                "larger batches",
                "raise the batch size, lower r or rho, or set use_label_mask=False",
            )
        found = pca.components[:rank]
        return found / pca.singular_values[:rank].sqrt()[:, None] if self.settings.whiten else found


def _alpha(config: Any, name: str, rank: int) -> float:
    alpha = config.alpha_of(name)
    return alpha * rank / config.rank_of(name) if config.eva_config.adjust_scaling_factors else alpha
