"""Read an adapter that mlx-lm wrote, `mlx_lm.lora` for example, as an adapter of PEFT.

    mlx-lm                              PEFT
    X.lora_a (in, r), X.lora_b (r, out) base_model.model.X.lora_A.weight (r, in), lora_B.weight (out, r)
    m (out) of a DoRA                   lora_magnitude_vector
    rank, scale                         r = rank, lora_alpha = scale · rank

A module without tensors is as the base has it in both. An adapter of the embedding changes the head, too, where the
base ties them: PEFT has two adapters then.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..core.adapters.adapter_files import WEIGHTS_FILE, serialize_to_safetensors_header_and_data
from ..core.adapters.adapter_tensors import PREFIX
from ..core.adapters.peft_config import write_adapter_config
from ..core.foundation.files import atomic_folder, read_json_object, refuse_non_regular_file, write_atomic
from ..core.foundation.json_results import JsonObject
from ..core.models.base_config import load_base_config
from ..core.models.model_source import resolve_model_source
from ..errors import AdapterError, SlimtuneError, format_names
from .gguf_loading import get_slimtune_cache_root
from .mlx_names import ADAPTER_FILE, CONFIG_FILE, to_transformers_module_name

MAX_CONFIG_BYTES = 16 << 20
_LEAVES = {"lora_a": 2, "lora_b": 2, "m": 1}
"""Names of an adapter's tensors, and their dimensions."""
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "embedding", "embeddings", "word_embeddings")


@dataclass(frozen=True)
class MlxModuleTensors:
    """What an adapter of mlx-lm adds to a module: `scale · x A B`."""

    a: Tensor  # (in, r); of an embedding (tokens, r)
    b: Tensor  # (r, out)
    magnitude: Tensor | None = None  # (out), of a DoRA


@dataclass(frozen=True)
class MlxAdapter:
    """An adapter folder of mlx-lm."""

    modules: dict[str, MlxModuleTensors]  # by mlx-lm's names
    scale: float
    rank: int
    is_dora: bool
    base: str | None  # the folder or Hub id that it was trained on
    file: Path


def is_mlx_adapter(path: Path) -> bool:
    """Return whether a folder has an adapter of mlx-lm, and none of PEFT."""
    return (path / ADAPTER_FILE).is_file() and not (path / WEIGHTS_FILE).exists()


def read_mlx_adapter(folder: Path) -> MlxAdapter:
    """Read an adapter folder of mlx-lm.

    Raises:
        AdapterError: a file is damaged, or contains something other than a LoRA or DoRA of linear layers.
    """
    file, config_file = folder / ADAPTER_FILE, folder / CONFIG_FILE
    for each in (file, config_file):
        if not each.exists():
            raise AdapterError(f"{folder} has no {each.name}", "the two files that mlx_lm.lora writes")
        refuse_non_regular_file(each)
    if (size := config_file.stat().st_size) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{config_file} has {size:,} bytes", f"at most {MAX_CONFIG_BYTES:,}")
    config = read_json_object(config_file, error_class=AdapterError)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(
            f"{folder} was trained with fine_tune_type {kind!r}: {ADAPTER_FILE} has whole weights",
            "lora or dora",
            "mlx_lm.fuse makes a whole model of it",
        )
    parameters = config.get("lora_parameters")
    scale, rank = _read_number(parameters, "scale", config_file), _read_number(parameters, "rank", config_file)
    try:
        tensors = load_file(file)
    except SafetensorError as e:
        message = f"{file} ({file.stat().st_size} bytes) is not a valid safetensors file: {e}"
        raise AdapterError(message, "a complete file", "copy it again, or use an older checkpoint") from None
    modules = _group_by_module(tensors, file)
    wrong = [name for name, module in modules.items() if module.a.shape[1] != rank or module.b.shape[0] != rank]
    if wrong:
        shape = tuple(modules[wrong[0]].a.shape)
        message = f"{len(wrong)} modules have another rank than {config_file.name} says: {wrong[0]}.lora_a is {shape}"
        raise AdapterError(message, f"(in, {int(rank)})", "take the config that was saved with the tensors")
    base = config.get("model")
    return MlxAdapter(modules, scale, int(rank), kind == "dora", base if isinstance(base, str) and base else None, file)


