"""One way to train, in a process of its own: its peaks are its own, and it waits while another is measured.

    python -m gpu_ways.worker SPEC WAY
    stdin    ["kind of rows", turn]           stdout   {"ready": true}, then an object for each turn

Whatever a library prints goes to stderr.
"""

import gc
import json
import os
import resource
import sys
import time
from typing import Any

from .setting import learned, rows_of
from .ways import WAYS, Absent, Way


class Turns:
    """A way, its optimizer, and in how many parts its rows are run."""

    def __init__(self, spec: dict[str, Any], way: Way) -> None:
        import torch

        self.torch, self.spec, self.way, self.parts = torch, spec, way, 1
        self.cuda = torch.device(spec["device"]).type == "cuda"
        self.trained = [p for p in way.model.parameters() if p.requires_grad]
        # At rate 0 it works as much, and every way shows the loss of the same model.
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, fused=True) if self.trained else None
        self.vocabulary = way.model.config.get_text_config().vocab_size
        way.model.train()

    def turn(self, kind: str, number: int) -> dict[str, Any]:
        """Run a turn's steps; in more parts if memory does not suffice."""
        steps = [rows_of(self.spec, kind, number, s, self.vocabulary) for s in range(self.spec["steps"])]
        while True:
            try:
                return self._timed(steps)
            except self.torch.OutOfMemoryError:
                self.parts *= 2
                if self.parts > self.spec["rows"]:
                    raise
            # Behind the `except`, whose error holds the graph.
            if self.optimizer is not None:
                self.optimizer.zero_grad()
            self._free()

    def _timed(self, steps: list[list[Any]]) -> dict[str, Any]:
        self._free()
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()
        self._wait()
        began = time.perf_counter()
        losses = [self._step(rows) for rows in steps]
        self._wait()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "seconds": seconds,
            "rows": sum(map(len, steps)),
            "tokens": sum(len(r["input_ids"]) for rows in steps for r in rows),
            "loss": float(losses[0]) if losses[0] is not None else None,
            "parts": self.parts,
            "peak_allocated": self.torch.cuda.max_memory_allocated() if self.cuda else peak,
            "peak_reserved": self.torch.cuda.max_memory_reserved() if self.cuda else peak,
        }

    def _step(self, rows: list[Any]) -> Any:
        targets = sum(map(learned, rows))
        whole = None
        for batch in self.way.passes(rows, self.parts):
            loss = self.way.loss(self._there(batch), targets)
            if loss is not None:
                loss.backward()
                whole = loss.detach() if whole is None else whole + loss.detach()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return whole

    def _there(self, batch: Any) -> Any:
        if not isinstance(batch, dict):
            return batch
        return {k: v.to(self.spec["device"]) if isinstance(v, self.torch.Tensor) else v for k, v in batch.items()}

    def _wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def _free(self) -> None:
        """Give back what torch's allocator keeps: others run on this card."""
        gc.collect()
        if self.cuda:
            self.torch.cuda.empty_cache()


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=out, flush=True)

    spec = json.loads(sys.argv[1])
    try:
        turns = Turns(spec, WAYS[sys.argv[2]](spec))
    except Absent as e:
        say({"absent": str(e)})
        return
    say({"ready": True})
    for line in sys.stdin:
        say(turns.turn(*json.loads(line)))
        turns._free()


if __name__ == "__main__":
    main()
