"""Several runs on one base: each has its own adapter and tokenizer, all share the model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.adapters.peft_config import PeftConfig
from ..core.models.dtype import pick_dtype
from ..core.models.loader import load_tokenizer
from ..core.training.run_dir import RunDir, find_adapter_folder
from ..core.training.trained_model import TrainedModel, load_run
from ..errors import UsageError
from ..extras.training_fingerprint import require_base_unchanged_since_training
from .run_requirements import resolve_trained_base


def load_trained_models_sharing_base(paths: Sequence[str | Path], **load_options: Any) -> list[TrainedModel]:
    """Load the adapters of several runs, or of bare adapter folders, on one base.

    All results share the first one's model, in which each has its own `adapter_name`; each has its own tokenizer.

    Args:
        paths: run folders or adapter folders, one or more.
        load_options: dtype, device and so on, as for `load_run`; None: as the first run says.

    Raises:
        UsageError: two of them need different bases, or the same one in another dtype or quantization.
    """
    first = load_run(paths[0], **load_options)
    others = [_add_adapter(first, Path(path), f"default_{i}") for i, path in enumerate(paths[1:], 1)]
    return [first, *others]


def _add_adapter(first: TrainedModel, path: Path, name: str) -> TrainedModel:
    folder = find_adapter_folder(path)
    config = PeftConfig.from_pretrained(folder)
    recipe = RunDir.open(path).load_recipe() if folder != path else None
    base = first.base
    differences: dict[str, tuple[Any, Any]] = {"base": (resolve_trained_base(path).path, base.source.path)}
    if recipe is not None and first.recipe is not None:
        one, other = recipe.model, first.recipe.model
        differences |= {key: (getattr(one, key), getattr(other, key)) for key in ("revision", "quantization")}
        differences["dtype"] = (pick_dtype(one.dtype, base.device), base.dtype)
    for key, (own, shared) in differences.items():
        if own != shared:
            folder = first.adapter_folder
            raise UsageError(
                f"{path} and {folder} need different models: the {key} of one is {own}, of the other {shared}",
                "adapters of one base, loaded in one way",
                "serve the others by a process of their own",
            )
    template: Any = None if recipe is None else recipe.data.chat_template
    if recipe is None and (file := folder / "chat_template.jinja").is_file():
        template = file
    revision = None if recipe is None else recipe.model.revision
    tokenizer = load_tokenizer(base.source.spec, revision=revision, chat_template=template)
    own_base = dataclasses.replace(base, tokenizer=tokenizer)
    require_base_unchanged_since_training(path, own_base)
    first.model.load_adapter(folder, name, config=config)
    return TrainedModel(first.model, own_base, folder, recipe, adapter_name=name)
