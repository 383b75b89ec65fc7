"""PyTorch's CUDA caching allocator, replayed: from what a step allocates to what it reserves.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` with its default settings: sizes are rounded up to 512 bytes;
up to 1 MiB a block comes from segments of 2 MiB, below 10 MiB from segments of 20 MiB, above from one of its own,
rounded up to 2 MiB; the smallest free block that fits is taken, and split where enough is left; freed neighbours join.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 1 << 20
ROUND = 512
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
MIDDLE, MIDDLE_SEGMENT = 10 * MIB, 20 * MIB


@dataclass(eq=False)
class _Block:
    size: int
    small: bool
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None


class Allocator:
    """Replays allocations.

    Attributes:
        reserved: bytes of all segments taken from the device so far.
    """

    def __init__(self) -> None:
        self.reserved = 0
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._of: dict[int, _Block] = {}

    def run(self, events: Iterable[tuple[int, int]]) -> int:
        """Replay `(storage, ± bytes)` in order; return the bytes reserved after them."""
        for key, size in events:
            if size > 0:
                self._of[key] = self._take(-(-size // ROUND) * ROUND)
            elif size < 0:
                self._give(self._of.pop(key))
        return self.reserved

    def _take(self, size: int) -> _Block:
        small = size <= SMALL
        blocks = self._free[small]
        at = bisect_left(blocks, (size, 0))  # type: ignore[type-var]
        if at < len(blocks):
            block = blocks.pop(at)[2]
            block.free = False
        else:
            segment = SMALL_SEGMENT if small else MIDDLE_SEGMENT if size < MIDDLE else -(-size // (2 * MIB)) * 2 * MIB
            self.reserved += segment
            block = _Block(segment, small)
        left = block.size - size
        if left >= ROUND if small else left > SMALL:
            rest = _Block(left, small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = rest
            block.size, block.after = size, rest
            self._keep(rest)
        return block

    def _give(self, block: _Block) -> None:
        for beside in (block.before, block.after):
            if beside is None or not beside.free:
                continue
            blocks = self._free[beside.small]
            del blocks[bisect_left(blocks, (beside.size, id(beside)))]  # type: ignore[type-var]
            block.size += beside.size
            if beside is block.before:
                block.before = beside.before
                if block.before is not None:
                    block.before.after = block
            else:
                block.after = beside.after
                if block.after is not None:
                    block.after.before = block
        self._keep(block)

    def _keep(self, block: _Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, id(block), block), key=lambda b: b[:2])
