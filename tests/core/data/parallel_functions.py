"""Functions for other processes, in a module that imports next to nothing."""

import os

from slimtune.errors import ModelError


def exit_at_3(batch: int) -> None:
    if batch == 3:
        os._exit(7)


def refuse_3(batch: int) -> None:
    if batch == 3:
        raise ModelError("message", "expected", "hint")
