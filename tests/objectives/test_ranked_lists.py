"""Ranked lists: equal to TRL's loss of each pair on padded rows, also packed as a tree."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.config.objective_registry import load_objective_class
from slimtune.core.data.collator import Collator
from slimtune.core.training.loss import compute_step_loss, make_collator, score_examples_by_objective

PROMPT = [5, 9, 30, 77, 12, 41, 8, 19, 55, 60]


def make_list(lengths, scores, seed=0):
    generator = torch.Generator().manual_seed(seed)
    answers = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]
    rows = [PROMPT + answer for answer in answers]
    return {
        "input_ids": [t for row in rows for t in row],
        "labels": [t for answer in answers for t in [-100] * len(PROMPT) + answer],
        "line": 1,
        "row_lengths": [*map(len, rows)],
        "reference": torch.randn(len(rows), generator=generator, dtype=torch.float64).mul(3).sub(20).tolist(),
        **({"row_scores": scores} if scores else {}),
    }


def take_pair(example, i, j):
    """A pair of two answers of a list, as a row of its own."""
    ends = list(itertools.accumulate(example["row_lengths"]))
    parts = [slice(ends[k] - example["row_lengths"][k], ends[k]) for k in (i, j)]
    tokens = {key: [t for part in parts for t in example[key][part]] for key in ("input_ids", "labels")}
    lengths, reference = ([example[key][k] for k in (i, j)] for key in ("row_lengths", "reference"))
    return {**tokens, "line": 1, "row_lengths": lengths, "reference": reference}


def compute(model, objective, examples, collator, items=None):
    items = objective.count_items(examples) if items is None else items
    with using_packed_attention(model):
        loss = sum(compute_step_loss(model, collator([e]), items, objective) for e in examples)
        gradient = torch.autograd.grad(loss, model.model.norm.weight)[0]
    return loss.item(), gradient


@pytest.mark.slow
def test_loss_is_the_mean_of_trls_losses_of_all_pairs(tiny_llama):
    """SimPO by TRL's function on padded rows; the sum over pairs of three lists, of which one has a tie."""
    from trl.experimental.cpo import CPOTrainer

    model = tiny_llama().double()
    lists = [
        make_list([4, 7, 3], [3.0, 2.0, 1.0]),
        make_list([2, 6, 5, 3], [9, 4, 4, 1], 1),
        make_list([5, 4], [1, 0], 2),
    ]
    pairs = [take_pair(lists[0], *p) for p in ((0, 1), (0, 2), (1, 2))]
    pairs += [take_pair(lists[1], *p) for p in ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))] + [take_pair(lists[2], 0, 1)]
    simpo, padded = load_objective_class("simpo")(beta=1.5, simpo_gamma=0.4), Collator(0, packing=False)
    cpo = SimpleNamespace(alpha=0.0, loss_type="simpo", beta=1.5, simpo_gamma=0.4, label_smoothing=0.0,
                          accelerator=SimpleNamespace(device="cpu"))  # fmt: skip
    losses = []
    for pair in pairs:
        batch, half = padded([pair]), pair["row_lengths"][0]
        labels = torch.full_like(batch["input_ids"], -100)
        for row, values in enumerate((pair["labels"][:half], pair["labels"][half:])):
            labels[row, : len(values)] = torch.tensor(values)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logps = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
        losses.append(CPOTrainer.cpo_loss(cpo, logps[:1], logps[1:])[0].mean())
    expected = torch.stack(losses).mean()
    (gradient,) = torch.autograd.grad(expected, model.model.norm.weight)
    assert simpo.count_items(lists) == 9
    loss, found = compute(model, simpo, lists, padded)
    assert loss == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(found, gradient, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_of_a_list_is_that_of_its_pairs(tiny_llama, loss_type):
    """The test of TRL's trainer proves DPO's loss of a pair; here a list of two is that, and of four their mean."""
    model, dpo = tiny_llama().double(), load_objective_class("dpo")(beta=0.3, loss_type=loss_type)
    padded, shared = Collator(0, packing=False), make_collator(model, 0)
    two, four = make_list([4, 7], [1.0, 0.5]), make_list([4, 7, 3, 5], [4.0, 3.0, 2.0, 1.0], 3)
    four_pairs = [take_pair(four, i, j) for i, j in itertools.combinations(range(4), 2)]
    assert shared([four])["input_ids"].shape[1] == len(PROMPT) + 4 + 7 + 3 + 5
    for example, pairs in ((two, [take_pair(two, 0, 1)]), (four, four_pairs)):
        loss, gradient = compute(model, dpo, pairs, padded)
        for collator in (padded, shared):
            found, own = compute(model, dpo, [example], collator)
            assert found == pytest.approx(loss, abs=1e-9 if collator is padded else 1e-7)
            torch.testing.assert_close(own, gradient, atol=1e-9 if collator is padded else 1e-7, rtol=1e-6)
        scores = score_examples_by_objective(model, [example], padded, dpo)
        assert dpo.summarize(np.array([scores[0]]))["loss"] == pytest.approx(loss, abs=1e-9)
