"""Check an adapter's file against its base, without an engine and without the base's weights."""

import copy
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoModel, PreTrainedConfig

from ...core.adapters.adapter_files import WEIGHTS_FILE
from ...core.adapters.adapter_tensors import PREFIX
from ...core.adapters.peft_config import PeftConfig, write_adapter_config
from ...core.foundation.formatting import format_bytes
from ...core.models.base_config import load_base_config
from ...core.models.load_errors import silence_and_translate_load_errors
from ...core.models.loader import get_auto_class
from ...core.training.run_dir import RunDir
from ...core.training.trained_model import TrainedModel
from ...errors import AdapterError, SlimtuneError, TargetError
from ...extras.mlx_adapter import get_or_make_peft_folder, is_mlx_adapter
from ..merge import SMALL_MODEL, load_run_for_export
from . import base_findings, tensor_findings
from .adapter_findings import AdapterFileCheck, AdapterFinding, make_finding
from .foreign_adapter import ForeignAdapter, open_foreign_adapter
from .key_placement import KeyPlacement, group_lora_pairs, place_keys, place_no_keys

BASE_WEIGHTS_UNPROVEN = "whether the base has the weights of the training: only its config was compared"
RUNTIME_BYTES = 470 << 20
"""Memory of a process with torch and transformers imported, and a file checked."""
LOGIT_BYTES = 3 * 64 * 4
"""For each entry of the vocabulary: three float32 copies of the logits of a text of 64 tokens."""
_PATTERN_FIELDS = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters")


class FileCheck(NamedTuple):
    """The check of a file, and what a comparison with an engine, or a repair, needs of it."""

    result: AdapterFileCheck
    adapter: ForeignAdapter
    config: PeftConfig | None  # None: it cannot be read
    model: Any  # the base on the meta device; None: no base was at hand
    placement: KeyPlacement | None
    updates: tensor_findings.UpdateNorms  # by module


def check_file(path: Path, base: str | None = None, log: Callable[[str], None] = lambda _: None) -> FileCheck:
    """Check an adapter's file, alone and against its base's config, tokenizer and template; load no weights.

    Args:
        path: an adapter folder of any trainer that writes PEFT's files, or of mlx-lm, or a run folder.
        base: the base; None: the one that the adapter or the run names, if it is at hand.
        log: gets progress messages.

    Raises:
        UsageError: there is no such adapter, or `base` is no base.
        AdapterError: a file is damaged, a pickle, or of another format.
    """
    started, given = time.monotonic(), path
    if is_mlx_adapter(path):
        path = get_or_make_peft_folder(path, base, log)
    adapter = open_foreign_adapter(path)
    findings, updates = tensor_findings.find_tensor_faults(adapter)
    not_proven = list[str]()
    config = _read_config(adapter, findings, not_proven)
    spec = base or _find_base_name(path, adapter)
    model = placement = base_config = None
    reason = "the adapter does not name its base, and no --base was given"
    try:
        base_config = load_base_config(spec).config if spec is not None else None
    except SlimtuneError as error:
        if base is not None:
            raise
        reason, spec = f"its base {spec} is not at hand ({error.message}); --base names it", None
    if spec is None or base_config is None:
        not_proven.append(f"keys, shapes and tokens: {reason}")
    else:
        findings += base_findings.find_recorded_base_faults(adapter, base_config, spec)
        findings += base_findings.find_token_faults(adapter, base_config)
        if config is not None:
            try:
                model = _build_meta_base(base_config, config, adapter, spec)
                placement = _place_keys(adapter, model, config, findings)
                findings += base_findings.find_placement_faults(placement, adapter)
                findings += base_findings.find_placed_shape_faults(placement, adapter, config)
                findings += base_findings.find_tied_faults(model, placement, adapter)
            except SlimtuneError as error:
                not_proven.append(f"keys and shapes: {error.message}")
        try:
            findings += base_findings.find_tokenizer_faults(adapter, spec)
        except SlimtuneError as error:
            not_proven.append(f"chat template and special tokens: {error.message.splitlines()[0]}")
        not_proven.append(BASE_WEIGHTS_UNPROVEN)
    if config is not None and config.name != "lora":
        not_proven.append(f"whether the training changed it: that is only known of a LoRA, and this is {config.name}")
    findings.sort(key=lambda finding: finding.severity)
    result = AdapterFileCheck(
        adapter=str(given if path != given else adapter.folder),
        base=spec,
        method=config.name if config is not None else str(adapter.config.get("peft_type") or "unknown").lower(),
        tensors=len(adapter.tensors),
        placed=None if placement is None else placement.count_placed_by_own_name(),
        bytes=adapter.bytes,
        right=not any(finding.severity == "fault" for finding in findings),
        findings=findings,
        not_proven=not_proven,
        layers=tensor_findings.sum_update_norms_by_layer(updates, partial(_compute_scale, config)),
        seconds=time.monotonic() - started,
    )
    return FileCheck(result, adapter, config, model, placement, updates)


