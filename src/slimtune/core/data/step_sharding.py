"""One optimizer step divided over the processes of a run.

Every process reads the same rows in the same order, so each computes the same division of the whole step:

    rows → micro-batches (at least one a process, if there are enough rows) → the costliest first, to the process with
    the least work

    cost of a micro-batch = tokens + pairs / 6d        pairs: (query, key) pairs of attention, d: hidden size

The linear layers of a layer take about 24 d² operations a token, attention 4 d a pair. The loss of a micro-batch is its
share of the whole step's loss, so the sum of the gradients of all processes is that of one process.
"""

import math
from collections.abc import Sequence
from typing import TypedDict

from .collator import IGNORE_INDEX, Collator
from .example_types import Batch, Example
from .packing import pack_into_one_sequence
from .tokenized_dataset import list_tokens_and_labels_by_row

_SLACK = (1.0, 1.1, 1.3)
"""Token limits that are tried, as multiples of an even share: micro-batches are never filled evenly."""


class StepShard(TypedDict):
    """What one process computes in an optimizer step, and the size of the whole step."""

    micro_batches: list[Batch]
    weights: list[float]
    """Of each micro-batch in the sum of gradients: 1, or 0 for one that another process has, too."""
    targets: int
    """Supervised tokens of the step."""
    tokens: int
    """Tokens of the step."""


class DataParallelSharder:
    """Makes the share of process `rank` of `world_size` in an optimizer step; `hidden_size` is the model's."""

    def __init__(self, collator: Collator, hidden_size: int, world_size: int = 1, rank: int = 0) -> None:
        self.collator, self.hidden_size, self.world_size, self.rank = collator, hidden_size, world_size, rank

    def __call__(self, examples: Sequence[Example]) -> StepShard:
        """Return this process's share of the examples of a step."""
        groups, weights = self.assign_groups(examples)
        return {
            "micro_batches": [self.collator([examples[i] for i in g]) for g in groups],
            "weights": weights,
            "targets": sum(label != IGNORE_INDEX for e in examples for label in e["labels"][1:]),
            "tokens": sum(len(e["input_ids"]) for e in examples),
        }

    def assign_groups(self, examples: Sequence[Example]) -> tuple[list[list[int]], list[float]]:
        """Return the row numbers of each micro-batch of this process, and the weights of the micro-batches.

        Every process gets the same number, because processes that shard the base communicate in every forward pass. A
        process with fewer repeats its last one, or the cheapest of all, with weight 0.
        """
        groups = self.collator.group_rows(examples)
        if self.world_size == 1:
            return groups, [1.0] * len(groups)
        groups = self._divide_step(groups, examples)
        costs = self._costs(groups, examples)
        assigned = balance_micro_batches(costs, self.world_size)
        own = assigned[self.rank]
        repeated = own[-1] if own else min(range(len(groups)), key=costs.__getitem__)
        missing = max(map(len, assigned)) - len(own)
        return [groups[g] for g in [*own, *[repeated] * missing]], [1.0] * len(own) + [0.0] * missing

    def _divide_step(self, groups: list[list[int]], examples: Sequence[Example]) -> list[list[int]]:
        """Return the groups, of several token limits, with which the slowest process is done first."""
        tokens = sum(self._measure([examples[i] for i in g])[0] for g in groups)
        even_share = math.ceil(tokens / (math.ceil(len(groups) / self.world_size) * self.world_size))
        tried = [groups, *(self.collator.group_rows(examples, math.ceil(s * even_share)) for s in _SLACK)]

        def slowest(groups: list[list[int]]) -> float:
            costs = self._costs(groups, examples)
            return max(sum(costs[i] for i in own) for own in balance_micro_batches(costs, self.world_size))

        return min((self._split_groups(g, examples) for g in tried), key=slowest)

    def _split_groups(self, groups: list[list[int]], examples: Sequence[Example]) -> list[list[int]]:
        """Halve the costliest groups until there is one for each process, or each row is alone."""
        groups = list(groups)
        while len(groups) < min(self.world_size, len(examples)):
            costliest = max((g for g in groups if len(g) > 1), key=lambda g: self._costs([g], examples)[0])
            groups.remove(costliest)
            groups += [costliest[: len(costliest) // 2], costliest[len(costliest) // 2 :]]
        return groups

    def _costs(self, groups: list[list[int]], examples: Sequence[Example]) -> list[float]:
        return [self.cost([examples[i] for i in group]) for group in groups]

    def cost(self, examples: Sequence[Example]) -> float:
        """Return the cost of a micro-batch of these rows, in tokens."""
        tokens, pairs = self._measure(examples)
        return tokens + pairs / (6 * self.hidden_size)

    def _measure(self, examples: Sequence[Example]) -> tuple[int, int]:
        """Return the packed tokens of a micro-batch, and its (query, key) pairs."""
        rows = [ids for e in examples for ids, _ in list_tokens_and_labels_by_row(e)]
        if not self.collator.packing:
            longest = max(map(len, rows))
            return longest * len(rows), longest * longest * len(rows)
        packed = pack_into_one_sequence(rows, share_prefix=self.collator.share_prefix)
        return len(packed.tokens), sum(position + 1 for position in packed.layout.positions())


def balance_micro_batches(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Assign micro-batches, the costliest first, to the process with the least work; return the numbers of each."""
    assigned: list[list[int]] = [[] for _ in range(world_size)]
    load = [0.0] * world_size
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = min(range(world_size), key=load.__getitem__)
        assigned[least].append(i)
        load[least] += costs[i]
    return assigned
