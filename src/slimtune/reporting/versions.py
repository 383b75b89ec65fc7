"""Versions of Python and packages, and the kind of machine, for the records of a run."""

import platform

from ..machine.facts import find_version

PACKAGES = ("slimtune", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "bitsandbytes", "peft")


def versions() -> dict[str, str]:
    """Return the versions of Python and of each package, and the kind of machine, by name."""
    packages = {package: find_version(package) or "not installed" for package in PACKAGES}
    return {"python": platform.python_version(), "machine": f"{platform.machine()}, {platform.system()}", **packages}
