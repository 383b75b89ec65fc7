"""Merge base and adapter into one plain Hugging Face checkpoint, W' = W + ΔW, and check that it is the trained model.

    log-probabilities with the adapter → each module merged in float32, rounded once, written beside `out` → loaded
    back → log-probabilities compared → renamed to `out`

The base is taken as the run had it: rounded to the run's dtype. The work is done in CPU memory; `merged_weights.py`
says how little of it is used.
"""

import dataclasses
import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel

from ..core.adapters.adapter_module import MergeUnsupported
from ..core.adapters.peft_config import PeftConfig
from ..core.adapters.peft_model import PeftModel
from ..core.foundation.dtype_names import dtype_name, llama_cpp_dtype_name
from ..core.foundation.files import atomic_folder, read_json_object, require_disk_space, translate_os_errors, write_json
from ..core.foundation.json_results import to_json_dict
from ..core.models.base_config import load_convertible_base_config
from ..core.models.dtype import pick_dtype
from ..core.models.load_errors import silencing_model_loading
from ..core.models.loader import load_base
from ..core.models.quantization import get_stored_quantization, remove_quantization_config
from ..core.training.run_dir import ADAPTER_FILE, RunDir, find_adapter_folder
from ..core.training.trained_model import TrainedModel, load_run
from ..errors import AdapterError, RunError, UsageError, format_install_command
from ..evaluation.run_results import RunResults
from ..extras.mlx_names import add_older_rope_fields
from ..extras.model_card import render_model_card
from ..extras.training_fingerprint import mark_as_compared
from ..generation.inference_engines import TransformersInferenceEngine
from ..generation.multi_run_loading import load_trained_models_sharing_base
from ..planning.meta_model import build_adapted_meta_model
from . import gguf, llama_cpp_tools
from .expected_logps import AdapterReference, get_loosest_tolerance, make_fixed_and_held_out_reference_texts
from .export_format import MERGED_FOLDER
from .export_results import MergeComparison, MergedExportFacts, MergeResult
from .gguf_rounding import round_gguf_with_inputs
from .gguf_roundings import is_trained_precision, write_trained_blocks
from .gptq_rounding import MIN_TOKENS, record_linear_layer_inputs, record_second_moments
from .manifest import write_export_manifest
from .merged_weights import LazyMergedStateDict, round_merged_weight, save_merged_weights
from .served_base import read_gguf_majority_precision

log = logging.getLogger(__name__)

SMALL_MODEL = 1_000_000_000
"""Below this many parameters the check computes in float32, and 16-bit weights are rounded with the run's rows. Larger
models are checked in the run's dtype and rounded to the nearest, to save memory."""


BESIDE_ITS_BASE = "use it beside its base (slimtune generate, chat; PeftModel.from_pretrained)"
STORED_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
"""Precisions of a GGUF to which the merged weights of small models are rounded with the run's rows. Rounded to the
nearest, a change of less than half a step is lost, as most of those of a preference run are even in f16."""


