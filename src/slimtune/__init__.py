"""Parameter-efficient fine-tuning: plan, train, prove, ship.

The public names are in `compat/public_names.py`. They are lazy: `import slimtune` imports no torch.
"""

from typing import Any

from . import parts as parts  # fills the registries of the core before anything reads them
from .compat.public_names import PUBLIC, add_public_names, find_name
from .core.adapters.method_registry import config_class_paths
from .core.foundation.version import __version__ as __version__

_CONFIGS = config_class_paths()  # a method's file is its own entry
add_public_names(_CONFIGS)
__all__ = sorted({name for names in PUBLIC.values() for name in names} | set(_CONFIGS))


def __getattr__(name: str) -> Any:
    value = find_name(__name__, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
