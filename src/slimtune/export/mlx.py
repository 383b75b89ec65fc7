"""Write a run's adapter as mlx-lm reads it, and a base or a merged model as an MLX folder.

    adapters.safetensors   lora_a (in, r), lora_b (r, out), and m (out) of a DoRA, by mlx-lm's names of the modules
    adapter_config.json    fine_tune_type, num_layers, and one rank and one scale for all modules

mlx-lm has one rank and one scale. If a LoRA has several ranks, the smaller matrices are padded with zeros; if it has
several scales, each is multiplied into its B, and the file's scale is 1. What mlx-lm cannot hold is refused here first.
"""

import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from ..core.adapters import adapter_files
from ..core.foundation.dtype_names import dtype_name, llama_cpp_dtype_name
from ..core.foundation.files import read_json_object, write_atomic, write_json
from ..core.training.trained_model import TrainedModel
from ..errors import AdapterError, ModelError, format_names
from ..extras.mlx_adapter import ADAPTER_FILE, CONFIG_FILE, read_mlx_adapter
from ..extras.mlx_names import (
    add_fields_mlx_lm_reads,
    is_misread_by_mlx_lm,
    select_layers_and_keys,
    to_mlx_module_name,
)
from ..generation.mlx_engine import MlxEngine, convert_to_mlx_folder, is_mlx_lm_installed, require_mlx_lm
from .adapter_file_check import ScaledMatrix, require_same_matrices
from .expected_logps import TOLERANCES, EngineTolerance
from .export_support import get_export_support_flags
from .gptq_rounding import MIN_TOKENS, record_second_moments
from .manifest import EXPORT_MANIFEST
from .merge import SMALL_MODEL, merge, write_base_checkpoint
from .mlx_format import BITS, UNROUNDED
from .mlx_rounding import round_mlx_folder_with_inputs

if TYPE_CHECKING:
    from .verify import ExportVerifier

BASE_FOLDER = "base"
_WITHOUT_PLACE = {
    "bias": "it trains biases",
    "lora_bias": "it has a bias on B",
    "alora_invocation_tokens": "it changes only the tokens after its invocation",
    "trainable_token_indices": "it trains single rows of an embedding",
    "layer_replication": "it repeats layers of the base",
}
"""Fields of a config whose value, if there is one, no adapter of mlx-lm can express."""


@dataclass(frozen=True)
class MlxLoraPair:
    """A module's update in mlx-lm: `scale · x A B`, and for DoRA the magnitude of each row of the adapted weight."""

    a: Tensor  # (in, r)
    b: Tensor  # (r, out)
    scale: float
    magnitude: Tensor | None = None  # (out)

    def pad(self, rank: int, scale: float) -> dict[str, Tensor]:
        """Return the tensors of the file by their leaf, for the file's rank and scale."""
        a = torch.nn.functional.pad(self.a.detach().float(), (0, rank - self.a.shape[1]))
        b = torch.nn.functional.pad(self.b.detach().double(), (0, 0, 0, rank - self.b.shape[0]))
        tensors = {"lora_a": a, "lora_b": (b * (self.scale / scale)).float()}
        if self.magnitude is not None:
            tensors["m"] = self.magnitude.detach().float().flatten()
        return tensors


@dataclass(frozen=True)
class WrittenMlxAdapter:
    """What an adapter's two files say."""

    fine_tune_type: str  # lora or dora
    rank: int
    scale: float
    num_layers: int
    keys: list[str]
    is_folded: bool  # whether scales were multiplied into B
    are_keys_whole_names: bool  # whether each module is named by its whole path
    bytes: int


def collect_mlx_lora_pairs(model: Any, adapter_name: str = "default") -> tuple[dict[str, MlxLoraPair], list[str]]:
    """Return an adapter's updates by mlx-lm's names of the modules, and a clause for each thing it cannot hold."""
    config, report = model.peft_config[adapter_name], model.match_report(adapter_name)
    given = {name: getattr(config, name, None) for name in _WITHOUT_PLACE}
    other = [_WITHOUT_PLACE[name] for name, value in given.items() if value and value != "none"]
    other += [f"it trains {name} in full" for name in report.trained_parameter_copies]
    if getattr(config, "init_lora_weights", None) == "loftq":
        other.append("it belongs to the quantized base that LoftQ compensates")
    is_wrapper = model.config.get_text_config() is not model.config
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and getattr(head, "weight", head) is getattr(embedding, "weight", embedding)
    pairs: dict[str, MlxLoraPair] = {}
    modules = model.adapter_modules(adapter_name)
    has_tied_head = any(hasattr(module, "owner") for module in modules.values())
    for name, module in modules.items():
        mlx_name, kind = to_mlx_module_name(name, is_wrapper), report.kinds[name]
        layer = model.get_submodule(name)
        if mlx_name is None:
            other.append(f"it changes {name}, and mlx-lm has only the text part of the model")
        elif is_tied and layer is head and hasattr(module, "owner"):
            continue  # mlx-lm's adapter of the embedding changes the head in the same way
        elif is_tied and layer is head:
            other.append(f"it changes {name}, which the base ties to its embedding, without the embedding")
        elif is_tied and layer is embedding and not has_tied_head:
            other.append(f"it changes {name} without the head that the base ties to it")
        elif (pair := _get_lora_pair(module, kind)) is None:
            other.append(f"it changes {name} ({kind}, {type(module).__name__})")
        else:
            pairs[mlx_name] = pair
    return pairs, list(dict.fromkeys(other))


