"""Checkpoints: each is complete or absent, in safetensors and JSON.

    checkpoint-<step>/
      adapter_config.json, adapter_model.safetensors   the adapter, as PEFT reads it
      method.safetensors                               what the method needs to continue and the adapter's file lacks
      optimizer.safetensors, optimizer.json            the optimizer's tensors; its settings
      rng.safetensors, rng.json                        random number generators of torch, NumPy and Python
      training_state.json                              steps done, losses, learning rate schedule, micro-batch size
      checksums.json                                   SHA-256 of every file above

A checkpoint is written under another name, flushed to the disk and renamed: a process that is killed leaves the older
checkpoints and at most a temporary folder, which the next start removes. A checkpoint that was damaged later does not
match its checksums; resuming then takes the one before it and says so. Nothing is deleted that is not understood: it
is renamed to `damaged-<name>`.
"""

import hashlib
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ...errors import RunError, format_names
from ..foundation.files import atomic_folder, read_json_object, to_json
from .run_dir import RunDir

CHECKSUMS_FILE = "checksums.json"
METHOD_FILE = "method.safetensors"
STATE_FILE = "training_state.json"
PREFIX = "checkpoint-"
INITIAL_LOSS_SCALE = 2.0**14
REQUIRED_FILES = frozenset({
    "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "optimizer.json", "rng.safetensors",
    "rng.json", STATE_FILE,
})  # fmt: skip


@dataclass
class TrainingState:
    """What a run has done; every checkpoint contains it.

    Args:
        max_steps: optimizer steps of the whole run.
        step: optimizer steps done.
        epoch: passes over the training rows done.
        trained_tokens: tokens of the rows trained on, each row as if it were alone.
        supervised_tokens: how many of them were supervised.
        train_seconds: time in optimizer steps, without evaluations and checkpoints.
        train_cpu_seconds: CPU time of this process in them.
        train_losses: the logged training losses.
        validation_losses: `(step, loss)` of each evaluation with a finite loss.
        forgetting_budget: most forgetting of the checkpoint that is kept, in nats per token; None: any.
        general_base_losses: the base's loss on each kind of general text, in nats per token; empty: not measured yet.
        forgetting: `(step, nats per token)` of each evaluation in which it was finite.
        skipped_steps: steps without an update of the weights, because their loss or gradient was NaN or Inf.
        unlogged_loss: summed training losses since they were logged; of the last checkpoint.
        unlogged_steps: how many these are.
        loss_scale: factor on the gradients of a float16 run; None: there is none.
        steps_at_loss_scale: steps since the scale was changed.
        objective_state: numbers that the objective keeps from step to step.
        threads: torch's threads on a CPU, of the last checkpoint: the bits of a step depend on them.
    """

    max_steps: int
    step: int = 0
    epoch: float = 0.0
    trained_tokens: int = 0
    supervised_tokens: int = 0
    train_seconds: float = 0.0
    train_cpu_seconds: float = 0.0
    train_losses: list[float] = field(default_factory=list)
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    skipped_steps: int = 0
    forgetting_budget: float | None = None
    general_base_losses: dict[str, float] = field(default_factory=dict)
    forgetting: list[tuple[int, float]] = field(default_factory=list)
    unlogged_loss: float = 0.0
    unlogged_steps: int = 0
    loss_scale: float | None = None
    steps_at_loss_scale: int = 0
    objective_state: dict[str, float] = field(default_factory=dict)
    threads: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens per second of optimizer steps."""
        return self.trained_tokens / self.train_seconds if self.train_seconds else 0.0

    @property
    def ranked(self) -> list[tuple[float, int]]:
        """`(loss, step)` of the evaluations, best first, the first of equal ones before the others."""
        return sorted((loss, step) for step, loss in self.validation_losses)

    @property
    def ranked_inside_budget(self) -> list[tuple[float, int]]:
        """`ranked` without the evaluations outside the forgetting budget; empty without a budget."""
        inside = {step for step, change in self.forgetting if change <= (self.forgetting_budget or -math.inf)}
        return [(loss, step) for loss, step in self.ranked if step in inside]

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss; None before there is one."""
        return next((step for _, step in self.ranked), None)

    @property
    def best_steps(self) -> set[int]:
        """The best step of all, and that inside the forgetting budget: their checkpoints are kept."""
        return {step for ranked in (self.ranked, self.ranked_inside_budget) for _, step in ranked[:1]}

    @property
    def evaluations_since_best(self) -> int:
        """Evaluations after the best one."""
        return sum(step > (self.best_step or 0) for step, _ in self.validation_losses)

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Return whether the run ends early: the validation loss has not improved for `patience` evaluations."""
        return self.step < self.max_steps and patience is not None and self.evaluations_since_best >= patience


# --- folders of checkpoints -------------------------------------------------------------------------------------------


def parse_checkpoint_step(folder: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(folder.name.removeprefix(PREFIX))


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoint folders under `root`, oldest first."""
    names = re.compile(PREFIX + "[0-9]+")
    return sorted((p for p in root.glob(f"{PREFIX}*") if names.fullmatch(p.name)), key=parse_checkpoint_step)


def describe_newest_checkpoint(run: RunDir) -> str:
    """Name a run's newest checkpoint and the command that continues from it; "" if there is none."""
    newest = list_checkpoints(run.checkpoints)[-1:]
    return f"{newest[0].name} is complete: {run.resume_command()}" if newest else ""


def write_checkpoint(root: Path, step: int, write_files: Callable[[Path], None]) -> None:
    """Write `checkpoint-<step>` under `root`, complete or not at all; `write_files(folder)` writes its files."""
    final = root / f"{PREFIX}{step}"
    with atomic_folder(final) as folder:
        write_files(folder)
        checksums = {p.name: _sha256(p) for p in sorted(folder.iterdir())}
        (folder / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=1, allow_nan=False))
        delete_path(final)


