"""A run's adapter as vLLM takes it: PEFT's two files, and the line that serves them beside the base.

vLLM adds s · B A x to each adapted map, s by `r`, `lora_alpha` and `use_rslora`. Releases differ in what they make of
`rank_pattern` and `alpha_pattern`: 0.32 follows them, others take one scale for all layers and say nothing. So where a
LoRA is not of one rank and one scale, or starts from the base's weight (PiSSA, OLoRA), what is written is

    B' = s · B,  alpha = r in every layer: the scale is 1, whoever reads it, with patterns or without

Ranks stay as they are: vLLM itself fills A and B up with zeros to --max-lora-rank. What vLLM refuses is refused here
first; `vllm.json` holds what its classes say of each architecture (written by `benchmarks/vllm_ways/facts.py`).
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor

from ..adapters import state_dict
from ..adapters.config import CONFIG_FILE
from ..adapters.conversion import LoraReport, rank_settings
from ..adapters.export_formats import lora_incompatibilities, plain_lora_incompatibilities
from ..errors import AdapterError, UsageError, format_names, nearest
from ..methods.lora.starts import is_in_weight
from ..models.gguf import read_dequantized
from ..models.loader import load_tokenizer
from ..run_dir import RunDir
from ..setup import TrainedModel, find_adapter_folder, load_run
from ..utils.files import write_atomic

log = logging.getLogger(__name__)

SCRIPT, TEMPLATE = "serve.sh", "chat_template.jinja"
MOST_TOKENS = 258_048
"""Tokens of the largest vocabulary beside whose head vLLM serves a LoRA."""
DTYPES = ("float32", "bfloat16", "float16")
Factors = dict[str, tuple[Tensor, Tensor, float]]
"""By module: `A (r, in)`, `B (out, r)` and the scale."""


@cache
def known() -> dict[str, Any]:
    """Return what vLLM says of itself.

    `version`; `ranks`: what --max-lora-rank may be; `architectures`: the embeddings and heads that each takes an
    adapter on, None where it serves no LoRA.
    """
    return json.loads((files(__package__) / "vllm.json").read_text(encoding="utf-8"))


def vllm_adapter(
    run: Path,
    folder: Path,
    *,
    out: Path | None = None,
    name: str | None = None,
    as_lora: float | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write a run's adapter into an open export folder: its two files and `serve.sh`, a chat template where it is not
    the base's own.

    Args:
        run: a run folder, or an adapter folder.
        folder: where the files go; it exists.
        out: where the folder will lie in the end, which the command names; None: where it is.
        name: what the adapter is asked for by; None: the name of `out`.
        as_lora: make a LoRA of it first, the nearest of this rank (int), or the one that keeps this share of each
            layer's change (float in (0, 1]); None: it is a LoRA.
        dtype: what vLLM is to compute in: "float32", "bfloat16" or "float16"; None: what the run held its base in.

    Returns:
        `name`, `base` (path or Hub id) and `base_name` (what the base is asked for by), `dtype`, `rank`,
        `max_lora_rank`, `modules`, `folded` (whether scales went into B), `bytes`, `command` (a shell line),
        `arguments` (the same after `vllm serve`), `warnings`, and where `as_lora` is given `conversion`: `method`,
        `rank`, `error` and `worst` (relative to the change, over all layers and at the worst).

    Raises:
        UsageError: no such run, a name or dtype that cannot be.
        AdapterError: the adapter does not fit its base, or vLLM would refuse it: all causes, and the way out.
    """
    run, out = Path(run), Path(out or folder).expanduser().resolve()
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}{nearest(dtype, DTYPES)}", f"one of {format_names(DTYPES)}")
    loaded = load_run(run, dtype=dtype, device="cpu")
    base, base_name = _base(loaded)
    name = _name(name, out.name, base_name)
    model: Any = loaded.model
    adapter, method, report = model.active_adapter, model.active_peft_config.name, None
    never = [*lora_incompatibilities(model.peft_config[adapter]), *_base_refuses(model, adapter)]
    _require(run, model, adapter, never, _form(model, adapter) if as_lora is None else [])
    if as_lora is not None:
        report = model.to_lora(adapter, as_lora)
        adapter = report.adapter
        _require(run, model, adapter, [], _form(model, adapter))
    config = model.peft_config[adapter]
    # What is left is plain LoRA, which has factors everywhere.
    layers: Factors = {n: d.low_rank_factors() for n, d in model.adapter_modules(adapter).items()}
    folded = _is_mixed(config, layers)
    held = _held(run) or str(loaded.base.dtype).removeprefix("torch.")
    served = dtype or (held if held in DTYPES else "float32")  # vLLM has no float64
    rank = max(A.shape[0] for A, _, _ in layers.values())
    facts: dict[str, Any] = {
        "name": name,
        "base": base,
        "base_name": base_name,
        "dtype": served,
        "rank": rank,
        "max_lora_rank": _room(rank),
        "modules": len(layers),
        "folded": folded,
        "bytes": _write(model, adapter, layers, folder, folded),
        "warnings": _warnings(model, held, served),
    }
    template = _template(loaded)
    if template is not None:
        write_atomic(folder / TEMPLATE, template)
    write_atomic(folder / SCRIPT, _script(facts, _arguments(facts, loaded, ".", template is not None)))
    for warning in facts["warnings"]:
        log.warning(warning)
    arguments = _arguments(facts, loaded, str(out), template is not None)
    return {
        **facts,
        "arguments": arguments,
        "command": shlex.join(["vllm", "serve", *arguments]),
        **({"conversion": _conversion(method, report)} if report is not None else {}),
    }