def _get_lora_pair(module: Any, kind: str) -> MlxLoraPair | None:
    if kind not in ("linear", "embedding") or module.expert_factors():
        return None
    magnitude = getattr(module, "lora_magnitude_vector", None)
    if magnitude is not None:
        if kind != "linear" or getattr(module.lora_B, "bias", None) is not None:
            return None  # a DoRA of an embedding has a magnitude for each column in PEFT, for each row in mlx-lm
        (A, B), scale = module.low_rank(), module.scale
    elif (factors := module.low_rank_factors()) is not None:
        A, B, scale = factors
    else:
        return None
    return MlxLoraPair(A.t(), B.t(), float(scale), magnitude)


def require_held_by_mlx_lm(
    run: Path, model: Any, adapter_name: str, pairs: Mapping[str, Any], other: list[str]
) -> None:
    """Raise AdapterError with what mlx-lm's adapters cannot hold, and the alternatives."""
    if pairs and not other:
        return
    hints = []
    if get_export_support_flags(model, adapter_name).merged:
        hints.append(f"base and adapter as one model: slimtune export {shlex.quote(str(run))} --to mlx --merged")
        if {*model.match_report(adapter_name).kinds.values()} <= {"linear", "embedding"}:
            hints.append("or the nearest LoRA: --convert-to-lora 64")
    method = model.peft_config[adapter_name].name
    reasons = format_names(other or ["it changes nothing"], 3)
    raise AdapterError(
        f"no adapter of mlx-lm can hold the {method} adapter of {run}: {reasons}",
        "a LoRA or DoRA of linear layers",
        "; ".join(hints) or "use it with slimtune generate and slimtune chat: it cannot be merged",
    )


def write_mlx_adapter(
    model: Any, adapter_name: str, pairs: Mapping[str, MlxLoraPair], folder: Path, base: str
) -> WrittenMlxAdapter:
    """Write the adapter's two files; `base` is the folder or Hub id that mlx-lm loads it on."""
    scales = {pair.scale for pair in pairs.values()}
    is_folded = len(scales) > 1
    rank, scale = max(pair.a.shape[1] for pair in pairs.values()), 1.0 if is_folded else next(iter(scales))
    kind = "dora" if any(pair.magnitude is not None for pair in pairs.values()) else "lora"
    count = model.config.get_text_config().num_hidden_layers
    layers, keys = select_layers_and_keys(list(pairs), count)
    config = {
        "fine_tune_type": kind,
        "num_layers": layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
        "model": base,
    }
    tensors = {
        f"{name}.{leaf}": tensor.cpu().contiguous()
        for name, pair in pairs.items()
        for leaf, tensor in pair.pad(rank, scale).items()
    }
    write_json(folder / CONFIG_FILE, config)
    content = adapter_files.serialize_to_safetensors_header_and_data(tensors, {"format": "mlx"})
    write_atomic(folder / ADAPTER_FILE, content)
    size = sum((folder / name).stat().st_size for name in (ADAPTER_FILE, CONFIG_FILE))
    return WrittenMlxAdapter(kind, rank, scale, layers, keys, is_folded, set(keys) == set(pairs), size)


