"""P-tuning: prompt tuning whose n embeddings are the output of a small network, which trains in their place.

    [P_1 … P_n, x_1 … x_T] → the frozen model,   P = f(E),   E (n, hidden)

    MLP    f = W3 relu(W2 relu(W1 E))                  W1 (h, hidden), W2 (h, h), W3 (hidden, h), with biases
    LSTM   f = W2 relu(W1 LSTM(E)), bidirectional      W1 (2h, 2h), W2 (hidden, 2h), with biases

Parameters added: n · hidden and f's own, which only training needs: afterwards P is a table. It cannot be merged.

Paper: https://arxiv.org/abs/2103.10385. File format: PEFT's `prompt_embeddings (n, hidden)`, which is P, and beside it
E and f as `prompt_encoder.…`, so that training can continue. A file without them (PEFT's) loads as a table P.
"""

from .p_tuning_config import PromptEncoderConfig as PromptEncoderConfig
