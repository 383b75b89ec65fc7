"""Log-probabilities of all rows under the reference of DPO and KTO, computed once before the first step.

The reference is the model without its adapter, or with the adapter that training continues from. So training holds one
model and runs one forward pass a step. The values are kept in the run folder, in reference.safetensors (`train` and
`validation`, fp64 [examples, rows of an example], NaN where an example has fewer rows than another), and read again
when the run is resumed.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from ..data.collator import Collator
from ..data.tokenized_dataset import TokenizedDataset
from ..errors import RunError
from ..run_dir import RunDir
from ..setup import Datasets
from ..train_step.loss import score_row_logps
from ..utils import distributed
from ..utils.files import translate_os_errors, write_atomic
from .oom_recovery import OomRecovery
from .scoring import build_sharder, score_in_parts


def add_reference(run: RunDir, data: Datasets, model: Any, collator: Collator, logger: Any, disable: bool) -> None:
    """Give every training and validation example its `reference`, from the run folder if it is there.

    Args:
        run: the run folder.
        data: the rows; replaced in place by those with a reference.
        model: the adapted model, before training.
        collator: makes the micro-batches; its limits get smaller if memory runs out.
        logger: says what is done.
        disable: whether the reference is the model without its adapter.
    """
    parts = {"train": data.train, "validation": data.validation}
    digests = {name: rows.digest() for name, rows in parts.items()}
    values = _load(run, digests)
    if values is None:
        logger.say("computing the reference log-probabilities of all rows, once")
        with model.disable_adapter() if disable else nullcontext():
            values = {name: _compute(rows, model, collator, logger) for name, rows in parts.items()}
        if distributed.is_main_process():
            write_atomic(run.reference_file, save(values, metadata=digests))
    data.train, data.validation = (rows.with_columns(reference=values[name]) for name, rows in parts.items())


def _compute(rows: TokenizedDataset, model: Any, collator: Collator, logger: Any) -> np.ndarray:
    device = next(p.device for p in model.parameters() if p.requires_grad)
    recovery = OomRecovery(collator, device, logger)
    where = "reference log-probabilities"
    logps = score_in_parts(score_row_logps, where, model, rows, build_sharder(model, collator), recovery)
    values = np.full((len(rows), max(map(len, logps), default=1)), np.nan)
    for row, own in zip(values, logps, strict=True):
        row[: len(own)] = own
    return values


def _load(run: RunDir, digests: dict[str, str]) -> dict[str, np.ndarray] | None:
    """Return the values of the run folder; None if there are none. Raise RunError if they are those of other rows."""
    if not run.reference_file.is_file():
        return None
    with translate_os_errors(run.path), safe_open(run.reference_file, framework="numpy") as file:
        if file.metadata() != digests:
            raise RunError(
                f"{run.reference_file} has the log-probabilities of other rows: the data has changed since",
                "the rows that the run was started with",
                "put the old rows back, or start again with another --out",
            )
        return {name: file.get_tensor(name) for name in digests}
