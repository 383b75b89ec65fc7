"""BitFit: y = W x + b + d, with W and b frozen: only biases train, of linear layers and of norms.

d (out) starts at zero, so the model starts unchanged. Parameters added per layer: out. Merged: b + d. Llama and similar
models have no biases: `new_biases` adds some, which the merged model then has no place for.

Paper: https://arxiv.org/abs/2106.10199. File format: PEFT's layout with the key `bitfit_bias`; PEFT lacks this method.
"""

from .bitfit_config import BitFitConfig as BitFitConfig
