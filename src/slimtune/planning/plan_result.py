"""What a plan says: numbers, each with the kind of evidence behind it (docs/plan.md). It imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ..core.foundation.formatting import compute_trained_share, format_bytes, format_count
from ..core.foundation.json_results import NOT_IN_JSON, make_json_key_metadata
from .interval import Interval, format_three_digits

MemoryVerdict = Literal["fits", "tight", "does not fit"]
Advice = Literal["none", "first", "all"]
"""Which changes that save memory a plan looks for: none, those up to the first that is enough, or all."""
THEN_IT: dict[MemoryVerdict, str | None] = {"fits": "fits", "tight": "is tight", "does not fit": None}
"""What a change leads to, behind "then it"; None: it is no help."""
PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "runtime")
"""The parts of a step's memory, in the order bars are stacked."""

EVIDENCE = ("measured", "traced", "computed", "published", "guessed")
"""Kinds of evidence behind a figure, explained in docs/plan.md."""


_COMPUTED = Interval(0, 0)


class TrainingWorkload(NamedTuple):
    """What a run computes, from which its speed on any GPU follows (`throughput.estimate_training_speed`)."""

    counts_by_operator_cost: Any  # how often an operator of (FLOPs, bytes moved, dtype) runs in one micro-batch
    attention_flops_by_dtype: Any  # FLOPs of fused attention in one micro-batch, by dtype
    tokens_per_micro_batch: int  # trained in one micro-batch
    optimizer_step_bytes: int = 0  # that the optimizer moves in a step
    micro_batches_per_step: int = 1  # in an optimizer step


class LabelledFigure(NamedTuple):
    """A figure of an estimate as text, and the field whose kind of evidence it has."""

    label: str
    text: str
    evidence_field: str


@dataclass(frozen=True)
class MemorySaving:
    """One change that saves memory."""

    change: str
    """The change, as a flag."""
    saves: int
    """Bytes less at the highest point."""
    verdict: MemoryVerdict
    """Of the changed run."""


