"""One optimizer step divided over the processes of a run.

Every process reads the same rows in the same order, so each knows the whole step and works out the same division:

    rows → packs (at least one a process where there are rows enough) → hands: longest pack first, to the least loaded

    cost of a pack = tokens + pairs / 6d        pairs: (query, key) that attention looks at, d: the model's width

A layer's maps take about 24 d² operations a token, attention 4 d a pair. The loss of each pack is a share of the whole
step's, so the sum of all hands' gradients is that of one process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .collator import IGNORED, Collator, Example
from .packing import pack_sequences

_SLACK = (1.0, 1.1, 1.3)
"""Rooms that are tried above the even share: packs never fill up evenly."""


class StepSharder:
    """Make one process's share of an optimizer step.

    Args:
        collator: divides rows into packs and lays them.
        width: of the model, for costs.
        hands: processes.
        hand: this one's number.
    """

    def __init__(self, collator: Collator, width: int, hands: int = 1, hand: int = 0) -> None:
        self.collator, self.width, self.hands, self.hand = collator, width, hands, hand

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return `packs` of this process and their `weights`, and of the whole step `targets` and `tokens`.

        Every process gets as many packs, since processes that divide the base talk in each pass: one with fewer runs
        its last again, or the least of all, with weight 0.
        """
        step = {
            "targets": sum(label != IGNORED for e in examples for label in e["labels"][1:]),
            "tokens": sum(len(e["input_ids"]) for e in examples),
        }
        groups, weights = self.turns(examples)
        return {"packs": [self.collator([examples[i] for i in g]) for g in groups], "weights": weights, **step}

    def turns(self, examples: Sequence[Example]) -> tuple[list[list[int]], list[float]]:
        """Return the groups of row numbers that this process runs, and the weight of each."""
        if self.hands == 1:
            return (groups := self.collator.groups(examples)), [1.0] * len(groups)
        groups = self.groups(examples)
        costs = [self.cost([examples[i] for i in g]) for g in groups]
        hands = balance(costs, self.hands)
        mine = hands[self.hand]
        again = mine[-1] if mine else min(range(len(groups)), key=costs.__getitem__)
        missing = max(map(len, hands)) - len(mine)
        return [groups[g] for g in [*mine, *[again] * missing]], [1.0] * len(mine) + [0.0] * missing

    def groups(self, examples: Sequence[Example]) -> list[list[int]]:
        """Divide a step's rows into packs that the hands have done soonest."""
        whole = self.collator.groups(examples)
        turns = math.ceil(len(whole) / self.hands)
        even = math.ceil(sum(self._laid([examples[i] for i in g])[0] for g in whole) / (turns * self.hands))
        tried = [whole, *(self.collator.groups(examples, math.ceil(slack * even)) for slack in _SLACK)]
        return min((self._enough(groups, examples) for groups in tried), key=lambda g: self._longest(g, examples))

    def cost(self, examples: Sequence[Example]) -> float:
        """Return what a pack of these rows takes, in tokens."""
        tokens, pairs = self._laid(examples)
        return tokens + pairs / (6 * self.width)

    def _enough(self, groups: list[list[int]], examples: Sequence[Example]) -> list[list[int]]:
        """Halve the costliest packs until there is one for each hand, or each row is alone."""
        groups = list(groups)
        while len(groups) < min(self.hands, len(examples)):
            largest = max((g for g in groups if len(g) > 1), key=lambda g: self.cost([examples[i] for i in g]))
            groups.remove(largest)
            groups += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        return groups

    def _longest(self, groups: list[list[int]], examples: Sequence[Example]) -> float:
        costs = [self.cost([examples[i] for i in g]) for g in groups]
        return max(sum(costs[i] for i in hand) for hand in balance(costs, self.hands))

    def _laid(self, examples: Sequence[Example]) -> tuple[int, int]:
        """Return the tokens of a pack as laid, and the pairs attention looks at."""
        rows = [e["input_ids"] for e in examples]
        if not self.collator.packing:
            longest = max(map(len, rows))
            return longest * len(rows), longest * longest * len(rows)
        laid = pack_sequences(rows, share=self.collator.share)
        return len(laid.tokens), sum(position + 1 for position in laid.layout.positions())


def balance(costs: Sequence[float], hands: int) -> list[list[int]]:
    """Deal packs: the costliest first, each to the hand that has least; return the numbers in each hand."""
    held: list[list[int]] = [[] for _ in range(hands)]
    load = [0.0] * hands
    for pack in sorted(range(len(costs)), key=lambda p: -costs[p]):
        least = min(range(hands), key=load.__getitem__)
        held[least].append(pack)
        load[least] += costs[pack]
    return held
