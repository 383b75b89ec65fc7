"""What to plan: a base, a GPU, a method and the settings of a run."""

import copy
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self

import torch
from transformers import PreTrainedConfig

from ..core.adapters.peft_config import PeftConfig
from ..core.config import DataSettings, Recipe
from ..core.data.example_lengths import (
    ALL_SUPERVISED,
    DatasetRowComposition,
    ExampleLength,
    count_tokens_per_row,
)
from ..core.models.base_config import LoadedBaseConfig, get_max_positions, load_base_config
from ..core.models.dtype import pick_dtype
from ..core.models.quantization import get_quantization_settings, get_stored_quantization
from ..core.training.loss import TOKENS_ON_CPU, TOKENS_ON_GPU
from ..errors import UsageError
from ..extras.integer_checkpoints import METHODS, read_integer_checkpoint
from ..extras.stored_quantizations import DEQUANTIZED
from ..objectives.distill import Distill
from ..objectives.teacher_objective import TeacherObjective
from .fake_quantization import fake_quantize_model, resolve_quantization_kind
from .gpu_specs import GpuSpec, require_trainable_gpu
from .meta_model import build_adapted_meta_model
from .packed_lengths import count_packed_tokens, count_tokens_with_shared_prompt, remove_prefix_sharing
from .sampling_memory import count_sampling_bytes

QUANTILES = 64
"""Examples that stand for all of the data in an estimate of the speed."""
_FIRST_LAYERS_FIELDS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Fields of configs with the number of a mixture's first layers that have no experts."""
MAX_SEQ_LEN = 1 << 22
"""Longest row that a plan considers."""


@dataclass(frozen=True)
class TeacherWorkload:
    """What a teacher reads beside the rows of a micro-batch, and the divergence from it."""

    prefix_tokens: int  # that all its rows begin with, as a context
    row_tokens: int  # that each row has more, that context included
    beta: float  # of the divergence: 0 forward KL, 1 reverse KL
    top_k: int | None = None  # likeliest tokens that are known of a teacher elsewhere; None: it is computed here


