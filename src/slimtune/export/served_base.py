"""Whether the base that an engine will serve is the one an adapter was trained on.

    a GGUF file, or a model that Ollama has here    shapes, norms and samples of the weights; the check asks this file
    a Hugging Face folder                           the same
    a name alone                                    family and size, if the name is known; the weights stay unseen

A quantized GGUF has the base's weights rounded, so they are compared within what its bits can hold. Its norms are not
rounded: they tell a base from its fine-tuned sibling.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.foundation.files import read_json_object
from ..core.foundation.fingerprint import get_hashed_config_facts
from ..core.models.base_config import load_base_config
from ..core.models.load_errors import silence_and_translate_load_errors
from ..errors import SlimtuneError, UsageError
from ..extras.gguf_loading import import_gguf, open_gguf_reader
from .gguf import convert_to_llama_cpp_tensors, make_gguf_module_name_mapper, require_gguf_architecture_spec
from .merged_weights import CheckpointTensors, LazyMergedStateDict
from .ollama import require_base_path_unless_registry_name

SAMPLE_ROWS = 64
"""Rows of each weight that are compared."""
EQUAL_SHARE = 0.99
"""Share of the norms' values that must be equal, up to one rounding to the dtype of the training."""


@dataclass(frozen=True)
class ServedBase:
    """The base beside which an engine serves an adapter."""

    file: Path | None = None  # the GGUF with the weights that are served
    unproven: str = ""  # why it is not known to be the base of the training


def resolve_matching_ollama_base(base_name: str, trained_model: Any) -> ServedBase:
    """Compare a base for Ollama with the base that an adapter was trained on, a `TrainedModel`.

    `base_name` is what the user gave: a GGUF file, a Hugging Face folder, or a name from a registry.

    Raises:
        UsageError: it is another base.
    """
    comparison = ServedBaseTensorComparison(base_name, trained_model)
    base_path = require_base_path_unless_registry_name(base_name) or _find_ollama_file(base_name)
    if base_path is None:
        return ServedBase(unproven=_check_name(comparison))
    if base_path.is_dir():
        _check_folder(base_path, comparison)
        return ServedBase()
    _check_gguf(base_path, comparison)
    return ServedBase(base_path)


def read_gguf_majority_precision(file: Path) -> str:
    """Return the precision of a GGUF's weights, as llama.cpp calls it: that of its largest share."""
    sizes: dict[str, int] = {}
    for tensor in open_gguf_reader(file).tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return max(sizes, key=lambda name: sizes[name]).lower()


def _find_ollama_file(name: str) -> Path | None:
    """Return the GGUF of a model that Ollama has on this machine, in $OLLAMA_MODELS or where Ollama puts its models."""
    model, _, tag = name.partition(":") if "/" not in name.rpartition(":")[2] else (name, "", "")
    parts = model.split("/")
    host = parts.pop(0) if len(parts) == 3 else "registry.ollama.ai"
    manifest = Path("manifests", host, *(parts if len(parts) == 2 else ["library", *parts]), tag or "latest")
    roots = [os.environ.get("OLLAMA_MODELS"), "~/.ollama/models", "/usr/share/ollama/.ollama/models"]
    for root in (Path(r).expanduser() for r in roots if r):
        try:
            layers = read_json_object(root / manifest)["layers"]
            digest = next(x["digest"] for x in layers if x["mediaType"] == "application/vnd.ollama.image.model")
            file = root / "blobs" / Path(str(digest).replace(":", "-")).name
        except (SlimtuneError, OSError, LookupError, TypeError, StopIteration):
            continue
        if file.is_file():
            return file
    return None


def _check_name(comparison: "ServedBaseTensorComparison") -> str:
    """Return why a name proves nothing; UsageError if it is known to name another base."""
    name = comparison.served_base_name
    try:
        config = load_base_config(name).config
    except SlimtuneError:
        return f"what Ollama serves as {name} is not known here, so its weights were not compared with the base"
    facts, own = (get_hashed_config_facts(c.to_dict()) for c in (config, comparison.loaded.base.model.config))
    shape = [k for k in ("model_type", "hidden", "layers", "heads", "kv_heads", "intermediate") if k in own]
    if any(facts.get(k) != own[k] for k in shape):
        found, expected = (", ".join(f"{k} {f.get(k)}" for k in shape) for f in (facts, own))
        raise comparison.make_error(found, expected)
    return f"{name} has the family and size of the base, but its weights were not compared with it"


