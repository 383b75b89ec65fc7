"""A GGUF base becomes, once, a Hugging Face folder in the user's cache.

Reading a GGUF takes about 20 s for 135 M parameters, the folder takes one. Its weights are the dequantized values in
float32, exactly, so that a float32 and a bfloat16 load are both right (4 bytes per parameter on disk). The folder's
name contains a hash of the whole file, so a changed file is another base. The folder is written under a temporary name,
fsynced and renamed. A lock keeps two processes from doing the work twice.

transformers ignores two facts of a GGUF file, which would give wrong results silently:

- **Rotary scaling.** Llama 3.1 and later store divisors of their frequencies as the tensor `rope_freqs.weight`. The
  settings that produce exactly those divisors go into the config; any other scaling is an error.
- **Pre-tokenizer.** A vocabulary whose numbers were split digit by digit gets GPT-2's splitting from transformers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..errors import ModelError, RunError, SlimtuneError, format_names
from ..utils.files import disk_full_error, fsync_folder, fsync_tree, translate_disk_full
from .errors import silence_libraries, translate_load_errors

log = logging.getLogger(__name__)

_ELSEWHERE = "set SLIMTUNE_CACHE to a folder on another disk"

# Raised when the same file would be written differently, so that older folders are not reused.
_FORMAT = 1
_STAMP = "slimtune.json"


def cache_root() -> Path:
    """Return slimtune's cache: `$SLIMTUNE_CACHE`, else `$XDG_CACHE_HOME/slimtune`, else `~/.cache/slimtune`."""
    if own := os.environ.get("SLIMTUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slimtune"


def read_dequantized(path: str | Path) -> tuple[Path, float]:
    """Return the cached Hugging Face folder of a GGUF file, and the seconds spent on making it (0 if it was there).

    Raises:
        ModelError: the file is no GGUF, damaged, of an unknown architecture, or the package `gguf` is missing.
        RunError: the disk or the memory is full, or the cache cannot be written.
    """
    path = Path(path).resolve()
    _check_magic(path)
    stat = path.stat()
    digest = _sha256(str(path), stat.st_size, stat.st_mtime_ns)
    folder = cache_root() / "bases" / f"{path.stem}-{digest[:16]}-fp32-v{_FORMAT}"
    if _complete(folder):
        return folder, 0.0
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {path.name} needs the package gguf, which is not installed", hint="pip install gguf")
    start = time.perf_counter()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not _complete(folder):
                _make(path, folder, digest)
    except SlimtuneError:
        raise
    except OSError as error:
        raise RunError(
            f"the cache {folder.parent} cannot be written: {error.strerror or error}",
            "a folder that can be written",
            "set SLIMTUNE_CACHE to a folder of yours",
        ) from error
    return folder, time.perf_counter() - start


@contextlib.contextmanager
def _locked(folder: Path) -> Any:
    """Hold the folder's lock; says so when another process has it."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        log.warning("another process is preparing %s; waiting for it", folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(path: Path, folder: Path, digest: str) -> None:
    log.info("dequantizing %s into %s (once)", path.name, folder)
    # The lock is ours, so a temporary folder of this name was left by a process that was killed.
    for left in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    model, tokenizer = _read(path)
    need = sum(p.numel() * p.element_size() for p in model.parameters()) + (64 << 20)
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        raise disk_full_error(folder, need, _ELSEWHERE)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        with translate_disk_full(folder, need, _ELSEWHERE):
            _write(model, tokenizer, temporary, path, digest)
        if folder.exists():  # incomplete, or it would have been used
            log.warning("the cached base %s is damaged; it is made again", folder)
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        fsync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _read(path: Path) -> tuple[PreTrainedModel, Any]:
    """Return the file's model in float32 and its tokenizer, both ready to be saved."""
    options: dict[str, Any] = {}
    if quantization := getattr(transformers, "GgufConfig", None):
        options["quantization_config"] = quantization(dequantize=True)
    with translate_load_errors(str(path), "GGUF file"):
        facts = read_facts(path)  # first: a file cut short is noticed here, before the slow part
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, **options
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    _check_weights(model, info, facts, path)
    set_rope(model.config, facts, path.name)
    set_splitting(tokenizer, facts, path.name)
    _forget_quantization(model)
    if (longest := getattr(model.config, "max_position_embeddings", None)) and tokenizer.model_max_length > longest:
        tokenizer.model_max_length = longest
    return model, tokenizer


def _check_weights(model: PreTrainedModel, info: dict[str, Any], facts: GgufFacts, path: Path) -> None:
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{path} lacks {len(missing)} weights that {type(model).__name__} needs: {format_names(missing, 4)}",
            "every weight (a missing one would be filled at random)",
            "use the model's Hugging Face checkpoint",
        )
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ModelError(
                f"{path} is damaged: the weight {name} holds values that are no numbers", hint="download it again"
            )
    held = sum(p.numel() for p in model.parameters())
    if held != facts.elements:
        log.warning(
            "%s holds %d numbers, the loaded model %d: transformers left some out or the architecture splits them",
            path.name,
            facts.elements,
            held,
        )


def _forget_quantization(model: Any) -> None:
    """Make the dequantized model an ordinary one: with its quantizer left on it, `save_pretrained` refuses."""
    for owner, names in (
        (model.config, ("quantization_config", "_model_name_or_path")),
        (model, ("is_quantized", "hf_quantizer", "quantization_method")),
    ):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)


