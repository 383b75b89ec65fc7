"""The step: a batch's loss at supervised positions, each row as if it were alone.

    loss = sum over supervised positions of −log p(token) / number of supervised tokens in the whole optimizer step

So the gradient of several packs is that of one. Training, scoring and (later) the plan all run these functions.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from ..attention.packed_layout import LAYOUT_KWARG, empty_mask, packed_attention, packing_unsupported_reason
from ..data.collator import IGNORED, Collator, Example
from ..errors import ModelError, UsageError
from ..kernels.cross_entropy import nll_and_accuracy
from ..kernels.dropout import preserve_rng_state
from ..models.lm_head import LMHead, get_hidden_states, get_lm_head
from ..utils.distributed import is_sharded
from ..utils.memory import free_memory

TOKENS_ON_CPU, TOKENS_ON_GPU = 1024, 8192
"""Tokens in one pass from which on more of them compute no faster."""
PROBE = 64
EVAL_TOKENS = 4096
"""Rows that are divided into passes at once where rows are scored."""


def make_collator(model: Any, pad_token_id: int, *, packing: bool = True, share: bool = True, **sizes: Any) -> Collator:
    """Return the collator that lays rows as well as this model can take them.

    Args:
        model: the model, adapted or not.
        pad_token_id: fills shorter rows where they are padded.
        packing: lay rows in one sequence.
        share: lay what rows begin with alike once.
        sizes: `room` and `rows` of a batch, as `Collator` has them.
    """
    return Collator(
        pad_token_id, packing, layout=packing and not packing_unsupported_reason(model), share=share, **sizes
    )


def step_loss(model: Any, batch: dict[str, Any], num_items: Tensor | int | None = None) -> Tensor:
    """Return a batch's loss in fp32 or wider: summed over its targets, divided by `num_items` (default: how many).

    With a `layout` in the batch, call it inside `laid_out(model)`, and leave that after the backward pass.
    """
    nats = token_nll(model, batch)
    return nats.sum() / (len(nats) if num_items is None else num_items)


def forward_backward(
    model: Any,
    packs: Sequence[dict[str, Any]],
    backward: Callable[[Tensor], Any],
    *,
    targets: int | None = None,
    weights: Sequence[float] | None = None,
    penalized: bool = True,
) -> Tensor:
    """Run the packs of one optimizer step forwards and backwards; return the step's loss, detached.

    Args:
        model: in training mode.
        packs: on the model's device; together they are normalised over the targets of all.
        backward: adds a loss's gradients to those that are there.
        targets: of the whole step, where other processes run packs of it too; None: those of `packs`.
        weights: what each pack's loss counts, 1 or 0; None: 1.
        penalized: the method's penalty is part of the loss; it is to be so in one process.
    """
    if targets is None:
        targets = sum(len(p["targets"]) for p in packs)
    total = torch.zeros((), device=packs[0]["targets"].device)
    for number, pack in enumerate(packs):
        loss = step_loss(model, pack, targets)
        if weights is not None and weights[number] != 1:
            loss = loss * weights[number]
        penalty = model.regularization_loss() if number == 0 and penalized and hasattr(model, "penalty") else None
        if penalty is not None:
            loss = loss + penalty
        backward(loss)
        total += loss.detach()
        # What a pass was computed with must not lie beside the next: functions of its graph keep the masks, too.
        del loss, penalty
        if "layout" in pack:
            pack["layout"].forget()
    return total


def token_nll(model: Any, batch: dict[str, Any]) -> Tensor:
    """Return −log p of each supervised token `(K)` of a collated batch, in the order of its `targets`."""
    head, h = _before_targets(model, batch)
    if head is None:
        wide = torch.promote_types(h.dtype, torch.float32)
        return F.cross_entropy(h.to(wide), batch["targets"], reduction="none")
    return head.nats(h, batch["targets"])


def token_nll_and_accuracy(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the same and, for each, whether it is the likeliest token `(K)`; for measuring: no gradient."""
    head, h = _before_targets(model, batch)
    if head is None:
        return nll_and_accuracy(h, lambda logits: logits, batch["targets"], h.shape[-1])
    return head.judge(h, batch["targets"])


