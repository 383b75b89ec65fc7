"""LoRA: y = W x + b + s · B A x, with W frozen.

    A (r, in), B (out, r), s = alpha / r, or alpha / √r with rsLoRA. B starts at zero, so the model starts unchanged.
    At an embedding A (r, rows) starts at zero and B (dim, r) normal, with every init_lora_weights but "mica".
    At a convolution A (r, in, *kernel) is a convolution like the base and B (out, r, 1, …) a pointwise one.
    Parameters added per layer: r · (in + out), with DoRA also out. Merged: W + s · B A.

`lora_modules.py` has the adapter modules, `lora_conv_modules.py` and `lora_parameter_modules.py` those of convolutions,
and of experts and other parameters; `lora_init.py` their initializations (PiSSA, OLoRA, …), `dora.py` DoRA, `alora.py`
activated LoRA, `eva.py`, `corda.py`, `loraga.py` and `loftq.py` initialization from data and from the weights before
quantization.

Papers: LoRA https://arxiv.org/abs/2106.09685, rsLoRA https://arxiv.org/abs/2312.03732, LoRA+
https://arxiv.org/abs/2402.12354, LoRA-FA https://arxiv.org/abs/2308.03303. File format: PEFT's `lora_A.weight`,
`lora_B.weight`; for an embedding `lora_embedding_A (r, rows)`, `lora_embedding_B (dim, r)`.
"""

from .lora_config import LoraConfig as LoraConfig
from .lora_config import LoraRuntimeConfig as LoraRuntimeConfig
