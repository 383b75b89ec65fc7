"""From a recipe to its base, adapted model, rows and collator; from a run folder to its trained model."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .adapters.config import PeftConfig
from .adapters.model import PeftModel, get_peft_model
from .config import Recipe
from .data.collator import Collator, Example
from .data.dataset import RowFile, open_rows
from .data.parallel import cpu_count
from .data.tokenize import RowReport, tokenize_dataset
from .data.tokenized_dataset import TokenizedDataset
from .data.validation.report import DatasetReport
from .errors import AdapterError, UsageError
from .methods.lora.loftq import replace_lora_weights_loftq
from .models.loader import Base, load_base, load_tokenizer, weights_folder
from .models.quantization import dequantize_model, require_bitsandbytes
from .run_dir import ADAPTER_FILE, RunDir
from .train_step.loss import auto_micro_batch_tokens, check_packing_supported, make_collator
from .train_step.memory_savings import apply_memory_savings
from .utils import distributed
from .utils.calibration import ROWS, collect_layer_inputs
from .utils.device import disable_malloc_trim
from .utils.linear_layers import is_quantized


@dataclass
class Datasets:
    """The tokenized rows of a run, and the reports on them."""

    train: TokenizedDataset
    validation: TokenizedDataset
    train_report: RowReport
    validation_report: RowReport | None
    data_reports: dict[str, Any] = field(default_factory=dict)
    """The reports of `slimtune data` on the training and the validation file."""

    def lengths(self) -> np.ndarray:
        """Return the tokens of each row, training rows first, int64."""
        return np.concatenate([self.train.lengths, self.validation.lengths])


@dataclass
class TrainedModel:
    """A trained adapter on its base.

    Args:
        model: the adapted model, in evaluation mode.
        base: its base, with tokenizer, dtype and device.
        adapter: the adapter's folder.
        recipe: the run's recipe; None if only an adapter folder was given.
    """

    model: PeftModel
    base: Base
    adapter: Path
    recipe: Recipe | None


def require_packages(recipe: Recipe) -> None:
    """Raise ModelError if a package that the recipe needs is missing, before anything is loaded."""
    if recipe.model.quantization is not None:
        require_bitsandbytes(f"model.quantization {recipe.model.quantization}")
    if recipe.train.optimizer == "adamw-8bit":
        require_bitsandbytes("train.optimizer adamw-8bit")


def load_base_from_recipe(recipe: Recipe) -> Base:
    """Load the recipe's base and tokenizer."""
    m = recipe.model
    base = load_base(
        m.name,
        dtype=m.dtype,
        device=m.device,
        trust_remote_code=m.trust_remote_code,
        revision=m.revision,
        chat_template=recipe.data.chat_template,
        quantization=m.quantization,
    )
    if base.device.type == "cpu":
        disable_malloc_trim()
    return base


def load_tokenizer_from_recipe(recipe: Recipe) -> Any:
    """Load the tokenizer of the recipe's base, no weights."""
    m = recipe.model
    return load_tokenizer(
        m.name, trust_remote_code=m.trust_remote_code, revision=m.revision, chat_template=recipe.data.chat_template
    )


def with_adapter_config(recipe: Recipe, adapter: Path) -> Recipe:
    """Return the recipe with the method settings of the adapter that training starts from.

    Raises:
        UsageError: the adapter is of another method than the recipe's.
    """
    folder = find_adapter_folder(adapter)
    config = PeftConfig.from_pretrained(folder)
    if config.name != recipe.method.name:
        raise UsageError(
            f"{folder} is a {config.name} adapter, the recipe's method is {recipe.method.name}",
            f"an adapter of the method {recipe.method.name}",
            f"--method {config.name}",
        )
    shared = {f.name for f in dataclasses.fields(PeftConfig)} | {"peft_type"}
    settings = {k: v for k, v in config.to_dict().items() if k not in shared and v is not None}
    return recipe.model_copy(update={"method": type(recipe.method)(name=config.name, **settings)})


