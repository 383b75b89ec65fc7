"""Products of float32 rows with frozen weights on this CPU: torch's own (MKL on x86) and oneDNN's, in turns.

    python benchmarks/frozen_product.py [--rounds 7] [--rows 1 2 4 16 64 512] [--shapes 576x576 1536x576 …]

`forward` is `x Wᵀ`, `backward` is `g W`, the gradient of x. Times are medians over rounds by the clock, of as many
threads as torch takes (OMP_NUM_THREADS sets another number).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

ROWS = (1, 2, 4, 16, 64, 512)
SHAPES = ("576x576", "1536x576", "576x1536", "49152x576", "4096x4096")
"""Out x in features: layers and head of SmolLM2-135M, and a layer of an 8B."""


def measure(call: Callable[[], object], repeats: int) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN")
    options = parser.parse_args()
    linear = torch.ops.mkldnn._linear_pointwise
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    head = f"{'out x in':>12} {'rows':>5} {'forward: torch':>15} {'oneDNN':>7} {'backward: torch':>16} {'oneDNN':>7}"
    print(f"{head}  (GFLOP/s)")
    for shape in options.shapes:
        out_features, in_features = map(int, shape.split("x"))
        weight = torch.randn(out_features, in_features)
        for rows in options.rows:
            x, grad = torch.randn(rows, in_features), torch.randn(rows, out_features)
            calls: list[Callable[[], object]] = [
                partial(F.linear, x, weight),
                partial(linear, x, weight, None, "none", [], ""),
                partial(torch.mm, grad, weight),
                partial(linear, grad, weight.t(), None, "none", [], ""),
            ]
            operations = 2 * rows * weight.numel()
            repeats = max(1, round(2e9 / operations))
            times: list[list[float]] = [[] for _ in calls]
            for _ in range(options.rounds + 1):
                for one, call in zip(times, calls, strict=True):
                    one.append(measure(call, repeats))
            rates = [operations / statistics.median(one[1:]) / 1e9 for one in times]
            print(
                f"{shape:>12} {rows:>5} {rates[0]:>15.0f} {rates[1]:>7.0f} {rates[2]:>16.0f} {rates[3]:>7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
