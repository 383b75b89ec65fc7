"""Principal directions of rows that come in batches (Ross et al. 2008; scikit-learn's and PEFT's way)."""

from __future__ import annotations

import torch
from torch import Tensor


class Pca:
    """The main directions of all rows so far.

    Args:
        most: how many directions are kept.
    """

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0
        self.directions: Tensor | None = None
        self.sizes = self.shares = self.mean = self.variance = torch.empty(0)

    def add(self, rows: Tensor) -> Tensor:
        """Take in `rows (n, in)`; return how far each direction stayed, as a cosine; 0 at first."""
        n = rows.shape[0]
        if n < self.most:
            return torch.zeros(self.most)
        before, centre = self.directions, rows.double().mean(0)
        variance = rows.double().var(0, correction=0)
        total = self.count + n
        # As PEFT: the first batch in fp32, later ones in float64; the random vectors of the SVD depend on it.
        X = (rows - centre).float()
        if before is not None:
            X = rows - rows.mean(0)
            apart = self.mean - centre
            X = torch.vstack([self.sizes[:, None] * before, X, (self.count / total * n) ** 0.5 * apart[None]])
            variance = (self.variance * self.count + variance * n + apart**2 * self.count * n / total) / total
            centre = (self.mean * self.count + centre * n) / total
        with torch.random.fork_rng():
            torch.manual_seed(42)
            _, S, V = torch.svd_lowrank(X, q=2 * self.most, niter=4)
        V = V.t()
        V = V * V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
        self.directions, self.sizes = V[: self.most], S[: self.most]
        self.shares = S[: self.most] ** 2 / (variance * total).sum()
        self.mean, self.variance, self.count = centre, variance, total
        return torch.zeros(self.most) if before is None else torch.cosine_similarity(self.directions, before)
