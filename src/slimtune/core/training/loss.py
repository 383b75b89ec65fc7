"""The training step's loss: −log p of supervised tokens, each row computed as if it were alone in the batch.

    loss of a step = Σ over micro-batches of `objective.loss`(−log p of each supervised token, counts of the whole step)

So a step's gradient does not depend on how its rows are divided into micro-batches. Training, validation, evaluation
and planning all run these functions; the objective (`objectives/`) is cross-entropy unless another one is given.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ...errors import UsageError
from ..attention.attention_functions import (
    LAYOUT_KWARG,
    layout_unsupported_reason_or_empty,
    make_placeholder_mask,
    packing_unsupported_reason_or_empty,
    using_packed_attention,
)
from ..config.objective_registry import load_objective_class
from ..config.schema import TrainSettings
from ..data.collator import IGNORE_INDEX, Collator
from ..data.example_types import Batch, Example
from ..foundation.device import count_free_memory
from ..foundation.progress_bars import track_progress
from ..kernels.dropout import preserve_rng_state
from ..models.lm_head import (
    LMHead,
    ModelInputs,
    get_classifier_head,
    get_hidden_states,
    get_lm_head_with_scale_and_cap,
    require_matching_lm_head_loss,
)
from .objective import Objective, sum_targets_by_row

TOKENS_ON_CPU, TOKENS_ON_GPU = 1280, 8192
"""Tokens in a micro-batch above which more tokens compute hardly faster (2,048 on a CPU: 4 %)."""
PROBE_TOKENS = 64
EVAL_ROWS = 4096
"""Rows that are divided into micro-batches together in evaluation."""


def make_collator(
    model: Any, pad_token_id: int, *, packing: bool = True, share_prefix: bool = True, **sizes: Any
) -> Collator:
    """Return the collator that packs rows if that is known to be exact for this model; `sizes` are its limits."""
    # A token of a shared prefix may be changed in one row and not in another.
    share_prefix = share_prefix and not any(getattr(m, "takes_tokens", False) for m in model.modules())
    packing = packing and not packing_unsupported_reason_or_empty(model)
    layout = packing and not layout_unsupported_reason_or_empty(model)
    if get_classifier_head(model) is not None:
        own = model.config.get_text_config().pad_token_id
        sizes["pooling_pad_id"] = -1 if own is None else own
        pad_token_id = pad_token_id if own is None else own
    return Collator(pad_token_id, packing, with_packed_layout=layout, share_prefix=share_prefix, **sizes)


def build_run_collator(settings: TrainSettings, model: Any, tokenizer: Any, longest: int) -> Collator:
    """Return the collator for a run's rows and this model; raise ModelError if the model does not support it."""
    collator = make_collator(
        model,
        tokenizer.pad_token_id,
        packing=settings.packing is not False,
        share_prefix=settings.share_prefix,
        max_rows=settings.batch_size,
    )
    if settings.packing and not collator.packing:
        message = f"train.packing is true, but {packing_unsupported_reason_or_empty(model)}"
        raise UsageError(message, hint="--set train.packing=null packs where it is exact")
    require_matching_lm_head_loss(model)
    limit = settings.max_tokens_per_micro_batch
    collator.max_tokens = choose_sufficient_micro_batch_tokens(model, collator, longest) if limit == "auto" else limit
    return collator


def move_batch_to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its tensors on a device."""
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
    if device.type == "mps":  # Metal has no float64
        tensors = {k: v.float() if v.dtype == torch.float64 else v for k, v in tensors.items()}
    return batch | {k: v.to(device) for k, v in tensors.items()}


@cache
def load_default_objective() -> Objective:
    """Return the objective of supervised fine-tuning, which is the default everywhere."""
    return load_objective_class("sft")()


# --- the loss ---------------------------------------------------------------------------------------------------------


def compute_supervised_token_nll(model: Any, collated_batch: Batch) -> Tensor:
    """Return −log p of each supervised token of a collated batch, `(K,)` in fp32 or wider, in the order of `targets`.

    If the batch has a `layout`, call this inside `using_packed_attention(model)`, and the backward pass, too.
    """
    head, h = get_head_and_supervised_hidden_states(model, collated_batch)
    if head is None:
        logits = h.to(torch.promote_types(h.dtype, torch.float32))
        return F.cross_entropy(logits, collated_batch["targets"], reduction="none")
    return head.target_nll(h, collated_batch["targets"])


def _model_inputs(batch: Batch) -> ModelInputs:
    """Return the arguments of the model's call."""
    # With a cache, transformers would let packed rows attend to each other, without a warning.
    inputs: ModelInputs = {"use_cache": False}
    inputs |= {k: batch[k] for k in ("input_ids", "position_ids", "attention_mask") if k in batch}
    if "layout" in batch:
        inputs |= {LAYOUT_KWARG: batch["layout"], "attention_mask": make_placeholder_mask(batch["input_ids"].device)}
    return inputs


