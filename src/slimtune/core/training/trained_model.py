"""A trained adapter on its base, loaded from a run folder or from an adapter folder."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import AdapterError
from ..adapters.adapter_files import read_adapter_tensors_and_metadata
from ..adapters.peft_config import PeftConfig
from ..adapters.peft_model import PeftModel
from ..config import Recipe
from ..data.class_labels import ClassLabels
from ..foundation.files import read_json_object
from ..foundation.remote_code import allowing_remote_code
from ..models.loader import LoadedBase, load_base
from ..models.quantization import dequantize_model
from .base_model import load_base_model
from .fingerprint_checks import FINGERPRINT_CHECKS
from .run_dir import CONFIG_FILE, RunDir, find_adapter_folder


@dataclass
class TrainedModel:
    """A trained adapter on its base, in evaluation mode; the recipe is None if only an adapter folder was given."""

    model: PeftModel
    base: LoadedBase
    adapter_folder: Path
    recipe: Recipe | None
    classes: ClassLabels | None = None  # of a sequence classifier
    adapter_name: str = "default"


def load_run(
    path: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    quantization: str | None = None,
    dequantize: bool = False,
    trust_remote_code: bool = False,
    accept_changed: Collection[str] = (),
) -> TrainedModel:
    """Load a run's adapter, or a bare adapter folder, on its base.

    Args:
        path: a run folder or an adapter folder.
        dtype: dtype of the base's weights; None: that of the run (for an adapter folder "auto").
        device: the device; None: that of the run (for an adapter folder "auto").
        quantization: quantization of the base, "nf4" or "int8"; "none": not quantized; None: that of the run.
        dequantize: dequantize the base.
        trust_remote_code: run the base's own Python code; what the run's recipe says does not count.
        accept_changed: parts of what the adapter was trained on that may have changed: "weights", "config",
            "tokenizer", "template". A change of another part is an AdapterError.
    """
    with allowing_remote_code(trust_remote_code):
        return _load_run(
            Path(path), {"dtype": dtype, "device": device, "quantization": quantization}, dequantize, accept_changed
        )


def _read_class_labels(folder: Path) -> ClassLabels:
    """Return the classes of a classifier's adapter, from the config beside it; without one they are numbered."""
    if (folder / CONFIG_FILE).is_file():
        return ClassLabels.from_config(read_json_object(folder / CONFIG_FILE))
    tensors, _ = read_adapter_tensors_and_metadata(folder)
    heads = [t for name, t in tensors.items() if name.endswith("score.weight")]
    if not heads:
        raise AdapterError(f"{folder} has no classification head", "an adapter that was trained with its head, `score`")
    outputs = heads[0].shape[0]
    return ClassLabels(tuple(f"LABEL_{i}" for i in range(outputs)) if outputs > 1 else ())


def _load_run(
    path: Path, changes: dict[str, str | None], dequantize: bool, accept_changed: Collection[str]
) -> TrainedModel:
    folder = find_adapter_folder(path)
    config = PeftConfig.from_pretrained(folder)
    given: dict[str, Any] = {k: None if v == "none" else v for k, v in changes.items() if v}
    classes = _read_class_labels(folder) if config.task_type == "SEQ_CLS" else None
    recipe = None
    if folder != path:
        recipe = RunDir.open(path).load_recipe()
        base = load_base_model(dataclasses.replace(recipe.model, **given), recipe.data.chat_template, classes)
    elif config.base_model_name_or_path:
        template = folder / "chat_template.jinja"
        base = load_base(
            config.base_model_name_or_path,
            chat_template=template if template.is_file() else None,
            task="CAUSAL_LM" if classes is None else "SEQ_CLS",
            head=None if classes is None else classes.config,
            **given,
        )
    else:
        raise AdapterError(
            f"{folder} does not name its base", "base_model_name_or_path in adapter_config.json", code="wrong-base"
        )
    FINGERPRINT_CHECKS.load("files").require_base_unchanged_since_training(path, base, accept_changed)
    if dequantize and base.quantization is not None:
        base.model = dequantize_model(base.model, base.dtype)
    model = PeftModel.from_pretrained(base.model, folder, config=config)
    return TrainedModel(model, base, folder, recipe, classes)
