"""Versions of Python and packages, and the kind of machine, for the records of a run."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("slimtune", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "bitsandbytes", "peft")


def find_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of each package, and the kind of machine, by name."""
    packages = {package: find_version(package) or "not installed" for package in PACKAGES}
    return {"python": platform.python_version(), "machine": f"{platform.machine()}, {platform.system()}", **packages}
