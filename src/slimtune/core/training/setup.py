"""From a recipe to its base, adapted model, rows and collator; from a run folder to its trained model."""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ...errors import AdapterError, DataError, ModelError, RunError, UsageError, format_names
from ...extras.row_formats import Row
from ...methods.lora.loftq import replace_lora_weights_loftq
from ..adapters.layer_inputs import ROWS, collect_layer_inputs
from ..adapters.peft_config import PeftConfig
from ..adapters.peft_model import PeftModel, get_peft_model
from ..adapters.state_dict import read_adapter_file
from ..adapters.targets import ALL_LINEAR
from ..attention.attention_functions import packing_unsupported_reason
from ..config import Recipe
from ..config.objective_registry import objective_class, objective_names
from ..data.chat_template import adds_bos
from ..data.class_labels import (
    Classes,
    check_class_names,
    count_classes,
    encode_classes,
    encode_goodness,
    find_classes,
    require_known_labels,
)
from ..data.collator import Collator, Example
from ..data.document_windows import DocumentWindows
from ..data.example_lengths import ExampleLength
from ..data.row_files import RowFile, open_rows
from ..data.row_observer import DATA_REPORTS, DataReport, RowObserver
from ..data.tokenize import TokenizationStats, tokenize_dataset
from ..data.tokenized_dataset import AnswerSubset, TokenizedDataset, split_rows
from ..foundation import distributed
from ..foundation.cpu import cpu_count
from ..foundation.device import disable_malloc_trim
from ..foundation.files import read_json
from ..foundation.remote_code import allow_remote_code
from ..kernels.linear_layers import is_quantized
from ..models.base_config import get_hidden_size, load_base_config
from ..models.dtype import pick_dtype
from ..models.load_errors import translate_load_errors
from ..models.loader import Base, download_weights, get_auto_class, load_base, load_tokenizer
from ..models.model_source import ModelSource, resolve_model
from ..models.quantization import dequantize_model
from .loss import auto_micro_batch_tokens, check_lm_head, get_row_head, make_collator
from .memory_savings import apply_memory_savings
from .objective import Objective
from .run_dir import CONFIG_FILE, RunDir, find_adapter_folder


@dataclass
class Datasets:
    """The tokenized rows of a run, how many were kept, and the reports of `slimtune data`, by "train" and "validation".

    Without a validation file, its rows are split from the training rows and have no report; so are the test rows.
    Documents are cut into windows here, and are split whole.
    """

    train: TokenizedDataset
    validation: TokenizedDataset
    test: TokenizedDataset
    train_report: TokenizationStats
    validation_report: TokenizationStats | None
    data_reports: dict[str, DataReport | None]
    classes: Classes | None = None  # of a sequence classifier

    def lengths(self) -> list[ExampleLength]:
        """Return the length of each example, training examples first."""
        return [*self.train.example_lengths, *self.validation.example_lengths]


@dataclass
class TrainedModel:
    """A trained adapter on its base, in evaluation mode; the recipe is None if only an adapter folder was given."""

    model: PeftModel
    base: Base
    adapter: Path
    recipe: Recipe | None
    classes: Classes | None = None  # of a sequence classifier
    adapter_name: str = "default"


# --- rows -------------------------------------------------------------------------------------------------------------


def open_rows_from_recipe(recipe: Recipe | None, path: Path) -> RowFile:
    """Open a data set with the format and the columns of a recipe."""
    if recipe is None:
        return open_rows(path)
    data, objective = recipe.data, recipe.objective()
    formats = (data.format,) if data.format in objective.named_formats else objective.formats
    format = data.format or (formats[0] if len(formats) == 1 else None)
    rows = open_rows(path, format=format, columns=data.columns, ignore_columns=data.ignore_columns)
    if rows.format not in (*formats, "unknown"):
        tasks = [name for name in objective_names() if rows.format in objective_class(name).formats]
        by_name = rows.format in objective.named_formats
        raise DataError(
            f"{path} has rows of the format {rows.format}, and the task {recipe.task.name} does not learn from them",
            f"rows of {format_names(formats)}",
            " or ".join([f"--task {name}" for name in tasks] + ["--format preference: the chosen answers"] * by_name),
        )
    return rows


def load_datasets(recipe: Recipe, tokenizer: Any) -> Datasets:
    """Read, tokenize and validate the training and validation rows of a recipe."""
    return add_classes(recipe, _load_datasets(recipe, tokenizer))


