"""Work for other processes, in a module that imports next to nothing."""

import os

from slimtune.errors import ModelError


def dies(batch: int) -> int:
    if batch == 3:
        os._exit(7)
    return batch


def refuses(batch: int) -> int:
    if batch == 3:
        raise ModelError("got it", "wanted it", "fix it")
    return batch