@dataclass(frozen=True, kw_only=True)
class ResourceEstimate:
    """What a run takes on a GPU; sizes in bytes."""

    model: str
    """The base, by the name that was asked for."""
    method: str
    """The method's name."""
    gpu: str = field(metadata=make_json_key_metadata("card"))
    """The GPU's name."""
    dtype: str
    """Of the base's weights; "nf4" or "int8" if it is quantized."""
    batch: int
    """Rows in a micro-batch."""
    seq_len: int
    """Tokens of the longest row."""
    max_tokens_per_micro_batch: int
    """Tokens of a micro-batch, shared prefixes once."""
    micro_batches: int
    """Micro-batches in an optimizer step."""
    trainable_params: int
    """Numbers that are trained."""
    total_params: int
    """Numbers of base and adapter."""
    adapter_bytes: int
    """Bytes of `adapter_model.safetensors`, to the MB."""
    adapter_bytes_at_most: bool
    """Whether training may leave a smaller file, because it chooses ranks from data."""
    parts: dict[str, int]
    """Bytes by part (weights, adapters, gradients …) at the highest point of the step."""
    allocated_bytes: int
    """Highest number of bytes of tensors over all phases of the run."""
    reserved_bytes: Interval
    """What the allocator takes from the device for them."""
    runtime_bytes: Interval
    """What the device's runtime takes beside the allocator."""
    usable_bytes: Interval
    """What the GPU gives to a run: surely, at most."""
    peaks: dict[str, int]
    """Bytes of tensors by phase: start, forward, loss, backward, optimizer, evaluation, merge, sampling."""
    host_bytes: int
    """Highest number of bytes of CPU memory."""
    disk_bytes: int
    """What a run writes at most: checkpoints and adapter."""
    verdict: MemoryVerdict
    """Whether the device has the bytes that the run needs."""
    reason: str
    """Of the verdict, in one sentence."""
    max_seq_len: int
    """Tokens of the longest row that fits at this batch; 0: none."""
    max_batch_size: int
    """Most rows of `seq_len` that fit in a micro-batch; 0: none."""
    tokens_per_second: Interval | None
    """Trained tokens a second; null if the GPU's rates are unknown."""
    advice: list[MemorySaving] = field(default_factory=list)
    """Changes that save memory, the best first."""
    evidence: dict[str, str] = field(default_factory=dict)
    """Kind of evidence by field, with a note where there is one."""
    work: TrainingWorkload | None = field(default=None, repr=False, compare=False, metadata=NOT_IN_JSON)
    """What the run computes; not in JSON."""
    notes: list[str] = field(default_factory=list)
    """What the GPU's dtypes and software, or the base's positions, cost."""
    trainable_fraction: float = 0.0
    """Share of the numbers that are trained; computed."""
    need_bytes: Interval = _COMPUTED
    """What the device needs: reserved and runtime; computed."""

    def __post_init__(self) -> None:
        share = compute_trained_share(self.method, self.trainable_params, self.total_params)
        object.__setattr__(self, "trainable_fraction", share)
        object.__setattr__(self, "need_bytes", self.reserved_bytes + self.runtime_bytes)

    @property
    def can_be_made_to_fit(self) -> bool:
        """Whether a change of `advice` is known to make it fit."""
        return any(saving.verdict == "fits" for saving in self.advice)

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the answer as label and text: how much fits, how fast it is, and notes; "" is the reason's label."""
        yield "", self.reason
        for saving in self.advice[:1]:
            if (after := THEN_IT[saving.verdict]) is not None:
                yield "change", f"{saving.change} saves {format_bytes(saving.saves)}; then it {after}"
        rows = "rows" if self.batch > 1 else "row"
        longest = f"{self.batch} {rows} of up to {self.max_seq_len} tokens" if self.max_seq_len else ""
        is_same = (self.max_batch_size, self.seq_len) == (self.batch, self.max_seq_len)
        most = f"{_count(self.max_batch_size, 'rows')} of {self.seq_len}" if self.max_batch_size and not is_same else ""
        yield "largest that fits", " or ".join(filter(None, (longest, most))) or "nothing"
        if self.verdict == "does not fit":  # it has no speed
            return
        if self.tokens_per_second is None:
            is_here = "this machine" in self.evidence.get("usable_bytes", "")
            yield "speed", f"not known{'; `slimtune bench` measures it' if is_here else ''}"
        else:
            evidence = self.evidence.get("tokens_per_second", "")
            measured = f", {evidence}" if evidence.startswith("measured") else ""
            yield "speed", f"{self.format_speed()} tokens/s{measured}"

    def format_speed(self) -> str:
        """Return the tokens a second, "" if they are not known, or if the run does not fit."""
        if self.tokens_per_second is None or self.verdict == "does not fit":
            return ""
        return self.tokens_per_second.format("{:.0f}".format)

    def list_memory_figures(self) -> Iterator[LabelledFigure]:
        """Yield the memory by part, then what is reserved, needed and usable."""
        for part, size in self.parts.items():
            if part != "runtime" and size:  # a part that is 0 at the highest point of the step is not shown
                yield LabelledFigure(part, format_bytes(size), "parts")
        yield LabelledFigure("tensors, at most", format_bytes(self.allocated_bytes), "allocated_bytes")
        yield LabelledFigure("reserved for them", self.reserved_bytes.format(), "reserved_bytes")
        yield LabelledFigure("runtime", self.runtime_bytes.format(), "runtime_bytes")
        yield LabelledFigure("needed", self.need_bytes.format(), "need_bytes")
        yield LabelledFigure("usable", self.usable_bytes.format(), "usable_bytes")

    def list_run_figures(self, *, unified_memory: bool) -> Iterator[LabelledFigure]:
        """Yield the sizes of the run; with unified memory the CPU's is the GPU's."""
        percent, at_most = f"{100 * self.trainable_fraction:.3g} %", "at most " if self.adapter_bytes_at_most else ""
        trained = f"{format_count(self.trainable_params)} ({percent})"
        micro_batch = f"{_count(self.batch, 'rows')}, {self.max_tokens_per_micro_batch} tokens"
        host = "CPU memory, of the same memory" if unified_memory else "CPU memory"
        longest = f"longest row that fits, {self.batch} at once"
        yield LabelledFigure("micro-batch", micro_batch, "batch")
        yield LabelledFigure("longest row in it", f"{self.seq_len} tokens", "seq_len")
        yield LabelledFigure("micro-batches in a step", str(self.micro_batches), "micro_batches")
        yield LabelledFigure("weights held in", self.dtype, "dtype")
        yield LabelledFigure("trained parameters", trained, "trainable_params")
        yield LabelledFigure("adapter file", at_most + format_bytes(self.adapter_bytes), "adapter_bytes")
        yield LabelledFigure(host, format_bytes(self.host_bytes), "host_bytes")
        yield LabelledFigure("disk, beside the base's files", format_bytes(self.disk_bytes), "disk_bytes")
        yield LabelledFigure(longest, _count(self.max_seq_len, "tokens"), "max_seq_len")
        yield LabelledFigure(
            f"most rows of {self.seq_len} that fit", _count(self.max_batch_size, "rows"), "max_batch_size"
        )
        if self.verdict == "does not fit":
            return
        speed = self.format_speed()
        yield LabelledFigure("tokens in a second", speed or "not known", "tokens_per_second" if speed else "")


@dataclass(frozen=True, kw_only=True)
class CpuExpertsEstimate:
    """What a mixture takes in llama.cpp with the experts of its first layers in CPU memory; guessed."""

    n_cpu_moe: int
    """Layers that `--n-cpu-moe` names: the fewest with which the GPU surely has the rest."""
    layers: int
    """Of them, those with experts."""
    expert_layers: int
    """Layers with experts that the base has."""
    need_bytes: Interval
    """What the GPU needs."""
    host_bytes: int
    """Weights in CPU memory."""
    decode_tokens_per_second: Interval | None
    """Of a request, after `context` tokens; null: not known."""
    prefill_tokens_per_second: Interval | None
    """Of a prompt."""

    def format(self) -> str:
        """Return all of it in one sentence."""
        some = "all" if self.layers == self.expert_layers else f"{self.layers} of {self.expert_layers}"
        text = f"fits with the experts of {some} layers in CPU memory (llama.cpp --n-cpu-moe {self.n_cpu_moe}): "
        text += f"{self.need_bytes.format()} on the GPU, {format_bytes(self.host_bytes)} in CPU memory"
        decode, prefill = self.decode_tokens_per_second, self.prefill_tokens_per_second
        if decode is None or prefill is None:
            return f"{text}; its speed is not known"
        written, read = (n.format(format_three_digits) for n in (decode, prefill))
        return f"{text}; {written} tokens/s written, {read} tokens/s of a prompt read, by the CPU's memory (guessed)"