def require_trained_adapter_in_mlx(folder: Path, pairs: Mapping[str, MlxLoraPair]) -> None:
    """Raise AdapterError unless an adapter of mlx-lm has each A, and each B with its scale, as it was trained."""
    read = read_mlx_adapter(folder)
    found, trained = dict[str, ScaledMatrix](), dict[str, Tensor]()
    for name, its in read.modules.items():
        rank = pairs[name].a.shape[1] if name in pairs else 0
        is_padded = not (its.a[:, rank:].any() and its.b[rank:].any())
        found[f"lora_a of {name}"] = (its.a[:, :rank] if is_padded else its.a), 1.0
        found[f"lora_b of {name}"] = (its.b[:rank] if is_padded else its.b), read.scale
        if its.magnitude is not None:
            found[f"m of {name}"] = its.magnitude, 1.0
    for name, pair in pairs.items():
        trained |= {f"lora_a of {name}": pair.a, f"lora_b of {name}": pair.b.double() * pair.scale}
        if pair.magnitude is not None:
            trained[f"m of {name}"] = pair.magnitude.flatten()
    require_same_matrices(found, trained)


def find_mlx_base_or_write_it(loaded: TrainedModel, folder: Path) -> tuple[str, list[str]]:
    """Return what mlx-lm loads the base from (a folder, a Hub id, or `BASE_FOLDER`), and notes.

    A base whose config.json mlx-lm would misread, or that is no Hugging Face folder, is written beside the adapter.
    """
    source = loaded.base.source
    if source.kind == "hub":
        cached = try_to_load_from_cache(source.path, "config.json")
        file = Path(cached) if isinstance(cached, str) else None
    else:
        file = Path(source.path) / "config.json" if source.kind == "folder" else None
    is_read = file is not None and file.is_file() and not is_misread_by_mlx_lm(read_json_object(file))
    if is_read and loaded.base.quantization is None:
        return (source.path if source.kind == "hub" else str(Path(source.path).resolve())), []
    (folder / BASE_FOLDER).mkdir()
    write_mlx_base(loaded, folder / BASE_FOLDER)
    why = (
        f"the base {source.spec} is no Hugging Face folder"
        if source.kind not in ("hub", "folder")
        else f"mlx-lm would misread the config.json of {source.spec}, written by transformers 5 (rope_parameters)"
    )
    return BASE_FOLDER, [
        f"{why}, so {BASE_FOLDER}/ has the base in {dtype_name(loaded.base.dtype)}, as mlx-lm reads it"
    ]


def find_local_mlx_base(verifier: "ExportVerifier", folder: Path, base: str | None) -> Path:
    """Return the folder of an adapter's base as mlx-lm loads it; of a base from the Hub it is written once."""
    if base == BASE_FOLDER:
        return folder / BASE_FOLDER
    if base is not None and Path(base).is_dir():
        return Path(base)
    return write_mlx_base_in(verifier, "")


def find_mlx_base_of_adapter(folder: Path) -> Path:
    """Return the folder of the base that an adapter of mlx-lm names; ModelError if it is not on this disk."""
    name = read_mlx_adapter(folder).base
    for place in (Path(name or "").expanduser(), folder / BASE_FOLDER):  # the export may have been moved
        if name and (place / "config.json").is_file():
            return place
    raise ModelError(
        f"the base of {folder} is {name!r}, which is no folder here",
        "a folder that mlx_lm.load takes",
        f'its path as "model" in {folder / CONFIG_FILE}',
    )


def find_mlx_precision_and_tolerance(folder: Path) -> tuple[str, EngineTolerance]:
    """Return the precision of an MLX folder's weights, "4bit" or "bf16" for example, and its tolerance."""
    config = read_json_object(folder / "config.json")
    if isinstance(quantization := config.get("quantization"), dict):
        bits = quantization.get("bits")
        return f"{bits}bit", TOLERANCES["q8_0" if bits == 8 else "lower"]
    name = str(config.get("torch_dtype") or config.get("dtype") or "float32")
    precision = next((short for short, long in UNROUNDED.items() if long == name), "f32")
    return precision, TOLERANCES[precision]


def open_mlx_base_like(verifier: "ExportVerifier", folder: Path) -> MlxEngine:
    """Open the untouched base in mlx-lm, in the precision of a folder of MLX."""
    quantization = read_json_object(folder / "config.json").get("quantization") or {}
    precision, _ = find_mlx_precision_and_tolerance(folder)
    return MlxEngine(write_mlx_base_in(verifier, precision, quantization.get("group_size")))


def write_mlx_base_in(verifier: "ExportVerifier", precision: str, group_size: int | None = None) -> Path:
    """Return the untouched base as an MLX folder in a precision, written once; "": as it was trained."""
    folder = verifier.temp_folder / f"mlx-base-{precision}"
    if folder.is_dir():
        return folder
    plain = verifier.temp_folder / "mlx-base-"
    if not plain.is_dir():
        plain.mkdir()
        write_mlx_base(verifier.loaded, plain)
    if precision:
        dtype, bits = UNROUNDED.get(precision), BITS.get(precision)
        convert_to_mlx_folder(plain, folder, dtype or _get_16_bit_dtype(verifier.loaded), bits, group_size)
    return folder


