"""Hashes of a base's files: of every weight, and of each part of its tokenizer.

They are of what the files contain, so the dtype, the device, a quantization while loading and how the weights are
divided into files do not matter. What was hashed is kept in slimtune's cache under the file's real path, and is used
again while the file's size, time and number are the same: then a check reads no weights.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from ..core.foundation.cpu import count_usable_cpus
from ..core.foundation.files import refuse_non_regular_file, write_atomic
from ..core.foundation.progress_bars import track_progress
from ..core.models.loader import LoadedBase
from ..errors import ModelError
from .gguf_loading import get_slimtune_cache_root

CHUNK_BYTES = 8 << 20
MAX_HEADER_BYTES = 100 << 20  # as safetensors allows
RECENT_SECONDS = 2.0
"""A file that changed within these seconds is not kept in the cache: it may change again without another time."""
_FORMAT = 1
_VOCABULARY_FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


def require_base_folder(base: LoadedBase) -> Path:
    """Return the folder with a loaded base's files; nothing is downloaded.

    Raises:
        OSError, ValueError: the Hub's cache does not contain the base.
    """
    if base.source.kind != "hub":
        return base.download_weights()
    return require_cached_snapshot(base.source.path, base.revision)


def require_cached_snapshot(hub_id: str, revision: str | None) -> Path:
    """Return the folder of a model in the Hub's cache; raise OSError or ValueError if it is not there."""
    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise FileNotFoundError(f"its files are not in the Hub's cache, revision {revision or 'main'}") from None


def hash_weights_by_projection(folder: Path) -> dict[str, str]:
    """Return 32 hex digits for each kind of weight ("q_proj.weight") in a folder's safetensors, over all layers.

    They are of the names, dtypes, shapes and all values of the tensors.
    """
    tensors: dict[str, str] = {}
    for file in _list_weight_files(folder):
        tensors |= _load_or_compute(file, _hash_tensors)
    kinds: dict[str, Any] = {}
    for name, digest in sorted(tensors.items()):
        kind = ".".join(name.split(".")[-2:])
        kinds.setdefault(kind, hashlib.sha256()).update(f"{name}\0{digest}\n".encode())
    return {kind: digest.hexdigest()[:32] for kind, digest in sorted(kinds.items())}


def hash_tokenizer_by_part(folder: Path, tokenizer: Any) -> dict[str, str]:
    """Return 16 hex digits for each part of a tokenizer, such as "vocabulary", "normalizer" and "added tokens"."""
    file = folder / "tokenizer.json"
    if file.is_file():
        parts = _load_or_compute(file, _hash_tokenizer_json)
    else:
        files = (folder / name for name in _VOCABULARY_FILES)
        parts = {"vocabulary": _hash_values([_load_or_compute(f, _hash_whole) for f in files if f.is_file()])}
    added = {
        str(i): [t.content, t.special, t.lstrip, t.rstrip, t.normalized, t.single_word]
        for i, t in tokenizer.added_tokens_decoder.items()
    }
    options = getattr(tokenizer, "init_kwargs", {})
    names = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "legacy", "split_special_tokens")
    return parts | {
        "added tokens": _hash_values([added, parts.get("added tokens")]),
        "special tokens": _hash_values({k: str(v) for k, v in tokenizer.special_tokens_map.items()}),
        "settings": _hash_values({name: options[name] for name in names if options.get(name) is not None}),
    }


def hash_text(text: str) -> str:
    """Return 16 hex digits of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_safetensors_header_and_data_start(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and where its data begin; raise ValueError if it has none."""
    refuse_non_regular_file(path)
    with path.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"{path} is not a safetensors file")
        header = json.loads(f.read(size))
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file")
    return header, 8 + size


def _list_weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of a base: those of the index, else model.safetensors, else all."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _load_or_compute(file: Path, compute: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    """Return what `compute(file)` returns, from the cache if the file has not changed."""
    file = file.resolve()
    stat = file.stat()
    stamp = [_FORMAT, str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    cached = get_slimtune_cache_root() / "digests" / f"{hash_text(str(file))}.json"
    with suppress(OSError, ValueError, LookupError, TypeError):  # not there, or damaged
        kept = json.loads(cached.read_bytes())
        if kept["file"] == stamp and kept["check"] == _hash_values(kept["digests"]):
            found: dict[str, str] = kept["digests"]
            return found
    found = compute(file)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > RECENT_SECONDS:
        with suppress(OSError, ModelError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(cached, json.dumps({"file": stamp, "digests": found, "check": _hash_values(found)}))
    return found


def _hash_tensors(file: Path) -> dict[str, str]:
    """Return a digest of each tensor's dtype, shape and bytes in a safetensors file, by its name."""
    header, start = read_safetensors_header_and_data_start(file)
    tensors = {name: facts for name, facts in header.items() if name != "__metadata__"}

    def hash_tensor(facts: Mapping[str, Any]) -> str:
        begin, end = (start + at for at in facts["data_offsets"])
        digest = hashlib.sha256(json.dumps([facts["dtype"], facts["shape"]]).encode())
        for chunk in _read_chunks(file, begin, end):
            digest.update(chunk)
        return digest.hexdigest()[:32]

    with ThreadPoolExecutor(min(8, count_usable_cpus())) as pool:
        futures = {name: pool.submit(hash_tensor, facts) for name, facts in tensors.items()}
        return {name: futures[name].result() for name in track_progress(list(futures), "weights of the base")}


def _read_chunks(file: Path, begin: int, end: int) -> Iterator[memoryview]:
    """Yield the bytes of a part of a file; the buffer is used again."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, end - begin)))
    with file.open("rb", buffering=0) as f:
        f.seek(begin)
        while begin < end:
            count = f.readinto(buffer[: end - begin])
            if not count:
                raise ValueError(f"{file} is cut")
            yield buffer[:count]
            begin += count


def _hash_whole(file: Path) -> dict[str, str]:
    with file.open("rb") as f:
        return {file.name: hashlib.file_digest(f, "sha256").hexdigest()[:16]}


def _hash_tokenizer_json(file: Path) -> dict[str, str]:
    """Return a digest of each part of tokenizer.json; merges written as texts and as pairs are the same."""
    values = json.loads(file.read_bytes())
    model = dict(values.get("model") or {})
    model["merges"] = [" ".join(m) if isinstance(m, list) else m for m in model.get("merges") or []]
    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation")
    parts = {name.replace("_", "-"): values.get(name) for name in names}
    parts["added tokens"] = values.get("added_tokens")
    return {"vocabulary": _hash_values(model)} | {name: _hash_values(value) for name, value in parts.items()}


def _hash_values(values: Any) -> str:
    return hash_text(json.dumps(values, sort_keys=True, separators=(",", ":")))