# --- what vLLM refuses -----------------------------------------------------------------------------------------------


def _require(run: Path, model: Any, adapter: str, never: list[str], form: list[str]) -> None:
    """Raise AdapterError where there are causes, with the ways that are left.

    Args:
        run: the run, for messages.
        model: with the adapter.
        adapter: its name.
        never: causes that stay whatever LoRA is made of it.
        form: causes that another LoRA would not have.
    """
    if not never and not form:
        return
    config, kinds = model.peft_config[adapter], set(model.match_report(adapter).kinds.values())
    ways = []
    if config.mergeable:
        merge = shlex.join(["slimtune", "merge", str(run), "--out", "merged"])
        ways.append(f"merge it: {merge}, then vllm serve merged")
    if config.mergeable and not never and kinds <= {"linear", "embedding"}:
        ways.append("make a LoRA of it, which says how near it comes: slimtune export … --to vllm --as-lora 64")
    raise AdapterError(
        f"vLLM would refuse the adapter of {run}: {'; '.join([*never, *form])}",
        f"a LoRA of rank {known()['ranks'][-1]} at most on linear maps (vLLM {known()['version']})",
        "; or ".join(ways) or "use it with slimtune generate and slimtune chat: it is no change of weights",
    )


def _form(model: Any, adapter: str) -> list[str]:
    """Return why vLLM would not take the adapter that another LoRA would not have."""
    config, most = model.peft_config[adapter], known()["ranks"][-1]
    if causes := plain_lora_incompatibilities(config):
        return causes
    deltas = model.adapter_modules(adapter).values()
    rank = max((d.low_rank()[0].shape[0] for d in deltas if hasattr(d, "low_rank")), default=0)
    if rank <= most:
        return []
    start = ", twice its own since its start is taken out" if is_in_weight(config.init_lora_weights) else ""
    return [f"its rank is {rank}{start}: vLLM's --max-lora-rank ends at {most}"]


def _base_refuses(model: Any, adapter: str) -> list[str]:
    """Return why vLLM would take no such LoRA on this base."""
    architecture = _architecture(model)
    if architecture not in known()["architectures"]:
        return []
    takes = known()["architectures"][architecture]
    if takes is None:
        return [f"the base is a {architecture}, which vLLM serves no LoRA on"]
    causes, tokens = [], model.config.get_text_config().vocab_size
    if "lm_head" in takes and tokens > MOST_TOKENS:
        causes.append(f"the base has {tokens} tokens: with LoRA vLLM takes {MOST_TOKENS} at most")
    kinds, head = model.match_report(adapter).kinds, model.get_output_embeddings()
    deltas = model.adapter_modules(adapter)
    ends = [n for n in deltas if kinds[n] == "embedding" or model.get_submodule(n) is head]
    if odd := [n for n in ends if n.rpartition(".")[2] not in takes]:
        what = f"only {format_names(takes)}" if takes else "no embedding and no head"
        causes.append(f"it changes {format_names(odd)}, and of a {architecture} vLLM takes {what}")
    return causes


def _architecture(model: Any) -> str:
    """Return the name by which vLLM finds its own class: the first in the base's config."""
    return (getattr(model.config, "architectures", None) or [model.base_model_class.__name__])[0]


def _warnings(model: Any, held: str, served: str) -> list[str]:
    architecture, found = _architecture(model), []
    if architecture not in known()["architectures"]:
        found.append(
            f"nothing is known of a {architecture} in vLLM {known()['version']}: where it has no class of its own for "
            "it, it may serve it by transformers', or not at all"
        )
    if served != held:
        found.append(
            f"the run held its base in {held}, and vLLM is to compute in {served}: log-probabilities will differ by "
            "what that rounding of the base makes"
        )
    return found


# --- the files -------------------------------------------------------------------------------------------------------


def _is_mixed(config: Any, layers: Factors) -> bool:
    """Return whether one r, alpha and use_rslora do not say what the adapter means to every release."""
    same = {(A.shape[0], scale) for A, _, scale in layers.values()}
    other = len(same) > 1 or next(iter(same))[0] != config.r
    return other or bool(config.alpha_pattern) or is_in_weight(config.init_lora_weights)


