"""The methods: one file (or folder) is one method, and its name is the entry in the registry."""

from __future__ import annotations

from ..contract.registry import built_in, config_class, names

__all__ = ["built_in", "config_class", "names"]