@dataclass(frozen=True)
class MicroBatchWorkload:
    """One micro-batch, in the numbers that decide its memory and time."""

    base_config: PreTrainedConfig
    method: PeftConfig
    dtype: torch.dtype  # of the base's weights
    lengths: tuple[ExampleLength, ...]  # of the examples of a micro-batch
    micro_batches_per_step: int = 1  # in an optimizer step
    device: Literal["cpu", "cuda", "mps"] = "cpu"  # decides which kernels run
    gradient_checkpointing: bool = False
    offload_activations: bool = False  # keep checkpointed activations in CPU memory
    mlp_tile_size: int | None = None  # tokens that norms and MLPs process at once; None: all
    optimizer: str = "adamw"  # as in `build_optimizer`
    quantization: str | None = None  # one of fake_quantization.KINDS for the base's linear layers
    packing: bool = True  # rows in one sequence; else padded
    shared_prefix_tokens: int = 0  # that all examples begin with, as a system prompt; packing stores them once
    supervised: float = 1.0  # share of the tokens, apart from prompts in `lengths`, that have a loss
    teacher: TeacherWorkload | None = None  # the rows as a teacher reads them, if there is one
    layer_kinds: tuple[int, ...] = ()  # a number for each layer, the same for layers that are alike; (): all are

    @property
    def row_tokens(self) -> list[int]:
        """Tokens of each row."""
        return [n for length in self.lengths for n in count_tokens_per_row(length)]

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of the micro-batch, shared prefixes once."""
        return count_packed_tokens(self.lengths, self.shared_prefix_tokens)

    @property
    def num_layers(self) -> int:
        return self.base_config.get_text_config().num_hidden_layers

    def with_num_layers(self, num_layers: int) -> Self:
        """Return the job for a base with only its first layers."""
        return self.with_layers(range(num_layers))

    def with_layers(self, indices: Sequence[int]) -> Self:
        """Return the job for a base with only the layers at these places, in this order."""
        config = copy.deepcopy(self.base_config)
        text, num_layers = config.get_text_config(), self.num_layers
        own_fields = {int(i): fields for i, fields in (text.to_dict().get("per_layer_config") or {}).items()}
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == num_layers:
                setattr(text, name, [value[i] for i in indices])
        for name in _FIRST_LAYERS_FIELDS:
            if isinstance(first := getattr(text, name, None), int):
                setattr(text, name, sum(i < first for i in indices))
        text.num_hidden_layers = len(indices)
        if shared := getattr(text, "num_kv_shared_layers", 0):  # the last layers read the keys of earlier ones
            text.num_kv_shared_layers = sum(i >= num_layers - shared for i in indices)
        if own_fields:
            text.per_layer_config = {place: own_fields[i] for place, i in enumerate(indices) if i in own_fields}
        return replace(self, base_config=config, layer_kinds=())

    def build_model(self) -> Any:
        """Return the job's model on `meta`, with its adapter attached.

        Raises:
            UsageError: the targets match nothing, there is nothing to quantize, or every weight of a quantized base is
                to be trained.
        """
        return build_adapted_meta_model(
            self.base_config,
            self.method,
            self.dtype,
            checkpointing=self.gradient_checkpointing,
            offload=self.offload_activations,
            tile=self.mlp_tile_size,
            change_base=partial(fake_quantize_model, quantization=self.quantization) if self.quantization else None,
        )


@dataclass(frozen=True)
class PlanRequest:
    """A run to plan: fields without a comment are those of `MicroBatchWorkload`."""

    model: LoadedBaseConfig
    gpu: GpuSpec
    method: PeftConfig
    batch_size: int = 1  # examples
    seq_len: int = 1024  # tokens of the longest row
    gradient_accumulation_steps: int = 1
    dtype: str = "auto"  # "auto": bfloat16 where the GPU supports it, else float32
    optimizer: str = "adamw"
    quantization: str | None = None
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    mlp_tile_size: int | None = None
    packing: bool = True
    split_batch: bool = True  # training may split a batch into micro-batches that fit
    save_total_limit: int = 2  # checkpoints that a run keeps beside its best
    rows_per_example: int = 1  # 2 for preference pairs, if `lengths` are not known
    lengths: tuple[ExampleLength, ...] = ()  # of the longest examples, if known; replaces batch_size and seq_len
    quantiles: tuple[ExampleLength, ...] = ()  # of examples at even shares of the data, if known; decide the speed
    content: DatasetRowComposition = ALL_SUPERVISED  # of the examples, if known
    max_tokens: int | None = None  # in a micro-batch, a longer example goes alone; None: no limit
    processes: int = 1  # that train together, each on a GPU of its own
    fsdp: bool = False  # shard the base over the processes; else each holds all of it
    sampling_bytes: int = 0  # keys and values of the answers that are sampled before a step
    teacher: TeacherWorkload | None = None
    teacher_bytes: int = 0  # weights of a teacher that is another base
    notes: tuple[str, ...] = ()  # what the plan must say about the request

    def __post_init__(self) -> None:
        if self.seq_len > MAX_SEQ_LEN:
            raise UsageError(f"a row of {self.seq_len} tokens", f"at most {MAX_SEQ_LEN}", "give the length in tokens")

    def job(self) -> MicroBatchWorkload:
        """Return the job with all examples of a batch in one micro-batch, the longest first."""
        rows = self.rows_per_example
        example = self.seq_len if rows == 1 else (0, *[self.seq_len] * rows)
        return MicroBatchWorkload(
            base_config=self.model.config,
            method=self.method,
            dtype=pick_dtype(self.dtype, has_bf16=None if self.gpu.kind == "cpu" else self.gpu.bf16),
            lengths=tuple(
                sorted(self.lengths or (example,) * self.batch_size, key=count_tokens_with_shared_prompt, reverse=True)
            ),
            micro_batches_per_step=self.gradient_accumulation_steps,
            device=self.gpu.device,
            gradient_checkpointing=self.gradient_checkpointing,
            offload_activations=self.offload_activations,
            mlp_tile_size=self.mlp_tile_size,
            optimizer=self.optimizer,
            quantization=self.quantization,
            packing=self.packing,
            shared_prefix_tokens=self.content.shared_prefix_tokens,
            teacher=self.teacher,
        )


def pick_length_quantiles(ascending_lengths: Sequence[ExampleLength], count: int) -> tuple[ExampleLength, ...]:
    """Return `count` of ordered lengths, evenly spread, the longest first."""
    return tuple(ascending_lengths[int((i + 0.5) * len(ascending_lengths) / count)] for i in reversed(range(count)))


def make_teacher_workload(objective: Any, composition: DatasetRowComposition) -> TeacherWorkload | None:
    """Return what an objective's teacher reads; None if it has none."""
    if not isinstance(objective, TeacherObjective):
        return None
    if isinstance(objective, Distill) and not objective.computes_teacher_here:
        return TeacherWorkload(0, 0, 0.0, objective.loss_top_k)
    return TeacherWorkload(composition.teacher_prefix_tokens, composition.teacher_row_tokens, float(objective.beta))


