"""Tokens are drawn as often as their probabilities say, with one random number each."""

import torch

from slimtune.generation.text_generator import draw_from


def test_tokens_are_drawn_by_their_probability():
    probabilities = torch.tensor([[0.0, 0.2, 0.3, 0.0, 0.5, 0.0]])
    random = torch.Generator().manual_seed(0)
    counts = torch.bincount(draw_from(probabilities.repeat(20_000, 1), [random] * 20_000), minlength=6)
    torch.testing.assert_close(counts[None] / 20_000, probabilities, atol=0.015, rtol=0)
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0]


def test_answers_draw_with_random_numbers_of_their_own():
    probabilities = torch.full((2, 1000), 1e-3)
    both = draw_from(probabilities, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    alone = [draw_from(probabilities[:1], [torch.Generator().manual_seed(seed)]) for seed in (1, 2)]
    assert both.tolist() == torch.cat(alone).tolist()
