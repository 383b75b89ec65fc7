"""EVA: A starts as the principal directions of a layer's inputs, and each layer gets the rank that its inputs need.

    inputs x of a layer, over batches → incremental PCA → A = the first directions, B = 0

The ranks of all layers together are a budget, which goes to the directions with the highest explained variance over
all layers; a layer can get up to `rho` times its rank, or none, and then it is not adapted. Layers with the same inputs
(q, k, v) share one PCA. It ends when the directions of all layers have converged (cosine similarity `tau`).

Paper: https://arxiv.org/abs/2410.07170. The file is a LoRA's, with a `rank_pattern`.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...extras.layer_inputs import recording_layer_inputs
from ...extras.prompt_learning.prompt_modules import disable_adapter_in_eval_no_grad
from .incremental_pca import IncrementalPca
from .init_configs import EvaConfig as EvaConfig


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] | None = None,
    adapter_name: str = "default",
    max_batches: int | None = None,
    **ignored: Any,
) -> None:
    """Set the start and the ranks of a LoRA adapter with `init_lora_weights="eva"` from batches of inputs.

    Args:
        dataloader: batches, as dictionaries of the model's inputs; repeated until all directions have converged.
        eva_state_dict: the directions by layer name, if `get_eva_state_dict` computed them before.
        forward_fn: `(model, batch)` → anything; runs the model. None: `model(**batch)`.
        max_batches: stop after this many batches and use the directions as they are; None: no limit.
        ignored: PEFT's arguments on progress bars and several processes.
    """
    if [adapter_name] != list(model.active_adapters):
        active, expected = f"the active adapters are {model.active_adapters}", f"{adapter_name!r} alone"
        raise UsageError(active, expected, "model.set_adapter(name)")
    if eva_state_dict is None:
        eva_state_dict = get_eva_state_dict(model, dataloader, forward_fn, adapter_name, max_batches, **ignored)
    directions = {n.removeprefix("base_model.model."): w for n, w in eva_state_dict.items()}
    config = model.peft_config[adapter_name]
    ranks = {n: config.get_rank(n) for n in model.adapter_modules(adapter_name)}
    ranks |= {n: len(w) for n, w in directions.items() if n in ranks}
    alphas = {n: config.get_alpha(n) for n, rank in ranks.items() if rank}
    if config.eva_config.adjust_scaling_factors:
        alphas = {n: alpha * ranks[n] / config.get_rank(n) for n, alpha in alphas.items()}
    changed = dataclasses.replace(
        config,
        target_modules=list(alphas),
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        rank_pattern={n: r for n, r in ranks.items() if r not in (0, config.r)},
        alpha_pattern={n: a for n, a in alphas.items() if a != config.lora_alpha},
    )
    # A new rank changes the shapes: build a second adapter, and let it replace the first.
    model.add_adapter("eva_start", changed)
    for name, module in model.adapter_modules("eva_start").items():
        if name in directions:
            module.lora_A.weight.copy_(directions[name])
    model.set_adapter("eva_start")
    model.delete_adapter(adapter_name)
    model.rename_adapter("eva_start", adapter_name)


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
            f"adapter {adapter_name!r} was not created for EVA",
            "an adapter with init_lora_weights='eva'",
            "get_peft_model(base, LoraConfig(init_lora_weights='eva', …)), then this call",
        )
    if dataloader is not None and not isinstance(dataloader, Sized):
        dataloader = list(dataloader)
    if not dataloader:
        raise UsageError("there are no batches", "a dataloader that gives the model's inputs")
    layers = {n: m for n, m in model.adapted_layers().items() if hasattr(m.adapters[adapter_name], "lora_A")}
    settings: EvaConfig = config.eva_config

    def collect_inputs(batch: Any, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the inputs `(positions, in)` of layers in one batch, without padding and positions without a label."""
        inputs: dict[str, Tensor] = {}
        mask: Tensor | None = None
        if isinstance(batch, Mapping) and "input_ids" in batch:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            if settings.use_label_mask and batch.get("labels") is not None:
                mask = mask & (batch["labels"] != settings.label_mask_value)

        def receive(name: str, x: Tensor) -> None:
            inputs[name] = (x[mask] if mask is not None else x.reshape(-1, x.shape[-1])).float()

        with recording_layer_inputs({n: layers[n] for n in names}, receive):
            forward_fn(model, batch) if forward_fn else model(**batch)
        return inputs

    ranks = {n: config.get_rank(n) for n in layers}
    with disable_adapter_in_eval_no_grad(model):
        return _find_directions(collect_inputs, dataloader, ranks, settings, max_batches)


