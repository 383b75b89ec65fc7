"""LLaMA-Adapter: the attention of the upper layers also attends to m learned tokens, through a gate.

    softmax(q Kᵀ · scale) V  +  g · softmax(q Kpᵀ · scale) Vp        Kp = Wk P, Vp = Wv P

Each of the top layers learns P (m, hidden) and a scalar g; Wk and Wv are the layer's own, frozen and without rotary
embeddings. g starts at zero, so the model starts bit for bit unchanged. Parameters added: (m · hidden + 1) · layers. It
cannot be merged.

Paper: https://arxiv.org/abs/2303.16199. File format: PEFT's `…self_attn.adaption_prompt (1, m, hidden)` and
`…self_attn.adaption_gate (1)`. In GPT-2 the second term is added after the output projection, as in PEFT.
"""

from .adaption_prompt_config import AdaptionPromptConfig as AdaptionPromptConfig
