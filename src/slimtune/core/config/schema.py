"""The recipe's settings, each declared once: type, range, default and help.

YAML, `--set`, the flags of the commands, the error messages and the tables in `docs/recipe.md` all read them from here.
`list_settings(Recipe)` lists them. This module imports no torch, so that `slimtune train --help` is quick.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ..adapters.config_fields import DeclaredSettings, config_field
from ..foundation.dtype_names import DTYPE_ABBREVIATIONS
from ..foundation.json_results import INLINE, to_json_dict
from ..foundation.registry import Registry
from .objective_registry import load_objective_class


def _read_number(value: Any) -> Any:
    # YAML reads '1e-4' in quotes as text.
    try:
        return float(value) if isinstance(value, str | int) and not isinstance(value, bool) else value
    except (OverflowError, ValueError):
        return value


def _read_path(value: Any) -> Any:
    is_path = isinstance(value, str) and value and not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value)
    return Path(value).expanduser() if is_path else value  # no path that every command can write: an error of type


RecipeTree = dict[str, Any]
"""A recipe, or a section of one, as YAML has it: plain values, some of them wrong."""
Number = Annotated[float, _read_number]
PathLike = Annotated[Path, _read_path]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "float64"],
    lambda value: DTYPE_ABBREVIATIONS.get(value, value) if isinstance(value, str) else value,
]


@dataclass(frozen=True)
class RecipeSection(DeclaredSettings):
    """A section of the recipe: frozen, strict about types, and without unknown fields."""

    yaml_words: ClassVar[bool] = True

    def to_dict(self) -> RecipeTree:
        """Return the values as plain YAML and JSON have them."""
        return to_json_dict(self)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(RecipeSection):
    """The base model and how it is loaded."""

    name: str = config_field(
        ...,
        "base model: an alias (smollm2-135m), a GGUF file, a Hugging Face folder or a Hub id",
        flag="--model",
        pattern=".+",
    )
    dtype: Dtype = config_field("auto", "data type of the frozen weights; auto: bfloat16 if the device computes in it")
    quantization: Literal["nf4", "int8"] | None = config_field(
        None, "hold the base's linear layers in 4 bits (nf4) or 8 bits", when_null="as dtype or the checkpoint says"
    )
    device: str = config_field(
        "auto",
        "device to run on; auto: a GPU if there is one",
        takes="auto, cpu, cuda, cuda:N or mps",
        pattern=r"auto|cpu|mps|cuda(:\d+)?",
    )
    trust_remote_code: bool = config_field(
        False, "run Python code that comes with the base; counts only as a flag, not in a file"
    )
    revision: str | None = config_field(None, "branch, tag or commit on the Hub", when_null="the newest")


@dataclass(frozen=True, kw_only=True)
class DataSettings(RecipeSection):
    """The rows to train on and how they become tokens."""

    train: PathLike = config_field(
        ...,
        "training rows: a file (JSONL, JSON, CSV, TSV, Parquet, text), a folder of such files, or a dataset of the Hub",
        flag="--data",
    )
    validation: PathLike | None = config_field(None, "validation rows, in the same forms")
    validation_fraction: Number = config_field(
        0.05, "share of the training rows set aside for validation, if validation is null", ge=0, le=0.5
    )
    test: PathLike | None = config_field(None, "rows for `slimtune eval`, in the same forms")
    test_fraction: Number = config_field(
        0.0, "share of the training rows set aside for `slimtune eval`, if test is null", ge=0, le=0.5
    )
    general_text: PathLike | None = config_field(
        None, "text for train.forgetting_budget, a .txt or JSONL file", when_null="the text that comes with slimtune"
    )
    format: str | None = config_field(
        None,
        "format of a row",
        when_null="inferred from its columns",
        choices=Registry("slimtune.row_formats", "data format").names,
    )
    columns: dict[str, str] = config_field({}, "names of the format's columns in these rows", flag="--column")
    ignore_columns: list[str] = config_field(
        [], "columns to leave out although they may change what a row means; messages.KEY: a key of the messages"
    )
    split_special_tokens: bool = config_field(
        True, "documents: read special tokens typed in their text as text; false: as the tokens themselves"
    )
    train_on: Literal["assistant", "last_assistant"] = config_field(
        "assistant", "turns that contribute to the loss: every assistant turn, or the last one of each row"
    )
    max_seq_len: int = config_field(1024, "longest row, or longest window of a document, in tokens", ge=2, le=10**8)
    on_overlong: Literal["error", "drop", "truncate"] = config_field("drop", "what happens to a longer row")
    apply_chat_template: bool = config_field(
        True, "pairs, lists and ratings of texts: read a prompt as the user's turn, an answer as the assistant's"
    )
    chat_template: PathLike | None = config_field(None, "chat template's name, or Jinja file", when_null="the base's")


@dataclass(frozen=True, kw_only=True)
class NamedSettings(RecipeSection):
    """A section that names a method or a task, whose class declares the section's other settings."""

    name: str = ""
    settings: dict[str, Any] = field(default_factory=dict, metadata=INLINE)
    """Those other settings by their full names, with the defaults of recipes."""


