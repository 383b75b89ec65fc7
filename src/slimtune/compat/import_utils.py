"""Which libraries are there, under PEFT's names."""

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

_TRANSFORMERS = Version(version("transformers"))
is_transformers_ge_v5 = Version("5.0.0.dev0") <= _TRANSFORMERS
is_transformers_ge_v5_1_0 = Version("5.1.0") <= _TRANSFORMERS
is_transformers_ge_v5_4_0 = Version("5.4.0") <= _TRANSFORMERS
is_transformers_ge_v5_6_0 = Version("5.6.0.dev0") <= _TRANSFORMERS
is_transformers_ge_v5_13_0 = Version("5.13.0.dev0") <= _TRANSFORMERS
is_transformers_ge_v5_17_0 = Version("5.17.0") <= _TRANSFORMERS


@cache
def is_bnb_available() -> bool:
    """Return whether bitsandbytes can be imported."""
    return find_spec("bitsandbytes") is not None


def is_bnb_4bit_available() -> bool:
    """Return whether bitsandbytes has 4-bit layers, as all its supported releases do."""
    return is_bnb_available()


@cache
def is_diffusers_available() -> bool:
    """Return whether diffusers can be imported."""
    return find_spec("diffusers") is not None


@cache
def is_optimum_available() -> bool:
    """Return whether optimum can be imported."""
    return find_spec("optimum") is not None


def is_xpu_available(check_device: bool = False) -> bool:
    """Return whether there is an Intel GPU that training runs on: none is supported."""
    return False


def _is_unsupported() -> bool:
    """Return False: layers of this library are refused by name, whether it is installed or not."""
    return False


is_aqlm_available = is_eetq_available = is_gptqmodel_available = is_hqq_available = _is_unsupported
is_te_available = is_torchao_available = is_torchao_ge_v0_18_0 = _is_unsupported
