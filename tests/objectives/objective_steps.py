"""One step of an objective on a model: its loss and its gradients."""

from typing import Any

import torch

from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.training.loss import compute_step_loss, score_row_logps_by_example_index


def get_gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found


def score_rows(model, examples, collator):
    logps = score_row_logps_by_example_index(model.get_base_model(), examples, collator)
    return [logps[i] for i in range(len(examples))]


def add_reference(model, examples, collator):
    with model.disable_adapter():
        reference = score_rows(model, examples, collator)
    return [e | {"reference": logps} for e, logps in zip(examples, reference, strict=True)]


def take_step(model, examples, objective, collator, groups=None):
    """Return a step's loss and gradients; `groups` are its micro-batches."""
    rows = objective.prepare_step(examples, lambda rows: score_rows(model, rows, collator))
    batches = [collator([rows[i] for i in group]) for group in groups or collator.group_rows(rows)]
    num_items = objective.count_items(rows)
    with using_packed_attention(model):
        loss = sum(compute_step_loss(model.get_base_model(), batch, num_items, objective) for batch in batches)
        loss.backward()
    return loss.item(), get_gradients(model)