def describe_checkpoint_damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint, `""` for nothing."""
    try:
        checksums = read_json_object(folder / CHECKSUMS_FILE)
    except RunError as e:
        return e.message.removeprefix(f"{folder}/")
    if missing := REQUIRED_FILES - checksums.keys():
        return f"{CHECKSUMS_FILE} does not name {format_names(sorted(missing), 2)}"
    for name, checksum in checksums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != checksum:
            return f"{name} is damaged (its checksum differs)"
    return ""


def find_newest_undamaged_checkpoint(root: Path, log: Callable[[str], None]) -> Path | None:
    """Return the newest undamaged checkpoint, None if there is no checkpoint; tell `log` about each one passed over."""
    for partial in root.glob(f".{PREFIX}*"):
        log(f"{partial.name}: a checkpoint that was being written when the run stopped; removed")
        delete_path(partial)
    damaged: list[Path] = []
    for folder in reversed(list_checkpoints(root)):
        damage = describe_checkpoint_damage(folder)
        if not damage:
            for other in damaged:  # renamed, so that they do not count among those that are kept
                rename_as_damaged_replacing_older(other)
            return folder
        log(f"{folder.name} is passed over: {damage}")
        damaged.append(folder)
    if damaged:
        message = f"every checkpoint in {root} is damaged: {format_names(p.name for p in reversed(damaged))}"
        raise RunError(message, "at least one complete checkpoint", "start again with another --out")
    return None


def delete_old_checkpoints(root: Path, keep: int, best_steps: Collection[int]) -> None:
    """Delete all but the newest `keep` checkpoints and the best ones."""
    for folder in list_checkpoints(root)[:-keep]:
        if parse_checkpoint_step(folder) not in best_steps:
            delete_path(folder)


def delete_path(path: Path) -> None:
    """Delete a file, a link or a folder with what it contains, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rename_as_damaged_replacing_older(path: Path) -> Path:
    """Rename a file or folder to `damaged-<name>`, replacing an older one; return its new path."""
    damaged = path.with_name(f"damaged-{path.name}")
    delete_path(damaged)
    return path.rename(damaged)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- files of a checkpoint --------------------------------------------------------------------------------------------


def save_optimizer(folder: Path, optimizer_state_dict: dict[str, Any]) -> None:
    """Write an optimizer's `state_dict()` as tensors and JSON; a tensor shared by parameters is written once."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    shared: dict[str, str] = {}
    first_key: dict[int, str] = {}
    for index, entry in optimizer_state_dict["state"].items():
        # bitsandbytes nests its tensors in a table, to hide them from FSDP; it loads them without the table, too.
        flat = {k: v for k, v in entry.items() if not isinstance(v, dict)}
        for table in entry.values():
            flat |= table if isinstance(table, dict) else {}
        for name, value in flat.items():
            key = f"{index}.{name}"
            if not isinstance(value, torch.Tensor):
                values[key] = value
            elif first_key.setdefault(id(value), key) == key:
                tensors[key] = value.detach().to("cpu").contiguous()
            else:
                shared[key] = first_key[id(value)]
    save_file(tensors, folder / "optimizer.safetensors")
    settings = {"param_groups": optimizer_state_dict["param_groups"], "state": values, "same": shared}
    (folder / "optimizer.json").write_text(to_json(settings))


def load_optimizer(folder: Path) -> dict[str, Any]:
    """Return the `state_dict()` that `save_optimizer` wrote."""
    settings = json.loads((folder / "optimizer.json").read_text())
    state: dict[int, dict[str, Any]] = {}
    tensors = load_file(folder / "optimizer.safetensors")
    tensors |= {key: tensors[other] for key, other in settings["same"].items()}
    for key, value in [*tensors.items(), *settings["state"].items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in settings["param_groups"]]
    return {"state": state, "param_groups": groups}


def save_method_state(folder: Path, model: Any) -> None:
    """Write what the adapter's method needs to continue and the adapter's own file lacks, if anything."""
    state = {
        f"{site}:{name}": tensor.detach().to("cpu").contiguous()
        for site, module in model.adapter_modules("default").items()
        for name, tensor in module.extra_state().items()
    }
    if state:
        save_file(state, folder / METHOD_FILE)


def load_method_state(folder: Path, model: Any) -> None:
    """Restore what `save_method_state` wrote."""
    by_site: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in (load_file(folder / METHOD_FILE) if (folder / METHOD_FILE).is_file() else {}).items():
        site, _, name = key.rpartition(":")
        by_site.setdefault(site, {})[name] = tensor
    modules = model.adapter_modules("default")
    for site, tensors in by_site.items():
        modules[site].load_extra_state(tensors)


def save_rng_state(folder: Path) -> None:
    """Write the states of the random number generators of torch (CPU and GPUs), NumPy and Python."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(np.asarray(numpy_keys).astype(np.int64))
    save_file(tensors, folder / "rng.safetensors")
    (folder / "rng.json").write_text(
        json.dumps({"numpy": [numpy_name, *numpy_rest], "python": random.getstate()}, allow_nan=False)
    )


def restore_rng_state(folder: Path) -> None:
    """Restore the states that `save_rng_state` wrote."""
    tensors, values = load_file(folder / "rng.safetensors"), json.loads((folder / "rng.json").read_text())
    torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    if "mps" in tensors and torch.backends.mps.is_available():
        torch.mps.set_rng_state(tensors["mps"])
    numpy_name, *numpy_rest = values["numpy"]
    np.random.set_state((numpy_name, tensors["numpy"].numpy().astype(np.uint32), *numpy_rest))
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
