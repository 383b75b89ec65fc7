"""The recipe's settings, each declared once: type, range, default and help.

YAML, `--set`, the flags of the commands, the error messages and the tables in `docs/recipe.md` all read them from here.
`iterate_settings` lists them. This module imports no torch, so that `slimtune train --help` is quick.
"""

import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
"""Short names of the data types."""


def _to_number(value: Any) -> Any:
    # YAML reads '1e-4' in quotes as text.
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _to_path(value: Any) -> Any:
    if not isinstance(value, str) or not value or "\0" in value or _has_surrogates(value):
        return value  # no path that every command can write: an error of type
    return Path(value).expanduser()


Number = Annotated[float, BeforeValidator(_to_number)]
PathLike = Annotated[Path, BeforeValidator(_to_path)]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "float64"],
    BeforeValidator(lambda v: DTYPES.get(v, v) if isinstance(v, str) else v),
]


def setting(default: Any, help: str, *, flag: str = "", expected: str = "", **limits: Any) -> Any:
    """Declare a setting with its help, its unit included; a default of `...` means that it must be given.

    Args:
        default: its default.
        help: what it does.
        flag: the command-line flag; by default its name, `--batch-size`.
        expected: what it takes, where its type and limits do not say it.
        limits: pydantic's limits, such as `ge=1`.
    """
    return Field(default, description=help, json_schema_extra={"flag": flag, "expected": expected}, **limits)


class Section(BaseModel):
    """A section of the recipe: frozen, strict about types, and without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSettings(Section):
    """The base model and how it is loaded."""

    name: str = setting(
        ...,
        "base model: an alias (smollm2-135m), a GGUF file, a Hugging Face folder or a Hub id",
        flag="--model",
        min_length=1,
    )
    dtype: Dtype = setting("auto", "data type of the frozen weights; auto: bfloat16 if the device computes in it")
    quantization: Literal["nf4", "int8"] | None = setting(
        None, "hold the base's linear layers in 4 bits (nf4) or 8 bits; null: as dtype or the checkpoint says"
    )
    device: str = setting(
        "auto",
        "device to run on; auto: a GPU if there is one",
        expected="auto, cpu, cuda, cuda:N or mps",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
    )
    trust_remote_code: bool = setting(
        False, "run Python code that comes with the base; counts only as a flag, not in a file"
    )
    revision: str | None = setting(None, "branch, tag or commit on the Hub; null: the newest")


class DataSettings(Section):
    """The rows to train on and how they become tokens."""

    train: PathLike = setting(
        ...,
        "training rows: a file (JSONL, JSON, CSV, TSV, Parquet, text), a folder of such files, or a dataset of the Hub",
        flag="--data",
    )
    validation: PathLike | None = setting(None, "validation rows, in the same forms")
    validation_fraction: Number = setting(
        0.05, "share of the training rows set aside for validation, if validation is null", ge=0, le=0.5
    )
    test: PathLike | None = setting(None, "rows for `slimtune eval`, in the same forms")
    test_fraction: Number = setting(
        0.0, "share of the training rows set aside for `slimtune eval`, if test is null", ge=0, le=0.5
    )
    general_text: PathLike | None = setting(
        None, "text for train.forgetting_budget, a .txt or JSONL file; null: the text that comes with slimtune"
    )
    format: (
        Literal[
            "chat",
            "instruction",
            "sharegpt",
            "prompt-completion",
            "text",
            "document",
            "preference",
            "ranked-preference",
            "unpaired-preference",
            "classification",
        ]
        | None
    ) = setting(None, "format of a row; null: inferred from its columns")
    columns: dict[str, str] = setting({}, "names of the format's columns in these rows", flag="--column")
    ignore_columns: list[str] = setting(
        [], "columns to leave out although they may change what a row means; messages.KEY: a key of the messages"
    )
    train_on: Literal["assistant", "last_assistant"] = setting(
        "assistant", "turns that contribute to the loss: every assistant turn, or the last one of each row"
    )
    max_seq_len: int = setting(1024, "longest row, or longest window of a document, in tokens", ge=2, le=10**8)
    on_overlong: Literal["error", "drop", "truncate"] = setting("drop", "what happens to a longer row")
    chat_template: PathLike | None = setting(None, "Jinja file with a chat template; null: the base's own")


class MethodSettings(BaseModel):
    """The method's name and its own fields, which its config class declares."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = setting("lora", "method to train, as `slimtune methods` lists them", flag="--method")

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own fields by their full names, with the defaults of recipes."""
        return dict(self.model_extra or {})


class TaskSettings(BaseModel):
    """The objective's name and its own fields, which its class declares."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = setting(
        "sft", "objective: sft learns the answers of the rows; docs/recipe.md lists the others", flag="--task"
    )

    @property
    def settings(self) -> dict[str, Any]:
        """The objective's own fields, with their defaults."""
        return dict(self.model_extra or {})


