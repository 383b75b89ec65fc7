"""Prompt tuning: n learned embeddings (virtual tokens) in front of the sequence.

    [P_1 … P_n, x_1 … x_T] → the frozen model        P (n, hidden)

Parameters added: n · hidden. P starts at random, as the embeddings of random tokens, or as those of a text: if n is the
text's number of tokens, the model then answers as after that text, up to rounding. It cannot be merged.

Paper: https://arxiv.org/abs/2104.08691. File format: PEFT's one tensor `prompt_embeddings (n, hidden)`. Unlike PEFT's,
the logits have no positions for the virtual tokens.
"""

from .prompt_tuning_config import PromptTuningConfig as PromptTuningConfig
