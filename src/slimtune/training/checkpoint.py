"""Checkpoints that are whole or absent, without pickle.

    checkpoint-<step>/
      adapter_config.json, adapter_model.safetensors   the adapter, as PEFT reads it
      method.safetensors                               what the method goes on from beside it, if anything
      optimizer.safetensors, optimizer.json            AdamW's moments; its settings
      rng.safetensors, rng.json                        random numbers of torch, NumPy and Python
      scheduler.json, trainer_state.json, progress.json
      checksums.json                                   SHA-256 of every file above

A checkpoint is written under another name, flushed to the disk and renamed, so that a process killed at any moment
leaves the ones before it and, at most, a `.partial` folder that the next start removes. A checkpoint whose sums do not
hold is passed over, aloud, for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes

from ..errors import RunError, format_names
from ..utils.files import fsync_folder, translate_disk_full

SUMS = "checksums.json"
METHOD = "method.safetensors"
_PREFIX = "checkpoint-"
_PARTIAL = ".partial-"


def step_of(folder: Path) -> int:
    """Return the step a checkpoint folder's name says."""
    return int(folder.name.removeprefix(_PREFIX))


def folders(root: Path) -> list[Path]:
    """Return the checkpoint folders under `root`, oldest first."""
    found = root.glob(f"{_PREFIX}*") if root.is_dir() else []
    return sorted((p for p in found if p.name.removeprefix(_PREFIX).isdigit()), key=step_of)


def write(root: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Write `checkpoint-<step>` under `root` whole: `fill(folder)` puts the files there.

    Raises:
        RunError: the disk is full; nothing of this checkpoint is left, the older ones are.
    """
    root.mkdir(parents=True, exist_ok=True)
    final, partial = root / f"{_PREFIX}{step}", root / f"{_PARTIAL}{step}"
    shutil.rmtree(partial, ignore_errors=True)
    with translate_disk_full(final):
        try:
            partial.mkdir()
            fill(partial)
            sums = {p.name: _sum(p) for p in sorted(partial.iterdir())}
            (partial / SUMS).write_text(json.dumps(sums, indent=1))
            for file in partial.iterdir():
                _flush(file)
            fsync_folder(partial)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            fsync_folder(root)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return final


def fault_in(folder: Path) -> str:
    """Return what is wrong with a checkpoint, or `""`."""
    try:
        sums = json.loads((folder / SUMS).read_text())
    except (OSError, ValueError) as e:
        return f"{SUMS} cannot be read ({type(e).__name__})"
    for name, wanted in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sum(folder / name) != wanted:
            return f"{name} is damaged (its checksum differs)"
    return ""


def newest_sound(root: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is whole; each one passed over is told to `say`. None: there is none.

    Raises:
        RunError: there are checkpoints, and none is whole.
    """
    for left in root.glob(f"{_PARTIAL}*") if root.is_dir() else ():
        say(f"{left.name}: a checkpoint that was being written when the run stopped; removed")
        shutil.rmtree(left)
    every = folders(root)
    damaged: list[Path] = []
    for folder in reversed(every):
        fault = fault_in(folder)
        if not fault:
            for other in damaged:  # out of the count of those kept, and there for whoever wants to look
                shutil.rmtree(root / f"damaged-{other.name}", ignore_errors=True)
                other.rename(root / f"damaged-{other.name}")
            return folder
        say(f"{folder.name} is passed over: {fault}")
        damaged.append(folder)
    if every:
        raise RunError(
            f"no checkpoint in {root} is whole: {format_names(p.name for p in every)}",
            "at least one",
            "start anew with another --out",
        )
    return None


def rotate(root: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    for folder in folders(root)[:-keep]:
        if step_of(folder) != best:
            shutil.rmtree(folder)


def save_optimizer(folder: Path, state: dict[str, Any], *, stream: bool = False) -> None:
    """Write an optimizer's `state_dict()` as tensors and JSON; a tensor that several parameters share, once.

    Args:
        folder: of the checkpoint.
        state: the optimizer's.
        stream: write from where the tensors lie, where they are too large to be put together in memory first.
    """
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {}
    same: dict[str, str] = {}
    first: dict[int, str] = {}
    for index, values in state["state"].items():
        # bitsandbytes hides its tensors from FSDP in a table of their own, and takes them without it, too.
        inner = [v for v in values.values() if isinstance(v, dict)]
        for name, value in {**values, **{n: t for table in inner for n, t in table.items()}}.items():
            key = f"{index}.{name}"
            if not isinstance(value, torch.Tensor):
                rest |= {} if isinstance(value, dict) else {key: value}
            elif first.setdefault(id(value), key) == key:
                tensors[key] = value
            else:
                same[key] = first[id(value)]
    plain = {k: t.detach().to("cpu").contiguous() for k, t in tensors.items()}
    if stream:
        save_file(plain, folder / "optimizer.safetensors")
    else:
        (folder / "optimizer.safetensors").write_bytes(to_bytes(plain))
    (folder / "optimizer.json").write_text(
        json.dumps({"param_groups": state["param_groups"], "state": rest, "same": same})
    )


def load_optimizer(folder: Path) -> dict[str, Any]:
    """Return the `state_dict()` that `save_optimizer` wrote."""
    described = json.loads((folder / "optimizer.json").read_text())
    state: dict[int, dict[str, Any]] = {}
    tensors = load_file(folder / "optimizer.safetensors")
    tensors |= {key: tensors[other] for key, other in described.get("same", {}).items()}
    for key, value in [*tensors.items(), *described["state"].items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in described["param_groups"]]
    return {"state": state, "param_groups": groups}


def save_progress(folder: Path, model: Any) -> None:
    """Write what the adapter's method goes on from beside the adapter's own file, where there is anything."""
    deltas = model.adapter_modules("default")
    kept = {
        f"{at}:{n}": t.detach().to("cpu").contiguous() for at, d in deltas.items() for n, t in d.extra_state().items()
    }
    if kept:
        (folder / METHOD).write_bytes(to_bytes(kept))


def load_progress(folder: Path, model: Any) -> None:
    """Let the adapter's method go on from what `save_progress` wrote."""
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in (load_file(folder / METHOD) if (folder / METHOD).is_file() else {}).items():
        at, _, name = key.rpartition(":")
        kept.setdefault(at, {})[name] = tensor
    deltas = model.adapter_modules("default")
    for at, tensors in kept.items():
        deltas[at].load_extra_state(tensors)


def save_random(folder: Path) -> None:
    """Write where the random number generators of torch (CPU and GPUs), NumPy and Python stand."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    kind, keys, *rest = np.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    (folder / "rng.safetensors").write_bytes(to_bytes(tensors))
    version, inner, gauss = random.getstate()
    (folder / "rng.json").write_text(json.dumps({"numpy": [kind, *rest], "python": [version, list(inner), gauss]}))


def load_random(folder: Path) -> None:
    """Put the random number generators where `save_random` found them."""
    tensors, rest = load_file(folder / "rng.safetensors"), json.loads((folder / "rng.json").read_text())
    torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    if "mps" in tensors and torch.backends.mps.is_available():
        torch.mps.set_rng_state(tensors["mps"])
    kind, *others = rest["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *others))
    version, inner, gauss = rest["python"]
    random.setstate((version, tuple(inner), gauss))


def _sum(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())
