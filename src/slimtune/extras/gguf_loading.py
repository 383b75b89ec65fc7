"""A GGUF base becomes, once, a Hugging Face folder in the user's cache.

Reading a GGUF takes about 20 s for 135 M parameters, reading the folder takes one. Its weights are the dequantized
values in float32, exactly, so that a float32 and a bfloat16 load are both right (4 bytes per parameter on disk). The
folder's name contains a hash of the whole file, so a changed file is another base.

transformers ignores two facts of a GGUF file, which would give wrong results silently:

- **Rotary scaling.** Llama 3.1 and later store divisors of their frequencies as the tensor `rope_freqs.weight`. The
  settings that produce exactly those divisors go into the config; any other scaling is an error.
- **Pre-tokenizer.** A vocabulary whose numbers were split digit by digit gets GPT-2's splitting from transformers.
"""

import contextlib
import difflib
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..core.foundation.files import atomic_folder, write_atomic
from ..core.kernels.linear_layers import is_finite
from ..core.models.base_config import read_config_file
from ..core.models.load_errors import silence_and_translate_load_errors, silencing_model_loading
from ..core.models.quantization import remove_quantization_config
from ..errors import ModelError, RunError, format_names
from .heartbeat_lock import UNSUPPORTED

log = logging.getLogger(__name__)

_FORMAT = 1
"""Raised when the same file would be written differently, so that older folders are not reused."""
_STAMP = "slimtune.json"

# llama.cpp's names of the vocabularies that it splits as `\p{N}` followed by GPT-2's expression, and of those that it
# splits by GPT-2's expression alone.
_DIGITS_ALONE = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_PLAIN = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "modern-bert", "mellum"}
_LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA3_FACTORS = (8.0, 32.0)
_RANGES: dict[str, tuple[float, float]] = {
    "context_length": (1, 2**30), "layer_norm_rms_epsilon": (1e-15, 0.1), "layer_norm_epsilon": (1e-15, 0.1),
    "rope.freq_base": (1, 1e15), "rope.freq_base_swa": (1, 1e15), "head_count": (1, 2**20),
    "embedding_length": (1, 2**20),
}  # fmt: skip
"""Least and largest value of metadata, by the end of their names."""
_ROPE_TABLES = ("rope_freqs", "rope_factors")


