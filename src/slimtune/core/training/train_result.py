"""What a run returns, and `slimtune train --json` prints: result.json in the run folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..data.tokenize import TokenizationStats
from ..foundation.json_results import INLINE


@dataclass(frozen=True)
class ForgettingResult:
    """What a run with a forgetting budget forgot of general text, in nats per token, and what was done about it."""

    budget: float
    """Most that the loss on a kind of general text may rise above the base's."""
    tokens: int
    """Tokens of general text that were measured."""
    base_losses: dict[str, float]
    """The base's loss by kind of text."""
    measured: Sequence[tuple[int, float]]
    """Step and forgetting of each evaluation in which it was finite."""
    before: float | None
    """Forgetting of the best adapter as it was trained; null: NaN or Inf."""
    strength: float
    """Strength of the adapter that is kept: 1, or less so that it is inside the budget."""
    tried: Sequence[tuple[float, float | None]]
    """Strengths that were tried, and the forgetting of each."""
    change: float | None
    """Forgetting of the adapter that is kept; null: NaN or Inf."""


@dataclass(frozen=True)
class TokenizedRowsResult:
    """What happened to the rows of the run's files."""

    train: TokenizationStats
    """Of the training file."""
    validation: TokenizationStats | None
    """Of the validation file; null: validation rows are split from the training file."""


@dataclass(frozen=True)
class ExportSupport:
    """The export formats that an adapter supports."""

    merged: bool
    """Base and adapter as one model."""
    gguf: bool
    """A GGUF file that llama.cpp (and Ollama) adds to the base."""
    vllm: bool
    """A LoRA that vLLM adds to the base."""
    as_lora: bool
    """A LoRA that approximates the adapter, for vLLM."""


@dataclass(frozen=True)
class ExportFormatsResult:
    """How the adapter can be exported."""

    base_kind: str
    """Where the base is from: "hub", "folder", "package" or "gguf"."""
    supported: ExportSupport = field(metadata=INLINE)


@dataclass(frozen=True)
class TrainResult:
    """A run that has ended."""

    run: str
    """The run folder."""
    steps: int
    """Optimizer steps that were taken."""
    best_step: int
    """The step whose adapter is kept: that with the lowest validation loss, else the last."""
    epochs: float
    """Passes over the training rows."""
    rows: int
    """Training rows; of documents their windows."""
    held_out_rows: int | None
    """Rows that `slimtune eval` measures on without a file; null: it has none, or reads a file of them."""
    trained_tokens: int
    """Tokens of the rows trained on in all steps, each row as if it were alone."""
    supervised_tokens: int
    """How many of them were supervised."""
    tokens_per_second: float
    """Trained tokens per second of the optimizer steps."""
    train_seconds: float
    """Time of the optimizer steps, without evaluations and checkpoints."""
    train_cpu_seconds: float
    """CPU time of the main process in them."""
    load_seconds: float
    """Time of reading the base and its tokenizer."""
    start_seconds: float
    """Time from the start to the first step."""
    train_loss: float | None
    """Mean over the last tenth of the logged training losses; null: none was logged."""
    validation_loss: float | None
    """The kept adapter's validation loss; null: not measured, or not finite."""
    forgetting: ForgettingResult | None
    """What was forgotten of general text; null: the run has no forgetting budget."""
    skipped_steps: int
    """Steps without an update of the weights, because their loss or gradient was NaN or Inf."""
    peak_bytes: int
    """Most memory in use at once in a process: on a GPU of its tensors, else of the whole process."""
    dtype: str
    """Dtype of the base's weights, or in which quantized ones are computed."""
    quantization: str | None
    """Quantization of the base, "nf4" or "int8"; null: none."""
    base_weights: dict[str, str]
    """Hashes of the base's weights, by their kind."""
    device: str
    """The device."""
    adapter: str
    """The folder of the adapter that is kept."""
    stopped_early: bool
    """Whether the validation loss stopped improving for as long as the recipe waits."""
    prepare_seconds: float
    """Time of dequantizing a GGUF for the first time."""
    adapter_bytes: int
    """Size of the adapter's file."""
    trainable_params: int
    """Parameters that trained."""
    total_params: int
    """Parameters of the base and the adapter."""
    oom_events: int
    """How often memory ran out, and the work was repeated with less."""
    finished: str
    """When the run ended, in UTC."""
    target_summary: str
    """Which modules of the base were adapted, in one line."""
    untrained_experts: dict[str, list[int]]
    """Experts that got no gradient, as no token was routed to them, by module."""
    data_report: TokenizedRowsResult
    """What happened to the rows."""
    export_formats: ExportFormatsResult
    """How the adapter can be exported."""
    versions: dict[str, str]
    """Versions of Python and of packages, and the kind of machine."""