@dataclass(frozen=True, kw_only=True)
class ServingEstimate:
    """What serving a model takes; sizes in bytes."""

    engine: str
    """What serves it: ollama, llama.cpp, vllm or mlx."""
    precision: str
    """Of the weights; a GGUF file type for Ollama and llama.cpp."""
    context: int
    """Tokens of one request, prompt and answer."""
    sequences: int
    """Requests of this length at once."""
    cache: str
    """Precision of keys and values."""
    merged: bool
    """Whether the adapter is part of the weights; else it is loaded beside them."""
    file_bytes: int
    """Of the GGUF file; for vLLM, of the weights."""
    bits: float
    """Per weight, on average over the file."""
    parts: dict[str, int]
    """Bytes on the device: weights, adapter, cache, and the constant state of recurrent layers if the base has some."""
    host_bytes: int
    """Weights that llama.cpp keeps in CPU memory (the token embeddings)."""
    compute_bytes: Interval
    """Buffers of a forward pass."""
    runtime_bytes: Interval
    """The device's runtime, libraries and graphs."""
    usable_bytes: Interval | None
    """What the GPU gives the engine: surely, at most; null without a GPU."""
    max_context: int | None
    """Tokens of the longest request that surely fits; null without a GPU, 0: none."""
    decode_tokens_per_second: Interval | None
    """Of a request, after `context` tokens; null: not known, or it is not on the GPU."""
    prefill_tokens_per_second: Interval | None
    """Of a prompt."""
    verdict: MemoryVerdict | None
    """Whether the device has the bytes; null without a GPU."""
    reason: str
    """Of the verdict, in one sentence."""
    cpu_experts: CpuExpertsEstimate | None = None
    """How llama.cpp serves a mixture that does not fit; null: it fits, is no mixture, or does not fit so either."""
    notes: list[str] = field(default_factory=list)
    """What the estimate leaves out."""
    evidence: dict[str, str] = field(default_factory=dict)
    """Kind of evidence by field."""
    need_bytes: Interval = _COMPUTED
    """What the device needs; computed."""

    def __post_init__(self) -> None:
        weights = sum(self.parts.values())
        need = Interval(weights, weights) + self.compute_bytes + self.runtime_bytes
        object.__setattr__(self, "need_bytes", need)

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the answer as label and text; "" is the reason's label."""
        adapter = "the adapter merged" if self.merged else "the adapter beside it"
        yield "", f"{self.precision}, {adapter}, {self.context} tokens of context: {self.reason}"
        decode, prefill = self.decode_tokens_per_second, self.prefill_tokens_per_second
        if self.cpu_experts is not None:
            yield "", self.cpu_experts.format()
        elif decode is None or prefill is None:
            yield "speed", "not known"
        else:
            kinds = (self.evidence.get(f"{name}_tokens_per_second") for name in ("decode", "prefill"))
            guessed = [" (guessed)" if kind == "guessed" else "" for kind in kinds]
            written = f"{decode.format(format_three_digits)} tokens/s written behind {self.context} tokens{guessed[0]}"
            yield "speed", f"{written}, {prefill.format(format_three_digits)} tokens/s of a prompt read{guessed[1]}"
        yield from (("note", note) for note in self.notes)

    def list_memory_figures(self) -> Iterator[LabelledFigure]:
        """Yield the memory by part, the file, the longest context and the speed."""
        for part, size in self.parts.items():
            yield LabelledFigure(part, format_bytes(size), part)
        yield LabelledFigure("buffers", self.compute_bytes.format(), "compute_bytes")
        yield LabelledFigure("runtime", self.runtime_bytes.format(), "runtime_bytes")
        yield LabelledFigure("needed", self.need_bytes.format(), "need_bytes")
        yield LabelledFigure("CPU memory", format_bytes(self.host_bytes), "host_bytes")
        yield LabelledFigure("file", format_bytes(self.file_bytes), "file_bytes")
        yield LabelledFigure("longest context", _count(self.max_context or 0, "tokens"), "max_context")
        decode, prefill = self.decode_tokens_per_second, self.prefill_tokens_per_second
        if decode is not None and prefill is not None:
            written, read = (n.format(format_three_digits) for n in (decode, prefill))
            yield LabelledFigure("tokens written in a second", written, "decode_tokens_per_second")
            yield LabelledFigure("tokens of a prompt in a second", read, "prefill_tokens_per_second")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun if n > 1 else noun.removesuffix('s')}" if n else "none fits"
