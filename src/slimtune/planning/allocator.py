"""PyTorch's CUDA caching allocator, replayed: from what a step allocates to what it reserves.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` with its default settings, for one stream:

    a size is rounded up to 512 bytes; up to 1 MiB it is small, and small and large never share a segment
    the smallest free block that fits is taken, of equal ones that at the lowest address
    if none fits, the device gives a segment: 2 MiB for a small size, 20 MiB below 10 MiB, else its own in whole 2 MiB
    what a block has too much becomes a free block: from 512 bytes on if small, above 1 MiB if large, and else stays in
        it and counts as allocated
    a freed block joins free neighbours; only `empty_cache` gives segments back, those of which nothing is in use
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

MIB = 1 << 20
ROUND = 512
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
MIDDLE, MIDDLE_SEGMENT = 10 * MIB, 20 * MIB
LARGE_ROUND = 2 * MIB


@dataclass(eq=False)
class _Block:
    address: int
    size: int
    small: bool
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None


class Allocator:
    """Replays allocations.

    Attributes:
        allocated: bytes of the blocks in use, as `torch.cuda.memory_allocated` counts them.
        reserved: bytes of the segments taken from the device (`memory_reserved`).
        most_allocated: the most there was of it, since the start or `reset_peaks`.
        most_reserved: likewise.
    """

    def __init__(self) -> None:
        self.allocated = self.reserved = self.most_allocated = self.most_reserved = 0
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._of: dict[Hashable, _Block] = {}
        self._end = 0

    def run(self, events: Iterable[tuple[Hashable, int]]) -> int:
        """Replay `(storage, ± bytes)` in order; return the bytes reserved after them."""
        for key, size in events:
            if size > 0:
                self._of[key] = block = self._take(-(-size // ROUND) * ROUND)
                self.allocated += block.size
                self.most_allocated = max(self.most_allocated, self.allocated)
            elif size < 0:
                block = self._of.pop(key)
                self.allocated -= block.size
                self._give(block)
        return self.reserved

    def empty_cache(self) -> None:
        """Give the segments back to the device of which nothing is in use."""
        for small, blocks in self._free.items():
            split = [b for b in blocks if b[2].before is not None or b[2].after is not None]
            self.reserved -= sum(b[0] for b in blocks) - sum(b[0] for b in split)
            self._free[small] = split

    def reset_peaks(self) -> None:
        """Let `most_allocated` and `most_reserved` begin at what there is now."""
        self.most_allocated, self.most_reserved = self.allocated, self.reserved

    def _take(self, size: int) -> _Block:
        small = size <= SMALL
        blocks = self._free[small]
        at = bisect_left(blocks, size, key=lambda b: b[0])
        block = blocks.pop(at)[2] if at < len(blocks) else self._segment(size, small)
        block.free = False
        left = block.size - size
        if left >= ROUND if small else left > SMALL:
            rest = _Block(block.address + size, left, small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = rest
            block.size, block.after = size, rest
            self._keep(rest)
        return block

    def _segment(self, size: int, small: bool) -> _Block:
        if small:
            taken = SMALL_SEGMENT
        else:
            taken = MIDDLE_SEGMENT if size < MIDDLE else -(-size // LARGE_ROUND) * LARGE_ROUND
        self.reserved += taken
        self.most_reserved = max(self.most_reserved, self.reserved)
        self._end += taken
        return _Block(self._end - taken, taken, small)

    def _give(self, block: _Block) -> None:
        before, after = block.before, block.after
        if before is not None and before.free:
            self._drop(before)
            block.address, block.before = before.address, before.before
            block.size += before.size
            if block.before is not None:
                block.before.after = block
        if after is not None and after.free:
            self._drop(after)
            block.after = after.after
            block.size += after.size
            if block.after is not None:
                block.after.before = block
        self._keep(block)

    def _keep(self, block: _Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.address, block))

    def _drop(self, block: _Block) -> None:
        blocks = self._free[block.small]
        del blocks[bisect_left(blocks, (block.size, block.address), key=lambda b: b[:2])]
