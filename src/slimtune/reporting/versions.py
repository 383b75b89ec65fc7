"""What took part in a run: versions and the machine, noted while they are there."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("slimtune", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "bitsandbytes", "peft")


def versions() -> dict[str, str]:
    """Return Python's version, the machine's kind and each package's version, by name."""
    found = {"python": platform.python_version(), "machine": f"{platform.machine()}, {platform.system()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
