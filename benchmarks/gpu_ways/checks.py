"""Are the gradients right on this device? Small models in fp32, TF32 off; ‖a − b‖ / ‖b‖ of each tensor, the largest.

python -m gpu_ways.checks DEVICE        a JSON object a line: the device's facts, then each check
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from slimtune import LoraConfig, get_peft_model
from slimtune.core.attention import attention_functions as register
from slimtune.core.attention import packed_attention, packed_layout
from slimtune.core.data.collator import Collator
from slimtune.core.kernels import cross_entropy
from slimtune.core.kernels.lora_linear import low_rank_linear
from slimtune.core.training.loss import compute_step_loss, count_supervised_targets

LIMIT = 1e-4
SHAPE = {
    "vocab_size": 512, "hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0,
}  # fmt: skip
Gradients = dict[str, Tensor]


def facts(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"device": str(device), "torch": torch.__version__, "hip": torch.version.hip}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"name": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}
        found |= {"free_bytes": free, "total_bytes": total}
    return found


def apart(a: Gradients, b: Gradients) -> float:
    """The largest norm-relative difference of a tensor."""
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).norm() / b[n].norm()).item() for n in b)


def adapted(device: torch.device, window: int | None = None, drop: float = 0.0) -> Any:
    torch.manual_seed(0)
    base: Any
    if window is None:
        base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    else:
        base = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=window))
    base.set_attn_implementation("sdpa")
    model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=drop, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.to(device).train()


def rows() -> list[dict[str, Any]]:
    """Seven rows below a beginning, three of them below a second one; and one that shares nothing."""
    draw = torch.Generator().manual_seed(1)

    def some(n: int) -> list[int]:
        return torch.randint(3, SHAPE["vocab_size"], (n,), generator=draw).tolist()

    first, second = some(70), some(33)
    ids = [first + (second if i < 3 else []) + some(40 + 9 * i) for i in range(7)] + [some(90)]
    return [{"input_ids": row, "labels": [-100] * (len(row) // 2) + row[len(row) // 2 :]} for row in ids]


def gradients(model: Any, loss: Callable[[], Iterator[Tensor]]) -> Gradients:
    model.zero_grad()
    for part in loss():
        part.backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}


def alone(model: Any) -> Gradients:
    """Each row by itself, through transformers' own attention and loss."""
    device, every = next(model.parameters()).device, rows()

    def loss() -> Iterator[Tensor]:
        for row in every:
            ids, labels = (torch.tensor([row[k]], device=device) for k in ("input_ids", "labels"))
            mean = model(input_ids=ids, labels=labels, use_cache=False).loss
            yield mean * count_supervised_targets(row) / sum(map(count_supervised_targets, every))

    return gradients(model, loss)


def laid(model: Any, room: int | None = None, share: bool = True) -> Gradients:
    """As slimtune trains."""
    device, every = next(model.parameters()).device, rows()
    packs = Collator(0, with_packed_layout=True, share_prefix=share, max_tokens=room).make_micro_batches(every)
    assert room is None or len(packs) > 1

    def loss() -> Iterator[Tensor]:
        for pack in packs:
            pack = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in pack.items()}
            yield compute_step_loss(model, pack, sum(map(count_supervised_targets, every)))

    with register.using_packed_attention(model):
        return gradients(model, loss)


@contextmanager
def by_segment() -> Iterator[None]:
    """Without flex attention."""
    runs_here = register.should_use_flex_attention
    register.should_use_flex_attention = lambda *_: False  # type: ignore[assignment]
    try:
        yield
    finally:
        register.should_use_flex_attention = runs_here


@contextmanager
def counted() -> Iterator[list[int]]:
    """Give a list to which each call of flex attention is added."""
    run, calls = register.run_compiled_flex_attention, []

    def counting(query: Tensor, *rest: Any) -> Tensor:
        calls.append(query.shape[2])
        return run(query, *rest)

    register.run_compiled_flex_attention = counting
    try:
        yield calls
    finally:
        register.run_compiled_flex_attention = run


def models(device: torch.device) -> Iterator[tuple[str, float, float]]:
    model = adapted(device)
    want = alone(model)
    with counted() as calls:
        yield "packed = rows alone", apart(laid(model, share=False), want), LIMIT
    heads = torch.empty(1, SHAPE["num_attention_heads"], 4096, SHAPE["head_dim"], device=device)
    if packed_attention.should_use_flex_attention(heads, heads[:, : SHAPE["num_key_value_heads"]]):
        yield "its layers that flex attention did not compute", SHAPE["num_hidden_layers"] - len(calls), 0.5
    yield "packed, beginnings shared = rows alone", apart(laid(model), want), LIMIT
    with by_segment():
        yield "the same, attention by segment", apart(laid(model), want), LIMIT
    yield "several passes = one", apart(laid(model, room=300), laid(model)), LIMIT
    windowed = adapted(device, window=50)
    yield "the same with a window = rows alone", apart(laid(windowed), alone(windowed)), LIMIT
    dropping = adapted(device, drop=0.2)
    torch.manual_seed(5)
    plain = laid(dropping)
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(dropping, n) for n in names if hasattr(dropping, n))({"use_reentrant": False})
    torch.manual_seed(5)
    yield "checkpointed = plain, dropout 0.2", apart(laid(dropping), plain), LIMIT


