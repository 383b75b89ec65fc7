"""Answers of a model that is being trained, sampled between two of its steps.

The sampler is the model that trains: the same weights and kernels, with the adapter on, or off for the reference. So a
token's reported log-probability is the one that the next forward pass computes for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..core.kernels.dropout import get_rng_states, set_rng_states
from .answer_queue import GeneratedAnswer, SamplingParams
from .generation_models import GenerationModel
from .text_generator import TextGenerator


def sample_answers_between_steps(
    model: Any,
    adapter_or_base: GenerationModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    count: int,
    max_batch: int = 64,
) -> list[list[GeneratedAnswer]]:
    """Sample answers between two training steps, and leave the model and the random states as they were.

    Args:
        model: the adapted model that trains; its caches of keys and values last as long as this call.
        adapter_or_base: the adapter that answers, or the base (`BASE_ROW`).
        prompts: token ids of each prompt; the answers to one prompt share its pass.
        params: of all answers; the seed is that of the first one, and each further answer has the next one.
        count: answers to each prompt.
        max_batch: most answers that are generated at the same time.

    Returns:
        `count` answers to each prompt, with `token_ids` and `logprobs` for each of these tokens.
    """
    if params.top_logprobs is None:
        params = replace(params, top_logprobs=0)
    answers = [
        [GeneratedAnswer(adapter_or_base, ids, replace(params, seed=params.seed + n * count + i)) for i in range(count)]
        for n, ids in enumerate(prompts)
    ]
    with _suspend_training(model):
        generator = TextGenerator(model, max_batch=max_batch)
        generator.generate([answer for group in answers for answer in group])
    return answers


@contextmanager
def _suspend_training(model: Any) -> Iterator[None]:
    """Put an adapted model into evaluation mode inside the `with`.

    After it, the mode of each module, the active adapters, the parameters that train and the random states of the CPU
    and of the model's device are what they were.
    """
    training = [module for module in model.modules() if module.training]
    trained = [p for p in model.parameters() if p.requires_grad]
    active, states = model.active_adapters, get_rng_states(model.device)
    model.eval()
    try:
        yield
    finally:
        if model.active_adapters != active:
            model.set_adapter(active)
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
        set_rng_states(states)