def _load_datasets(recipe: Recipe, tokenizer: Any) -> Datasets:
    data, settings, model = recipe.data, recipe.train, recipe.model.name
    reports: dict[str, DataReport | None]
    validation_report: TokenizationStats | None

    def load(
        path: Path, like: RowObserver | None = None
    ) -> tuple[TokenizedDataset, TokenizationStats, RowFile, RowObserver]:
        rows = open_rows_from_recipe(recipe, path)
        observer = DATA_REPORTS.load("rows")(
            tokenizer,
            rows,
            max_seq_len=data.max_seq_len,
            on_overlong=data.on_overlong,
            rows_per_step=settings.rows_per_step,
            like=like,
        )
        return *_tokenize(recipe, tokenizer, rows, observer), rows, observer

    train, train_report, source, checked = load(data.train)
    train, test = split_test_rows(train, checked.kept_hashes(), data.test_fraction)
    if data.validation is not None:
        validation, validation_report, validation_source, other = load(data.validation, checked)
        reports = {
            "train": checked.finish(file=data.train, model=model, validation=(str(data.validation), other)),
            "validation": other.finish(file=data.validation, model=model),
        }
    else:
        count = round((len(train) + len(test)) * data.validation_fraction)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed))
        held_out = np.zeros(len(train), bool)
        held_out[order[: count if count < len(train) else 0].numpy()] = True
        train, validation = (train.select(np.flatnonzero(part)) for part in (~held_out, held_out))
        validation_report, validation_source = None, source
        reports = {"train": checked.finish(file=data.train, model=model), "validation": None}
    recipe.method_config().check_rows(train)
    cut = functools.partial(cut_documents, recipe, tokenizer)
    train, validation = cut(source, train, settings.seed), cut(validation_source, validation)
    return Datasets(train, validation, cut(source, test), train_report, validation_report, reports)


def cut_documents(
    recipe: Recipe, tokenizer: Any, rows: RowFile, dataset: TokenizedDataset, seed: int | None = None
) -> TokenizedDataset:
    """Return the windows of documents, of rows of another format the rows; with a seed, epochs have other cuts."""
    if rows.format != "document":
        return dataset
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    return DocumentWindows(dataset, recipe.data.max_seq_len, bos, seed)


def add_classes(recipe: Recipe, data: Datasets) -> Datasets:
    """Return the rows as the objective takes them; for a classifier with the ids of their classes.

    Raises:
        DataError: there is one class only, or a class has no training row.
    """
    objective = recipe.objective()
    if objective.task_type != "SEQ_CLS":
        parts = [_prepare_rows(objective, rows) for rows in (data.train, data.validation, data.test)]
        return dataclasses.replace(data, train=parts[0], validation=parts[1], test=parts[2])
    if "classification" not in objective.formats:
        return dataclasses.replace(data, classes=Classes())
    classes = find_classes(data.train)
    check_class_names([*(objective.class_weights if isinstance(objective.class_weights, dict) else ())], classes,
                      "task.class_weights")  # fmt: skip
    if (test := recipe.data.test) is not None and test.exists():  # read later, when a class that is missing is too late
        rows = open_rows_from_recipe(recipe, test)
        require_known_labels(((r.line, r.labels or ()) for r in rows if isinstance(r, Row)), classes, test)
    weights = objective.compute_class_weights(count_classes(data.train), len(data.train), classes.multi_label)
    files = {"train": None, "validation": recipe.data.validation, "test": recipe.data.test}
    encoded: dict[str, Any] = {
        name: encode_classes(getattr(data, name), classes, weights, file or recipe.data.train)
        for name, file in files.items()
    }
    return dataclasses.replace(data, classes=classes, **encoded)


def _prepare_rows(objective: Objective, rows: TokenizedDataset) -> TokenizedDataset:
    """Return rows with their labels for KTO, and ranked lists as pairs if the objective wants that."""
    if "unpaired-preference" in objective.formats:
        return encode_goodness(rows)
    return AnswerSubset(rows, (0, -1)) if getattr(objective, "pairs", None) == "best-worst" else rows


def split_test_rows(
    rows: TokenizedDataset, hashes: np.ndarray, fraction: float
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """Return the rows to train on and those set aside for `slimtune eval`.

    The text of a row decides, by its hash: rows with the same text stay together, and neither the seed nor the base
    changes which rows are set aside.
    """
    count = round(len(rows) * fraction)
    held_out = hashes <= np.sort(hashes)[count - 1] if count else np.zeros(len(rows), bool)
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))