def merge(run: Path, out: Path, dtype: str = "auto") -> MergeResult:
    """Write a run's base and adapter as one checkpoint.

    Args:
        run: a run folder, or an adapter folder.
        out: folder for the checkpoint; it does not exist yet, or is empty.
        dtype: of the weights; "auto": as the run held the base, or, for an adapter folder, as its base is stored.

    Raises:
        UsageError: no such run, an unknown dtype, or `out` contains something.
        AdapterError: the adapter does not fit, or cannot be merged.
        RunError: the disk is full, or the merged model is not the trained one.
    """
    start = time.perf_counter()
    run, out = Path(run), Path(out).expanduser()
    requested = None if dtype == "auto" else pick_dtype(dtype)
    RunDir.require_free(out)
    if _require_mergeable_config(run).task_type == "SEQ_CLS":
        return _merge_classifier(run, out, requested, start)
    with atomic_folder(out) as folder, _load_memory_mapped(run, out) as loaded:
        model: Any = loaded.model
        base, tokenizer, config = loaded.base, loaded.base.tokenizer, model.active_peft_config
        stored = requested or base.dtype
        quantized, small = getattr(model, "is_quantized", False), _is_small(model)
        if small and not quantized:
            model.to(torch.promote_types(base.dtype, torch.float32))
            set_unrounded_embedding_scales(model)
        texts = make_fixed_and_held_out_reference_texts(tokenizer, loaded.recipe, model.config)
        reference = AdapterReference(model, tokenizer, texts)
        effect = reference.effect  # measured before the model changes
        inputs = record_linear_layer_inputs(model, loaded.recipe, tokenizer) if small and stored.itemsize == 2 else None
        if quantized:
            remove_quantization_config(model.get_base_model())
        with _translate_merge_errors(run):
            weights = LazyMergedStateDict(model)
        require_disk_space(out, weights.count() * stored.itemsize)
        with _translate_merge_errors(run):
            _save_checkpoint(loaded, weights, folder, stored, inputs)
        checked = model.dtype if small else stored
        merged = load_base(str(folder), dtype=checked, device="cpu", trust_remote_code=_trusts_code(loaded)).model
        engine = TransformersInferenceEngine("merged", merged, tokenizer)
        differences = reference.differences(engine.score(text.prompt_and_answer_ids).token_log_probs for text in texts)
        tolerance = get_loosest_tolerance(llama_cpp_dtype_name(stored), llama_cpp_dtype_name(model.dtype))
        if faults := reference.find_faults(differences, tolerance):
            raise RunError(
                f"the merged model is not the trained one: {'; '.join(faults)} (over {len(differences)} next "
                f"tokens; the adapter changes them by {effect:.3g} on average)",
                str(tolerance),
                "--dtype float32 (export: --precision f32): 16 bits cannot hold so small a change"
                if stored.itemsize == 2
                else "",
                code="merge-differs",
            )
        comparison = MergeComparison(
            dtype=dtype_name(stored),
            max_difference=differences.abs().max().item(),
            mean_difference=differences.abs().mean().item(),
            effect=effect,
            strength=reference.measure_effect_share(differences)[0],
            positions=len(differences),
        )
        card = _render_card(loaded, config, comparison, out.resolve().name)
        (folder / "README.md").write_text(card, encoding="utf-8")
        with (loaded.adapter_folder / ADAPTER_FILE).open("rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        facts = MergedExportFacts(comparison, base.fingerprint, sha256)
        write_export_manifest(folder, MERGED_FOLDER, run, to_json_dict(facts))
        written = sum(f.stat().st_size for f in folder.iterdir())
    seconds = round(time.perf_counter() - start, 3)
    return MergeResult(str(run), str(out), written, weights.count(), comparison, seconds)


def _require_mergeable_config(run: Path) -> PeftConfig:
    """Return the config of a run's adapter; raise AdapterError if its method changes no weight."""
    config = PeftConfig.from_pretrained(find_adapter_folder(run))
    if not config.mergeable:
        raise AdapterError(
            f"{run} was trained with {config.name}, which changes no weight of the base: it cannot be merged",
            "a run of a method that can be merged: `slimtune methods` lists them",
            BESIDE_ITS_BASE,
            code="merge-differs",
        )
    return config


def _merge_classifier(run: Path, out: Path, requested: torch.dtype | None, start: float) -> MergeResult:
    """Write a classifier or a reward model as one checkpoint, and compare the logits of some texts.

    `start` is when the work began, by `time.perf_counter`.
    """
    loaded = load_run_for_export(run)
    model: Any = loaded.model
    tokenizer, stored = loaded.base.tokenizer, requested or loaded.base.dtype
    texts = make_fixed_and_held_out_reference_texts(tokenizer, loaded.recipe, model.config)

    @torch.no_grad()
    def compute_logits(model: Any) -> Tensor:
        return torch.cat(
            [model.eval()(input_ids=torch.tensor([text.prompt_and_answer_ids])).logits.float() for text in texts]
        )

    adapted = compute_logits(model)
    with model.disable_adapter():
        effect = (adapted - compute_logits(model)).abs().mean().item()
    with _translate_merge_errors(run):
        weights = LazyMergedStateDict(model)
    with atomic_folder(out, weights.count() * stored.itemsize) as folder:
        with _translate_merge_errors(run):
            _save_checkpoint(loaded, weights, folder, stored)
        trusted = _trusts_code(loaded)
        base = load_base(str(folder), dtype=model.dtype, device="cpu", trust_remote_code=trusted, task="SEQ_CLS")
        differences = (compute_logits(base.model) - adapted).abs()
        tolerance = get_loosest_tolerance(llama_cpp_dtype_name(stored), llama_cpp_dtype_name(model.dtype))
        mean, largest = differences.mean().item(), differences.max().item()
        if not mean <= tolerance.mean_difference + tolerance.mean_difference_per_effect * effect:
            raise RunError(
                f"the merged classifier is not the trained one: its logits differ by {mean:.3g} on average",
                str(tolerance),
                "--dtype float32",
                code="merge-differs",
            )
        strength = 1 - mean / effect if effect else None
        comparison = MergeComparison(dtype_name(stored), largest, mean, effect, strength, len(texts))
        facts = MergedExportFacts(comparison, loaded.base.fingerprint)
        write_export_manifest(folder, MERGED_FOLDER, run, to_json_dict(facts))
        written = sum(f.stat().st_size for f in folder.iterdir())
    seconds = round(time.perf_counter() - start, 3)
    return MergeResult(str(run), str(out), written, weights.count(), comparison, seconds)


def _render_card(loaded: TrainedModel, config: PeftConfig, merge: MergeComparison, name: str) -> str:
    """Return the model card of the merged model."""
    source = loaded.base.source
    # The Hub reads `base_model` as an id: a local path would be a dead link.
    hub_id = source.path if source.kind == "hub" else None
    data = ModelCardData(
        base_model=hub_id,
        base_model_relation="finetune" if hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["slimtune", config.name],
    )
    names = {"title": name, "repo_id": name, "base_id": hub_id, "base_name": source.spec}
    chat = bool(loaded.base.tokenizer.chat_template)
    return render_model_card(
        data, config, merge=to_json_dict(merge), results=RunResults(loaded.recipe), chat=chat, **names
    )


@contextmanager
def _load_memory_mapped(run: Path, out: Path) -> Iterator[TrainedModel]:
    """Load a run with the base as it was trained on, its weights mapped from files if the model is large.

    transformers maps a checkpoint's files if it is stored in the dtype asked for, and copies them otherwise. A large
    base that is stored in another dtype is first written in the run's dtype beside `out`, and deleted afterwards.
    """
    dtype, stored = _get_trained_dtype(run), None
    if find_adapter_folder(run) != run:
        m = RunDir.open(run).load_recipe().model
        dtype = dtype_name(pick_dtype(dtype or m.dtype, "cpu"))
        config = load_convertible_base_config(m.name, trust_remote_code=m.trust_remote_code, revision=m.revision)
        if (
            m.quantization is None and get_stored_quantization(config) is None
        ):  # a quantized base stays quantized in memory
            stored = dtype_name(config.dtype or torch.float32)
    if stored in (None, dtype) or _is_small(build_adapted_meta_model(config, None, torch.float32)):
        yield load_run(run, dtype=dtype, device="cpu")
        return
    loaded = load_run(run, dtype=stored, device="cpu")
    trained: Any = pick_dtype(str(dtype))
    weights, place = LazyMergedStateDict(loaded.model, adapters=()), out.resolve()
    with translate_os_errors(place, 2 * weights.count() * trained.itemsize):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.base.", dir=place.parent) as folder:
            _save_checkpoint(loaded, weights, Path(folder), trained)
            base = load_base(folder, dtype=trained, device="cpu", trust_remote_code=_trusts_code(loaded))
            mark_as_compared(base.model, loaded.adapter_folder)  # its files are the base's, rounded
            yield dataclasses.replace(
                loaded,
                model=PeftModel.from_pretrained(base.model, loaded.adapter_folder),
                base=dataclasses.replace(loaded.base, model=base.model, dtype=trained),
            )


def _get_trained_dtype(run: Path) -> str | None:
    """Return the dtype a run held its base in; for an adapter folder, the one the base's checkpoint is stored in."""
    folder = find_adapter_folder(run)
    if folder != run:
        file = RunDir.open(run).result_file
        # "auto" in the recipe may have meant another dtype on the machine that trained.
        return read_json_object(file).get("dtype") if file.is_file() else None
    name = PeftConfig.from_pretrained(folder).base_model_name_or_path
    return dtype_name((load_convertible_base_config(name).dtype if name else None) or torch.float32)


def load_run_for_export(run: Path, base_rounding_dtype: str | None = None) -> TrainedModel:
    """Load a run's adapter on its base on the CPU: in float32 if the model is small, dequantized if it is quantized.

    The base's weights are rounded to `base_rounding_dtype`, without quantization; by default as in training.
    """
    return load_runs_for_export([run], base_rounding_dtype)[0]


def load_runs_for_export(runs: Sequence[Path], base_rounding_dtype: str | None = None) -> list[TrainedModel]:
    """Load the adapters of several runs on one base, as `load_run_for_export` loads one, with the same errors."""
    how = {
        "dtype": base_rounding_dtype or _get_trained_dtype(runs[0]),
        "quantization": None if base_rounding_dtype is None else "none",
    }
    loaded = load_trained_models_sharing_base(runs, **how, device="cpu", dequantize=True)
    model: Any = loaded[0].model
    if _is_small(model):
        model.to(torch.promote_types(loaded[0].base.dtype, torch.float32))
        set_unrounded_embedding_scales(model)
    return loaded


def set_unrounded_embedding_scales(model: Any) -> None:
    """Give scaled embeddings (Gemma) their factor in the model's dtype: a base loaded in bfloat16 has it rounded.

    √640 = 25.298 became 25.25. Engines compute with the exact factor, whatever the dtype of the weights is.
    """
    for module in model.modules():
        if isinstance(factor := getattr(module, "scalar_embed_scale", None), float):
            module.embed_scale.fill_(factor)


@contextmanager
def rounding_embedding_scales(model: Any) -> Iterator[None]:
    """Round the factor of scaled embeddings (Gemma) to bfloat16 meanwhile, whatever the dtype of the model is."""
    scales = [m.embed_scale for m in model.modules() if isinstance(getattr(m, "scalar_embed_scale", None), float)]
    before = [scale.clone() for scale in scales]
    for scale in scales:
        scale.copy_(scale.bfloat16())
    try:
        yield
    finally:
        for scale, value in zip(scales, before, strict=True):
            scale.copy_(value)


def write_merged_gguf(
    loaded: TrainedModel,
    run: Path,
    file: Path,
    precision: str,
    importances: Mapping[str, Any] | None = None,
    second_moments: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Write base and adapter as one GGUF; the loaded model is unchanged afterwards.

    Args:
        loaded: base and adapter.
        run: for messages.
        file: to write.
        precision: of its weights.
        importances: of inputs: they weight the errors of llama.cpp's quantizer, as for `quantize_gguf`.
        second_moments: of the inputs of matrices, by the tensor's name: these are rounded as `round_gguf_with_inputs`
            does.

    Returns:
        the names of the matrices that were rounded with inputs, or as in training: without importances and moments, in
        the precision that the adapter was trained through.
    """
    with _writing_unquantized(loaded, file, precision, importances, second_moments) as (whole, written, rounded):
        _write_unquantized_merged_gguf(loaded, run, whole, written, quantized_afterwards=whole != file)
    if importances is None and second_moments is None and is_trained_precision(loaded.model, precision):
        return write_trained_blocks(file, loaded.model)
    return rounded


def _write_unquantized_merged_gguf(
    loaded: TrainedModel, run: Path, file: Path, precision: str, *, quantized_afterwards: bool
) -> None:
    source = loaded.base.source
    model: Any = loaded.model
    small = _is_small(model)
    if source.kind != "gguf":
        with tempfile.TemporaryDirectory(prefix=".slimtune-", dir=file.parent) as folder:
            dtype = "auto" if precision == "bf16" else "float16" if precision == "f16" and small else "float32"
            merge(run, Path(folder, "merged"), dtype)
            llama_cpp_tools.convert_hf_to_gguf(Path(folder, "merged"), file, precision)
        return
    inputs: dict[str, torch.Tensor] = {}
    # f32 holds the change, q8_0 rounds in blocks, and the quantizer rounds what 16 bits have rounded already
    if precision in STORED_DTYPES and small and not quantized_afterwards:
        inputs = record_linear_layer_inputs(model, loaded.recipe, loaded.base.tokenizer)
    with _translate_merge_errors(run):
        model.merge_adapter(safe_merge=True)
    try:
        for name in inputs.keys() & model.adapted_layers().keys():
            weight = model.get_submodule(name).weight
            rounded = round_merged_weight(model, f"{name}.weight", weight.detach(), STORED_DTYPES[precision], inputs)
            weight.data = rounded.to(weight.dtype)
        chat_template = loaded.base.tokenizer.chat_template
        gguf.write_gguf_from_template(Path(source.path), model, file, precision, chat_template)
    finally:
        model.unmerge_adapter()


def measure_input_importances(loaded: TrainedModel, run: Path) -> dict[str, Any]:
    """Return the mean square of each input of a matrix `(in,)`, by its name in a GGUF, on rows the run trained on.

    UsageError means that the run's rows are not there.
    """
    inputs = _name_as_in_gguf(loaded, record_linear_layer_inputs(loaded.model, loaded.recipe, loaded.base.tokenizer))
    if not inputs:
        raise UsageError(f"--imatrix, but the rows that {run} was trained on are not there", hint="leave it out")
    return {name: x.float().square().mean(0).cpu().numpy() for name, x in inputs.items()}


def record_second_moments_by_gguf_name(loaded: TrainedModel) -> dict[str, Tensor] | str:
    """Return the second moments of inputs to round with, by the matrix's name in a GGUF; or why there are none."""
    if not _is_small(loaded.model):
        return f"the model has {SMALL_MODEL:,} parameters or more"
    if not llama_cpp_tools.is_llama_cpp_library_installed():
        return f"{format_install_command('export-check')} brings the library that it needs"
    if (kind := loaded.model.config.model_type) not in gguf.ARCHITECTURES:  # llama.cpp's converter knows more of them
        return f"how llama.cpp names the weights of a {kind} model is not known"
    moments = _name_as_in_gguf(loaded, record_second_moments(loaded.model, loaded.recipe, loaded.base.tokenizer))
    return moments or f"the rows that the run was trained on are not there, or have fewer than {MIN_TOKENS} tokens"


def _name_as_in_gguf(loaded: TrainedModel, by_module: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = gguf.make_gguf_module_name_mapper(loaded.model.config)
    return {f"{name}.weight": value for module, value in by_module.items() if (name := names(module)) is not None}


def write_base_gguf(
    loaded: TrainedModel, file: Path, precision: str = "f32", importances: Mapping[str, Any] | None = None
) -> None:
    """Write the base an adapter was trained on as one GGUF; `importances` are as for `quantize_gguf`."""
    source, base = loaded.base.source, loaded.base
    with _writing_unquantized(loaded, file, precision, importances) as (whole, written, _):
        if source.kind == "gguf":
            gguf.write_gguf_from_template(Path(source.path), loaded.model, whole, written)
            return
        with tempfile.TemporaryDirectory(prefix=".slimtune-", dir=file.parent) as folder:
            _save_checkpoint(loaded, LazyMergedStateDict(loaded.model, adapters=()), Path(folder, "base"), base.dtype)
            llama_cpp_tools.convert_hf_to_gguf(Path(folder, "base"), whole, written)


def write_base_checkpoint(loaded: TrainedModel, folder: Path) -> None:
    """Write the base an adapter was trained on as a Hugging Face folder, in the dtype of the training, 32 bits at most.

    The folder may exist.
    """
    dtype = torch.float32 if loaded.base.dtype == torch.float64 else loaded.base.dtype
    _save_checkpoint(loaded, LazyMergedStateDict(loaded.model, adapters=()), folder, dtype)


def take_or_write_base_gguf(loaded: TrainedModel, file: Path, precision: str | None) -> tuple[Path, str]:
    """Return the GGUF that the base is, or write `file`; and the precision of its weights. None: the base's, or f16."""
    source = loaded.base.source
    if precision is None and source.kind == "gguf":
        return Path(source.path), read_gguf_majority_precision(Path(source.path))
    write_base_gguf(loaded, file, precision or "f16")
    return file, precision or "f16"


@contextmanager
def _writing_unquantized(
    loaded: TrainedModel,
    file: Path,
    precision: str,
    importances: Mapping[str, Any] | None,
    second_moments: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[Path, str, list[str]]]:
    """Yield the GGUF to write and in which of `PRECISIONS`; llama.cpp's quantizer then makes any other.

    It is made of float32, of a large model of float16, which takes half of the space. Then matrices with
    `second_moments` are rounded with them; their names are added to the list that is yielded.
    """
    precision, rounded = llama_cpp_tools.resolve_gguf_precision(precision), list[str]()
    if precision in llama_cpp_tools.PRECISIONS:
        yield file, precision, rounded
        return
    with tempfile.TemporaryDirectory(prefix=".slimtune-", dir=file.parent) as folder:
        whole = Path(folder, "whole.gguf")
        yield whole, "f32" if _is_small(loaded.model) else "f16", rounded
        llama_cpp_tools.quantize_gguf(whole, file, precision, importances)
        rounded += round_gguf_with_inputs(file, whole, second_moments) if second_moments else []


@contextmanager
def _translate_merge_errors(run: Path) -> Iterator[None]:
    """Turn MergeUnsupported into an AdapterError that gives the alternatives."""
    try:
        yield
    except MergeUnsupported as e:
        older = ", or an older checkpoint of it" if "NaN or Inf" in str(e) else ""
        raise AdapterError(
            f"the adapter of {run} cannot be merged: {e}",
            "finite changes of plain weights",
            f"{BESIDE_ITS_BASE}{older}",
            code="merge-differs",
        ) from e


def _save_checkpoint(
    loaded: TrainedModel, weights: LazyMergedStateDict, folder: Path, dtype: torch.dtype, inputs: Any = None
) -> None:
    """Write a whole checkpoint: config, generation settings, the base's own code, tokenizer and weights."""
    model: Any = weights.model
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        try:
            generation.validate(strict=True)
        except ValueError:
            # Some checkpoints set a temperature without do_sample, which transformers refuses to save.
            log.warning("the base's generation settings have sampling parameters without do_sample: it is set")
            generation.do_sample = True
    with silencing_model_loading():
        PreTrainedModel.save_pretrained(model, folder, state_dict={})  # transformers' own, not the adapter's
        for empty in folder.glob("*.safetensors"):
            empty.unlink()
        model.config.dtype = dtype_name(dtype)
        model.config.save_pretrained(folder)
    config_file = folder / "config.json"
    write_json(config_file, add_older_rope_fields(read_json_object(config_file)))
    loaded.base.tokenizer.save_pretrained(folder)
    _copy_sentencepiece_model(loaded, folder)
    save_merged_weights(weights, folder, dtype, inputs)


def _copy_sentencepiece_model(loaded: TrainedModel, folder: Path) -> None:
    """Copy the base's tokenizer.model: llama.cpp's converter needs it, and transformers saves only tokenizer.json."""
    source, name = loaded.base.source, "tokenizer.model"
    file = Path(source.path, name) if source.kind == "folder" else None
    if source.kind == "hub":
        revision = loaded.recipe.model.revision if loaded.recipe is not None else None
        with suppress(HfHubHTTPError, LocalEntryNotFoundError):  # many bases have none
            file = Path(hf_hub_download(source.path, name, revision=revision))
    if file is not None and file.is_file():
        shutil.copyfile(file, folder / name)


def _is_small(model: Any) -> bool:
    return sum(p.numel() for p in model.parameters()) < SMALL_MODEL


def _trusts_code(loaded: TrainedModel) -> bool:
    return loaded.recipe is not None and loaded.recipe.model.trust_remote_code
