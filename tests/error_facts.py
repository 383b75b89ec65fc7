"""What tests assert of an error beside its class: `pytest.raises(UsageError, check=has_code("wrong-base"))`."""

from collections.abc import Callable

from slimtune.errors import SlimtuneError


def has_code(code: str) -> Callable[[SlimtuneError], bool]:
    """Return a check whether `slimtune explain CODE` explains an error."""
    return lambda error: error.code == code


def has_field(field: str) -> Callable[[SlimtuneError], bool]:
    """Return a check whether an error is about the setting or column `field`."""
    return lambda error: error.field == field
