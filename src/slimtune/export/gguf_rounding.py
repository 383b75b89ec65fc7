"""Round the matrices of a GGUF in few bits with the inputs of their layers, in place of llama.cpp's rounding.

llama.cpp's quantizer has written the file and chosen each tensor's type. Type, place and size of a tensor stay; only
its bytes are replaced (see `gptq_rounding.py`).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.foundation.progress_bars import track_progress
from ..extras.gguf_loading import open_gguf_reader
from .gguf_blocks import BLOCK_FORMATS
from .gptq_rounding import round_to_blocks_with_inputs


def round_gguf_with_inputs(file: Path, source: Path, second_moments: Mapping[str, Tensor]) -> list[str]:
    """Round the matrices of a quantized GGUF again, so that their outputs on inputs change little; return their names.

    Args:
        file: of llama.cpp's quantizer; it is changed.
        source: what it was made from, in 16 or 32 bits.
        second_moments: of the inputs of matrices, `(in, in)`, by the tensor's name. Matrices without, and those in a
            type that is not in `BLOCK_FORMATS`, stay as they are.
    """
    values = {t.name: t for t in open_gguf_reader(source).tensors}
    chosen = [
        t
        for t in open_gguf_reader(file).tensors
        if t.tensor_type.name in BLOCK_FORMATS
        and len(t.shape) == 2
        and t.name in second_moments
        and len(second_moments[t.name]) == t.shape[0]
    ]
    chosen.sort(key=lambda t: id(second_moments[t.name]))  # what is computed of an input serves q, k and v
    with file.open("r+b") as f:
        for tensor in track_progress(chosen, "matrices rounded with rows"):
            weight = torch.from_numpy(np.array(values[tensor.name].data, dtype=np.float32))
            block_format = BLOCK_FORMATS[tensor.tensor_type.name]
            blocks = round_to_blocks_with_inputs(weight, second_moments[tensor.name], block_format)
            f.seek(tensor.data_offset)
            f.write(blocks.numpy().tobytes())
    return [t.name for t in chosen]
