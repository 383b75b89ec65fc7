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


def collect_layer_inputs(
    model: Any, layers: Mapping[str, nn.Module], token_id_rows: Sequence[Sequence[int]], max_inputs: int = MAX_INPUTS
) -> dict[str, Tensor]:
    """Run a model on rows of token ids; return for each layer `(n, in_features)` on the CPU, n at most `max_inputs`.

    Layers that get the same tensor (q, k and v) share one sample. A layer that does not run, or gets something other
    than the row's hidden states (an expert), is left out.
    """
    samples: dict[str, list[Tensor]] = {name: [] for name in layers}
    per_row = max(1, max_inputs // max(1, len(token_id_rows)))
    _run_on_rows(model, layers, token_id_rows, per_row, lambda name, x: samples[name].append(x))
    joined: dict[tuple[int, ...], Tensor] = {}
    for parts in samples.values():
        key = tuple(map(id, parts))
        if key not in joined and any(len(part) for part in parts):
            joined[key] = torch.cat(parts)
    return {name: joined[key] for name, parts in samples.items() if (key := tuple(map(id, parts))) in joined}


def collect_second_moments(
    model: Any, layers: Mapping[str, nn.Module], token_id_rows: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Run a model on rows of token ids; return for each layer (1/n) XᵀX of its n inputs X, `(in, in)`, on the CPU.

    They take the same memory however many inputs there are. Which layers share one or are left out is as in
    `collect_layer_inputs`.
    """
    moments: dict[str, Tensor] = {}
    tokens = sum(map(len, token_id_rows))
    last_name, last_input = "", None

    def add(name: str, x: Tensor) -> None:
        nonlocal last_name, last_input
        if x is last_input:
            if last_name in moments:
                moments.setdefault(name, moments[last_name])
            return
        last_name, last_input = name, x
        if len(x):
            with torch.autocast("cpu", enabled=False):  # 16 bits would leave no sum of squares
                moment = compute_second_moment(x).mul_(len(x) / tokens)
            moments[name] = moments[name].add_(moment) if name in moments else moment

    _run_on_rows(model, layers, token_id_rows, None, add)
    return moments


@torch.no_grad()
def _run_on_rows(
    model: Any,
    layers: Mapping[str, nn.Module],
    token_id_rows: Sequence[Sequence[int]],
    per_row: int | None,
    receive: Callable[[str, Tensor], None],
) -> None:
    """Run a model on rows; `receive(name, x)` gets a layer's inputs `(n, in_features)` on the CPU, batch by batch.

    They are those of `per_row` tokens drawn from each row, or of all. Layers with the same input get the same tensor,
    one after the other; one that gets something other than the row's hidden states gets an x without rows.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    last_input: Tensor | None = None
    last_sample = torch.zeros(0)
    batches: list[list[Sequence[int]]] = []
    for row in sorted(token_id_rows, key=len):  # similar lengths need little padding
        if not batches or (len(batches[-1]) + 1) * len(row) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)

    def take(name: str, x: Tensor) -> None:
        nonlocal last_input, last_sample
        if x is not last_input:
            last_input = x
            flat = x.reshape(-1, get_in_and_out_features(layers[name])[0])
            last_sample = (flat[positions] if len(flat) == ids.numel() else flat[:0]).cpu()
        receive(name, last_sample)

    with recording_layer_inputs(layers, take):
        for batch in batches:
            ids, mask = torch.zeros(2, len(batch), len(batch[-1]), dtype=torch.long)
            for n, row in enumerate(batch):
                ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(list(row)), 1
            kept = [torch.randperm(len(row), generator=generator)[:per_row] for row in batch]
            positions = torch.cat([n * ids.shape[1] + some for n, some in enumerate(kept)]).to(device)
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=1)
            last_input = None


def compute_second_moment(inputs: Tensor) -> Tensor:
    """Return (1/n) XᵀX of inputs X `(n, in)`, in fp32 or wider."""
    x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    moment = x.new_empty(x.shape[1], x.shape[1])
    for start in range(0, len(moment), 256):  # it is symmetric: half of the products give all of it
        end = start + 256
        torch.mm(x[:, start:end].t(), x[:, start:], out=moment[start:end, start:])
        moment[end:, start:end] = moment[start:end, end:].t()
    return moment.div_(len(x))


def add_damping(second_moment: Tensor, damping: float) -> Tensor:
    """Return a second moment + λ I, fp64; λ is `damping` times the mean of its diagonal.

    λ makes the matrix positive definite, and covers directions that the inputs miss.
    """
    damped = second_moment.to(torch.float64, copy=True)
    damped.diagonal().add_(damping * damped.diagonal().mean() + 1e-12)
    return damped