def _read_number(parameters: Any, name: str, file: Path) -> float:
    value = parameters.get(name) if isinstance(parameters, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise AdapterError(
            f"lora_parameters.{name} in {file} is {value!r}", "a number", "take the config that mlx_lm.lora wrote"
        )
    if name == "rank" and not 1 <= value <= 1 << 20:
        raise AdapterError(f"lora_parameters.rank in {file} is {value!r}", "1 or more")
    return value


def _group_by_module(tensors: dict[str, Tensor], file: Path) -> dict[str, MlxModuleTensors]:
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf not in _LEAVES:
            raise AdapterError(f"{file} has {key!r}, which belongs to no LoRA", f"tensors named {', '.join(_LEAVES)}")
        if tensor.dim() == 3:
            raise AdapterError(
                f"{file} adapts {module}, the experts of a mixture, which are not read",
                "a LoRA or DoRA of linear layers",
                "mlx_lm.fuse makes a whole model of it; or train it with keys that leave switch_mlp out",
            )
        if tensor.dim() != _LEAVES[leaf] or not tensor.is_floating_point():
            raise AdapterError(f"{key} in {file} has the shape {tuple(tensor.shape)}", f"{_LEAVES[leaf]} dimensions")
        found[module][leaf] = tensor
    if not found:
        raise AdapterError(f"{file} has no tensors", "the tensors of an adapter")
    if halves := [m for m, leaves in found.items() if not {"lora_a", "lora_b"} <= leaves.keys()]:
        raise AdapterError(f"{file} lacks lora_a or lora_b of {format_names(halves, 3)}", "both of each module")
    return {m: MlxModuleTensors(t["lora_a"], t["lora_b"], t.get("m")) for m, t in found.items()}


def convert_mlx_adapter_to_peft(folder: Path, out: Path, base: str | None = None) -> None:
    """Write an adapter of mlx-lm as PEFT's two files.

    Args:
        folder: with mlx-lm's two files.
        out: folder to write; it exists.
        base: the base that the files name; None: the one that mlx-lm's config names.

    Raises:
        AdapterError: a file is damaged, or contains what PEFT has no place for.
    """
    adapter = read_mlx_adapter(folder)
    base = base or adapter.base
    is_tied = _find_whether_base_ties_head(base)
    tensors: dict[str, Tensor] = {}
    targets = []
    for mlx_name, module in adapter.modules.items():
        name = to_transformers_module_name(mlx_name)
        targets.append(name)
        is_embedding = name.rpartition(".")[2] in _EMBEDDINGS
        if is_embedding and module.magnitude is not None:
            message = f"{adapter.file} has a DoRA of {mlx_name}: its magnitudes are of tokens, PEFT's are of columns"
            raise AdapterError(message, "a LoRA of the embedding", "mlx_lm.fuse makes a whole model of it")
        a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{name}.{a}": module.a.t(), f"{PREFIX}{name}.{b}": module.b.t()}
        if module.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = module.magnitude
        if is_embedding and is_tied:
            targets.append("lm_head")
            tensors |= {f"{PREFIX}lm_head.lora_A.weight": module.b, f"{PREFIX}lm_head.lora_B.weight": module.a}
    alpha = adapter.scale * adapter.rank
    config: JsonObject = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_dora": adapter.is_dora,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    write_adapter_config(out, config)
    content = serialize_to_safetensors_header_and_data(
        {k: t.contiguous() for k, t in tensors.items()}, {"format": "pt"}
    )
    write_atomic(out / WEIGHTS_FILE, content)


def _find_whether_base_ties_head(base: str | None) -> bool:
    """Return whether a base's head is its embedding; False if the base is not at hand."""
    try:
        config = load_base_config(base).config if base else None
    except SlimtuneError:
        return False
    return config is not None and bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def _refuse_base_quantized_by_mlx(base: Path, folder: Path) -> None:
    """Raise AdapterError if a base's weights are packed as only MLX reads them."""
    config = base / "config.json"
    quantization = read_json_object(config).get("quantization") if config.is_file() else None
    if isinstance(quantization, dict):
        raise AdapterError(
            f"the adapter {folder} names the base {base}, which MLX has quantized to {quantization.get('bits')} bits: "
            "transformers does not read it",
            "the base in 16 bits, beside which log-probabilities differ by its rounding",
            f'name that one as "model" in {folder / CONFIG_FILE} (slimtune check: --base)',
        )


def get_or_make_peft_folder(folder: Path, base: str | None = None, log: Callable[[str], None] = lambda _: None) -> Path:
    """Return a folder in the cache with an adapter of mlx-lm as PEFT's files, made once for each content and base."""
    adapter = read_mlx_adapter(folder)
    named = base or adapter.base
    if named is not None and (Path(named).expanduser().exists() or base is not None):
        named = resolve_model_source(named).spec
        _refuse_base_quantized_by_mlx(Path(named), folder)
    digest = hashlib.sha256(str(named).encode())
    for name in (ADAPTER_FILE, CONFIG_FILE):
        digest.update((folder / name).read_bytes())
    made = get_slimtune_cache_root() / "adapters" / f"{folder.resolve().name}-{digest.hexdigest()[:16]}-v1"
    if not (made / WEIGHTS_FILE).is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(made) as temporary:
            convert_mlx_adapter_to_peft(folder, temporary, named)
    log(f"{folder} is an adapter of mlx-lm, read as PEFT's files: {made}")
    return made