def parts(device: torch.device) -> Iterator[tuple[str, float, float]]:
    torch.manual_seed(0)
    x, W, A, B = (torch.randn(*s, device=device) for s in ((1, 301, 96), (80, 96), (8, 96), (80, 8)))
    weights = torch.randn(1, 301, 80, device=device)
    for name, drop in (("fused = plain", 0.0), ("fused = plain, dropout 0.3", 0.3)):
        found = []
        for run in (low_rank_linear, _plain):
            torch.manual_seed(1)  # the same inputs are left out
            leaves = [t.clone().requires_grad_() for t in (x, A, B)]
            out = run(leaves[0], W, None, leaves[1], leaves[2], 1.7, drop)
            grads = torch.autograd.grad(out, leaves, weights)
            found.append(dict(zip(("y", "x", "A", "B"), (out.detach(), *grads), strict=True)))
        yield name, apart(*found), LIMIT
    for dtype in (torch.float32, torch.bfloat16):
        for turned in (False, True):
            how = f"{str(dtype).removeprefix('torch.')}{', x lies turned' if turned else ''}"
            yield f"dropout, forwards ≠ backwards ({how}), values", _left_out(device, dtype, turned), 0.5
    vocabulary = cross_entropy.CHUNK_ON_GPU // 100
    h, head = torch.randn(700, 64, device=device), torch.randn(vocabulary, 64, device=device)
    targets = torch.randint(vocabulary, (700,), device=device)
    found = []
    for chunked in (True, False):
        leaf = h.clone().requires_grad_()
        if chunked:
            nats = cross_entropy.chunked_cross_entropy(leaf, head, targets)
        else:
            nats = F.cross_entropy(leaf @ head.t(), targets, reduction="none")
        found.append({"nats": nats.detach(), "h": torch.autograd.grad(nats.sum(), leaf)[0]})
    yield "loss in chunks = cross entropy", apart(*found), LIMIT


def _plain(x: Tensor, W: Tensor, _: None, A: Tensor, B: Tensor, scale: float, drop: float) -> Tensor:
    return F.linear(x, W) + scale * F.linear(F.linear(F.dropout(x, drop), A), B)


def _left_out(device: torch.device, dtype: torch.dtype, turned: bool) -> float:
    """In how many values what the forward pass left out is not what the backward pass left out."""
    n, size = 333, 64
    x = (
        torch.ones(size, n, device=device, dtype=dtype).t()
        if turned
        else torch.ones(n, size, device=device, dtype=dtype)
    )
    x.requires_grad_()
    eye = torch.eye(size, device=device, dtype=dtype)
    A = eye.clone().requires_grad_()
    y = low_rank_linear(x, torch.zeros_like(eye), None, A, eye, 1.0, 0.5)  # y is d(1)
    gx, gA = torch.autograd.grad(y, (x, A), torch.ones_like(y))
    wrong = (y != gx).sum() + (y.float().sum(0) - gA.float()[0]).abs().gt(8).sum()
    return float(wrong)


def kernels(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Flex attention itself, for the kinds of heads it takes here, beside attention in fp32 under the dense mask."""
    tree = packed_layout.PackedLayout((300, 130, 222, 41), (-1, 0, 0, 2), 3)
    segments = packed_attention.list_segments(tree, None, torch.float32, torch.device("cpu"))
    seen = torch.zeros(1, 1, tree.total, tree.num_prefix_keys + tree.total, dtype=torch.bool, device=device)
    for s in segments:
        visible = torch.ones(s.length, s.length).tril() if s.mask is None else (s.mask[0, 0] == 0)
        columns = torch.cat([torch.arange(first, first + n) for first, n in s.key_ranges])
        seen[0, 0, s.start : s.start + s.length, columns] = visible.bool().to(device)
    for dtype, size in [
        (torch.float32, 64), (torch.bfloat16, 64), (torch.bfloat16, 80), (torch.bfloat16, 128), (torch.bfloat16, 256),
    ]:  # fmt: skip
        torch.manual_seed(0)
        shapes = ((1, 6, tree.total, size), *[(1, 2, tree.total + 3, size)] * 2)
        full = [torch.randn(*s, device=device).to(dtype).float().requires_grad_() for s in shapes]
        thin = [t.detach().to(dtype).requires_grad_() for t in full]
        if not packed_attention.should_use_flex_attention(*thin[:2]):
            continue
        mask = packed_attention.get_flex_block_mask(tree, None, device)
        got = packed_attention.run_compiled_flex_attention(*thin, mask, None)
        want = F.scaled_dot_product_attention(*full, seen, enable_gqa=True)
        weights = torch.randn_like(want).to(dtype)
        a = {"out": got, **dict(zip("qkv", torch.autograd.grad(got, thin, weights), strict=True))}
        b = {"out": want, **dict(zip("qkv", torch.autograd.grad(want, full, weights.float()), strict=True))}
        difference = apart({n: t.detach().float() for n, t in a.items()}, {n: t.detach() for n, t in b.items()})
        name = f"flex attention = dense, {str(dtype).removeprefix('torch.')}, heads of {size}"
        yield name, difference, LIMIT if dtype == torch.float32 else 0.02


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    device = torch.device(sys.argv[1])
    torch.set_float32_matmul_precision("highest")
    say(facts=facts(device))
    for group in (parts, models, kernels):
        for name, value, limit in group(device):
            say(check=name, value=value, limit=limit, ok=value < limit)


if __name__ == "__main__":
    main()
