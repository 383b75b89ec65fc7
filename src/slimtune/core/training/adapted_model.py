"""A base with the recipe's method attached."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from ...errors import UsageError
from ..adapters.peft_config import PeftConfig
from ..adapters.peft_model import PeftModel, get_peft_model
from ..adapters.targets import ALL_LINEAR
from ..config import Recipe
from ..data.collator import Example
from ..foundation import distributed
from ..foundation.dtype_names import dtype_name
from ..models.dtype import pick_dtype, pick_training_device
from ..models.lm_head import get_classifier_head
from ..models.loader import LoadedBase
from .base_model import LoadBase, require_finite_weights
from .datasets import RunDatasets
from .fingerprint_checks import FINGERPRINT_CHECKS
from .memory_savings import apply_memory_savings, shard_base_with_fsdp
from .run_dir import find_adapter_folder


def load_base_and_adapted_model(
    recipe: Recipe, data: RunDatasets, init_adapter: Path | None, load_base: LoadBase, force: bool
) -> tuple[LoadedBase, PeftModel]:
    """Load the recipe's base on the device of this process, and attach its adapter; return both.

    A base that is sharded (train.fsdp) is loaded to CPU memory, by one process of a machine at a time.

    Args:
        recipe: the base, the method and its settings.
        data: the run's rows; their classes get a head.
        init_adapter: a run or an adapter folder to start from.
        load_base: loads the base.
        force: take a base whose weights contain NaN or Inf.
    """
    device = pick_training_device(recipe.model.device)
    dtype = pick_dtype(recipe.model.dtype, device)
    shard = recipe.train.fsdp and distributed.world_size() > 1
    mesh = init_device_mesh(device.type, (distributed.world_size(),)) if shard else None
    place: dict[str, Any] = {"device": "cpu" if shard else str(device), "dtype": dtype_name(dtype)}
    settings = replace(recipe.model, **place)

    def load() -> tuple[LoadedBase, PeftModel]:
        base = load_base(settings, recipe.data.chat_template, data.classes)
        if not force:
            require_finite_weights(base)
        model = _attach_adapter(base, recipe, init_adapter, data.train)
        if mesh is not None:
            shard_base_with_fsdp(model, mesh, device)
            base.device = device
        return base, model

    return distributed.run_on_all_ranks(load, in_turns=shard)


def _attach_adapter(
    base: LoadedBase, recipe: Recipe, init_adapter: Path | None = None, rows: Sequence[Example] = ()
) -> PeftModel:
    """Attach the recipe's method to the base, in place, or load an adapter to continue training.

    Args:
        base: the loaded base.
        recipe: the method and its settings; `train.seed` seeds the adapter's initial weights.
        init_adapter: a run or an adapter folder to start from.
        rows: training rows, for an initialization from data.
    """
    torch.manual_seed(recipe.train.seed)
    head = get_classifier_head(base.model)
    if head is not None and base.new_weights:  # as transformers does, here with the run's seed
        torch.nn.init.normal_(head.weight, std=getattr(base.model.config.get_text_config(), "initializer_range", 0.02))
    if init_adapter is not None:
        folder = find_adapter_folder(init_adapter)
        FINGERPRINT_CHECKS.load("files").mark_as_compared(base.model, folder)  # `fingerprint_run` compares it
        model = PeftModel.from_pretrained(base.model, folder, is_trainable=True)
    else:
        config: Any = recipe.method_config()
        initialize = config.defer_initialization()
        if getattr(config, "tokenizer_name_or_path", None) == recipe.model.name:
            config.tokenizer_name_or_path = base.tokenizer.name_or_path  # an alias cannot be loaded by PEFT
        exclude_non_text_modules_in_place(base.model, config)
        model = get_peft_model(base.model, config)
        if initialize is not None:
            initialize(model, base, rows)
    model.peft_config["default"].base_model_name_or_path = base.source.spec  # the Hub id of an alias
    t = recipe.train
    if t.offload_activations and base.device.type == "cpu":
        raise UsageError(
            "train.offload_activations moves activations to CPU memory, where they are already",
            "a GPU to train on",
            "--set train.offload_activations=false",
        )
    apply_memory_savings(model, t.gradient_checkpointing, t.offload_activations, t.mlp_tile_size)
    return model


def exclude_non_text_modules_in_place(model: Any, method_config: PeftConfig) -> None:
    """Let "all-linear" leave out the parts of a base that see images or hear: a run's rows are text.

    The model's language part is transformers' `get_decoder()`. Writes `exclude_modules` of the config.
    """
    everything = str(getattr(method_config, "target_modules", "")).lower() == ALL_LINEAR
    language = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not everything or getattr(method_config, "exclude_modules", None) or language in (None, model):
        return
    names = {id(m): n for n, m in model.named_modules()}
    parts = names.get(id(language), "").split(".")
    path = [".".join(parts[:i]) for i in range(len(parts) + 1)]  # the modules that the language part is in, and itself
    beside = [n for n, m in model.named_modules() if n not in path and n.rpartition(".")[0] in path[:-1]]
    if other := [n for n in beside if model.get_submodule(n) is not model.get_output_embeddings()]:
        method_config.exclude_modules = "|".join(rf"{re.escape(n)}(\..*)?" for n in other)  # type: ignore[attr-defined]