def _read_config(adapter: ForeignAdapter, findings: list[AdapterFinding], not_proven: list[str]) -> PeftConfig | None:
    """Return the config as slimtune reads it, if it can, and add what is wrong with it."""
    code, what, kind = "config-unreadable", "there is no adapter_config.json", adapter.config.get("peft_type")
    try:
        if adapter.config:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = PeftConfig.from_pretrained(adapter.folder)
            findings += base_findings.find_config_faults(adapter, config)
            return config
    except TypeError as error:
        what = str(error)
    except SlimtuneError as error:
        what = error.message
        numbers = {name: adapter.config.get(name, 1) for name in ("r", "lora_alpha")}
        wrong = [f"{n} is {v!r}" for n, v in numbers.items() if not isinstance(v, int | float) or v <= 0]
        if kind and group_lora_pairs(adapter.tensors) and str(kind).upper() not in ("LORA", "ADALORA", "XLORA"):
            code, what = "another-method", f"peft_type is {kind}, and the tensors are lora_A and lora_B"
        elif kind and not wrong:
            not_proven.append(f"keys and shapes: slimtune cannot read this config ({what})")
            return None
        elif kind:
            what = " and ".join(wrong)
    findings.append(make_finding(code, what))
    return None


def _find_base_name(path: Path, adapter: ForeignAdapter) -> str | None:
    """Return the base that a run or an adapter names."""
    if (run := RunDir(path)).recipe_file.is_file() and adapter.folder != path:
        return str(run.load_recipe().model.name)
    name = adapter.config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _build_meta_base(base_config: PreTrainedConfig, config: PeftConfig, adapter: ForeignAdapter, spec: str) -> Any:
    """Return the base that a task's adapter is for, on the meta device."""
    base_config = copy.deepcopy(base_config)
    trusted = type(base_config).__module__.startswith("transformers_modules")
    task = config.task_type or "CAUSAL_LM"
    if task == "SEQ_CLS":
        heads = [t.shape[0] for k, t in adapter.tensors.items() if k.endswith(("score.weight", "classifier.weight"))]
        if heads and 0 < heads[0] < 1 << 20:
            base_config.num_labels = heads[0]
    elif task not in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
        raise AdapterError(f"the adapter is for the task {task}, whose models are not built here")
    auto: Any = AutoModel if task == "FEATURE_EXTRACTION" else get_auto_class(base_config, task)
    with torch.device("meta"), silence_and_translate_load_errors(spec):
        model = auto.from_config(base_config, dtype=torch.float32, trust_remote_code=trusted)
    config.change_base(model)  # layers that run several times have an adapter each
    return model


def _place_keys(
    adapter: ForeignAdapter, model: Any, config: PeftConfig, findings: list[AdapterFinding]
) -> KeyPlacement:
    """Place an adapter's keys; if its targets match nothing, the last parts of the file's module names are tried."""
    try:
        return place_keys(adapter.tensors, model, config)
    except TargetError as error:
        findings.append(make_finding("targets-unmatched", error.message))
    leaves = {module.rpartition(".")[2] for module in group_lora_pairs(adapter.tensors)}
    other: Any = copy.deepcopy(config)
    vars(other).update({name: None for name in _PATTERN_FIELDS if hasattr(other, name)}, target_modules=leaves)
    try:
        return place_keys(adapter.tensors, model, other)
    except TargetError:
        return place_no_keys(adapter.tensors, model)


def _compute_scale(config: PeftConfig | None, module: str) -> float:
    """Return the scale of a module's update by the config; 1 without a LoRA's config."""
    if config is None or config.name != "lora":
        return 1.0
    settings: Any = config
    rank = settings.get_rank(name := module.removeprefix(PREFIX))
    return settings.get_alpha(name) / (rank**0.5 if settings.use_rslora else rank)


def load_as_trained(checked: FileCheck, folder: Path, log: Callable[[str], None] = lambda _: None) -> TrainedModel:
    """Load an adapter on its base as it was trained: keys that have other names in the file are put in their place.

    `folder` gets the adapter's files where they have to be written. AdapterError means that it cannot be computed with.
    """
    adapter, placement, base = checked.adapter, checked.placement, str(checked.result.base)
    if checked.model is not None:
        log(f"loading the base once: about {format_bytes(_estimate_bytes(checked.model, base))} of memory")
    own = adapter.config.get("base_model_name_or_path") == base
    if own and (placement is None or not placement.renamed):
        run = RunDir(adapter.folder.parent)  # it knows the dtype of the training, and the held-out rows
        is_of_run = run.recipe_file.is_file() and run.adapter == adapter.folder
        return load_run_for_export(run.path if is_of_run else adapter.folder)
    names = placement.names if placement is not None else {}
    tensors = {names.get(key, key): adapter.load_tensor(key) for key in adapter.tensors}
    save_file(tensors, folder / WEIGHTS_FILE, adapter.metadata or None)
    write_adapter_config(folder, {**adapter.config, "base_model_name_or_path": base})
    template = adapter.folder / "chat_template.jinja"
    if template.is_file():
        (folder / template.name).write_bytes(template.read_bytes())
    return load_run_for_export(folder)


def _estimate_bytes(model: Any, base: str) -> int:
    """Return the memory of loading a base and computing with it, roughly; `model` is the base on the meta device.

    A small base is loaded as it is stored, and widened to float32 one weight after the other.
    """
    sizes = [parameter.numel() for parameter in model.parameters()]
    stored = getattr(load_base_config(base).config.dtype, "itemsize", 4)
    weights = sum(sizes) * 4 + max(sizes) * stored if sum(sizes) < SMALL_MODEL else sum(sizes) * stored
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 0
    return RUNTIME_BYTES + vocabulary * LOGIT_BYTES + weights
