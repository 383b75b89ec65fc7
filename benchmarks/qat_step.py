"""What a training step through the rounding of a GGUF costs beside a LoRA step, in processor time.

    python benchmarks/qat_step.py [PRECISION ...] [--model smollm2-135m] [--rows 8] [--tokens 96] [--rounds 3]

Both step on the same packed rows, in turns, so that what else runs on the machine slows both. A step is the forward and
backward passes and AdamW; the rounded weights are computed once in each step.
"""

import argparse
import time
from statistics import median

import torch

from slimtune import LoraConfig, get_peft_model
from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.models.loader import load_base
from slimtune.core.training.loss import forward_backward, make_collator
from slimtune.core.training.memory_savings import apply_memory_savings
from slimtune.core.training.optimizer import build_optimizer


class Stepper:
    """Takes steps of one model, and keeps what each took in processor seconds."""

    def __init__(self, source: str, precision: str | None, rows: int, tokens: int) -> None:
        base = load_base(source, dtype="auto").model
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", qat=precision)
        self.model = get_peft_model(base, config).train()
        apply_memory_savings(self.model)
        self.optimizer = build_optimizer(self.model)
        ids = [[(7 * i * i + 3 * j) % 1000 for i in range(tokens)] for j in range(rows)]
        self.batch = make_collator(self.model, 0)([{"input_ids": row, "labels": row} for row in ids])
        self.seconds: list[float] = []

    def step(self) -> None:
        started = time.process_time()
        with using_packed_attention(self.model):
            forward_backward(self.model, [self.batch])
        self.optimizer.step()
        self.model.zero_grad()
        self.seconds.append(time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precisions", nargs="*", default=["Q4_0"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for precision in args.precisions:
        torch.manual_seed(0)
        steppers = [Stepper(args.model, p, args.rows, args.tokens) for p in (None, precision)]
        for _ in range(args.rounds + 1):  # the first finds the blocks' scales
            for stepper in steppers:
                stepper.step()
        plain, rounded = (s.seconds[1:] for s in steppers)
        ratio = median(b / a for a, b in zip(plain, rounded, strict=True))
        print(f"{precision}: {ratio:.2f} of a LoRA step ({median(plain):.2f} s of processor time)", flush=True)


if __name__ == "__main__":
    main()