def get_head_and_supervised_hidden_states(model: Any, collated_batch: Batch) -> tuple[LMHead | None, Tensor]:
    """Return the head and its inputs `(K, d)` at the supervised positions; None and logits if the head is unknown."""
    inputs = _model_inputs(collated_batch) | {"logits_to_keep": collated_batch["logits_to_keep"]}
    temperature = float(collated_batch["temperature"][0]) if "temperature" in collated_batch else 1.0
    head = get_lm_head_with_scale_and_cap(model, temperature)
    if head is None:
        return None, model(**inputs).logits.flatten(0, 1).index_select(0, collated_batch["hidden_index"]) / temperature
    return head, get_hidden_states(model, head, inputs).flatten(0, 1).index_select(0, collated_batch["hidden_index"])


def compute_row_logits(model: Any, collated_batch: Batch) -> Tensor:
    """Return the logits of a sequence classifier for each row of a collated batch, `(R, classes)` in fp32 or wider.

    They are those that transformers pools: of the last token of a row that is no padding.
    """
    logits: list[Tensor] = []
    hook = get_classifier_head(model).register_forward_hook(lambda module, args, output: logits.append(output))
    try:
        model(**_model_inputs(collated_batch))
    finally:
        hook.remove()
    chosen = logits[0].flatten(0, 1).index_select(0, collated_batch["row_ends"])
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32))


def compute_token_nll_or_row_logits(model: Any, collated_batch: Batch) -> Tensor:
    """Return an objective's input: `compute_row_logits` of a classifier, else `compute_supervised_token_nll`."""
    return (compute_row_logits if "row_ends" in collated_batch else compute_supervised_token_nll)(model, collated_batch)


def compute_step_loss(model: Any, batch: Batch, num_items: Any = None, objective: Objective | None = None) -> Tensor:
    """Return a batch's share of the step's loss; `num_items` is the step's count (default: the batch's targets)."""
    items = max(1, len(batch["targets"])) if num_items is None else num_items
    objective = objective or load_default_objective()
    return objective.loss(objective.compute_values(model, batch), batch, items)


def forward_backward(
    model: Any,
    micro_batches: Sequence[Batch],
    *,
    objective: Objective | None = None,
    num_items: Any = None,
    micro_batch_weights: Sequence[float] | None = None,
    add_regularization: bool = True,
    loss_scale: float = 1.0,
) -> Tensor:
    """Run the forward and backward passes of one optimizer step; return the step's loss, detached.

    Args:
        model: the model in training mode; gradients are added to those it has.
        micro_batches: the step's batches, on the model's device.
        objective: what is minimized; None: cross-entropy.
        num_items: its `count_items` of the whole step; cross-entropy counts the targets of the batches by default.
        micro_batch_weights: 1 for each micro-batch whose loss counts, 0 for one that is only run; None: all count.
        add_regularization: add the method's regularization loss, which one process of a run does.
        loss_scale: factor on the gradients; the returned loss is without it.
    """
    if num_items is None:
        num_items = max(1, sum(len(b["targets"]) for b in micro_batches))
    total = torch.zeros((), device=micro_batches[0]["targets"].device)
    for number, batch in enumerate(micro_batches):
        loss = compute_step_loss(model, batch, num_items, objective)
        if micro_batch_weights is not None and micro_batch_weights[number] != 1:
            loss = loss * micro_batch_weights[number]
        if number == 0 and add_regularization and hasattr(model, "regularization_loss"):
            penalty = model.regularization_loss()
            loss = loss if penalty is None else loss + penalty
            del penalty
        (loss if loss_scale == 1 else loss * loss_scale).backward()
        total += loss.detach()
        # Free this micro-batch before the next one is computed: functions of its graph keep the attention masks, too.
        del loss
        if "layout" in batch:
            batch["layout"].clear_cache()
    return total


# --- evaluation -------------------------------------------------------------------------------------------------------


