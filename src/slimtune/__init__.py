"""Parameter-efficient fine-tuning: plan, train, prove, ship.

The public names are in `compat/public_names.py`. They are lazy: `import slimtune` imports no torch.
"""

import logging
from typing import Any

from . import parts as parts  # fills the registries of the core before anything reads them
from .compat.public_names import import_public_name, list_public_names
from .core.foundation.version import __version__ as __version__

# bitsandbytes, which transformers imports, warns at import that a kernel for inference could be downloaded.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)


def __getattr__(name: str) -> Any:
    value = list_public_names() if name == "__all__" else import_public_name(__name__, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *list_public_names()})
