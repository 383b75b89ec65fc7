"""VeRA: y = W x + b + λ_b ⊙ B (λ_d ⊙ A x), with W frozen, and random frozen A and B that all layers share.

A (r, in) is the first columns of one shared A, B (out, r) the first rows of one shared B; both are as large as the
largest layer needs and drawn from a seed. λ_d (r) and λ_b (out) train. λ_b starts at zero, so the model starts
unchanged. Parameters added per layer: r + out. Merged: W + diag(λ_b) B diag(λ_d) A.

Paper: https://arxiv.org/abs/2310.11454. File format: PEFT's `vera_lambda_d`, `vera_lambda_b`, and, unless
`save_projection` is off, `base_model.vera_A`, `base_model.vera_B`.
"""

from .vera_config import VeraConfig as VeraConfig
