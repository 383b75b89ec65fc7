"""Base and adapter as one plain Hugging Face checkpoint: W' = W + ΔW, and the proof that it is the trained model.

    log p with the adapter ─ each module merged in fp32, rounded once, written beside `out` ─ read back ─ log p ─ rename

The base is taken as it was trained on: rounded to the run's dtype. Its weights are views of the files they lie in, and
one module's are merged at a time, so memory is that of a module, not of a model. Whatever fails on the way, `out` is
not there. The work is done on the CPU, whose memory is the larger one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapters.base import MergeUnsupported
from ..adapters.config import PeftConfig
from ..adapters.model import PeftModel
from ..errors import AdapterError
from ..models.dtype import pick_dtype
from ..models.errors import silence_libraries
from ..models.loader import load_base, load_config
from ..models.quantization import remove_quantization, stored_quantization
from ..run_dir import ADAPTER_FILE, RunDir
from ..setup import TrainedModel, find_adapter_folder, load_run
from ..utils.files import atomic_folder, translate_disk_full
from . import proof
from .folder import require_free, write_note
from .model_card import render_merged_card
from .rounding import rounding_for
from .weights import Weights

log = logging.getLogger(__name__)

SMALL = 1_000_000_000
"""Below this many parameters the proof computes in fp32, and 16 bits are rounded with the run's rows in sight; above,
memory counts: it computes in the run's dtype, and numbers are rounded one by one."""
SHARD = 5_000_000_000
"""Bytes of a weight file, at most."""


def merge(run: Path, out: Path, dtype: str = "auto") -> dict[str, Any]:
    """Write a run's base and adapter as one checkpoint.

    Args:
        run: a run folder, or an adapter folder.
        out: folder for the checkpoint: not there yet, or empty.
        dtype: of the weights written; "auto": what the run held the base in (an adapter folder: what the base's
            checkpoint is stored in).

    Returns:
        `run`, `out`, `bytes` (all files), `dtype`, `parameters`, `seconds`, and over `positions` of text, in nats:
        `max_difference` and `mean_difference` (merged against adapter) and `effect` (adapter against base, on average).

    Raises:
        UsageError: no such run, an unknown dtype, or `out` holds something.
        AdapterError: the adapter does not fit, or cannot be merged.
        RunError: the disk is full, or the merged model is not the trained one.
    """
    began = time.perf_counter()
    run, out = Path(run), Path(out).expanduser()
    asked = None if dtype == "auto" else pick_dtype(dtype)
    require_free(out)
    with _as_trained(run, out) as loaded:
        found = _write(loaded, run, out, asked or loaded.base.dtype)
    return {"run": str(run), "out": str(out), **found, "seconds": round(time.perf_counter() - began, 3)}


