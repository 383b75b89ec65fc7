"""Incremental PCA, for EVA."""

import torch
from torch import Tensor


class IncrementalPca:
    """Principal components of rows that arrive in batches (Ross et al. 2008; as PEFT and scikit-learn)."""

    def __init__(self, n_components: int) -> None:
        self.n_components, self.count = n_components, 0
        self.components: Tensor | None = None
        self.singular_values = self.explained_variance_ratio = self.mean = self.variance = torch.empty(0)

    def partial_fit(self, rows: Tensor) -> Tensor:
        """Update with `rows (n, in)`; return the cosine of each component with its previous value (0 at first)."""
        n, k = rows.shape[0], self.n_components
        if n < k:
            return torch.zeros(k)
        before, mean = self.components, rows.double().mean(0)
        variance = rows.double().var(0, correction=0)
        total = self.count + n
        # Like PEFT: the first batch in fp32, later ones in float64; the random vectors of the SVD depend on the dtype.
        X = (rows - mean).float()
        if before is not None:
            X = rows - rows.mean(0)
            shift = self.mean - mean
            X = torch.vstack([self.singular_values[:, None] * before, X, (self.count / total * n) ** 0.5 * shift[None]])
            variance = (self.variance * self.count + variance * n + shift**2 * self.count * n / total) / total
            mean = (self.mean * self.count + mean * n) / total
        with torch.random.fork_rng():
            torch.manual_seed(42)
            _, S, V = torch.svd_lowrank(X, q=2 * k, niter=4)
        V = V.t()
        V = V * V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
        self.components, self.singular_values = V[:k], S[:k]
        self.explained_variance_ratio = S[:k] ** 2 / (variance * total).sum()
        self.mean, self.variance, self.count = mean, variance, total
        return torch.zeros(k) if before is None else torch.cosine_similarity(self.components, before)
