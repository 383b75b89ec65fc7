"""A figure with its interval, as results have it."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval. In JSON an estimate `x` has two keys: `x`, its value, and `x_ci95`."""

    json_suffixes: ClassVar = {"value": "", "ci95": "_ci95"}

    value: float
    ci95: tuple[float, float]
    """95 % interval, from low to high."""

    def __neg__(self) -> "Estimate":
        """Return the figure with the other sign."""
        return Estimate(-self.value, (-self.ci95[1], -self.ci95[0]))

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.ci95[0]

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.ci95[1]