def _write(model: PreTrainedModel, tokenizer: Any, folder: Path, path: Path, digest: str) -> None:
    with silence_libraries():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    stamp = {
        "source": path.name,
        "sha256": digest,
        "dtype": "float32",
        "transformers": transformers.__version__,
        "files": {f.name: f.stat().st_size for f in sorted(folder.iterdir())},
    }
    (folder / _STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    fsync_tree(folder)


def _complete(folder: Path) -> bool:
    """Return whether every file that was written is there at its full size."""
    try:
        files = json.loads((folder / _STAMP).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as f:
            magic = f.read(4)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if magic != b"GGUF":
        found = f"it begins with {magic!r}" if magic else "it is empty"
        raise ModelError(f"{path} is no GGUF file: {found}", "a file that begins with b'GGUF'", "download it again")


@functools.lru_cache(maxsize=16)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    """Hash a file once per process; size and time are there to notice that it changed."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- what the file says -----------------------------------------------------------------------------------------------

# llama.cpp's names of the vocabularies that it splits as `\p{N}` followed by GPT-2's expression, and of those that it
# splits by GPT-2's expression alone.
_DIGITS_ALONE = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_PLAIN = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "modern-bert", "mellum"}
_LLAMA3_FACTORS = (8.0, 32.0)


@dataclass(frozen=True)
class GgufFacts:
    """What was read from a GGUF file's header.

    Args:
        elements: numbers in all weight tensors, rotary tables apart.
        splitting: llama.cpp's name of the pre-tokenizer, "" where the vocabulary is not byte-level BPE.
        scaling: the rotary scaling named in the metadata, "" for none.
        rope_divisors: `(head_dim / 2,)` divisors of the rotary frequencies, where the file has them.
        rope_tables: other rotary tables in the file.
    """

    elements: int
    splitting: str
    scaling: str
    rope_divisors: torch.Tensor | None
    rope_tables: tuple[str, ...]


def read_facts(path: Path) -> GgufFacts:
    """Read the header of a GGUF file.

    Raises:
        Exception: whatever the reader stumbles over in a damaged file.
    """
    from gguf import GGUFReader  # heavy, optional

    reader = GGUFReader(str(path))
    fields = reader.fields
    tables = {t.name: t for t in reader.tensors if t.name.startswith(("rope_freqs", "rope_factors"))}
    own = tables.pop("rope_freqs.weight", None)
    scaling = next((fields[k].contents() for k in fields if k.endswith(".rope.scaling.type")), "none")
    byte_level = "tokenizer.ggml.model" in fields and fields["tokenizer.ggml.model"].contents() == "gpt2"
    splitting = fields["tokenizer.ggml.pre"].contents() if byte_level and "tokenizer.ggml.pre" in fields else ""
    skipped = {*tables, "rope_freqs.weight"}
    return GgufFacts(
        elements=sum(int(t.n_elements) for t in reader.tensors if t.name not in skipped),
        splitting=str(splitting),
        scaling="" if scaling == "none" else str(scaling),
        rope_divisors=None if own is None else torch.tensor(own.data.reshape(-1).tolist(), dtype=torch.float64),
        rope_tables=tuple(tables),
    )


def set_rope(config: Any, facts: GgufFacts, name: str) -> None:
    """Put the file's rotary scaling into `config`.

    Raises:
        ModelError: the file scales positions in a way that could not be reproduced.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        return
    if facts.rope_divisors is not None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for factor in _LLAMA3_FACTORS:
            theirs = llama3_divisors(float(rope.get("rope_theta", 10000.0)), head_dim, factor)
            if theirs.shape == facts.rope_divisors.shape and torch.allclose(theirs, facts.rope_divisors, rtol=1e-4):
                config.rope_parameters = {
                    **rope,
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
                return
    if facts.rope_divisors is not None or facts.rope_tables or facts.scaling:
        what = facts.scaling or ", ".join(facts.rope_tables) or "a table of frequencies"
        raise ModelError(
            f"{name} scales its rotary positions ({what}) in a way that transformers does not read from a GGUF file",
            "plain rotary positions, or Llama 3's scaling",
            "use the model's Hugging Face checkpoint (a folder or a Hub id) instead of its GGUF file",
        )


def llama3_divisors(theta: float, head_dim: int, factor: float) -> torch.Tensor:
    """Return Llama 3's `(head_dim / 2,)` divisors of the rotary frequencies: 1 for short waves, `factor` for long."""
    old, low, high = 8192.0, 1.0, 4.0
    waves = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((old / waves - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def set_splitting(tokenizer: Any, facts: GgufFacts, name: str) -> None:
    """Make the tokenizer split text as the vocabulary expects; logs a warning if that is unknown."""
    if facts.splitting in _DIGITS_ALONE:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif facts.splitting and facts.splitting not in _PLAIN | _known_splits():
        log.warning(
            "%s splits text as %r, which transformers does not know: tokens may differ from llama.cpp's",
            name,
            facts.splitting,
        )


def _known_splits() -> set[str]:
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs  # not in every 5.x
    except ImportError:
        return set()
    return set(getattr(theirs, "GGUF_PRE_TOKENIZER_SPLITS", {}))