def _find_directions(
    collect_inputs: Callable[..., dict[str, Tensor]],
    dataloader: Any,
    ranks: dict[str, int],
    settings: EvaConfig,
    max_batches: int | None,
) -> dict[str, Tensor]:
    """Run batches until all directions have converged; return them by layer. `ranks` are the configured ones."""
    # For each layer the first layer with the same inputs; their PCA has its name.
    leader: dict[str, str] = {}
    first_inputs: dict[str, Tensor] = {}
    for name, inputs in collect_inputs(next(iter(dataloader)), ranks).items():
        same = (n for n, x in first_inputs.items() if x.shape == inputs.shape and torch.equal(x, inputs))
        leader[name] = next(same, name)
        first_inputs.setdefault(leader[name], inputs)
    del first_inputs
    groups = {first: [n for n in leader if leader[n] == first] for first in dict.fromkeys(leader.values())}
    analyses = {n: IncrementalPca(round(max(ranks[m] for m in group) * settings.rho)) for n, group in groups.items()}
    found = {n: analyses[leader[n]].n_components for n in leader}
    converged: dict[str, Tensor] = {}
    for count, batch in enumerate(itertools.chain.from_iterable(itertools.repeat(dataloader))):
        needed = {n: max(found[m] for m in group) for n, group in groups.items()}
        pending = [n for n in analyses if n not in converged or not converged[n][: needed[n]].all()]
        if not pending or count == max_batches:
            break
        for name, inputs in collect_inputs(batch, pending).items():
            converged[name] = analyses[name].partial_fit(inputs) >= settings.tau
        if all(pca.components is not None for pca in analyses.values()):
            found = _allocate_ranks(analyses, leader, sum(ranks.values()))
        elif count + 1 == len(dataloader):  # no batch was large enough, and none will be
            break
    directions = {}
    for name, rank in found.items():
        pca = analyses[leader[name]]
        if pca.components is None:
            raise UsageError(
                f"EVA needs {pca.n_components} positions of a layer in one batch, and no batch had so many",
                "larger batches",
                "raise the batch size, lower r or rho, or set use_label_mask=False",
            )
        scale = pca.singular_values[:rank].sqrt()[:, None] if settings.whiten else 1
        directions[name] = pca.components[:rank] / scale
    return directions


def _allocate_ranks(analyses: dict[str, IncrementalPca], leader: dict[str, str], budget: int) -> dict[str, int]:
    """Give the budget to the directions with the highest explained variance."""
    order = [*analyses, *(n for n in leader if n not in analyses)]
    shares = [(n, share) for n in order for share in analyses[leader[n]].explained_variance_ratio]
    best = torch.stack([share for _, share in shares]).argsort(descending=True)[:budget]
    count = Counter(shares[i][0] for i in best.tolist())
    ranks = {n: count.get(n, 0) for n in order}
    for name in order:  # among layers that share a PCA the leader gets the largest rank
        first = leader[name]
        if ranks[first] < ranks[name]:
            ranks[first], ranks[name] = ranks[name], ranks[first]
    return ranks


def estimate_max_adapter_bytes_added_by_eva(adapter_modules: Mapping[str, Any], config: Any) -> int:
    """Return how many bytes EVA can add to an adapter at most, whatever the data: the largest layers get the ranks."""
    layers = {n: d for n, d in adapter_modules.items() if hasattr(d, "lora_A")}
    max_rank: dict[int, int] = {}
    for name, module in layers.items():  # layers that share a PCA can each get the largest rank among them
        width = module.lora_A.in_features
        max_rank[width] = max(max_rank.get(width, 0), round(config.get_rank(name) * config.eva_config.rho))
    budget, increase = sum(config.get_rank(n) for n in layers), 0
    bytes_per_rank = {n: d.lora_A.weight[0].nbytes + d.lora_B.weight[:, 0].nbytes for n, d in layers.items()}
    for name in sorted(layers, key=bytes_per_rank.__getitem__, reverse=True):
        rank = min(budget, max_rank[layers[name].lora_A.in_features])
        budget -= rank
        increase += (rank - config.get_rank(name)) * bytes_per_rank[name]
    return increase
