"""The versions of installed packages."""

import importlib.metadata
import platform

RECORDED_PACKAGES = (
    "slimtune", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "bitsandbytes", "peft",
)  # fmt: skip
"""Packages whose versions are in the records of a run."""


def find_package_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_installed_versions() -> dict[str, str]:
    """Return the versions of Python and of each recorded package, and the kind of machine, by name."""
    packages = {package: find_package_version(package) or "not installed" for package in RECORDED_PACKAGES}
    return {"python": platform.python_version(), "machine": f"{platform.machine()}, {platform.system()}", **packages}