def score_examples_by_objective(
    model: Any, examples: Sequence[Example], collator: Collator, objective: Objective, **options: Any
) -> dict[int, list[float]]:
    """Return the objective's measures of each example, by its number; arguments: see `score_examples_by_number`."""

    def measure(batch: Batch) -> Tensor:
        return objective.score(objective.compute_values(model, batch), batch)

    return score_examples_by_number(model, examples, collator, measure, **options)


def score_row_logps_by_example_index(
    model: Any, examples: Sequence[Example], collator: Collator, **options: Any
) -> dict[int, list[float]]:
    """Return the summed log p of each row of each example, by its number; arguments: see `score_examples_by_number`."""

    def measure(batch: Batch) -> Sequence[Tensor]:
        nats = sum_targets_by_row(compute_supervised_token_nll(model, batch).double(), batch)
        return (-nats).split(batch["example_rows"])

    return score_examples_by_number(model, examples, collator, measure, **options)


@torch.no_grad()
def score_examples_by_number(
    model: Any,
    examples: Sequence[Example],
    collator: Collator,
    measure_micro_batch: Callable[[Batch], Tensor | Sequence[Tensor]],
    *,
    divide_into_micro_batches: Callable[[Sequence[Example]], Iterable[Sequence[int]]] | None = None,
) -> dict[int, list[float]]:
    """Return the measures of each example, by its number, computed in evaluation mode.

    Args:
        model: the model.
        examples: tokenized examples, each with a supervised token.
        collator: makes the micro-batches.
        measure_micro_batch: returns the measures of each example of a micro-batch [N, M].
        divide_into_micro_batches: may leave some examples to other processes; None: the collator divides them.
    """
    device, was_training = next(model.parameters()).device, model.training
    measured: dict[int, Tensor] = {}  # read at the end, so that a GPU need not wait for a CPU
    model.eval()
    try:
        with using_packed_attention(model):
            for start in range(0, len(examples), EVAL_ROWS):
                some = examples[start : start + EVAL_ROWS]
                for group in track_progress(
                    [*(divide_into_micro_batches or collator.group_rows)(some)], "micro-batches of rows"
                ):
                    batch = move_batch_to_device(collator([some[i] for i in group]), device)
                    measured |= zip((start + i for i in group), measure_micro_batch(batch), strict=True)
    finally:
        model.train(was_training)
    return {i: values.tolist() for i, values in measured.items()}


def count_supervised_targets(example: Example) -> int:
    """Return how many of a row's tokens are supervised; the first token has nothing to be predicted from."""
    return sum(1 for label in example["labels"][1:] if label != IGNORE_INDEX)


# --- what a model supports and needs ----------------------------------------------------------------------------------


def choose_sufficient_micro_batch_tokens(model: Any, collator: Collator, longest: int) -> int:
    """Return how many tokens to put into a micro-batch: enough to compute fast, if half of the free memory holds them.

    The bytes per token are measured in real forward passes of short rows, apart from what a pass takes whatever its
    length (learned positions, factors in the base's dtype). The longest row must fit in any case.
    """
    device = next(model.parameters()).device
    enough = TOKENS_ON_GPU if device.type == "cuda" else TOKENS_ON_CPU
    if isinstance(model, FSDPModule):  # a trial pass would count gathered weights, too; the plan knows better
        return max(longest, enough)
    half, whole = (measure_activation_bytes(model, collator, n) for n in (PROBE_TOKENS // 2, PROBE_TOKENS))
    per_token = max(1.0, (whole - half) / (PROBE_TOKENS - PROBE_TOKENS // 2))
    available = count_free_memory(device) / 2 - max(0.0, whole - PROBE_TOKENS * per_token)
    return int(max(longest, min(enough, available / per_token)))


def measure_activation_bytes(model: Any, collator: Collator, token_count: int = PROBE_TOKENS) -> int:
    """Return the bytes that the backward pass of a row of `token_count` tokens keeps, no parameters or buffers."""
    device, was_training = next(model.parameters()).device, model.training
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node whose hook keeps its own output would keep all tensors for ever

    vocabulary = model.config.get_text_config().vocab_size
    row = [(7 * i * i + 3) % vocabulary for i in range(token_count)]
    batch = move_batch_to_device(collator([{"input_ids": row, "labels": row}]), device)
    hooks = torch.autograd.graph.saved_tensors_hooks(record, lambda t: t)
    with preserve_rng_state(device), using_packed_attention(model), hooks:
        loss = compute_step_loss(model.train(), batch)
    del loss
    model.train(was_training)
    return sum(saved.values())
