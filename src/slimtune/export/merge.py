"""Base and adapter as one plain Hugging Face checkpoint: W' = W + ΔW, and the proof that it is the trained model.

    load ─ log p with the adapter ─ merge in fp32, round once ─ save beside `out` ─ read back ─ log p again ─ rename

The base is taken as it was trained on: rounded to the run's dtype. Whatever fails on the way, `out` is not there.
The work is done on the CPU, whose memory is the larger one.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from ..build import adapter_folder, load_run
from ..contract.config import PeftConfig
from ..contract.delta import MergeRefused
from ..errors import AdapterError
from ..models.dtype import pick_dtype
from ..models.faults import quiet
from ..models.load import load_base, load_config
from ..runs import RunFolder
from . import proof
from .card import card
from .folder import require_free, whole_folder

log = logging.getLogger(__name__)

SMALL = 1_000_000_000
"""Below this many parameters the proof computes in fp32 and reads the saved folder back; above, memory counts."""


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
    loaded = load_run(run, dtype=_trained_dtype(run), device="cpu")
    model: Any = loaded.model
    config, tokenizer, store = model.active_peft_config, loaded.base.tokenizer, asked or loaded.base.dtype
    small = sum(p.numel() for p in model.parameters()) < SMALL
    if small:
        model.to(torch.promote_types(loaded.base.dtype, torch.float32))
    compute = model.dtype
    rows = proof.texts(tokenizer, loaded.recipe, model.config.get_text_config())
    adapted = proof.log_probabilities(model, rows)
    with model.disable_adapter():
        base = proof.log_probabilities(model, rows)
    merged = _merged(model, run)
    _store_as(merged, store)
    size = sum(p.numel() for p in merged.parameters())
    with whole_folder(out, size * store.itemsize) as folder:
        with quiet():
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        proof.require_whole(folder, merged)
        if small:
            trusted = loaded.recipe is not None and loaded.recipe.model.trust_remote_code
            merged = load_base(str(folder), dtype=compute, device="cpu", trust_remote_code=trusted).model
        found = proof.require_same(proof.log_probabilities(merged, rows), adapted, base, store, compute)
        made = {"dtype": str(store).removeprefix("torch."), **found}
        text = card(loaded.base.source, config, loaded.recipe, made, out.resolve().name, bool(tokenizer.chat_template))
        (folder / "README.md").write_text(text, encoding="utf-8")
        written = sum(f.stat().st_size for f in folder.iterdir())
    return {
        "run": str(run),
        "out": str(out),
        "bytes": written,
        "parameters": size,
        **made,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _trained_dtype(run: Path) -> str | None:
    """Return the dtype the run held its base in; for an adapter folder, the one the base's checkpoint is stored in."""
    folder = adapter_folder(run)
    if folder != run:
        result = RunFolder.open(run).result_file
        # "auto" in the recipe may have meant another dtype on the machine that trained.
        return json.loads(result.read_text()).get("dtype") if result.is_file() else None
    name = PeftConfig.from_pretrained(folder).base_model_name_or_path
    stored = load_config(name).dtype if name else None
    return str(stored or "float32").removeprefix("torch.")


def _merged(model: Any, run: Path) -> Any:
    """Return the plain base with the adapter in its weights; its generation settings can be saved."""
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except MergeRefused as e:
        raise AdapterError(
            f"the adapter of {run} cannot be merged: {e}",
            "finite changes of plain weights",
            "use it beside its base (slimtune generate, chat; PeftModel.from_pretrained)"
            + (", or an older checkpoint of it" if "not finite" in str(e) else ""),
        ) from e
    settings = getattr(merged, "generation_config", None)
    if settings is not None:
        try:
            settings.validate(strict=True)
        except ValueError:
            # Some checkpoints name a temperature and forget that it asks for sampling; transformers saves no such file.
            log.warning("the base's generation settings ask for sampling without do_sample: it is set")
            settings.do_sample = True
    return merged


def _store_as(model: Any, dtype: torch.dtype) -> None:
    """Round every weight to `dtype`, in place; buffers stay (rotary frequencies must not be rounded)."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        parameter.data = parameter.data.to(dtype)
        if not torch.isfinite(parameter.data).all():
            raise AdapterError(
                f"{name} holds numbers that {str(dtype).removeprefix('torch.')} cannot hold",
                f"numbers up to {torch.finfo(dtype).max:.3g}",
                "--dtype bfloat16 or float32",
            )