def _write(model: Any, adapter: str, layers: Factors, folder: Path, folded: bool) -> int:
    """Write both files; return their bytes."""
    config, kinds = model.peft_config[adapter], model.match_report(adapter).kinds
    tensors: dict[str, Tensor] = {}
    for module, (A, B, scale) in layers.items():
        at = f"base_model.model.{module}."
        a, b = ("lora_embedding_A", "lora_embedding_B") if kinds[module] == "embedding" else _LINEAR
        if folded:
            A, B = A.float(), (B.double() * scale).float()
        tensors |= {at + a: A.detach().contiguous(), at + b: B.detach().contiguous()}
    settings = {k: v for k, v in config.to_dict().items() if k not in config.extension_fields}
    settings |= {"inference_mode": True, "init_lora_weights": True, "eva_config": None, "rank_pattern": {}}
    if folded:
        settings |= rank_settings({n: A.shape[0] for n, (A, _, _) in layers.items()})
    write_atomic(folder / CONFIG_FILE, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    write_atomic(folder / state_dict.WEIGHTS_FILE, to_bytes(tensors, state_dict.adapter_tensor_info(model, adapter)[1]))
    return sum((folder / f).stat().st_size for f in (CONFIG_FILE, state_dict.WEIGHTS_FILE))


_LINEAR = ("lora_A.weight", "lora_B.weight")


def _conversion(method: str, report: LoraReport) -> dict[str, Any]:
    worst = max(report.errors.values())
    return {"method": method, "rank": max(report.ranks.values()), "error": report.error, "worst": worst}


def _template(loaded: TrainedModel) -> str | None:
    """Return the chat template the adapter was trained with where the base does not bring that one."""
    source, recipe = loaded.base.source, loaded.recipe
    options: dict[str, Any] = {}
    if recipe is not None:
        options = {"trust_remote_code": recipe.model.trust_remote_code, "revision": recipe.model.revision}
    used = loaded.base.tokenizer.chat_template
    return used if used != load_tokenizer(source.spec, **options).chat_template else None


# --- the line --------------------------------------------------------------------------------------------------------


def _base(loaded: TrainedModel) -> tuple[str, str]:
    """Return what vLLM loads the base from, and the name it serves it by."""
    source = loaded.base.source
    if source.kind == "hub":
        return source.path, source.path
    # vLLM takes no GGUF beside a LoRA here: the base is what was trained on, the folder it was dequantized into.
    path = read_dequantized(source.path)[0] if source.kind == "gguf" else Path(source.path)
    return str(path.expanduser().resolve()), _plain(source.name)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _name(given: str | None, folder: str, base: str) -> str:
    """Return the adapter's name: what can stand in a request, in a shell line and before vLLM's `=`."""
    if given is None:
        name = _plain(folder)
        return f"{name}-tuned" if name == base else name
    if not re.fullmatch(r"[A-Za-z0-9._][A-Za-z0-9._/:-]*", given):
        raise UsageError(
            f"{given!r} is no name vLLM can serve the adapter by", "letters, digits and . _ - / : alone", "--name"
        )
    if given == base:
        raise UsageError(f"the base itself is served as {given!r}", "another name for the adapter", "--name")
    return given


def _held(run: Path) -> str | None:
    """Return the dtype a run held its base in, which "auto" may not name on this machine; None for an adapter alone."""
    result = RunDir.open(run).result_file if find_adapter_folder(run) != run else None
    return json.loads(result.read_text()).get("dtype") if result is not None and result.is_file() else None


def _room(rank: int) -> int:
    """Return the smallest --max-lora-rank that an adapter fits into; 1 is not in older releases."""
    return next(r for r in known()["ranks"] if r >= max(rank, 8))


def _arguments(facts: dict[str, Any], loaded: TrainedModel, folder: str, template: bool) -> list[str]:
    """Return what comes after `vllm serve`."""
    recipe = loaded.recipe
    served = ["--served-model-name", facts["base_name"]] if facts["base_name"] != facts["base"] else []
    if recipe is not None and recipe.model.revision:
        served += ["--revision", recipe.model.revision]
    if recipe is not None and recipe.model.trust_remote_code:
        served += ["--trust-remote-code"]
    rank = ["--max-lora-rank", str(facts["max_lora_rank"])]
    module = f"{facts['name']}={folder}"
    if "," in module:  # then vLLM reads JSON
        module = json.dumps({"name": facts["name"], "path": folder})
    lora = ["--enable-lora", *rank, "--lora-modules", module]
    chat = ["--chat-template", f"{folder}/{TEMPLATE}"] if template else []
    return [facts["base"], *served, "--dtype", facts["dtype"], *lora, *chat]


def _script(facts: dict[str, Any], arguments: list[str]) -> str:
    """Return a shell script that serves the adapter from wherever the folder lies."""
    return f"""#!/bin/sh
# Serves the base and, by the name {facts["name"]}, the adapter in this folder: sh {SCRIPT} [more options of vllm serve]
cd -- "$(dirname -- "$0")" || exit 1
exec vllm serve {shlex.join(arguments)} "$@"
"""
