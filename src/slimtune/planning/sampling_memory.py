"""What a run that learns from its own answers holds while it samples them: keys and values of those at once.

They are freed before the step learns, so a run needs the most of both, not their sum.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..core.data.example_lengths import ALL_SUPERVISED, DatasetRowComposition, ExampleLength, count_tokens_per_row
from ..errors import ModelError
from ..objectives.policy_objective import PolicyObjective
from ..objectives.sampled_answers import PROMPTS_AT_ONCE
from ..objectives.teacher_objective import TeacherObjective
from .serving_cache import count_request_kv_cache_bytes

ANSWERS_AT_ONCE = 64
"""Answers that are sampled at the same time (`generation.training_samples`)."""
COPIES = 1.25
"""A step of sampling appends to the keys and values of one layer after another, and copies each as it does."""


def count_sampling_bytes(
    objective: Any,
    config: Any,
    prompts_per_step: int,
    lengths: Sequence[ExampleLength],
    seq_len: int,
    dtype: Any,
    content: DatasetRowComposition = ALL_SUPERVISED,
) -> int:
    """Return the most bytes of keys and values while a step's answers are sampled; 0 for objectives that sample none.

    Args:
        objective: of the run.
        config: of the base.
        prompts_per_step: prompts of an optimizer step.
        lengths: of the examples, if they are known; else every row has `seq_len` tokens.
        seq_len: longest row.
        dtype: of the keys and values.
        content: of the examples: what a teacher reads more than they have.
    """
    if isinstance(objective, TeacherObjective):
        if not content.samples_answers:
            return 0
        answers, teacher_tokens = PROMPTS_AT_ONCE, content.teacher_row_tokens
    elif isinstance(objective, PolicyObjective):
        answers, teacher_tokens = prompts_per_step * objective.num_generations, 0
    else:
        return 0
    longest = max((max(count_tokens_per_row(length)) for length in lengths), default=seq_len) + teacher_tokens
    try:
        half_precision = count_request_kv_cache_bytes(config, longest, "vllm")
    except ModelError:
        return 0
    return int(
        COPIES * min(ANSWERS_AT_ONCE, answers) * half_precision * torch.empty((), dtype=dtype).element_size() / 2
    )
