"""Our ways of `benchmarks/step.py`: `python ours.py SPEC.json WAY`. The step is `slimtune train`'s, in a plain loop.

    ours              everything on, fp32 adapters
    ours-bf16         the same with 16-bit adapters (`autocast_adapter_dtype=False`)

One lever off at a time, for its share:

    no-sharing        what rows begin with alike is laid for each of them (`--set train.share_prefix=false`)
    no-layout         and rows in one sequence are kept apart by a dense mask that transformers makes of `position_ids`
    all-logits        logits and their softmax at every position, as a model's own loss has them
    plain-maps        low-rank maps by plain operations in the adapters' dtype, as PEFT has them
    no-pages          glibc's own way with freed memory
    plain-norms       norms and MLPs as transformers has them, which keep more
    all-off           all of these: what is left is PEFT's packed step
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from worker import Row, Turns, serve

import slimtune
from slimtune.core.adapters.adapter_module import BaseForward
from slimtune.core.attention.attention_functions import (
    LAYOUT_KWARG,
    make_placeholder_mask,
    using_packed_attention,
)
from slimtune.core.data.collator import Collator
from slimtune.core.foundation.device import disable_malloc_trim
from slimtune.core.models.loader import load_base
from slimtune.core.training.loss import choose_sufficient_micro_batch_tokens, compute_step_loss, make_collator
from slimtune.core.training.memory_savings import apply_memory_savings

OFF = {
    "ours": (),
    "ours-bf16": ("autocast",),
    "no-sharing": ("share",),
    "no-layout": ("share", "layout"),
    "all-logits": ("logits",),
    "plain-maps": ("maps",),
    "plain-norms": ("recompute",),
    "no-pages": ("pages",),
    "all-off": ("share", "layout", "logits", "maps", "pages", "recompute"),
}


def all_logits_loss(model: Any, batch: dict[str, Any], supervised: int) -> Tensor:
    """The loss as a model's own has it: logits of every position in fp32, then cross-entropy over all of them."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    if "layout" in batch:
        inputs |= {LAYOUT_KWARG: batch["layout"], "attention_mask": make_placeholder_mask(batch["input_ids"].device)}
    logits = model(**inputs, use_cache=False).logits[0].float()
    columns = batch["logits_to_keep"][batch["hidden_index"]]
    assert len(columns.unique()) == len(columns), "a position has two targets: labels cannot say so"
    labels = torch.full(logits.shape[:1], -100).index_copy_(0, columns, batch["targets"])
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / supervised


def plain_maps() -> list[int]:
    """Compute every low-rank map by plain operations from now on; return a list that grows with each."""
    ran: list[int] = []

    def plus_low_rank(self: BaseForward, x: Tensor, A: Tensor, B: Tensor, scale: float, drop: float = 0.0) -> Tensor:
        ran.append(1)
        y = self(x)
        return (y + F.linear(F.linear(F.dropout(x.to(A.dtype), drop), A), B) * scale).to(y.dtype)

    BaseForward.plus_low_rank = plus_low_rank  # type: ignore[method-assign]
    return ran


def main() -> None:
    turns = Turns()
    spec, off = turns.spec, OFF[turns.way]
    base = load_base(spec["base"], dtype=spec["dtype"], device="cpu")
    if "pages" not in off:
        disable_malloc_trim()
    config = slimtune.LoraConfig(**spec["lora"])
    model = slimtune.get_peft_model(base.model, config, autocast_adapter_dtype="autocast" not in off)
    if "recompute" not in off:
        apply_memory_savings(model)
    ran = plain_maps() if "maps" in off else None
    pad, longest = base.tokenizer.pad_token_id, max(len(row["input_ids"]) for row in spec["rows"])
    collator = Collator(pad) if "layout" in off else make_collator(model, pad, share_prefix="share" not in off)
    assert collator.with_packed_layout != ("layout" in off)
    collator.max_tokens = choose_sufficient_micro_batch_tokens(model, collator, longest)
    assert ran is None or ran, "plain maps were asked for and others ran"

    def passes(rows: list[Row]) -> list[tuple[dict[str, Any], int]]:
        return [(pack, pack["input_ids"].numel()) for pack in collator.make_micro_batches(rows)]

    loss_of = all_logits_loss if "logits" in off else compute_step_loss
    dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
    with contextlib.nullcontext() if "layout" in off else using_packed_attention(model):
        facts = {"adapters": str(dtype).removeprefix("torch."), "room": collator.max_tokens}
        serve(turns, model, passes, loss_of, **facts)


if __name__ == "__main__":
    main()