@dataclass(frozen=True, kw_only=True)
class MethodSettings(NamedSettings):
    """The method's name and its own fields, which its config class declares."""

    name: str = config_field("lora", "method to train", see="`slimtune methods` lists them", flag="--method")


@dataclass(frozen=True, kw_only=True)
class TaskSettings(NamedSettings):
    """The objective's name and its own fields, which its class declares."""

    name: str = config_field(
        "sft", "objective: sft learns the answers of the rows", see="docs/recipe.md lists the others", flag="--task"
    )

    def build_objective(self) -> Any:
        """Return the objective, an `Objective`."""
        return load_objective_class(self.name)(**self.settings)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RecipeSection):
    """How long to train, how fast, with how much at once, and what is written."""

    epochs: Number = config_field(3.0, "passes over the training rows", gt=0, le=10**6)
    max_steps: int | None = config_field(None, "optimizer steps, in place of epochs", ge=1, le=10**9)
    learning_rate: Literal["auto"] | Number = config_field(
        "auto",
        "highest learning rate; auto: the method's own, for LoRA by steps, epochs, rank and the base's width",
        flag="--lr",
        gt=0,
        lt=math.inf,
    )
    batch_size: int = config_field(8, "rows in a batch", ge=1, le=10**6)
    gradient_accumulation_steps: int = config_field(1, "batches in an optimizer step", ge=1, le=10**6)
    max_tokens_per_micro_batch: Literal["auto"] | int = config_field(
        "auto",
        "most tokens in a micro-batch; changes memory and speed, not the gradient; auto: as many as fit in memory",
        ge=1,
        le=10**9,
    )
    packing: bool | None = config_field(
        None, "pack rows into one sequence without padding", when_null="if that is exact for the base, as it mostly is"
    )
    share_prefix: bool = config_field(True, "with packing: compute a prefix that rows share only once")
    compile: bool = config_field(False, "compile the model's layers with torch.compile")
    lr_scheduler: Literal["cosine", "linear", "constant", "inverse_sqrt", "polynomial", "cosine_with_restarts"] = (
        config_field("cosine", "learning-rate schedule after the warm-up")
    )
    warmup_ratio: Number = config_field(0.03, "share of the steps with a rising learning rate", ge=0, lt=1)
    weight_decay: Number = config_field(0.0, "AdamW's decoupled weight decay", ge=0, le=1)
    max_grad_norm: Number = config_field(1.0, "largest norm of the gradient; 0: no clipping", ge=0)
    on_nonfinite: Literal["stop", "skip"] = config_field(
        "stop", "what happens at a step whose loss or gradient is NaN or Inf: the run stops, or the step is skipped"
    )
    optimizer: Literal["adamw", "adamw-8bit"] = config_field(
        "adamw", "optimizer; adamw-8bit holds its states in 8 bits and needs bitsandbytes"
    )
    gradient_checkpointing: bool = config_field(False, "compute activations twice to keep fewer in memory")
    offload_activations: bool = config_field(False, "keep checkpointed activations in CPU memory")
    mlp_tile_size: int | None = config_field(
        None,
        "tokens that norms and MLPs compute at once, which saves memory on long rows",
        when_null="all",
        ge=1,
        le=10**9,
    )
    fsdp: bool = config_field(False, "with several processes: shard the frozen base among them")
    seed: int = config_field(42, "seed of all random numbers", ge=0, le=2**32 - 1)
    eval_steps: int | None = config_field(
        None, "optimizer steps between evaluations", when_null="after each epoch", ge=1, le=10**9
    )
    save_steps: int | None = config_field(
        None, "optimizer steps between checkpoints", when_null="at each evaluation", ge=1, le=10**9
    )
    save_total_limit: int = config_field(2, "checkpoints kept beside the best", ge=1, le=10**6)
    early_stopping_patience: int | None = config_field(
        None, "evaluations without improvement before the run stops", when_null="never", ge=1, le=10**9
    )
    forgetting_budget: Literal["auto"] | Number | None = config_field(
        "auto",
        "most nats per token that the loss on general text may rise; auto: 0.1, if it can be measured and limited",
        when_null="any",
        gt=0,
    )
    logging_steps: int = config_field(1, "optimizer steps between lines of metrics", ge=1, le=10**9)
    report_to: list[Literal["clearml", "comet_ml", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]] = (
        config_field([], "experiment trackers")
    )

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    def count_steps(self, rows: int) -> int:
        """Return the optimizer steps of a run over a number of rows."""
        return self.max_steps or math.ceil(self.epochs * math.ceil(rows / self.rows_per_step))
