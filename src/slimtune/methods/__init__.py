"""The methods: one file (or folder) is one method, and its name is the entry in the registry."""

from ..adapters.registry import built_in_methods, config_class, method_names

__all__ = ["built_in_methods", "config_class", "method_names"]
