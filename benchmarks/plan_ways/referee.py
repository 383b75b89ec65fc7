"""What a job's real step takes on this machine's CPU: sums of the events of torch's own allocator."""

import gc
import itertools
import tempfile
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from slimtune import get_peft_model
from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.config.objective_registry import load_objective_class
from slimtune.core.data.example_lengths import ExampleLength, count_tokens_per_row
from slimtune.core.training.loss import forward_backward, make_collator
from slimtune.core.training.memory_savings import apply_memory_savings
from slimtune.core.training.optimizer import build_optimizer
from slimtune.extras.bitsandbytes_loading import make_load_options
from slimtune.planning.fake_tensors import list_module_tensors
from slimtune.planning.plan_request import MicroBatchWorkload


def measured(job: MicroBatchWorkload) -> tuple[int, int]:
    """Build, adapt and train for two optimizer steps; return the bytes held after the first, and the second's most.

    Weights and rows are random. Everything that the allocator gives and takes from the model's first weight on counts,
    as the profiler's `[memory]` events tell it. Of a quantized base they do not tell all that is given back while it is
    loaded: there the state is the bytes of the tensors that are there, and the events count from then on.
    """
    gc.collect()  # what is left from before must not be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as done:
        held = _train(job)
    found = done.profiler.kineto_results.events()
    begin, end = next((e.start_ns(), e.end_ns()) for e in found if e.name() == "measured step")
    events = sorted(((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]"), key=lambda e: e[0])
    state = held if job.quantization else sum(size for at, size in events if at < begin)
    during = itertools.accumulate((size for at, size in events if begin <= at <= end), initial=state)
    return state, max(during)


def _train(job: MicroBatchWorkload) -> int:
    """Return the bytes of the model's and the optimizer's tensors."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(job.base_config, dtype=job.dtype)
    if job.quantization is not None:
        model = quantized(model, job.quantization)
    model = get_peft_model(model, job.method)
    job.method.on_train_begin(100)
    apply_memory_savings(model, job.gradient_checkpointing, job.offload_activations, job.mlp_tile_size)
    model.train()
    optimizer = build_optimizer(model, job.optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    collator = make_collator(model, 0, packing=job.packing)
    vocabulary = model.config.get_text_config().vocab_size

    pairs = any(isinstance(length, tuple) for length in job.lengths)
    most = max(len(count_tokens_per_row(length)) for length in job.lengths)  # the reference of shorter lists is padded
    objective: Any = load_objective_class("dpo" if pairs else "sft")()

    def draw(length: ExampleLength) -> dict[str, Any]:
        prefix, *answers = (0, length) if isinstance(length, int) else length
        prompt, rows = ids(prefix), [ids(n) for n in answers]
        example = {"input_ids": [t for row in rows for t in prompt + row], "row_lengths": [prefix + n for n in answers]}
        example["labels"] = [t for row in rows for t in [-100] * prefix + row]
        ranked = {"row_scores": [*range(len(rows), 0, -1)], "reference": [-1.0] * most}
        return example | (ranked if pairs else {})

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,)).tolist()

    def step(number: int) -> None:
        examples = [[draw(length) for length in job.lengths] for _ in range(job.micro_batches_per_step)]
        packs = [collator(some) for some in examples]
        items = objective.count_items([e for some in examples for e in some])
        forward_backward(model, packs, objective=objective, num_items=items)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        model.update_and_allocate(number)
        optimizer.zero_grad()

    with using_packed_attention(model):
        step(1)
        gc.collect()
        moments = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        inner = [t for m in model.modules() for t in quantization_tensors(m)]
        every = [*list_module_tensors(model), *inner, *moments]
        kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in every}
        with record_function("measured step"):
            step(2)
    return sum(kept.values())


def quantization_tensors(module: Any) -> list[torch.Tensor]:
    """Return what bitsandbytes keeps of a quantized layer, beside its parameters."""
    state = getattr(getattr(module, "weight", None), "quant_state", None) or getattr(module, "state", None)
    states = [s for s in (state, getattr(state, "state2", None)) if hasattr(s, "__dict__")]
    return [t for s in states for t in vars(s).values() if isinstance(t, torch.Tensor)]


def quantized(model: Any, kind: str) -> Any:
    """Return the model as transformers and bitsandbytes load it in "int8" or "nf4-single", slimtune in "nf4"."""
    if kind == "nf4-single":  # of a checkpoint only
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": model.dtype}
        how = BitsAndBytesConfig(**settings)
    else:
        options = make_load_options(model.config, kind, False, model.dtype, torch.device("cpu"))
        how = options["quantization_config"]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, quantization_config=how, dtype=model.dtype, device_map="cpu")
