"""How a run records what it is trained on, and how that is compared wherever its adapter is used.

A part does both (extras/training_fingerprint.py). `accept` are the names of what may have changed.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..config import Recipe
from ..foundation.registry import Registry
from ..models.loader import LoadedBase
from .datasets import RunDatasets
from .run_dir import RunDir


class TrainingFingerprint(Protocol):
    """What a run is trained on; `weights` are hashes by kind."""

    @property
    def weights(self) -> Mapping[str, str] | None: ...
    def to_json(self) -> str: ...


class FingerprintChecks(Protocol):
    """Raises where something has changed; the part's functions say what."""

    def require_recipe_unchanged_since_start(self, run: RunDir, recipe: Recipe, accept: Collection[str]) -> None: ...
    def fingerprint_run(
        self, run: RunDir, recipe: Recipe, data: RunDatasets, base: LoadedBase, resume: bool,
        init_adapter: Path | None, accept: Collection[str],
    ) -> TrainingFingerprint: ...  # fmt: skip
    def mark_as_compared(self, model: Any, adapter_folder: Path) -> None: ...
    def require_base_unchanged_since_training(self, path: Path, base: LoadedBase, accept: Collection[str]) -> None: ...


FINGERPRINT_CHECKS: Registry[FingerprintChecks] = Registry("slimtune.fingerprint_checks", "fingerprint")
