"""Parameter-efficient fine-tuning: plan, train, prove, ship.

The public names are in `peft_names.py`. They are lazy: `import slimtune` and `slimtune --help` import no torch.
"""

from typing import Any

from .compat.public_names import PUBLIC, add_public_names, find_name
from .core.adapters.method_registry import config_class_paths

__version__ = "0.2.0.dev0"

_CONFIGS = config_class_paths()  # a method's file is its own entry
add_public_names(_CONFIGS)
__all__ = sorted({name for names in PUBLIC.values() for name in names} | set(_CONFIGS))


def __getattr__(name: str) -> Any:
    value = find_name(__name__, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