def attach_adapter(
    base: Base, recipe: Recipe, init_adapter: Path | None = None, rows: Sequence[Example] = ()
) -> PeftModel:
    """Attach the recipe's method to the base, in place, or load an adapter to continue training.

    Args:
        base: the loaded base.
        recipe: the method and its settings; `train.seed` seeds the adapter's initial weights.
        init_adapter: a run or an adapter folder to start from.
        rows: training rows; "loftq" initializes from the quantization error on them.

    Raises:
        UsageError: targets match nothing; the adapter to start from is of another method; "loftq" on a base whose
            weights before quantization are not available.
        AdapterError: the adapter to start from does not fit this base.
    """
    torch.manual_seed(recipe.train.seed)
    if init_adapter is not None:
        folder = find_adapter_folder(init_adapter)
        model = PeftModel.from_pretrained(base.model, folder, is_trainable=True)
    else:
        config: Any = recipe.method_config()
        loftq = getattr(config, "init_lora_weights", None) == "loftq"
        if loftq:
            config.init_lora_weights = True  # as in PEFT: an adapter that is read back is not initialized again
        if getattr(config, "tokenizer_name_or_path", None) == recipe.model.name:
            config.tokenizer_name_or_path = base.tokenizer.name_or_path  # an alias cannot be loaded by PEFT
        model = get_peft_model(base.model, config)
        if loftq:
            layers = {n: m for n, m in model.adapted_layers().items() if is_quantized(m)}
            inputs = collect_layer_inputs(base.model.eval(), layers, [e["input_ids"] for e in rows[:ROWS]])
            replace_lora_weights_loftq(model, weights_folder(base.source, recipe.model.revision), inputs=inputs)
    model.peft_config["default"].base_model_name_or_path = recipe.model.name
    t = recipe.train
    if t.offload_activations and base.device.type == "cpu":
        raise UsageError(
            "train.offload_activations moves activations to CPU memory, where they are already",
            "a GPU to train on",
            "--set train.offload_activations=false",
        )
    apply_memory_savings(model, t.gradient_checkpointing, t.offload_activations, t.mlp_tile_size)
    return model


def build_meta_model(
    config: PreTrainedConfig,
    method: PeftConfig | None,
    dtype: torch.dtype,
    *,
    checkpointing: bool = False,
    offload: bool = False,
    tile: int | None = None,
    first: Callable[[Any], None] | None = None,
) -> Any:
    """Return the model that training would have, on the meta device: shapes and dtypes without weights.

    Args:
        config: the base's config.
        method: the method's config; None: no adapter, and every weight trains.
        dtype: dtype of the base's weights.
        checkpointing: activation checkpointing.
        offload: with checkpointing, keep the layers' inputs in CPU memory.
        tile: tokens that norms and feed-forwards run at a time; None: all.
        first: changes the base before the method is attached, such as quantizing it.

    Raises:
        UsageError: targets match nothing.
    """
    config, method = copy.deepcopy((config, method))  # building a model writes into both
    if getattr(method, "init_lora_weights", None) == "loftq":
        method.init_lora_weights = True  # type: ignore[union-attr]  # the same tensors without data
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if first is not None:
            first(model)
        if method is not None:
            model = get_peft_model(model, method)
    apply_memory_savings(model, checkpointing, offload, tile)
    return model


def load_datasets(recipe: Recipe, tokenizer: Any) -> Datasets:
    """Read, tokenize and validate the training and validation rows of a recipe.

    Without a validation file, validation rows are split from the training rows.
    """
    data, model = recipe.data, recipe.model.name
    train, train_report, checked = _tokenize_and_validate(recipe, tokenizer, data.train)
    if data.validation is not None:
        validation, validation_report, other = _tokenize_and_validate(recipe, tokenizer, data.validation, checked)
        data_reports: dict[str, Any] = {
            "train": checked.to_dict(file=data.train, model=model, validation=(str(data.validation), other)),
            "validation": other.to_dict(file=data.validation, model=model),
        }
        return Datasets(train, validation, train_report, validation_report, data_reports)
    data_reports = {"train": checked.to_dict(file=data.train, model=model), "validation": None}
    count = round(len(train) * data.validation_fraction)
    if count == len(train):
        count = 0
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.train.seed))
    held_out = np.zeros(len(train), bool)
    held_out[order[:count].numpy()] = True
    validation = train.select(np.flatnonzero(held_out))
    return Datasets(train.select(np.flatnonzero(~held_out)), validation, train_report, None, data_reports)


