"""The ways to train that `benchmarks/gpu.py` compares: LoRA r = 16 on all linear maps of a bf16 base, adapters in fp32.

A way gives, for the rows of a step, the batches of its passes, and the loss of one as a share of the step's. `parts`
begins at 1 and is doubled whenever memory does not suffice.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from .setting import LORA, MAPS, Row, base, learned, packed, padded

Spec = dict[str, Any]


class Absent(Exception):
    """This way cannot be run here; the text says why."""


@dataclass
class Way:
    """How to train.

    Args:
        model: the adapted model.
        passes: rows of a step, parts → batches, on the CPU.
        loss: batch on the device, targets in the whole step → loss; None: the batch is run and gives no loss.
    """

    model: Any
    passes: Callable[[list[Row], int], list[Any]]
    loss: Callable[[Any, int], Any]


def slimtune(spec: Spec, checkpointing: bool = False, by_segment: bool = False) -> Way:
    from slimtune import LoraConfig, get_peft_model
    from slimtune.core.attention import attention_functions as register
    from slimtune.core.models.lm_head import require_matching_lm_head_loss
    from slimtune.core.training.loss import choose_sufficient_micro_batch_tokens, compute_step_loss, make_collator

    if by_segment:
        register.should_use_flex_attention = lambda *_: False  # type: ignore[assignment]
    model: Any = get_peft_model(base(spec), LoraConfig(**LORA, target_modules="all-linear"))
    if checkpointing:
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(model, n) for n in names if hasattr(model, n))({"use_reentrant": False})
    collator = make_collator(model, 0)
    require_matching_lm_head_loss(model)
    room = choose_sufficient_micro_batch_tokens(model, collator, 1024)

    def passes(rows: list[Row], parts: int) -> list[Any]:
        collator.max_tokens = room // parts
        return collator.make_micro_batches(rows)

    ExitStack().enter_context(register.using_packed_attention(model))
    return Way(model, passes, lambda batch, targets: compute_step_loss(model, batch, targets))


def peft(spec: Spec, lay: Callable[[list[Row]], Any] = packed, attention: str = "sdpa", liger: bool = False) -> Way:
    need("peft")
    if attention == "flash_attention_2":
        need("flash_attn")
    if liger:
        need("liger_kernel")
        if spec["model"]:
            raise Absent("only the Llamas made here")
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
        attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM")
    return _hugging(get_peft_model(base(spec, attention), config), lay)


def unsloth(spec: Spec) -> Way:
    need("unsloth")
    folder = spec["model"] or tempfile.mkdtemp(prefix="gpu-bench-")
    if not spec["model"]:
        subprocess.run([sys.executable, "-m", "gpu_ways.setting", json.dumps(spec), folder], check=True)
    import unsloth  # before transformers, which it patches

    model, _ = unsloth.FastLanguageModel.from_pretrained(folder, max_seq_length=8192, dtype=None, load_in_4bit=False)
    model = unsloth.FastLanguageModel.get_peft_model(
        model, **LORA, target_modules=MAPS, bias="none", use_gradient_checkpointing=False
    )

    def lay(rows: list[Row]) -> Any:
        import torch

        lengths = torch.tensor([len(r["input_ids"]) for r in rows], dtype=torch.int32)
        return packed(rows) | {"packed_seq_lengths": lengths}

    return _hugging(model, lay)


def _hugging(model: Any, lay: Callable[[list[Row]], Any]) -> Way:
    def passes(rows: list[Row], parts: int) -> list[Any]:
        return [lay(rows[i::parts]) for i in range(parts) if rows[i::parts]]

    def loss(batch: Any, targets: int) -> Any:
        return model(**batch, use_cache=False, num_items_in_batch=targets).loss

    return Way(model, passes, loss)


def ceiling(spec: Spec) -> Way:
    """The frozen model's own products, forwards and to their inputs' gradients: no LoRA step can be faster."""
    import torch
    from torch import nn

    model = base(spec).requires_grad_(False)
    head = model.get_output_embeddings()
    maps = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]

    def loss(batch: Any, targets: int) -> None:
        tokens, learns = batch
        states: dict[tuple[int, int], Any] = {}
        for module in (*maps, head):
            n = learns if module is head else tokens
            for size in module.weight.shape:
                if (n, size) not in states:
                    states[n, size] = torch.randn(n, size, device=module.weight.device, dtype=module.weight.dtype)
            out, into = module.weight.shape
            states[n, into] @ module.weight.t()
            states[n, out] @ module.weight

    def passes(rows: list[Row], parts: int) -> list[Any]:
        of = [rows[i::parts] for i in range(parts)]
        return [(sum(len(r["input_ids"]) for r in some), sum(map(learned, some))) for some in of if some]

    return Way(model, passes, loss)


def need(package: str) -> None:
    """Raise where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")


WAYS: dict[str, Callable[[Spec], Way]] = {
    "slimtune": slimtune,
    "slimtune checkpointing": lambda spec: slimtune(spec, checkpointing=True),
    "slimtune by segment": lambda spec: slimtune(spec, by_segment=True),
    "peft padded": lambda spec: peft(spec, padded),
    "peft packed": peft,
    "peft packed flash": lambda spec: peft(spec, attention="flash_attention_2"),
    "peft packed liger": lambda spec: peft(spec, liger=True),
    "unsloth packed": unsloth,
    "ceiling": ceiling,
}