def load_eval_dataset(
    recipe: Recipe, tokenizer: Any, path: Path, classes: Classes | None = None
) -> tuple[TokenizedDataset, TokenizationStats]:
    """Read and tokenize rows for evaluation, with the recipe's length policy; `classes` are those of a classifier."""
    rows = open_rows_from_recipe(recipe, path)
    dataset, report = _tokenize(recipe, tokenizer, rows)
    dataset = _prepare_rows(recipe.objective(), dataset)
    if classes is not None and classes.names:
        dataset = encode_classes(dataset, classes, dict.fromkeys(classes.names, 1.0), path)
    return cut_documents(recipe, tokenizer, rows, dataset), report


def _tokenize(
    recipe: Recipe, tokenizer: Any, rows: RowFile, observer: RowObserver | None = None
) -> tuple[TokenizedDataset, TokenizationStats]:
    return tokenize_dataset(
        rows,
        tokenizer,
        max_seq_len=recipe.data.max_seq_len,
        on_overlong=recipe.data.on_overlong,
        train_on=recipe.data.train_on,
        path=rows.path,
        processes=max(1, cpu_count() // distributed.local_world_size()),
        observer=observer,
    )


def build_collator(recipe: Recipe, model: Any, tokenizer: Any, longest: int) -> Collator:
    """Return the collator for the recipe's rows and this model; raise ModelError if the model does not support it."""
    t = recipe.train
    if t.packing and (reason := packing_unsupported_reason(model)):
        raise UsageError(
            f"train.packing is true, but {reason}", hint="--set train.packing=null packs where it is exact"
        )
    collator = make_collator(
        model,
        tokenizer.pad_token_id,
        packing=t.packing is not False,
        share_prefix=t.share_prefix,
        max_rows=t.batch_size,
    )
    check_lm_head(model)
    limit = t.max_tokens_per_micro_batch
    collator.max_tokens = auto_micro_batch_tokens(model, collator, longest) if limit == "auto" else limit
    return collator


# --- base and adapter -------------------------------------------------------------------------------------------------


def load_base_from_recipe(recipe: Recipe, classes: Classes | None = None) -> Base:
    """Load the recipe's base and tokenizer, with a head for `classes`."""
    m, template = recipe.model, recipe.data.chat_template
    base = load_base(
        m.name,
        dtype=m.dtype,
        device=m.device,
        trust_remote_code=m.trust_remote_code,
        revision=m.revision,
        chat_template=template,
        quantization=m.quantization,
        task="CAUSAL_LM" if classes is None else "SEQ_CLS",
        head=None if classes is None else classes.config,
    )
    if classes is not None:
        require_row_head(base.model)
    if base.device.type == "cpu":
        disable_malloc_trim()
    return base


def load_tokenizer_from_recipe(recipe: Recipe) -> Any:
    """Load the tokenizer of the recipe's base, no weights."""
    m, template = recipe.model, recipe.data.chat_template
    return load_tokenizer(m.name, trust_remote_code=m.trust_remote_code, revision=m.revision, chat_template=template)


def read_hidden_size(recipe: Recipe) -> int:
    """Return the width of the base's hidden states by its config, no weights."""
    m = recipe.model
    return get_hidden_size(load_base_config(m.name, trust_remote_code=m.trust_remote_code, revision=m.revision).config)


def attach_adapter(
    base: Base, recipe: Recipe, init_adapter: Path | None = None, rows: Sequence[Example] = ()
) -> PeftModel:
    """Attach the recipe's method to the base, in place, or load an adapter to continue training.

    Args:
        base: the loaded base.
        recipe: the method and its settings; `train.seed` seeds the adapter's initial weights.
        init_adapter: a run or an adapter folder to start from.
        rows: training rows; "loftq" initializes from the quantization error on them.
    """
    torch.manual_seed(recipe.train.seed)
    head = get_row_head(base.model)
    if head is not None and base.new_weights:  # as transformers does, here with the run's seed
        torch.nn.init.normal_(head.weight, std=getattr(base.model.config.get_text_config(), "initializer_range", 0.02))
    if init_adapter is not None:
        model = PeftModel.from_pretrained(base.model, find_adapter_folder(init_adapter), is_trainable=True)
    else:
        config: Any = recipe.method_config()
        loftq = getattr(config, "init_lora_weights", None) == "loftq"
        if loftq:
            config.init_lora_weights = True  # as in PEFT: an adapter that is read back is not initialized again
        if getattr(config, "tokenizer_name_or_path", None) == recipe.model.name:
            config.tokenizer_name_or_path = base.tokenizer.name_or_path  # an alias cannot be loaded by PEFT
        exclude_other_inputs(base.model, config)
        model = get_peft_model(base.model, config)
        if loftq:
            layers = {n: m for n, m in model.adapted_layers().items() if is_quantized(m)}
            ids = [ids for example in rows[:ROWS] for ids, _ in split_rows(example)]
            inputs = collect_layer_inputs(base.model.eval(), layers, ids)
            replace_lora_weights_loftq(
                model, download_weights(base.source, recipe.model.revision), calibration_inputs=inputs
            )
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


def require_row_head(model: Any) -> None:
    """Raise ModelError if a sequence classifier does not read its logits with one linear layer `score`."""
    if not isinstance(get_row_head(model), torch.nn.Linear):
        raise ModelError(
            f"a {type(model).__name__} has no linear head `score` on its last token",
            "a decoder with transformers' head for classification",
        )


def exclude_other_inputs(model: Any, method: PeftConfig) -> None:
    """Let "all-linear" leave out the parts of a base that see images or hear: a run's rows are text.

    The model's language part is transformers' `get_decoder()`. Writes `exclude_modules` of the config.
    """
    everything = str(getattr(method, "target_modules", "")).lower() == ALL_LINEAR
    language = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not everything or getattr(method, "exclude_modules", None) or language in (None, model):
        return
    names = {id(m): n for n, m in model.named_modules()}
    parts = names.get(id(language), "").split(".")
    path = [".".join(parts[:i]) for i in range(len(parts) + 1)]  # the modules that the language part is in, and itself
    beside = [n for n, m in model.named_modules() if n not in path and n.rpartition(".")[0] in path[:-1]]
    if other := [n for n in beside if model.get_submodule(n) is not model.get_output_embeddings()]:
        method.exclude_modules = "|".join(rf"{re.escape(n)}(\..*)?" for n in other)  # type: ignore[attr-defined]


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
        checkpointing, offload, tile: as for `apply_memory_savings`.
        first: changes the base before the method is attached, such as quantizing it.
    """
    config, method = copy.deepcopy((config, method))  # building a model writes into both
    if getattr(method, "init_lora_weights", None) == "loftq":
        method.init_lora_weights = True  # type: ignore[union-attr]  # the same tensors without data
    # A config class from a base's own code: that code is trusted already, or the class would not be here.
    trusted = type(config).__module__.startswith("transformers_modules")
    with torch.device("meta"):
        with translate_load_errors(config.name_or_path or config.model_type):
            task = "SEQ_CLS" if method is not None and method.task_type == "SEQ_CLS" else "CAUSAL_LM"
            model: Any = get_auto_class(config, task).from_config(config, dtype=dtype, trust_remote_code=trusted)
        if first is not None:
            first(model)
        if method is not None:
            exclude_other_inputs(model, method)
            model = get_peft_model(model, method)
    apply_memory_savings(model, checkpointing, offload, tile)
    return model


# --- trained models ---------------------------------------------------------------------------------------------------


def load_run(
    path: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    quantization: str | None = None,
    unpack: bool = False,
    trust_remote_code: bool = False,
) -> TrainedModel:
    """Load a run's adapter, or a bare adapter folder, on its base.

    Args:
        path: a run folder or an adapter folder.
        dtype: dtype of the base's weights; None: that of the run (for an adapter folder "auto").
        device: the device; None: that of the run (for an adapter folder "auto").
        quantization: quantization of the base, "nf4" or "int8"; "none": not quantized; None: that of the run.
        unpack: dequantize the base.
        trust_remote_code: run the base's own Python code; what the run's recipe says does not count.
    """
    with allow_remote_code(trust_remote_code):
        return _load_run(Path(path), {"dtype": dtype, "device": device, "quantization": quantization}, unpack)


def load_runs(paths: Sequence[str | Path], **how: Any) -> list[TrainedModel]:
    """Load the adapters of several runs, or of bare adapter folders, on one base.

    All results share the first one's model, in which each has its own `adapter_name`; each has its own tokenizer.

    Args:
        paths: run folders or adapter folders, one or more.
        how: dtype, device and so on, as for `load_run`; None: as the first run says.

    Raises:
        UsageError: two of them need different bases, or the same one in another dtype or quantization.
    """
    first = load_run(paths[0], **how)
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
            raise UsageError(
                f"{path} and {first.adapter} need different models: the {key} of one is {own}, of the other {shared}",
                "adapters of one base, loaded in one way",
                "serve the others by a process of their own",
            )
    if recipe is not None:
        _require_trained_base(RunDir(path), base)
    template: Any = None if recipe is None else recipe.data.chat_template
    if recipe is None and (file := folder / "chat_template.jinja").is_file():
        template = file
    revision = None if recipe is None else recipe.model.revision
    tokenizer = load_tokenizer(base.source.spec, revision=revision, chat_template=template)
    first.model.load_adapter(folder, name, config=config)
    return TrainedModel(first.model, dataclasses.replace(base, tokenizer=tokenizer), folder, recipe, adapter_name=name)


def resolve_trained_base(run: Path) -> ModelSource:
    """Return where the base of a run or an adapter folder is, without loading it."""
    if (folder := find_adapter_folder(run)) != run:
        return resolve_model(RunDir.open(run).load_recipe().model.name)
    return resolve_model(PeftConfig.from_pretrained(folder).base_model_name_or_path or "")


def require_language_model(run: str | Path) -> None:
    """Raise UsageError if a run trained a classifier or a reward model."""
    if PeftConfig.from_pretrained(find_adapter_folder(run)).task_type == "SEQ_CLS":
        raise UsageError(
            f"{run} is a classifier or a reward model: it writes no text, and neither llama.cpp (GGUF, Ollama) nor "
            "vLLM's adapters serve its head",
            "a run of a language model",
            "slimtune eval or merge, or HF PEFT over AutoModelForSequenceClassification: docs/classification.md",
        )


def read_class_labels(folder: Path) -> Classes:
    """Return the classes of a classifier's adapter, from the config beside it; without one they are numbered."""
    if (folder / CONFIG_FILE).is_file():
        return Classes.from_config(read_json(folder / CONFIG_FILE))
    tensors, _ = read_adapter_file(folder)
    heads = [t for name, t in tensors.items() if name.endswith("score.weight")]
    if not heads:
        raise AdapterError(f"{folder} has no classification head", "an adapter that was trained with its head, `score`")
    outputs = heads[0].shape[0]
    return Classes(tuple(f"LABEL_{i}" for i in range(outputs)) if outputs > 1 else ())


def _require_trained_base(run: RunDir, base: Base) -> None:
    """Raise AdapterError if the base has other weights than when the run was trained on it, as far as was recorded."""
    try:
        result = read_json(run.result_file)
    except RunError:  # not there, or damaged: other commands say so
        return
    trained, dtype = result.get("base_weights"), str(base.dtype).removeprefix("torch.")
    # Another dtype or quantization rounds the same weights to other values.
    if not isinstance(trained, dict) or (result.get("dtype"), result.get("quantization")) != (dtype, base.quantization):
        return
    if changed := [k for k, v in base.weight_hashes.items() if trained.get(k, v) != v]:
        raise AdapterError(
            f"the base {base.source.spec} has changed since {run.path} was trained on it: {format_names(changed, 4)}",
            "the weights that the adapter was trained on",
            "put the old base back, or train again",
        )


def _load_run(path: Path, changes: dict[str, str | None], unpack: bool) -> TrainedModel:
    folder = find_adapter_folder(path)
    config = PeftConfig.from_pretrained(folder)
    given: dict[str, Any] = {k: None if v == "none" else v for k, v in changes.items() if v}
    classes = read_class_labels(folder) if config.task_type == "SEQ_CLS" else None
    recipe = None
    if folder != path:
        recipe = RunDir.open(path).load_recipe()
        settings = recipe.model.model_copy(update=given)
        base = load_base_from_recipe(recipe.model_copy(update={"model": settings}), classes)
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
        raise AdapterError(f"{folder} does not name its base", "base_model_name_or_path in adapter_config.json")
    if recipe is not None:
        _require_trained_base(RunDir(path), base)
    if unpack and base.quantization is not None:
        base.model = dequantize_model(base.model, base.dtype)
    model = PeftModel.from_pretrained(base.model, folder, config=config)
    return TrainedModel(model, base, folder, recipe, classes)