def _before_targets(model: Any, batch: dict[str, Any]) -> tuple[LMHead | None, Tensor]:
    """Return the head and its input `(K, d)` at the supervised positions; a model without a head: None, logits."""
    # With a cache, transformers would let rows in one sequence see each other, silently.
    inputs: dict[str, Any] = {"use_cache": False, "logits_to_keep": batch["logits_to_keep"]}
    inputs |= {k: batch[k] for k in ("input_ids", "position_ids", "attention_mask") if k in batch}
    if "layout" in batch:
        inputs |= {LAYOUT_KWARG: batch["layout"], "attention_mask": empty_mask(batch["input_ids"].device)}
    head = get_lm_head(model)
    if head is None:
        return None, model(**inputs).logits.flatten(0, 1).index_select(0, batch["picked"])
    return head, get_hidden_states(model, head, inputs).flatten(0, 1).index_select(0, batch["picked"])


@torch.no_grad()
def check_packing_supported(model: Any, collator: Collator) -> None:
    """Run short rows laid together and each alone, and the head here and the model's own; raise where they differ.

    Some architectures read no `position_ids` (OPT, BLOOM), some carry a state from row to row (Mamba), and a head may
    do more to its logits than its config says: transformers does not tell.

    Raises:
        ModelError: the model cannot be trained so; the fix is named.
    """
    device, was_training = next(model.parameters()).device, model.training
    size = model.config.get_text_config().vocab_size
    begun = [(5 * i * i + 1) % size for i in range(9)]
    rows = [[*(begun if r else []), *((7 * i * i + 3 + 11 * r) % size for i in range(9 + r))] for r in range(3)]
    examples = [{"input_ids": row, "labels": row} for row in rows]

    def nats(some: Sequence[Example]) -> Tensor:
        return token_nll(model, move_to_device(collator(some), device))

    model.eval()
    try:
        with packed_attention(model):
            together = nats(examples)
            alone = torch.cat([nats([e]) for e in examples])
        own = torch.cat([_plainly(model, row, device) for row in rows])
        half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    finally:
        model.train(was_training)
    most = 0.05 if half else 1e-3
    spread = own.std().clamp_min(1e-12)
    apart, headless = ((nats - own).abs().mean() / spread for nats in (together, alone))
    name = type(model).__name__
    if headless > most:
        raise ModelError(
            f"the loss of a {name} differs from the model's own (by {100 * headless.item():.2g} % of its spread): its "
            "head does more to its logits than its config says",
            "a head that multiplies, adds a bias, scales and soft-caps",
            "train it by transformers' Trainer, which takes the model's own loss",
        )
    if apart > most and len(collator.groups(examples)) == 1 and collator.packing:
        raise ModelError(
            f"rows laid in one sequence change each other in a {name} (by {100 * apart.item():.2g} % of the loss's "
            "spread)",
            "an architecture that tells rows apart by position_ids",
            "--set train.packing=false",
        )


def _plainly(model: Any, row: list[int], device: torch.device) -> Tensor:
    ids = torch.tensor([row], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits.float(), ids[0, 1:], reduction="none")


def score_rows(model: Any, examples: Sequence[Example], collator: Collator) -> list[tuple[float, int]]:
    """Return for each row its summed −log p over supervised tokens (nats), and their number, in the order given.

    Args:
        model: the model; put into evaluation mode here and back after.
        examples: encoded rows, each with a token to learn.
        collator: the collator of training; its `room` is what lies in one pass.
    """
    found: list[tuple[float, int]] = []
    for some in batched(examples):
        done = score_batch(model, some, collator, collator.groups(some))
        found += [done[i] for i in range(len(some))]
    return found