def _write(loaded: TrainedModel, run: Path, out: Path, store: torch.dtype) -> dict[str, Any]:
    """Write the checkpoint in `store` and prove it; return what there is to say."""
    model: Any = loaded.model
    config, tokenizer = model.active_peft_config, loaded.base.tokenizer
    packed = getattr(model, "is_quantized", False)
    small = _is_small(model)
    if small and not packed:
        model.to(torch.promote_types(loaded.base.dtype, torch.float32))
    compute = model.dtype
    rows = proof.texts(tokenizer, loaded.recipe, model.config.get_text_config())
    adapted = proof.log_probabilities(model, rows)
    with model.disable_adapter():
        base = proof.log_probabilities(model, rows)
    rounding = rounding_for(model, loaded.recipe, tokenizer) if small and store.itemsize == 2 else None
    if packed:
        remove_quantization(model)
    with _refusals(run):
        weights = Weights(model, store, rounding=rounding)
    with atomic_folder(out, weights.bytes) as folder:
        _write_settings(model, folder, store)
        tokenizer.save_pretrained(folder)
        with _refusals(run):
            weights.write(folder, SHARD)
        held = compute if small else store
        merged = load_base(str(folder), dtype=held, device="cpu", trust_remote_code=_trusts(loaded)).model
        proof.require_whole(folder, merged)
        found = proof.require_same(proof.log_probabilities(merged, rows), adapted, base, store, compute)
        made = {"dtype": _name(store), **found}
        text = render_merged_card(
            loaded.base.source, config, loaded.recipe, made, out.resolve().name, bool(tokenizer.chat_template)
        )
        (folder / "README.md").write_text(text, encoding="utf-8")
        with (loaded.adapter / ADAPTER_FILE).open("rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        write_note(folder, "merged", run, {**made, "fingerprint": loaded.base.fingerprint, "adapter_sha256": sha256})
        written = sum(f.stat().st_size for f in folder.iterdir())
    return {"bytes": written, "parameters": weights.parameters, **made}


@contextmanager
def _as_trained(run: Path, out: Path) -> Iterator[TrainedModel]:
    """Load a run on its base as it was trained on.

    transformers makes views of a checkpoint's files where it is stored in the dtype asked for, and copies elsewhere.
    There a large base is first written in that dtype beside `out`, for as long as it is needed.
    """
    kind = _trained_dtype(run)
    recipe = RunDir.open(run).load_recipe() if find_adapter_folder(run) != run else None
    stored = None
    if recipe is not None:
        m = recipe.model
        kind = _name(pick_dtype(kind or m.dtype, "cpu"))
        told = load_config(m.name, trust_remote_code=m.trust_remote_code, revision=m.revision)
        if (
            m.quantization is None and stored_quantization(told) is None
        ):  # a quantized base is held in few bits as it is
            stored = _name(told.dtype or torch.float32)
    if stored in (None, kind) or _is_small((loaded := load_run(run, dtype=stored, device="cpu")).model):
        yield load_run(run, dtype=kind, device="cpu")
        return
    assert kind is not None
    held: Any = pick_dtype(kind)
    weights = Weights(loaded.model, held, adapters=())
    place = out.resolve()
    with translate_disk_full(place, 2 * weights.bytes):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.base.", dir=place.parent) as beside:
            _write_settings(loaded.model, Path(beside), held)
            loaded.base.tokenizer.save_pretrained(beside)
            weights.write(Path(beside), SHARD)
            model = load_base(beside, dtype=held, device="cpu", trust_remote_code=_trusts(loaded)).model
            base = dataclasses.replace(loaded.base, model=model, dtype=held)
            yield dataclasses.replace(loaded, model=PeftModel.from_pretrained(model, loaded.adapter), base=base)


def _trained_dtype(run: Path) -> str | None:
    """Return the dtype the run held its base in; for an adapter folder, the one the base's checkpoint is stored in."""
    folder = find_adapter_folder(run)
    if folder != run:
        result = RunDir.open(run).result_file
        # "auto" in the recipe may have meant another dtype on the machine that trained.
        return json.loads(result.read_text()).get("dtype") if result.is_file() else None
    name = PeftConfig.from_pretrained(folder).base_model_name_or_path
    stored = load_config(name).dtype if name else None
    return _name(stored or torch.float32)


def _is_small(model: Any) -> bool:
    return sum(p.numel() for p in model.parameters()) < SMALL


def _trusts(loaded: TrainedModel) -> bool:
    return loaded.recipe is not None and loaded.recipe.model.trust_remote_code


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _refusals(run: Path) -> Iterator[None]:
    """Turn the refusal of a merge into an error that says the way out."""
    try:
        yield
    except MergeUnsupported as e:
        raise AdapterError(
            f"the adapter of {run} cannot be merged: {e}",
            "finite changes of plain weights",
            "use it beside its base (slimtune generate, chat; PeftModel.from_pretrained)"
            + (", or an older checkpoint of it" if "not finite" in str(e) else ""),
        ) from e


def _write_settings(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write what a checkpoint has beside its weights: config, generation settings, code that the base brought."""
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        try:
            settings.validate(strict=True)
        except ValueError:
            # Some checkpoints name a temperature and forget that it asks for sampling; transformers saves no such file.
            log.warning("the base's generation settings ask for sampling without do_sample: it is set")
            settings.do_sample = True
    with silence_libraries():
        # transformers' own, not the adapter's.
        PreTrainedModel.save_pretrained(model, folder, state_dict={})
        for weights in folder.glob("*.safetensors"):  # of no tensors
            weights.unlink()
        model.config.dtype = _name(dtype)  # the model is in the run's
        model.config.save_pretrained(folder)
