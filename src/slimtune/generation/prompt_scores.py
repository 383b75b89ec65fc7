"""Log-probabilities of the tokens of a prompt, computed in one pass, a few tokens' logits at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.adapters.active_adapters import BASE_ROW
from ..core.models.lm_head import get_hidden_states, get_lm_head_with_scale_and_cap
from ..errors import ModelError
from ..methods.lora.alora import calculate_alora_offsets
from ..objectives.teacher_divergence import compute_logits
from .answer_queue import PromptTokenLogprob
from .model_runner import MultiAdapterRunner

TOKENS_AT_ONCE = 64
"""Tokens of a prompt whose logits exist at the same time."""


@torch.no_grad()
def score_prompt(
    runner: MultiAdapterRunner, adapter_or_base: str, prompt: Sequence[int], top_k: int
) -> tuple[list[PromptTokenLogprob], Tensor]:
    """Return log-probabilities of all tokens of a prompt but the first, and the logits `(1, vocabulary)` after it.

    Args:
        runner: of the model; nobody else may use it meanwhile.
        adapter_or_base: the adapter's name, or BASE_ROW.
        prompt: token ids.
        top_k: how many of the likeliest tokens are reported at each position; at most the vocabulary.

    Raises:
        ModelError: the model has no head of its own.
    """
    model = runner.model
    ids = torch.tensor([list(prompt)], device=model.device)
    offsets = calculate_alora_offsets(model.peft_config, adapter_or_base, ids)
    with _using_adapter(model, adapter_or_base):
        head = get_lm_head_with_scale_and_cap(model)
        if head is None:
            raise ModelError("the model has no head of its own, which log-probabilities of a prompt need")
        inputs = {"input_ids": ids, "use_cache": False, "alora_offsets": offsets}
        states = get_hidden_states(model, head, inputs)[0, -len(prompt) :]  # without virtual tokens
        found: list[PromptTokenLogprob] = []
        for start in range(0, len(prompt) - 1, TOKENS_AT_ONCE):
            following = ids[0, 1 + start : 1 + start + TOKENS_AT_ONCE, None]
            log_probs = compute_logits(head, states[start : start + len(following)]).log_softmax(-1)
            log_probs.clamp_(min=-9999.0)  # JSON has no -Inf
            own = log_probs.gather(1, following)
            ranks = (log_probs > own).sum(-1) + 1
            values, tokens = log_probs.topk(min(top_k, log_probs.shape[1]))
            found += [
                PromptTokenLogprob(token, logprob, rank, list(zip(top, tops, strict=True)))
                for token, logprob, rank, top, tops in zip(
                    following[:, 0].tolist(), own[:, 0].tolist(), ranks.tolist(), tokens.tolist(), values.tolist(),
                    strict=True,
                )
            ]  # fmt: skip
        return found, compute_logits(head, states[-1:])


@contextmanager
def _using_adapter(model: Any, adapter_or_base: str) -> Iterator[None]:
    if adapter_or_base == BASE_ROW:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter_or_base, inference_mode=True)
        yield
