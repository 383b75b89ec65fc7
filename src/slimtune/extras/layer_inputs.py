"""What a model's layers get from data, for initializations and rounding that depend on it: samples of inputs, files."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..core.foundation.files import write_atomic
from ..core.kernels.linear_layers import get_in_and_out_features
from ..errors import UsageError

ROWS = 64
"""Rows that LoftQ takes its inputs from."""
MAX_INPUTS = 1024
"""Inputs kept for a layer by default: tokens drawn evenly from all rows."""
BATCH_TOKENS = 1024
"""Tokens of the rows that run together, padding included."""


@contextmanager
def recording_layer_inputs(layers: Mapping[str, nn.Module], callback: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `callback(name, x)` with a layer's first argument whenever it runs inside the `with` block."""

    def hook(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        callback(name, arguments[0])

    handles = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_cached_statistics(file: str | os.PathLike | None) -> dict[str, Tensor] | None:
    """Return the tensors of a safetensors file; None if no file is given or it does not exist."""
    if file is None or not Path(file).is_file():
        return None
    try:
        return load_file(file)
    except SafetensorError as e:
        message = f"{file} is not a safetensors file: {e}"
        raise UsageError(
            message, "a file that slimtune wrote (PEFT's are pickles)", "delete it to make it again"
        ) from None


def save_cached_statistics(file: str | os.PathLike | None, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file and make its folder; None: nothing."""
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(file), save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}))


@torch.no_grad()
def collect_layer_inputs(
    model: Any,
    layers: Mapping[str, nn.Module],
    token_id_rows: Sequence[Sequence[int]],
    max_inputs: int = MAX_INPUTS,
    kept_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Run a model on rows of token ids; return for each layer `(n, in_features)` on the CPU, n at most `max_inputs`.

    Layers that get the same tensor (q, k and v) share one sample. A layer that does not run, or gets something other
    than the row's hidden states (an expert), is left out. Samples are kept in `kept_dtype`; None: the layer's own.
    """
    samples: dict[str, list[Tensor]] = {name: [] for name in layers}
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    last_input: Tensor | None = None
    last_sample = torch.zeros(0)
    batches: list[list[Sequence[int]]] = []
    for row in sorted(token_id_rows, key=len):  # similar lengths need little padding
        if not batches or (len(batches[-1]) + 1) * len(row) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)

    def receive(name: str, x: Tensor) -> None:
        nonlocal last_input, last_sample
        if x is not last_input:
            last_input = x
            flat = x.reshape(-1, get_in_and_out_features(layers[name])[0])
            last_sample = (flat[positions] if len(flat) == ids.numel() else flat[:0]).to("cpu", kept_dtype)
        samples[name].append(last_sample)

    with recording_layer_inputs(layers, receive):
        for batch in batches:
            ids, mask = torch.zeros(2, len(batch), len(batch[-1]), dtype=torch.long)
            for n, row in enumerate(batch):
                ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(list(row)), 1
            kept = [
                torch.randperm(len(row), generator=generator)[: max(1, max_inputs // len(token_id_rows))]
                for row in batch
            ]
            positions = torch.cat([n * ids.shape[1] + some for n, some in enumerate(kept)]).to(device)
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=1)
            last_input = None
    joined: dict[tuple[int, ...], Tensor] = {}
    for parts in samples.values():
        key = tuple(map(id, parts))
        if key not in joined and any(len(part) for part in parts):
            joined[key] = torch.cat(parts)
    return {name: joined[key] for name, parts in samples.items() if (key := tuple(map(id, parts))) in joined}


def compute_second_moment(inputs: Tensor, damping: float) -> Tensor:
    """Return (1/n) XᵀX + λ I of inputs X `(n, in)`, fp64; λ is `damping` times the mean of the diagonal.

    λ makes the matrix positive definite, and covers directions that the sample misses.
    """
    x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    moment = (x.t() @ x).double() / len(x)
    moment.diagonal().add_(damping * moment.diagonal().mean() + 1e-12)
    return moment