class TrainSettings(Section):
    """How long to train, how fast, with how much at once, and what is written."""

    epochs: Number = setting(3.0, "passes over the training rows", gt=0, le=10**6)
    max_steps: int | None = setting(None, "optimizer steps, in place of epochs", ge=1, le=10**9)
    learning_rate: Literal["auto"] | Annotated[Number, Field(gt=0, allow_inf_nan=False)] = setting(
        "auto",
        "highest learning rate; auto: the method's own, for LoRA by steps, epochs, rank and the base's width",
        flag="--lr",
        union_mode="left_to_right",
    )
    batch_size: int = setting(8, "rows in a batch", ge=1, le=10**6)
    gradient_accumulation_steps: int = setting(1, "batches in an optimizer step", ge=1, le=10**6)
    max_tokens_per_micro_batch: Literal["auto"] | Annotated[int, Field(ge=1, le=10**9)] = setting(
        "auto",
        "most tokens in a micro-batch; changes memory and speed, not the gradient; auto: as many as fit in memory",
        union_mode="left_to_right",
    )
    packing: bool | None = setting(
        None, "pack rows into one sequence without padding; null: if that is exact for the base, as it mostly is"
    )
    share_prefix: bool = setting(True, "with packing: compute a prefix that rows share only once")
    compile: bool = setting(False, "compile the model's layers with torch.compile")
    lr_scheduler: Literal["cosine", "linear", "constant", "inverse_sqrt", "polynomial", "cosine_with_restarts"] = (
        setting("cosine", "learning-rate schedule after the warm-up")
    )
    warmup_ratio: Number = setting(0.03, "share of the steps with a rising learning rate", ge=0, lt=1)
    weight_decay: Number = setting(0.0, "AdamW's decoupled weight decay", ge=0, le=1)
    max_grad_norm: Number = setting(1.0, "largest norm of the gradient; 0: no clipping", ge=0, allow_inf_nan=False)
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop", "what happens at a step whose loss or gradient is NaN or Inf: the run stops, or the step is skipped"
    )
    optimizer: Literal["adamw", "adamw-8bit"] = setting(
        "adamw", "optimizer; adamw-8bit holds its states in 8 bits and needs bitsandbytes"
    )
    gradient_checkpointing: bool = setting(False, "compute activations twice to keep fewer in memory")
    offload_activations: bool = setting(False, "keep checkpointed activations in CPU memory")
    mlp_tile_size: int | None = setting(
        None, "tokens that norms and MLPs compute at once, which saves memory on long rows; null: all", ge=1, le=10**9
    )
    fsdp: bool = setting(False, "with several processes: shard the frozen base among them")
    seed: int = setting(42, "seed of all random numbers", ge=0, le=2**32 - 1)
    eval_steps: int | None = setting(
        None, "optimizer steps between evaluations; null: after each epoch", ge=1, le=10**9
    )
    save_steps: int | None = setting(
        None, "optimizer steps between checkpoints; null: at each evaluation", ge=1, le=10**9
    )
    save_total_limit: int = setting(2, "checkpoints kept beside the best", ge=1, le=10**6)
    early_stopping_patience: int | None = setting(
        None, "evaluations without improvement before the run stops; null: never", ge=1, le=10**9
    )
    forgetting_budget: Number | None = setting(
        None,
        "most that the loss on general text may rise above the base's, in nats per token; null: any",
        gt=0,
        allow_inf_nan=False,
    )
    logging_steps: int = setting(1, "optimizer steps between lines of metrics", ge=1, le=10**9)
    report_to: list[Literal["clearml", "comet_ml", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]] = setting(
        [], "experiment trackers"
    )

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    def count_steps(self, rows: int) -> int:
        """Return the optimizer steps of a run over a number of rows."""
        return self.max_steps or math.ceil(self.epochs * math.ceil(rows / self.rows_per_step))


@dataclass(frozen=True)
class Setting:
    """One setting of the recipe, as commands, messages and the documentation show it."""

    path: str  # dotted, "train.epochs"
    annotation: Any
    help: str
    flag: str
    expected: str  # what it takes, "an integer, at least 1"
    limits: str  # its range alone, "at least 1"
    default: Any  # None also where it is required
    required: bool


def iterate_settings(section: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of a section and of the sections in it."""
    for name, field in section.model_fields.items():
        annotation: Any = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from iterate_settings(annotation, f"{prefix}{name}.")
            continue
        declared: Any = field.json_schema_extra
        limits = _range(field)
        yield Setting(
            path=f"{prefix}{name}",
            annotation=annotation,
            help=field.description or "",
            flag=declared["flag"] or f"--{name.replace('_', '-')}",
            expected=declared["expected"] or ", ".join(filter(None, (describe_type(annotation), limits))),
            limits=_range(field, below=10**6),
            default=None if field.is_required() else field.default,
            required=field.is_required(),
        )


def describe_type(annotation: Any) -> str:
    """Return a type in words, `"an integer or null"`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        limits = [_range(m) for m in arguments[1:] if isinstance(m, FieldInfo)]
        return ", ".join([describe_type(arguments[0]), *limits])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(a) for a in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin is list:
        return f"a list of {describe_type(arguments[0]).removeprefix('one of ')}"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}
    return {**words, dict: "a mapping of text to text", type(None): "null"}[origin or annotation]


def _range(field: FieldInfo, below: float = math.inf) -> str:
    """Return a field's range in words; upper limits from `below` on, which nobody reaches, are left out."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [(word, getattr(m, name, None)) for m in field.metadata for name, word in words.items()]
    return " and ".join(f"{word} {limit}" for word, limit in limits if limit is not None and limit < below)