def write_merged_mlx_folder(
    loaded: TrainedModel,
    run: Path,
    folder: Path,
    dtype: str | None,
    bits: int | None,
    group_size: int | None,
    second_moments: Mapping[str, Tensor] | None = None,
) -> tuple[list[str], list[str]]:
    """Write base and adapter as one MLX folder with tokenizer and chat template.

    mlx-lm's own conversion writes it. Without mlx-lm a model in 16 or 32 bits is a Hugging Face folder, which mlx-lm
    reads, too.

    Args:
        loaded, run: the run's adapter on its base.
        folder: it exists, and is empty.
        dtype: of the weights; None: they are quantized.
        bits, group_size: of a quantized model.
        second_moments: of the inputs of its matrices, by mlx-lm's name of the module: these are rounded as
            `round_mlx_folder_with_inputs` does.

    Returns:
        notes, and the modules whose matrices were rounded with inputs.

    Raises:
        ModelError: the model is quantized, and mlx-lm is not installed.
        RunError: mlx-lm does not know its architecture.
    """
    if bits is not None:
        require_mlx_lm()
    small = sum(p.numel() for p in loaded.model.parameters()) < SMALL_MODEL
    with tempfile.TemporaryDirectory(prefix=".slimtune-", dir=folder.parent) as temporary:
        plain, converted = Path(temporary, "merged"), Path(temporary, "mlx")
        merge(run, plain, dtype or ("float32" if small else "auto"))
        for name in (EXPORT_MANIFEST, "README.md"):
            (plain / name).unlink(missing_ok=True)
        make_config_readable_for_mlx_lm(plain)
        notes, rounded, result = [], list[str](), plain
        if is_mlx_lm_installed():
            convert_to_mlx_folder(plain, converted, dtype or _get_16_bit_dtype(loaded), bits, group_size)
            (converted / "README.md").unlink(missing_ok=True)
            if second_moments and bits is not None and group_size is not None:
                rounded = round_mlx_folder_with_inputs(converted, plain, second_moments, bits, group_size)
            make_config_readable_for_mlx_lm(converted)
            result = converted
        else:
            notes.append("mlx-lm is not installed here, so this is a Hugging Face folder, which mlx-lm reads as well")
        for path in result.iterdir():
            shutil.move(path, folder / path.name)
    return notes, rounded


def record_second_moments_by_mlx_name(loaded: TrainedModel) -> dict[str, Tensor] | str:
    """Return the second moments of inputs to round with, by mlx-lm's name of the module; or why there are none."""
    model: Any = loaded.model
    if sum(p.numel() for p in model.parameters()) >= SMALL_MODEL:
        return f"the model has {SMALL_MODEL:,} parameters or more"
    moments = record_second_moments(model, loaded.recipe, loaded.base.tokenizer)
    is_wrapper = model.config.get_text_config() is not model.config
    names = {name: to_mlx_module_name(name, is_wrapper) for name in moments}
    found = {mlx_name: moments[name] for name, mlx_name in names.items() if mlx_name is not None}
    return found or f"the rows that the run was trained on are not there, or have fewer than {MIN_TOKENS} tokens"


def find_16_bit_precision(loaded: TrainedModel) -> str:
    """Return the precision of a merged model by default: the base's own, in 16 bits."""
    return llama_cpp_dtype_name(getattr(torch, _get_16_bit_dtype(loaded)))


def _get_16_bit_dtype(loaded: TrainedModel) -> str:
    return "float16" if loaded.base.dtype == torch.float16 else "bfloat16"


def write_mlx_base(loaded: TrainedModel, folder: Path) -> None:
    """Write the base an adapter was trained on as a folder that mlx-lm reads rightly, in the dtype of the training."""
    write_base_checkpoint(loaded, folder)
    make_config_readable_for_mlx_lm(folder)


def make_config_readable_for_mlx_lm(folder: Path) -> None:
    """Add to a checkpoint's config.json the older names that mlx-lm reads."""
    file = folder / "config.json"
    write_json(file, add_fields_mlx_lm_reads(read_json_object(file)))


def get_training_dtype_name(loaded: TrainedModel) -> str:
    """Return the dtype that the base was rounded to in training, by MLX's name; "" if MLX has no such dtype."""
    name = dtype_name(loaded.base.dtype)
    return name if name in UNROUNDED.values() else ""
