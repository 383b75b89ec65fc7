"""Versions of Python and packages, and the kind of machine, for the records of a run."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("slimtune", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "bitsandbytes", "peft")


def versions() -> dict[str, str]:
    """Return the versions of Python and of each package, and the kind of machine, by name."""
    found = {"python": platform.python_version(), "machine": f"{platform.machine()}, {platform.system()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