def _tokenize_and_validate(
    recipe: Recipe, tokenizer: Any, path: Path, like: DatasetReport | None = None
) -> tuple[TokenizedDataset, RowReport, DatasetReport]:
    data, train, rows = recipe.data, recipe.train, open_rows_from_recipe(recipe, path)
    report = DatasetReport(
        tokenizer,
        rows.format,
        max_seq_len=data.max_seq_len,
        on_overlong=data.on_overlong,
        rows_per_step=train.batch_size * train.gradient_accumulation_steps,
        like=like,
    )
    return *_tokenize(recipe, tokenizer, rows, report), report


def load_eval_dataset(recipe: Recipe, tokenizer: Any, path: Path) -> tuple[TokenizedDataset, RowReport]:
    """Read and tokenize rows for evaluation, with the recipe's length policy."""
    return _tokenize(recipe, tokenizer, open_rows_from_recipe(recipe, path))


def _tokenize(
    recipe: Recipe, tokenizer: Any, rows: RowFile, report: DatasetReport | None = None
) -> tuple[TokenizedDataset, RowReport]:
    return tokenize_dataset(
        rows,
        tokenizer,
        max_seq_len=recipe.data.max_seq_len,
        on_overlong=recipe.data.on_overlong,
        train_on=recipe.data.train_on,
        path=rows.path,
        processes=max(1, cpu_count() // distributed.local_world_size()),
        reporter=report,
    )


def open_rows_from_recipe(recipe: Recipe | None, path: Path) -> RowFile:
    """Open a data set with the format and the columns of a recipe.

    Raises:
        UsageError, DataError: as `open_rows`.
    """
    if recipe is None:
        return open_rows(path)
    return open_rows(path, format=recipe.data.format, columns=recipe.data.columns)


def build_collator(recipe: Recipe, model: Any, tokenizer: Any, longest: int) -> Collator:
    """Return the collator for the recipe's rows and this model, with the limit of tokens in a micro-batch.

    Args:
        recipe: the recipe.
        model: the adapted model.
        tokenizer: the base's tokenizer.
        longest: tokens of the longest row.

    Raises:
        ModelError: the model does not support packing, or its loss is not what its config says.
    """
    t = recipe.train
    collator = make_collator(
        model, tokenizer.pad_token_id, packing=t.packing, share_prefix=t.share_prefix, max_rows=t.batch_size
    )
    check_packing_supported(model, collator)
    collator.max_tokens = (
        auto_micro_batch_tokens(model, collator, longest)
        if t.max_tokens_per_micro_batch == "auto"
        else t.max_tokens_per_micro_batch
    )
    return collator


def find_adapter_folder(path: str | Path) -> Path:
    """Return the adapter folder of a run folder; an adapter folder is returned as it is."""
    path = Path(path)
    if (path / ADAPTER_FILE).is_file() or (path / "adapter_config.json").is_file():
        return path
    return RunDir.open(path).adapter


def load_run(
    path: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    quantization: str | None = None,
    unpack: bool = False,
) -> TrainedModel:
    """Load a run's adapter, or a bare adapter folder, on its base.

    Args:
        path: a run folder or an adapter folder.
        dtype: dtype of the base's weights; None: that of the run (for an adapter folder "auto").
        device: the device; None: that of the run (for an adapter folder "auto").
        quantization: quantization of the base, "nf4" or "int8"; "none": not quantized; None: that of the run.
        unpack: dequantize the base.

    Raises:
        UsageError: the folder is neither a run nor an adapter.
        AdapterError: the adapter does not name its base, or does not fit it.
    """
    folder = find_adapter_folder(path)
    recipe = RunDir.open(path).load_recipe() if folder != Path(path) else None
    config = PeftConfig.from_pretrained(folder)
    if recipe is not None:
        given = {"dtype": dtype, "device": device, "quantization": quantization}
        m = recipe.model.model_copy(update={k: None if v == "none" else v for k, v in given.items() if v})
        base = load_base_from_recipe(recipe.model_copy(update={"model": m}))
    elif config.base_model_name_or_path:
        template = folder / "chat_template.jinja"
        base = load_base(
            config.base_model_name_or_path,
            dtype=dtype or "auto",
            device=device or "auto",
            chat_template=template if template.is_file() else None,
            quantization=None if quantization == "none" else quantization,
        )
    else:
        raise AdapterError(f"{folder} does not name its base", "base_model_name_or_path in adapter_config.json")
    if unpack and base.quantization is not None:
        base.model = dequantize_model(base.model, base.dtype)
    model = PeftModel.from_pretrained(base.model, folder, config=config)
    return TrainedModel(model, base, folder, recipe)
