"""Log-probabilities under the reference, for DPO and KTO: the model without its adapter, or as training continues it.

They are computed once, for all rows before the first step. So training holds one model and runs one forward pass a
step. The values are kept in the run folder, in reference.safetensors (`train` and `validation`, fp64 [examples, rows of
an example], NaN where an example has fewer rows than another), and read again when the run is resumed.
"""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..core.data.tokenized_dataset import TokenizedDataset
from ..core.foundation import distributed
from ..core.foundation.files import translate_os_errors, write_atomic
from ..core.training.loss import score_row_logps_by_example_index
from ..core.training.oom_recovery import OomRecovery, make_peer_failure_check
from ..core.training.prepared_run import PreparedRun
from ..core.training.run_dir import RunDir
from ..core.training.validation_scores import make_data_parallel_sharder, score_across_processes
from ..errors import RunError
from ..extras.row_digest import hash_rows


def add_reference_logps(prepared: PreparedRun) -> None:
    """Give every training and validation example its `reference`, from the run folder if it is there.

    The limits of the collator get smaller if memory runs out.
    """
    run, data, model, say = prepared.run, prepared.data, prepared.model, prepared.logger.say
    parts = {"train": data.train, "validation": data.validation}
    digests = {name: hash_rows(rows) for name, rows in parts.items()}
    values = _load_reference(run, digests, say)
    if values is None:
        say("computing the reference log-probabilities of all rows, once")
        with model.disable_adapter() if prepared.init_adapter is None else nullcontext():
            values = {name: _compute_reference(rows, prepared) for name, rows in parts.items()}
        if distributed.is_main_process():
            write_atomic(run.reference_file, save(values, metadata=digests))
    data.train, data.validation = (rows.with_columns(reference=values[name]) for name, rows in parts.items())


def _compute_reference(rows: TokenizedDataset, prepared: PreparedRun) -> np.ndarray:
    model, collator = prepared.model, prepared.collator
    recovery = OomRecovery(collator, prepared.device, prepared.logger, any_failed=make_peer_failure_check(model))
    where = "reference log-probabilities"
    logps = score_across_processes(
        score_row_logps_by_example_index, where, model, rows, make_data_parallel_sharder(model, collator), recovery
    )
    values = np.full((len(rows), max(map(len, logps), default=1)), np.nan)
    for row, own in zip(values, logps, strict=True):
        row[: len(own)] = own
    return values


def _load_reference(run: RunDir, digests: dict[str, str], say: Callable[[str], None]) -> dict[str, np.ndarray] | None:
    """Return the values of the run folder; None if there are none, or the file is damaged.

    Raises:
        RunError: they are those of other rows.
    """
    if not run.reference_file.is_file():
        return None
    try:
        safe_open(run.reference_file, framework="numpy")
    except SafetensorError as error:
        say(f"{run.reference_file.name} is damaged ({error})")
        return None
    with translate_os_errors(run.path), safe_open(run.reference_file, framework="numpy") as file:
        if file.metadata() != digests:
            raise RunError(
                f"{run.reference_file} has the log-probabilities of other rows: the data has changed since",
                "the rows that the run was started with",
                "put the old rows back, or start again with another --out",
            )
        return {name: file.get_tensor(name) for name in digests}
