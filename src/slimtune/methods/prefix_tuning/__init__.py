"""Prefix tuning: in every layer the queries also attend to n learned keys and values.

    softmax([q Kpᵀ, q Kᵀ] · scale) [Vp, V]      Kp, Vp (kv heads, n, head size), one pair per layer

Parameters added: n · layers · 2 · kv heads · head size; with `prefix_projection` a small network computes them: a
linear layer, tanh, another linear layer. The tokens' positions start at n, as if the prefix had been read; so a prefix
can start as the keys and values of a text, and the model then answers as after that text. It cannot be merged.

Paper: https://arxiv.org/abs/2101.00190. File format: PEFT's `prompt_embeddings (n, layers · 2 · kv heads · head size)`;
with a projection also the network's own tensors, as `prompt_encoder.…`, so that training can continue.
"""

from .prefix_tuning_config import PrefixTuningConfig as PrefixTuningConfig