def _check_gguf(file: Path, comparison: "ServedBaseTensorComparison") -> None:
    """Compare a GGUF file's architecture, shapes and values with the base; raise UsageError if they differ."""
    gguf, config = import_gguf(), comparison.loaded.base.model.config
    with silence_and_translate_load_errors(comparison.served_base_name, "GGUF file"):
        reader = open_gguf_reader(file)
        tensors = {t.name: t for t in reader.tensors}
        stated = reader.fields["general.architecture"].contents() if "general.architecture" in reader.fields else None
    architecture = require_gguf_architecture_spec(config).name
    if stated != architecture:
        raise comparison.make_error(f"its architecture is {stated}", f"the architecture {architecture}")
    names = make_gguf_module_name_mapper(config)
    for own_name, weight in LazyMergedStateDict(comparison.loaded.model, adapters=()).items():
        for gguf_name, own in convert_to_llama_cpp_tensors(own_name, weight.float(), config, names).items():
            if (tensor := tensors.pop(gguf_name, None)) is None:
                raise comparison.make_error(f"it has no {gguf_name}", "every tensor of the base")
            block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
            rows = torch.from_numpy(gguf.quants.dequantize(tensor.data[:SAMPLE_ROWS], tensor.tensor_type).copy())
            comparison.add(gguf_name, own, tuple(map(int, reversed(tensor.shape))), rows, 8 * size / block)
    comparison.check_norms()
    if extra := [n for n in tensors if n.startswith("blk.")]:
        raise comparison.make_error(f"it has {extra[0]}, too", "only the tensors of the base")


def _check_folder(folder: Path, comparison: "ServedBaseTensorComparison") -> None:
    """Compare a Hugging Face folder's tensors with the base; raise UsageError if they differ."""
    with silence_and_translate_load_errors(comparison.served_base_name, "model folder"):
        tensors = CheckpointTensors(folder)
        for name, weight in LazyMergedStateDict(comparison.loaded.model, adapters=()).items():
            if name not in tensors.files:
                raise comparison.make_error(f"it has no {name}", "every tensor of the base")
            other = tensors.load(name)
            comparison.add(name, weight.float(), tuple(other.shape), other[:SAMPLE_ROWS].float(), 16)
    comparison.check_norms()


class ServedBaseTensorComparison:
    """Compares the tensors of a served base, by the name that the user gave, with those of the base of the training."""

    def __init__(self, served_base_name: str, loaded: Any) -> None:
        self.served_base_name, self.loaded = served_base_name, loaded
        self.equal = self.total = 0  # values of norms and biases

    def make_error(self, found: str, expected: str) -> UsageError:
        spec = self.loaded.base.source.spec
        return UsageError(
            f"{self.served_base_name} is not the base that the adapter was trained on, {spec}: {found}",
            expected,
            "give the trained base as --ollama-base, or export base and adapter as one model: --merged",
            code="wrong-base",
        )

    def add(self, tensor: str, own: Tensor, shape: tuple[int, ...], rows: Tensor, bits: float) -> None:
        """Compare one tensor with its shape and first rows in the other base, which has so many bits a value."""
        if shape != tuple(own.shape):
            raise self.make_error(f"{tensor} is {shape}", f"{tuple(own.shape)}")
        own = own[: len(rows)]
        if own.dim() == 1:
            eps = torch.finfo(self.loaded.base.dtype).eps
            self.equal += int(((own - rows).abs() <= eps * own.abs()).sum())
            self.total += len(own)
            return
        # Rounding to b bits in blocks costs about 2^(1.6 − b) of a weight's norm.
        limit = max(2.0**-7, 2 ** (1.6 - bits)) + (0.2 if self.loaded.base.quantization else 0.0)
        error = ((own - rows).norm() / own.norm().clamp_min(1e-12)).item()
        if not error <= limit:
            found = f"its {tensor} differs by {error:.1%}, where {bits:.2g} bits explain {limit:.1%}"
            raise self.make_error(found, "the weights of the base, rounded or not")

    def check_norms(self) -> None:
        """Raise UsageError if the norms are those of another base."""
        if self.equal < EQUAL_SHARE * self.total:
            found = f"{1 - self.equal / self.total:.0%} of the values of its norms differ"
            raise self.make_error(found, "the norms of the base, which no precision rounds")
