"""Pickle and copy objects whose class was made at run time, which pickle cannot find by its name.

A made class has `_factory_call`: the function that made it, and the function's arguments, of which some may be made
classes themselves. The function must return the same class for the same arguments, so `functools.cache` is around it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class ClassFactoryCall(NamedTuple):
    """How a class is made: `function(*arguments)`."""

    function: Callable[..., type]
    arguments: tuple


class PickledByClassFactory:
    """Mixed into made classes: pickle stores how the object's class is made instead of its name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_new_instance, (_describe_class(type(self)),), *reduced[2:])


def _describe_class(cls: Any) -> Any:
    """Return how a made class is made; any other argument as it is."""
    if not isinstance(cls, type) or "_factory_call" not in vars(cls):
        return cls
    function, *arguments = vars(cls)["_factory_call"]
    return ClassFactoryCall(function, tuple(_describe_class(a) for a in arguments))


def _make_class(description: Any) -> Any:
    """Return the class, or other argument, that `_describe_class` described."""
    if not isinstance(description, ClassFactoryCall):
        return description
    return description.function(*(_make_class(a) for a in description.arguments))


def _new_instance(description: Any) -> Any:
    """Return an empty object of the described class."""
    cls = _make_class(description)
    return cls.__new__(cls)
