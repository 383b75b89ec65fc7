"""The methods: one file (or folder) is one method, and its name is the entry in the registry."""

from ..adapters.registry import (
    config_class,
    find_built_in_method_files,
    method_names,
    parse_config_classes,
    require_method,
)

__all__ = ["config_class", "find_built_in_method_files", "method_names", "parse_config_classes", "require_method"]
