"""Activated LoRA: the low-rank part changes only the tokens from the invocation tokens on.

    y_t = W x_t + b + s · B A x_t    for the tokens t of a row from the last occurrence of `alora_invocation_tokens` on
    y_t = W x_t + b                  before it

The tokens before it have the base's hidden states, so one cache serves the base and any number of such adapters. No
weight has this effect: it is not merged. `alora_calls.py` finds the tokens of a call.

Paper: https://arxiv.org/abs/2504.12397. File format: PEFT's, LoRA's keys.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.adapters.adapter_module import AdapterSite, BaseForward, MergeUnsupported
from ...core.models.lm_head import ModelInputs
from .lora_modules import LinearLora

NEVER = torch.iinfo(torch.int64).max // 2
"""The start of the change in a row that has no invocation."""


class LinearALora(LinearLora):
    """`y + s · B A dropout(x)` at some tokens of a linear layer, y at the others."""

    takes_tokens: ClassVar[bool] = True
    base_can_store_merge = False

    def __init__(self, site: AdapterSite, config: Any, r: int, scale: float) -> None:
        super().__init__(site, config, r, scale)
        self.site_name = site.name

    def forward_with_base(self, base: BaseForward, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Map `x (..., in)` to `(..., out)`; `tokens` are the indices of the changed tokens in `x` flattened."""
        y, (A, B) = base(x), self.low_rank()
        z = F.linear(self.lora_dropout(x.reshape(-1, x.shape[-1])[tokens]), A.to(x.dtype))
        change = F.linear(z, B.to(x.dtype), None if self.lora_B.bias is None else self.lora_B.bias.to(x.dtype))
        return y.reshape(-1, y.shape[-1]).index_add(0, tokens, change.to(y.dtype), alpha=self.scale).view(y.shape)

    def forward_batch_rows(
        self, base: BaseForward, plain_base: BaseForward, rows: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        return self.forward_with_base(base, *args, **kwargs)  # the tokens are those of `rows`

    def low_rank_factors(self) -> None:
        """Return None: the tokens before the invocation do not get the update."""

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise MergeUnsupported("an activated LoRA changes only the tokens after its invocation: it cannot be merged")


def find_last_invocation_or_never_per_token(ids: Tensor, invocation: Sequence[int], token_rows: Tensor) -> Tensor:
    """Return for each token of `ids (tokens)` the index where its row's last invocation starts, `NEVER` without one.

    `token_rows (tokens)` gives each token's row; a row's tokens are neighbours.
    """
    n = len(invocation)
    last = torch.full((ids.shape[0],), -1, device=ids.device)  # by row
    if n <= ids.shape[0]:
        windows, row_windows = ids.unfold(0, n, 1), token_rows.unfold(0, n, 1)
        found = (windows == torch.tensor(invocation, device=ids.device)).all(1)
        found &= row_windows[:, 0] == row_windows[:, -1]
        index = torch.arange(len(found), device=ids.device)
        last = last.scatter_reduce(0, row_windows[:, 0], torch.where(found, index, -1), "amax")
    starts = last[token_rows]
    return torch.where(starts < 0, NEVER, starts)


def calculate_alora_offsets(
    peft_config: Mapping[str, Any], active_adapter: str, input_ids: Tensor, adapter_names: Sequence[str] | None = None
) -> list[int | None]:
    """Return for each row of `input_ids (batch, tokens)` how many of its last tokens are changed; None: none.

    `adapter_names` gives each row's adapter in a mixed batch; only adapters with `alora_invocation_tokens` count.
    """
    offsets: list[int | None] = []
    for row, name in zip(input_ids, adapter_names or [active_adapter] * len(input_ids), strict=True):
        invocation = getattr(peft_config.get(name), "alora_invocation_tokens", None)
        start = (
            int(find_last_invocation_or_never_per_token(row, invocation, torch.zeros_like(row))[0])
            if invocation
            else NEVER
        )
        offsets.append(None if start == NEVER else len(row) - start)
    return offsets


def get_alora_offsets_for_forward(
    model: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> ModelInputs:
    """Return a call's further arguments with its `alora_offsets` (PEFT's name); the adapted model finds them itself."""
    where = "when only inputs_embeds are provided. Disabling aLoRA for this forward pass."
    return _add_offsets(model, input_ids, kwargs, f"Cannot calculate aLoRA offsets {where}")


def get_alora_offsets_for_generate(model: Any, *args: Any, **kwargs: Any) -> ModelInputs:
    """Return a generation's further arguments with its `alora_offsets`, as above."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    why = "during generate as input_ids are not available. Disabling aLoRA."
    return _add_offsets(model, ids, kwargs, f"Cannot calculate aLoRA offsets {why}")


def _add_offsets(model: Any, ids: Tensor | None, kwargs: ModelInputs, warning: str) -> ModelInputs:
    names: Sequence[str] | None = kwargs.get("adapter_names")
    used = [model.peft_config.get(n) for n in {*model.active_adapters, *(names or ())}]
    if kwargs.get("alora_offsets") is not None or not any(getattr(c, "alora_invocation_tokens", None) for c in used):
        return kwargs
    if ids is None:
        warnings.warn(warning, stacklevel=3)
        return {**kwargs, "alora_offsets": None}
    ids = ids if ids.dim() == 2 else ids[None]
    return {**kwargs, "alora_offsets": calculate_alora_offsets(model.peft_config, model.active_adapters[0], ids, names)}