def count_teacher_bytes(recipe: Recipe, gpu: GpuSpec) -> int:
    """Return the bytes of the weights of a teacher that is another base; 0 if there is none."""
    name = recipe.task.settings.get("teacher_model_name_or_path")
    if not name or not recipe.objective().computes_teacher_here:
        return 0
    info = load_base_config(name, trust_remote_code=recipe.model.trust_remote_code)
    dtype = pick_dtype(recipe.model.dtype, has_bf16=None if gpu.kind == "cpu" else gpu.bf16)
    model = build_adapted_meta_model(info.config, None, dtype)
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def build_plan_request(
    recipe: Recipe,
    gpu: GpuSpec,
    example_lengths: Sequence[ExampleLength] = (),
    processes: int = 1,
    row_composition: DatasetRowComposition = ALL_SUPERVISED,
) -> PlanRequest:
    """Return the request to plan a recipe on a GPU.

    Args:
        recipe: the run.
        gpu: where it runs.
        example_lengths: of every example, if the data were read; else every row has the recipe's maximum length.
        processes: processes that train together.
        row_composition: of the examples, as far as it is known.

    Raises:
        UsageError: the base is unknown, or its checkpoint contradicts `model.quantization`.
        ModelError: the base's config cannot be read, or its quantization cannot be planned.
    """
    require_trainable_gpu(gpu)
    model, train = recipe.model, recipe.train
    info = load_base_config(model.name, trust_remote_code=model.trust_remote_code, revision=model.revision)
    seq_len, notes = recipe.data.max_seq_len, []
    positions = get_max_positions(info.config)
    longest = max(map(max, map(count_tokens_per_row, example_lengths)), default=seq_len)
    if positions is not None and longest > positions:
        if example_lengths or seq_len != DataSettings.max_seq_len:
            message = f"rows of {longest} tokens, and {info.name} has {positions} positions"
            raise UsageError(message, "rows within the base's positions", f"--max-seq-len {positions}")
        seq_len, notes = positions, [f"Rows have at most {positions} tokens: {info.name} has no more positions."]
    stored = get_stored_quantization(info.config)
    quantization = resolve_quantization_kind(info.config, model.quantization)
    if stored in DEQUANTIZED:
        notes.append(
            f"The checkpoint is stored in {stored}; it is dequantized as it is loaded, and takes what is planned here."
        )
    elif stored in METHODS:
        held_in = read_integer_checkpoint(stored, get_quantization_settings(info.config)).describe()
        notes.append(f"The checkpoint is stored in {held_in}; its weights stay so, and each product dequantizes one.")
    max_tokens = train.max_tokens_per_micro_batch
    if max_tokens == "auto":
        max_tokens = TOKENS_ON_GPU if gpu.device == "cuda" else TOKENS_ON_CPU
    objective = recipe.objective()
    notes += objective.list_plan_notes()
    if isinstance(objective, TeacherObjective) and not objective.computes_teacher_here:
        row_composition = row_composition._replace(samples_answers=False)
    if not train.share_prefix:
        example_lengths, row_composition = (
            [*map(remove_prefix_sharing, example_lengths)],
            row_composition._replace(shared_prefix_tokens=0),
        )
    same = ("gradient_accumulation_steps", "optimizer", "gradient_checkpointing", "offload_activations",
            "mlp_tile_size", "save_total_limit")  # fmt: skip
    return PlanRequest(
        model=info,
        packing=train.packing is not False,
        gpu=gpu,
        method=recipe.method_config(),
        seq_len=seq_len,
        notes=tuple(notes),
        sampling_bytes=count_sampling_bytes(
            objective,
            info.config,
            train.rows_per_step,
            example_lengths,
            seq_len,
            pick_dtype(model.dtype, has_bf16=None if gpu.kind == "cpu" else gpu.bf16),
            row_composition,
        ),
        dtype=model.dtype,
        quantization=quantization,
        split_batch=train.max_tokens_per_micro_batch == "auto",
        lengths=tuple(heapq.nlargest(train.batch_size, example_lengths, key=count_tokens_with_shared_prompt)),
        quantiles=pick_length_quantiles(sorted(example_lengths, key=count_tokens_with_shared_prompt), QUANTILES)
        if example_lengths
        else (),
        batch_size=train.batch_size,
        rows_per_example=objective.rows_per_example,
        teacher=make_teacher_workload(objective, row_composition),
        teacher_bytes=count_teacher_bytes(recipe, gpu),
        content=row_composition,
        max_tokens=max_tokens,
        processes=processes,
        fsdp=train.fsdp and processes > 1,
        **{name: getattr(train, name) for name in same},
    )
