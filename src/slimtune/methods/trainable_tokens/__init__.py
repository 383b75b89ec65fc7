"""Trainable tokens: some rows of the embedding train, the others stay frozen.

    W'[i] = V[j] where i is the j-th chosen token, W[i] elsewhere        V (k, d), starts as W's own rows

For new special tokens, or to change the meaning of a few words. An output head (or another embedding) that is tied to
the embedding follows: there y = W x, and the chosen tokens' logits become V x, computed as y + (V − W[chosen]) x, so
that the start is exact. Parameters added: k · d. Merged: W with its rows replaced.

File format: PEFT's `trainable_tokens_delta`, which holds V itself, not a difference. LoRA's `trainable_token_indices`
uses the modules of this file. https://huggingface.co/docs/peft/package_reference/trainable_tokens
"""

from .trainable_tokens_config import TrainableTokensConfig as TrainableTokensConfig