def batched(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Yield so many of the examples, in order, as are divided into passes at once: each is in memory until then."""
    for at in range(0, len(examples), EVAL_TOKENS):
        yield examples[at : at + EVAL_TOKENS]


def score_batch(
    model: Any, examples: Sequence[Example], collator: Collator, groups: Iterable[Sequence[int]]
) -> dict[int, tuple[float, int]]:
    """Return what `score` does for the rows in some groups of row numbers, each group one pass; by row number."""
    found = _by_row(lambda batch: token_nll(model, batch)[None], model, examples, collator, groups)
    return {i: (row[0].sum().item(), row.shape[1]) for i, row in found.items()}


class RowScore(NamedTuple):
    """One row under one model.

    Args:
        nats: summed −log p of its supervised tokens.
        hits: how many of them are the model's likeliest token.
        tokens: how many there are.
    """

    nats: float
    hits: int
    tokens: int


def evaluate_rows(model: Any, examples: Sequence[Example], collator: Collator) -> list[RowScore]:
    """Return nats and hits of each row, in the order given and from one pass; arguments as for `score`."""

    def measure(batch: dict[str, Any]) -> Tensor:
        nats, hits = token_nll_and_accuracy(model, batch)
        return torch.stack([nats, hits.to(nats.dtype)])

    found: list[RowScore] = []
    for some in batched(examples):
        done = _by_row(measure, model, some, collator, collator.groups(some))
        rows = (done[i] for i in range(len(some)))
        found += [RowScore(row[0].sum().item(), int(row[1].sum().item()), row.shape[1]) for row in rows]
    return found


@torch.no_grad()
def _by_row(
    measure: Callable[[dict[str, Any]], Tensor],
    model: Any,
    examples: Sequence[Example],
    collator: Collator,
    groups: Iterable[Sequence[int]],
) -> dict[int, Tensor]:
    """Return what is measured of each row's tokens, fp64 `(m, tokens)`, by row number; a group is one pass."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    found: dict[int, Tensor] = {}
    try:
        with packed_attention(model):
            for part in groups:
                batch = move_to_device(collator([examples[i] for i in part]), device)
                counts = [count_targets(examples[i]) for i in part]
                found |= zip(part, measure(batch).double().split(counts, dim=1), strict=True)
    finally:
        model.train(was_training)
    return found


def count_targets(example: Example) -> int:
    """Return how many of a row's tokens are predicted and supervised: its first token never is."""
    return sum(1 for label in example["labels"][1:] if label != IGNORED)


def mean_loss(scores: Iterable[tuple[float, int]]) -> float:
    """Return the mean −log p per supervised token over scored rows, in nats."""
    every = list(scores)
    return sum(s for s, _ in every) / max(1, sum(n for _, n in every))


def move_to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch whose tensors lie on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


# --- how much at once -------------------------------------------------------------------------------------------------


def auto_micro_batch_tokens(model: Any, collator: Collator, longest: int) -> int:
    """Return how many tokens to lay in one pass: what a device computes well, if its free memory holds it.

    The bytes a token's activations take are counted in real forward passes of short batches, apart from what a pass
    takes whatever its length (learned positions, factors in the base's dtype). A pass gets at most half of what is
    free.

    Args:
        model: the model as it will be trained.
        collator: lays its rows.
        longest: tokens of the longest row, which has to fit in any case.
    """
    device = next(model.parameters()).device
    good = TOKENS_ON_GPU if device.type == "cuda" else TOKENS_ON_CPU
    if is_sharded(model):  # gathered weights come and go in a trial, too: the plan knows better
        return max(longest, good)
    half, whole = (measure_activation_bytes(model, collator, n) for n in (PROBE // 2, PROBE))
    each = max(1.0, (whole - half) / (PROBE - PROBE // 2))
    left = free_memory(device) / 2 - max(0.0, whole - PROBE * each)
    return int(max(longest, min(good, left / each)))


def measure_activation_bytes(model: Any, collator: Collator, tokens: int = PROBE) -> int:
    """Return the bytes kept for the backward pass of one row of so many tokens, beside parameters and buffers."""
    device, was_training = next(model.parameters()).device, model.training
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    size = model.config.get_text_config().vocab_size
    row = [(7 * i * i + 3) % size for i in range(tokens)]
    with (
        preserve_rng_state(device),
        packed_attention(model),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
    ):
        loss = step_loss(model.train(), move_to_device(collator([{"input_ids": row, "labels": row}]), device))
    total = sum(kept.values())
    del loss
    model.train(was_training)
    return total


def compile_layers(model: Any) -> int:
    """Compile each layer of the backbone by torch.compile, in place; return how many.

    The first steps then take minutes: each kind of layer is compiled when it first runs. Attention by segment stays as
    it is, since it changes with each pack.

    Raises:
        UsageError: there is no compiler, or no layer that is known as one.
    """
    device = next(model.parameters()).device
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise UsageError(
            "torch.compile needs a C++ compiler on a CPU, and there is none", "g++ or clang++", "leave out --compile"
        )
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(f"a {type(model).__name__} has no layers that are known as such", hint="leave out --compile")
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)
