"""Bottleneck adapters: a small two-layer network after a sub-layer, with a residual connection around it.

    y' = y + s · (U f(D h + c) + e)        D (m, d), c (m), U (d, m), e (d), f a non-linearity, d the hidden size

`style` says where it is and what `h` is (any field given besides overrides the style):

    houlsby    after the attention and after the feed-forward of each layer; h = y
    pfeiffer   after each layer, including its residual sum: y is the layer's output; h = y
    parallel   beside the feed-forward: h = x, the feed-forward's input (after its norm, where the norm comes first)

Parameters added per adapter: 2 · d · m + m + d, with m = d / reduction_factor; plus 1 with scaling="learned", d with
"channel". U and e start at zero, so the model starts unchanged. It cannot be merged: f is not linear.

Papers: Houlsby https://arxiv.org/abs/1902.00751, Pfeiffer https://arxiv.org/abs/2005.00247, parallel
https://arxiv.org/abs/2110.04366. PEFT lacks this method; the file has the tensor names of the `adapters` library:
`adapter_down.weight`, `.bias`, `adapter_up.weight`, `.bias`, and `scaling` where it is learned.
"""

from .bottleneck_config import BottleneckConfig as BottleneckConfig
