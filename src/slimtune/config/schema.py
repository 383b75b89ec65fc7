"""The settings: four sections, every field with what it wants (unit and range) and its flag.

What a field wants stands once, in its `description`; messages and `docs/recipe.md` say it in the same words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def _number(value: Any) -> Any:
    # YAML leaves "1e-4" in quotes, and JSON from elsewhere, as text.
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _path(value: Any) -> Any:
    return Path(value).expanduser() if isinstance(value, str) and value else value


Number = Annotated[float, BeforeValidator(_number)]
PathLike = Annotated[Path, BeforeValidator(_path)]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "float64"],
    BeforeValidator(lambda v: DTYPES.get(v, v) if isinstance(v, str) else v),
]


def setting(default: Any, wanted: str, flag: str = "", **limits: Any) -> Any:
    """Return a field with what it wants in words, the flag that sets it, and pydantic's limits."""
    return Field(default, description=wanted, json_schema_extra={"flag": flag}, **limits)


class Section(BaseModel):
    """A part of the recipe: closed, frozen, strict about types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSettings(Section):
    """The base, and how it is loaded."""

    name: str = setting(
        ...,
        "the base: an alias (smollm2-135m), a GGUF file, a Hugging Face folder or a Hub id",
        "--model",
        min_length=1,
    )
    dtype: Dtype = setting(
        "auto", "dtype of the frozen weights: auto, float32, bfloat16, float16 or float64", "--dtype"
    )
    quantization: Literal["nf4", "int8"] | None = setting(
        None,
        "hold the base's linear layers in nf4 (4 bits) or int8; null: as dtype says, or as the checkpoint is stored",
        "--quant",
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    trust_remote_code: bool = setting(False, "true lets the base run code of its own", "--trust-remote-code")
    revision: str | None = setting(None, "branch, tag or commit on the Hub, as text; null: the newest")


class DataSettings(Section):
    """The rows to learn from, and how they become tokens."""

    train: PathLike = setting(
        ...,
        "training rows: a file (JSONL, JSON, CSV, TSV, Parquet, text), a folder of such files, or a dataset of the Hub",
        "--data",
    )
    validation: PathLike | None = setting(None, "validation rows, as train, or null", "--validation")
    validation_fraction: Number = setting(
        0.05, "where validation is null: share of the training rows set aside for it, 0 (none) to 0.5", ge=0, le=0.5
    )
    test: PathLike | None = setting(None, "rows kept for `slimtune eval`, as train, or null")
    format: Literal["chat", "instruction", "sharegpt", "prompt-completion", "text", "preference"] | None = setting(
        None,
        "what a row is: chat, instruction, sharegpt, prompt-completion, text or preference; null: told by its columns",
        "--format",
    )
    columns: dict[str, str] = setting({}, "a format's columns: the names they have in the rows", "--column")
    train_on: Literal["assistant", "last_assistant"] = setting(
        "assistant",
        "the turns that are learned: assistant (every assistant turn) or last_assistant (the last of each row)",
        "--train-on",
    )
    max_seq_len: int = setting(1024, "longest row in tokens, a whole number from 2", "--max-seq-len", ge=2)
    on_overlong: Literal["error", "drop", "truncate"] = setting(
        "drop", "what happens to a longer row: error, drop or truncate", "--too-long"
    )
    chat_template: PathLike | None = setting(None, "a Jinja file used for the chat template, or null: the base's own")


class MethodSettings(BaseModel):
    """The method's name and its own fields, which its config class declares."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = setting("lora", "a name that `slimtune methods` lists", "--method")

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own fields by their full names, defaults that serve filled in."""
        return dict(self.model_extra or {})


class TrainSettings(Section):
    """The run: how long, how fast, how much at once, and what is written."""

    epochs: Number = setting(3.0, "passes over the training rows, above 0", "--epochs", gt=0, allow_inf_nan=False)
    max_steps: int | None = setting(
        None, "optimizer steps, a whole number from 1, in place of epochs; null: epochs count", "--max-steps", ge=1
    )
    learning_rate: Number = setting(
        2e-4,
        "the highest rate, above 0; methods other than LoRA have their own default",
        "--lr",
        gt=0,
        allow_inf_nan=False,
    )
    batch_size: int = setting(
        8, "rows in a batch, a whole number from 1; times accumulate they make an optimizer step", "--batch-size", ge=1
    )
    gradient_accumulation_steps: int = setting(1, "batches in an optimizer step, a whole number from 1", ge=1)
    max_tokens_per_micro_batch: Literal["auto"] | int = setting(
        "auto",
        "most tokens computed in one pass, a whole number from 1: a step's rows are divided into passes, which changes "
        "memory and speed, not the gradient; auto: as free memory allows",
        union_mode="left_to_right",
    )
    packing: bool = setting(True, "true lays rows in one sequence, without padding", "--packing")
    share_prefix: bool = setting(True, "packed: true computes once what rows begin with alike")
    compile: bool = setting(False, "true compiles the model's layers by torch.compile first", "--compile")
    lr_scheduler: Literal["cosine", "linear", "constant", "inverse_sqrt", "polynomial", "cosine_with_restarts"] = (
        setting(
            "cosine",
            "course of the rate after the warm-up: cosine, linear, constant, inverse_sqrt, polynomial or "
            "cosine_with_restarts",
        )
    )
    warmup_ratio: Number = setting(0.03, "share of the steps spent warming up, 0 to below 1", ge=0, lt=1)
    weight_decay: Number = setting(0.0, "AdamW's decoupled decay, 0 to 1", ge=0, le=1)
    max_grad_norm: Number = setting(
        1.0, "the gradient's norm is clipped to this; 0: not clipped", ge=0, allow_inf_nan=False
    )
    optimizer: Literal["adamw", "adamw-8bit"] = setting(
        "adamw", "adamw, or adamw-8bit: its states in 8 bits, by bitsandbytes", "--optimizer"
    )
    gradient_checkpointing: bool = setting(False, "true computes activations twice to keep fewer in memory")
    offload_activations: bool = setting(
        False, "true keeps what gradient_checkpointing keeps in the machine's memory, not the GPU's"
    )
    mlp_tile_size: int | None = setting(
        None,
        "tokens of a row that norms and feed-forwards compute at once, a whole number from 1, which holds less of long "
        "rows; null: all",
        ge=1,
    )
    fsdp: bool = setting(
        False, "several processes: true divides the frozen base among them, false keeps it whole in each"
    )
    seed: int = setting(42, "a whole number from 0 to 4294967295", "--seed", ge=0, le=2**32 - 1)
    eval_steps: int | None = setting(
        None, "optimizer steps between evaluations, a whole number from 1; null: after each epoch", ge=1
    )
    save_steps: int | None = setting(
        None, "optimizer steps between checkpoints, a whole number from 1; null: at each evaluation", ge=1
    )
    save_total_limit: int = setting(2, "checkpoints kept beside the best, a whole number from 1", ge=1)
    early_stopping_patience: int | None = setting(
        None, "evaluations without improvement after which the run ends, a whole number from 1; null: never", ge=1
    )
    logging_steps: int = setting(1, "optimizer steps between lines of metrics, a whole number from 1", ge=1)
    report_to: list[
        Literal["clearml", "comet_ml", "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"]
    ] = setting([], "a list of trackers: clearml, comet_ml, mlflow, neptune, swanlab, tensorboard, trackio, wandb")
