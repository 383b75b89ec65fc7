"""Files before they exist: what training writes, from the shapes of a model on `meta`.

A safetensors file is 8 bytes, a JSON header filled up with spaces to whole 8 bytes, and the values:

    {"__metadata__":{…},"<name>":{"dtype":"F32","shape":[16,4096],"data_offsets":[0,262144]},…}

sorted by dtype, then by name. An adapter's file is known to the byte; checkpoints, and the JSON, logs and tokenizer
that lie beside, are bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..adapters.model import PeftModel
from ..adapters.state_dict import adapter_tensor_info
from ..train_step.optimizer import build_optimizer

_ADAPTER = "default"
BESIDE = 2**20
"""Bytes of a checkpoint's settings, random states and log, and as many of a run's own: enough for 4000 logged steps."""
_TOKEN = 150
"""Bytes a token takes in `tokenizer.json` at most; 134 in Llama 3's and Gemma 2's, 75 in Qwen 2.5's."""


def file_bytes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, at_most: int | None = None
) -> int:
    """Return the size of the safetensors file that holds these tensors; their values are not needed.

    Args:
        tensors: by name, on any device.
        metadata: what the header holds beside.
        at_most: bytes of the values at most, where they can have other shapes, or lie in another order, than those of
            `tensors`: then the result is the file's size at most. None: these tensors are what is written.
    """
    kinds = _kinds(t.dtype for t in tensors.values())
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (kinds[item[1].dtype]["data_offsets"], item[0])):
        begin, end = end, end + tensor.nbytes
        shape, offsets = list(tensor.shape), [begin, end]
        if at_most is not None:  # no number in a header has more digits than all bytes have
            shape, offsets = [at_most] * len(shape), [at_most] * 2
        header[name] = {"dtype": kinds[tensor.dtype]["dtype"], "shape": shape, "data_offsets": offsets}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + (end if at_most is None else at_most)


def adapter_bytes(model: Any) -> tuple[int, bool]:
    """Return the size of the file that training leaves, and whether that is an upper bound.

    It is one where data or training choose ranks (`PeftConfig.max_size_increase`). Of a model that is not adapted it is the size
    of its weights in one file.

    Args:
        model: a job's model, on meta or anywhere; the adapter is "default".
    """
    if not isinstance(model, PeftModel):
        return file_bytes(dict(model.named_parameters()), {"format": "pt"}), False
    tensors, metadata = adapter_tensor_info(model, _ADAPTER)
    grown = _may_grow(model)
    at_most = None if grown is None else _values(tensors.values()) + grown
    return file_bytes(tensors, metadata, at_most), grown is not None


def checkpoint_bytes(model: Any, optimizer: str = "adamw") -> int:
    """Return the size of one checkpoint at most.

    Args:
        model: a job's model.
        optimizer: a name `build.OPTIMIZERS` lists.
    """
    return sum(_checkpoint(model, optimizer)) + BESIDE


def run_bytes(model: Any, save_total_limit: int, optimizer: str = "adamw") -> int:
    """Return the most bytes on the disk that a run's folder takes: checkpoints, adapter, tokenizer and log.

    Args:
        model: a job's model.
        save_total_limit: checkpoints kept beside the best.
        optimizer: a name `build.OPTIMIZERS` lists.
    """
    # An older one goes when the new one is whole: the best, those kept, and the one that is being written.
    checkpoints = (save_total_limit + 2) * checkpoint_bytes(model, optimizer)
    vocabulary = model.config.get_text_config().vocab_size
    return checkpoints + adapter_bytes(model)[0] + vocabulary * _TOKEN + BESIDE


def writing_bytes(model: Any, optimizer: str = "adamw", device: str = "cuda") -> int:
    """Return the memory of the machine, beside the model's, that writing a checkpoint takes.

    Files are written one after another. Of each its values are brought from the device, and safetensors makes the file
    in memory twice: once for itself, once as what it returns.

    Args:
        model: a job's model.
        optimizer: a name `build.OPTIMIZERS` lists.
        device: kind of device the model lies on; from "cpu" nothing has to be brought.
    """
    return max(_checkpoint(model, optimizer)) * (2 if device == "cpu" else 3)


def _checkpoint(model: Any, optimizer: str) -> list[int]:
    """Return the sizes of a checkpoint's large files: adapter, optimizer, and what the method goes on from."""
    state = _optimizer_state(model, optimizer)
    held, trained = _values(state.values()), _values(p for p in model.parameters() if p.requires_grad)
    grown = -(-held * (_may_grow(model) or 0) // trained)
    # At most: the Trainer sorts parameters into groups, those with weight decay first, and numbers them in that order.
    sizes = [adapter_bytes(model)[0], file_bytes(state, at_most=held + grown)]
    if isinstance(model, PeftModel):
        deltas = model.adapter_modules(_ADAPTER)
        kept = {f"{at}:{n}": t for at, delta in deltas.items() for n, t in delta.extra_state().items()}
        sizes += [file_bytes(kept)] if kept else []
    return sizes


def _optimizer_state(model: Any, name: str) -> dict[str, Tensor]:
    """Return the tensors of an optimizer's state after its first step, without values."""
    with FakeTensorMode():
        # On fake CPU, where the fused kernels run, as they do not on meta.
        trained = nn.ParameterList(
            torch.empty(p.shape, dtype=p.dtype, device="cpu") for p in model.parameters() if p.requires_grad
        )
        optimizer = build_optimizer(trained, name)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        state = optimizer.state_dict()["state"]
        found = {f"{i}.{n}": t for i, held in state.items() for n, t in held.items() if isinstance(t, Tensor)}
        once = {id(t): n for n, t in reversed(found.items())}  # what parameters share is written once
        return {n: t for n, t in found.items() if once[id(t)] == n}


def _may_grow(model: Any) -> int | None:
    if not isinstance(model, PeftModel):
        return None
    return model.peft_config[_ADAPTER].max_size_increase(model.adapter_modules(_ADAPTER))


def _values(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _kinds(dtypes: Iterable[torch.dtype]) -> dict[torch.dtype, dict[str, Any]]:
    """Return what a header says of one value of each dtype: its name in a file, and where among the others it lies."""
    ones = {str(d): torch.empty(1, dtype=d, device="cpu") for d in dtypes}
    file = to_bytes(ones)
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return {one.dtype: header[name] for name, one in ones.items()}
