"""The ceiling of `benchmarks/step.py`: `python ceiling.py SPEC.json ceiling`.

What a step cannot do without, and nothing else: the frozen weights' own products for the same positions, forwards and
for the gradient of the input, layer by layer in order with the real weights, and the head's at the supervised
positions. No attention, norms, adapters or optimizer, no memory taken anew. The gradient of what goes into the first
layer's q, k and v is nobody's need, so it is left out.
"""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from worker import Turns

from slimtune.core.data.collator import Collator
from slimtune.core.training.loss import TOKENS_ON_CPU

FIRST = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj")
SQUARE = 2048


class Products:
    """The products of some weights, with inputs and outputs that lie ready."""

    def __init__(self, model: Any) -> None:
        self.head: Tensor = model.get_output_embeddings().weight
        linears = [(n, m.weight) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        self.layers = [(w, not n.endswith(FIRST)) for n, w in linears if w is not self.head]
        self.held: dict[tuple[str, int], Tensor] = {}

    def lying(self, what: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return `(rows, width)` of random numbers, the same memory each time."""
        key = (what, width)
        if key not in self.held or len(self.held[key]) < rows:
            self.held[key] = torch.randn(rows, width).to(dtype)
        return self.held[key][:rows]

    def run(self, weight: Tensor, rows: int, backwards: bool) -> int:
        """Multiply by a weight `(out, in)`, or backwards by its transpose; return the floating-point operations."""
        n, k = weight.shape
        x, y = self.lying("x", rows, k, weight.dtype), self.lying("y", rows, n, weight.dtype)
        if backwards:
            torch.mm(y, weight, out=self.lying("gx", rows, k, weight.dtype))
        else:
            torch.mm(x, weight.t(), out=self.lying("gy", rows, n, weight.dtype))
        return 2 * rows * n * k

    def step(self, positions: int, supervised: int) -> int:
        """Run the products of one pass; return the floating-point operations."""
        total = sum(self.run(w, positions, False) for w, _ in self.layers)
        total += sum(self.run(self.head, supervised, backwards) for backwards in (False, True))
        return total + sum(self.run(w, positions, True) for w, wanted in reversed(self.layers) if wanted)

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of a square product."""
        a, b, c = (self.lying(f"{name}{dtype}", SQUARE, SQUARE, dtype) for name in "abc")
        torch.mm(a, b, out=c)
        began = time.perf_counter()
        torch.mm(a, b, out=c)
        return 2 * SQUARE**3 / (time.perf_counter() - began)


@torch.no_grad()
def main() -> None:
    turns = Turns()
    spec = turns.spec
    dtype = getattr(torch, spec["dtype"])
    products = Products(AutoModelForCausalLM.from_pretrained(spec["base"], dtype=dtype))
    longest = max(len(row["input_ids"]) for row in spec["rows"])
    collator = Collator(
        spec["pad_token_id"], with_packed_layout=True, share_prefix=False, max_tokens=max(longest, TOKENS_ON_CPU)
    )
    passes = [
        [(p["input_ids"].numel(), len(p["targets"])) for step in steps for p in collator.make_micro_batches(step)]
        for steps in turns.rounds
    ]
    every = [pass_ for some in passes for pass_ in some]
    products.step(max(n for n, _ in every), max(k for _, k in every))  # takes all memory
    turns.ready(trained=0, adapters="none")
    while (number := turns.wait()) is not None:
        began = time.perf_counter()
        operations = sum(products.step(*pass_) for pass_ in passes[number])
        seconds = time.perf_counter() - began
        square = {str(kind).removeprefix("torch."): products.rate(kind) for kind in (torch.bfloat16, torch.float32)}
        positions = sum(positions for positions, _ in passes[number])
        turns.done(number, seconds, [], positions, operations=operations, square=square)


if __name__ == "__main__":
    main()