def import_gguf() -> Any:
    """Return the package gguf, or raise ModelError if it is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the package gguf, for GGUF files, is not installed", hint="pip install gguf")
    import gguf

    return gguf


def get_slimtune_cache_root() -> Path:
    """Return slimtune's cache: `$SLIMTUNE_CACHE`, else `$XDG_CACHE_HOME/slimtune`, else `~/.cache/slimtune`."""
    if own := os.environ.get("SLIMTUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slimtune"


def get_or_make_hf_folder_and_seconds(gguf_path: str | Path) -> tuple[Path, float]:
    """Return the cached Hugging Face folder of a GGUF file, and the seconds spent on making it (0 if it was there).

    Raises:
        ModelError: the file is no GGUF, damaged, of an unknown architecture, or the package `gguf` is missing.
        RunError: the disk or the memory is full, or the cache cannot be written.
    """
    gguf_path = Path(gguf_path).resolve()
    digest, folder = _locate_folder(gguf_path)
    if _is_complete(folder):
        return folder, 0.0
    start = time.perf_counter()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        try:
            lock.acquire(timeout=0.2)
        except Timeout:
            log.warning("another process is preparing %s; waiting for it", folder.name)
            lock.acquire()
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise  # without locks two processes may both make the folder; the one that is second says so
        try:
            if not _is_complete(folder):
                _write_folder(gguf_path, folder, digest)
        finally:
            lock.release()
    except OSError as error:
        raise RunError(
            f"the cache {folder.parent} cannot be written: {error.strerror or error}",
            hint="set SLIMTUNE_CACHE to a folder of yours",
        ) from error
    return folder, time.perf_counter() - start


def read_config(path: Path) -> PreTrainedConfig:
    """Return the config of a GGUF file: as it is cached, else from its metadata, whose parsing takes seconds."""
    cached = get_slimtune_cache_root().joinpath("bases").glob(f"{glob.escape(path.resolve().stem)}-*-fp32-v{_FORMAT}*")
    if any(cached):  # otherwise the file is not hashed
        folder = _locate_folder(path.resolve())[1]
        if _is_complete(folder):
            return read_config_file(folder / "config.json")
        if (config_file := _name_config_file(folder)).is_file():
            with contextlib.suppress(ModelError):  # damaged: it is made again
                return read_config_file(config_file)
    reader = open_checked_gguf_reader(path)
    with silence_and_translate_load_errors(str(path)), _parse_once(reader):
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        config_file = _name_config_file(_locate_folder(path.resolve())[1])
        config_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(config_file, config.to_json_string(use_diff=False))
    return config


def _name_config_file(folder: Path) -> Path:
    """Return where the config of a GGUF file is cached before its folder is made."""
    return folder.with_name(f"{folder.name}.config.json")


def _locate_folder(path: Path) -> tuple[str, Path]:
    """Return the hash of a GGUF file, and where its Hugging Face folder is or will be."""
    try:
        stat = path.stat()
        digest = _hash_file(str(path), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest, get_slimtune_cache_root() / "bases" / f"{path.stem}-{digest[:16]}-fp32-v{_FORMAT}"


def open_gguf_reader(path: Path) -> Any:
    """Return gguf's reader of a file; exceptions are gguf's and numpy's."""
    import numpy as np
    from gguf import GGUFReader  # optional

    class PlainArrayReader(GGUFReader):
        """A reader that slices a plain array. It slices four times a token, and a memmap takes four times as long."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    return PlainArrayReader(str(path))


@contextlib.contextmanager
def _parse_once(reader: Any) -> Iterator[None]:
    """Let transformers take this reader: it would parse the file for the config, the weights and the tokenizer."""
    gguf = import_gguf()
    original = gguf.GGUFReader
    gguf.GGUFReader = lambda *_: reader
    try:
        yield
    finally:
        gguf.GGUFReader = original


def open_checked_gguf_reader(path: Path) -> Any:
    """Return gguf's reader of a file whose metadata agree with its tensors.

    transformers takes a number of the metadata as it is: one of 2^31 layers would be built, and what is missing gets
    the value of another model. Raise ModelError for a file that contradicts itself, is cut, or lacks a fact.
    """
    with silence_and_translate_load_errors(str(path), "GGUF file"):
        reader = open_gguf_reader(path)
        values = {name: f.contents() for name, f in reader.fields.items() if name != "tokenizer.ggml.merges"}
    if problem := _find_contradiction(values, reader):
        raise ModelError(f"{path} is damaged: {problem}", "a whole GGUF file", "download it again", code="gguf-damaged")
    return reader


def _find_contradiction(values: dict[str, Any], reader: Any) -> str | None:
    """Return what is wrong with the metadata of a GGUF file, or None."""
    kind = values.get("general.architecture")
    own = {name.removeprefix(f"{kind}."): value for name, value in values.items() if name.startswith(f"{kind}.")}
    known = _known_keys(str(kind))
    for name in values.keys() - known:
        close = difflib.get_close_matches(name[:200], known - values.keys(), 1, 0.9)
        if close and not name.startswith("GGUF."):
            return f"it lacks {close[0]!r}, and has the unknown {name[:200]!r}"
    required = [f"{kind}.block_count", f"{kind}.context_length", f"{kind}.embedding_length"]
    required += [f"tokenizer.ggml.{name}" for name in ("model", "tokens", "eos_token_id")]
    if lacking := [name for name in required if values.get(name) is None]:
        return f"it lacks {format_names(lacking)}"
    if not any(own.get(f"attention.layer_norm_{name}") for name in ("rms_epsilon", "epsilon")):
        return f"it lacks '{kind}.attention.layer_norm_rms_epsilon'"
    tensors = {re.sub(r"^blk\.\d+\.", "blk.{bid}.", t.name) for t in reader.tensors}
    if unknown := tensors - _known_tensors():  # transformers would leave them out without a word
        return f"it has tensors that no architecture has: {format_names(sorted(n[:200] for n in unknown), 3)}"
    layers = {name.split(".")[1] for t in reader.tensors if (name := t.name).startswith("blk.")}
    if own["block_count"] != len(layers):  # some count layers that predict further tokens apart
        further = own.get("nextn_predict_layers", 0)
        if own["block_count"] + (further if isinstance(further, int) else 0) != len(layers):
            return f"it has {own['block_count']} layers by its metadata, and tensors of {len(layers)}"
    largest = max((int(size) for t in reader.tensors for size in t.shape), default=0)
    for name, value in own.items():
        for one in value if isinstance(value, list) else [value]:
            is_size = re.search(r"(length|count|count_kv|vocab_size)$", name) and name != "context_length"
            if isinstance(one, int) and is_size and one > largest:
                return f"{name} is {one}, and no tensor has a side of more than {largest}"
            least, most = next((r for end, r in _RANGES.items() if name.endswith(end)), (-math.inf, math.inf))
            if least > -math.inf and not (isinstance(one, int | float) and least <= one <= most):
                return f"{name} is {one!r}, outside of {least:g} to {most:g}"
    tokens = values["tokenizer.ggml.tokens"]
    count = len(tokens) if isinstance(tokens, list) else 0
    for name, value in values.items():
        if name in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores") and len(value) != count:
            return f"{name} has {len(value)} values for {count} tokens"
        if name.endswith("_token_id") and not (isinstance(value, int) and 0 <= value < max(count, 1)):
            return f"{name} is {value!r}, and there are {count} tokens"
    parts = sorted((int(t.data_offset), int(t.data_offset) + int(t.n_bytes), t.name) for t in reader.tensors)
    for (_, end, first), (start, _, second) in itertools.pairwise(parts):
        if start < end:
            return f"the tensors {first[:80]!r} and {second[:80]!r} overlap"
    return None


@functools.lru_cache
def _known_keys(kind: str) -> set[str]:
    """Return the names of metadata that the package `gguf` knows, for an architecture."""
    from gguf import Keys

    groups = [group for group in vars(Keys).values() if isinstance(group, type)]
    texts = [text for group in groups for text in vars(group).values() if isinstance(text, str)]
    return {text.replace("{arch}", kind) for text in texts}


@functools.lru_cache
def _known_tensors() -> set[str]:
    """Return the names of tensors that the package `gguf` knows, with `{bid}` for the number of a layer."""
    from gguf.constants import TENSOR_NAMES

    return {name + end for name in TENSOR_NAMES.values() for end in ("", ".weight", ".bias", ".scale")}


def _write_folder(path: Path, folder: Path, digest: str) -> None:
    """Write the Hugging Face folder of a GGUF file; the caller has the folder's lock."""
    log.info("dequantizing %s into %s (once)", path.name, folder)
    for killed in folder.parent.glob(f".{folder.name}.*"):  # temporary folders of killed processes, and the lock
        shutil.rmtree(killed, ignore_errors=True)
    if folder.exists():
        log.warning("the cached base %s is damaged; it is made again", folder)
        shutil.rmtree(folder)
    model, tokenizer = load_gguf(path)
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) + (64 << 20)
    with atomic_folder(folder, needed, "set SLIMTUNE_CACHE to a folder on another disk") as temporary:
        with silencing_model_loading():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        sizes = {f.name: f.stat().st_size for f in sorted(temporary.iterdir())}
        stamp = {"source": path.name, "sha256": digest, "transformers": transformers.__version__, "files": sizes}
        (temporary / _STAMP).write_text(json.dumps(stamp, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    """Return whether every file that was written is there at its full size."""
    try:
        sizes = json.loads((folder / _STAMP).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


@functools.lru_cache(maxsize=16)
def _hash_file(path: str, size: int, mtime_ns: int) -> str:
    """Hash a file once per process; size and time are arguments because they tell that it changed."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_gguf(path: Path) -> tuple[PreTrainedModel, Any]:
    """Return a GGUF file's model in float32, dequantized, and its tokenizer; nothing is kept in the cache."""
    gguf_config = getattr(transformers, "GgufConfig", None)  # older transformers always dequantize
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    reader = open_checked_gguf_reader(path)  # first: it notices an incomplete file before the slow part
    with silence_and_translate_load_errors(str(path), "GGUF file"), _parse_once(reader):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, **options
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{path} lacks {len(missing)} weights that {type(model).__name__} needs: {format_names(missing, 4)}",
            "every weight (a missing one would be filled at random)",
            "use the model's Hugging Face checkpoint",
        )
    for name, weight in model.named_parameters():
        if not is_finite(weight):
            raise ModelError(f"{path} is damaged: the weight {name} contains NaN or Inf", hint="download it again")
    stored = sum(int(t.n_elements) for t in reader.tensors if not t.name.startswith(_ROPE_TABLES))
    if (loaded_values := sum(p.numel() for p in model.parameters())) != stored:
        log.warning("%s contains %d values, the loaded model %d", path.name, stored, loaded_values)
    _set_rope(model.config, reader, path.name)
    _set_splitting(tokenizer, reader, path.name)
    remove_quantization_config(model)
    vars(model.config).pop("_model_name_or_path", None)
    if (longest := getattr(model.config, "max_position_embeddings", None)) and tokenizer.model_max_length > longest:
        tokenizer.model_max_length = longest
    return model, tokenizer


def _set_rope(config: Any, reader: Any, name: str) -> None:
    """Put the file's rotary scaling into `config`; raise ModelError if transformers cannot scale so."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        return
    tables = {t.name: t.data for t in reader.tensors if t.name.startswith(_ROPE_TABLES)}
    if list(tables) == ["rope_freqs.weight"]:
        divisors = torch.tensor(tables["rope_freqs.weight"].reshape(-1).tolist())
        # Frequency i is theta^(-i / n), divided by what the table says.
        stored = rope.get("rope_theta", 10000.0) ** -(torch.arange(len(divisors)) / len(divisors)) / divisors
        for factor in _LLAMA3_FACTORS:
            config.rope_parameters = rope | _LLAMA3 | {"factor": factor}
            frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
            if frequencies.shape == stored.shape and torch.allclose(frequencies, stored, rtol=1e-4, atol=0):
                return
    scaling = next((f.contents() for k, f in reader.fields.items() if k.endswith(".rope.scaling.type")), "none")
    if tables or scaling != "none":
        raise ModelError(
            f"{name} scales its rotary positions ({scaling if scaling != 'none' else ', '.join(tables)}) in a way that "
            "transformers does not read from a GGUF file",
            "plain rotary positions, or Llama 3's scaling",
            "use the model's Hugging Face checkpoint (a folder or a Hub id) instead of its GGUF file",
        )


def _set_splitting(tokenizer: Any, reader: Any, name: str) -> None:
    """Make the tokenizer split text as the vocabulary expects; log a warning if that is unknown."""
    kind, splitting = (reader.fields.get(f"tokenizer.ggml.{n}") for n in ("model", "pre"))
    if splitting is None or kind is None or kind.contents() != "gpt2":  # not byte-level BPE
        return
    splitting = splitting.contents()
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as known
    except ImportError:  # not in every transformers 5
        known = {}
    if splitting in _DIGITS_ALONE:
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif splitting not in _PLAIN and splitting not in known:
        warning = "%s splits text as %r, which transformers does not know: tokens may differ from llama.cpp's"
        log.warning(warning, name, splitting)
