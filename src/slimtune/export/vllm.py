"""Write a run's adapter as vLLM reads it: PEFT's two files, and a script that serves them beside the base.

vLLM adds s · B A x to each adapted layer, with s from `r`, `lora_alpha` and `use_rslora`. Its releases read
`rank_pattern` and `alpha_pattern` differently: 0.32 follows them, others use one scale for all layers without a
warning. So if a LoRA has several ranks or scales, or starts from the base's weight (PiSSA, OLoRA), this is written
instead:

    B' = s · B,  alpha = r in every layer: the scale is 1 for every reader, with and without patterns

Stacked experts are written as vLLM reads them for most mixtures: A and B of each expert's gate, up and down matrix.

Ranks stay as they are: vLLM pads A and B with zeros to --max-lora-rank. What vLLM refuses is refused here first;
`planning/vllm_rules.json` holds the rules that its classes declare per architecture.
"""

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from ..core.adapters import adapter_files
from ..core.adapters.peft_config import CONFIG_FILE, write_adapter_config
from ..core.foundation.dtype_names import dtype_name
from ..core.foundation.files import write_atomic
from ..core.models.loader import load_tokenizer
from ..core.training.trained_model import TrainedModel
from ..errors import AdapterError, UsageError, format_names, suggest
from ..extras.chat_templates import is_built_in_template
from ..extras.gguf_loading import get_or_make_hf_folder_and_seconds
from ..extras.lora_conversion import make_lora_config_rank_fields
from ..methods.lora.init_configs import is_init_subtracted_from_base
from ..planning.weight_formats import load_vllm_lora_rules
from .expert_layouts import split_stacked_experts
from .export_format import LoraConversion, WrittenExport
from .export_support import (
    Factors,
    get_export_support_flags,
    list_settings_no_vllm_lora_expresses,
    list_vllm_plain_lora_incompatibilities,
)
from .vllm_format import VllmExportFacts

SCRIPT, TEMPLATE = "serve.sh", "chat_template.jinja"
MAX_VOCABULARY = 258_048
"""Tokens of the largest vocabulary beside whose head vLLM serves a LoRA."""
DTYPES = ("float32", "bfloat16", "float16")
SPLIT_EXPERT_ARCHITECTURES = ("Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
"""Mixtures whose class in vLLM takes A and B of each expert's matrix, `experts.3.gate_proj.lora_A.weight`."""


def round_up_max_lora_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank that an adapter of this rank fits into; older releases do not have 1."""
    return next(r for r in load_vllm_lora_rules().ranks if r >= max(rank, 8))


def is_served_unchanged_by_vllm(config: Any) -> bool:
    """Return whether every vLLM release reads an adapter file with this config correctly, as it is."""
    return not (
        list_settings_no_vllm_lora_expresses(config)
        or list_vllm_plain_lora_incompatibilities(config)
        or config.rank_pattern
        or config.alpha_pattern
        or is_init_subtracted_from_base(config.init_lora_weights)
        or config.r > load_vllm_lora_rules().ranks[-1]
    )


def list_unfixable_and_convertible_vllm_refusals(model: Any, adapter_name: str) -> tuple[list[str], list[str]]:
    """Return why vLLM would refuse an adapter: causes that no conversion removes, and those --convert-to-lora does."""
    config, rules = model.peft_config[adapter_name], load_vllm_lora_rules()
    modules = model.adapter_modules(adapter_name)
    plain = copy.copy(config)
    if _get_architecture(model) in SPLIT_EXPERT_ARCHITECTURES:
        plain.target_parameters = None
    fixed, form = list_settings_no_vllm_lora_expresses(config), list_vllm_plain_lora_incompatibilities(plain)
    if not form:
        rank = max((A.shape[0] for A, _, _ in list_vllm_updates(model, adapter_name).values()), default=0)
        twice = ", twice the config's because its start is subtracted"
        start = twice if is_init_subtracted_from_base(config.init_lora_weights) else ""
        if rank > rules.ranks[-1]:
            form = [f"its rank is {rank}{start}; vLLM's --max-lora-rank ends at {rules.ranks[-1]}"]
    if other := [n for n, kind in model.match_report(adapter_name).kinds.items() if kind in ("conv", "weight")]:
        fixed = [*fixed, f"it changes {format_names(other, 2)}, no linear layers: vLLM adds LoRA to those only"]
    architecture = _get_architecture(model)
    accepted = rules.architectures.get(architecture, ...)
    if accepted is None:
        fixed = [*fixed, f"the base is a {architecture}, on which vLLM serves no LoRA"]
    elif accepted is not ...:
        vocabulary, head = model.config.get_text_config().vocab_size, model.get_output_embeddings()
        if "lm_head" in accepted and vocabulary > MAX_VOCABULARY:
            limit = f"with LoRA vLLM accepts {MAX_VOCABULARY} at most"
            fixed = [*fixed, f"the base has {vocabulary} tokens; {limit}"]
        kinds = model.match_report(adapter_name).kinds
        ends = [n for n in modules if kinds[n] == "embedding" or model.get_submodule(n) is head]
        if refused := [n for n in ends if n.rpartition(".")[2] not in accepted]:
            limit = f"only {format_names(accepted)}" if accepted else "no embedding and no head"
            fixed = [*fixed, f"it changes {format_names(refused)}; on a {architecture} vLLM accepts {limit}"]
    return fixed, form


def list_vllm_updates(model: Any, adapter_name: str) -> dict[str, Factors]:
    """Return an adapter's low-rank updates by vLLM's names of the matrices: those of each expert by themselves."""
    updates: dict[str, Factors] = {}
    for name, module in model.adapter_modules(adapter_name).items():
        if experts := module.expert_factors():
            updates |= split_stacked_experts(name, experts)
        elif (factors := module.low_rank_factors()) is not None:
            updates[name] = factors
    return updates


def _get_architecture(model: Any) -> str:
    """Return the name by which vLLM finds its own class: the first in the base's config."""
    return (getattr(model.config, "architectures", None) or [model.base_model_class.__name__])[0]


def _require_served(run: Path, model: Any, adapter: str, fixed: list[str], form: list[str]) -> None:
    """Raise AdapterError with all causes and the alternatives, if there are causes."""
    if not fixed and not form:
        return
    hints = []
    if get_export_support_flags(model, adapter).merged:
        merge = shlex.join(["slimtune", "merge", str(run), "--out", "merged"])
        hints.append(f"merge it: {merge}, then vllm serve merged")
        if not fixed and set(model.match_report(adapter).kinds.values()) <= {"linear", "embedding"}:
            hints.append("convert it to the nearest LoRA: slimtune export … --to vllm --convert-to-lora 64")
    rules = load_vllm_lora_rules()
    raise AdapterError(
        f"vLLM would refuse the adapter of {run}: {'; '.join([*fixed, *form])}",
        f"a LoRA of rank {rules.ranks[-1]} at most on linear layers (vLLM {rules.version})",
        "; or ".join(hints) or "use it with slimtune generate and slimtune chat: it does not change weights",
    )


def write_vllm_adapter(
    loaded: TrainedModel,
    run: Path,
    folder: Path,
    *,
    final_path: Path | None = None,
    name: str | None = None,
    convert_to_lora: float | None = None,
    dtype: str | None = None,
) -> WrittenExport:
    """Write the adapter's two files and `serve.sh`, and the chat template if it is not the base's own.

    Args:
        loaded: the run's adapter on its base, in the dtype it was trained in.
        run: the run or adapter folder, for messages.
        folder: the export folder; it exists.
        final_path: the final path of the folder, which the command names; None: `folder` itself.
        name, convert_to_lora, dtype: options of `VllmFormat`.
    """
    final_path = Path(final_path or folder).expanduser().resolve()
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}{suggest(dtype, DTYPES)}", f"one of {format_names(DTYPES)}")
    model: Any = loaded.model
    base, base_name = _locate_base(loaded)
    name = _check_name(name, final_path.name, base_name)
    adapter, conversion = model.active_adapters[0], None
    fixed, form = list_unfixable_and_convertible_vllm_refusals(model, adapter)
    _require_served(run, model, adapter, fixed, form if convert_to_lora is None else [])
    if convert_to_lora is not None:
        report, method = model.to_lora(adapter, convert_to_lora), model.peft_config[adapter].name
        rank, worst = max(report.ranks.values()), max(report.errors.values())
        conversion = LoraConversion(method, rank, report.error, worst)
        adapter = report.adapter
        _require_served(run, model, adapter, [], list_unfixable_and_convertible_vllm_refusals(model, adapter)[1])
    config = model.peft_config[adapter]
    layers = list_vllm_updates(model, adapter)
    has_experts = not layers.keys() <= model.adapter_modules(adapter).keys()
    shapes = {(A.shape[0], scale) for A, _, scale in layers.values()}
    # Whether one r, alpha and use_rslora describe all layers to every release.
    uniform = len(shapes) == 1 and next(iter(shapes))[0] == config.r
    folded = (
        not uniform
        or has_experts
        or bool(config.alpha_pattern)
        or is_init_subtracted_from_base(config.init_lora_weights)
    )
    rank = max(A.shape[0] for A, _, _ in layers.values())
    trained = dtype_name(loaded.base.dtype)
    served = dtype or (trained if trained in DTYPES else "float32")  # vLLM has no float64
    notes, rules, architecture = [], load_vllm_lora_rules(), _get_architecture(model)
    if architecture not in rules.architectures:
        fallback = "it may serve it through transformers, or not at all"
        notes.append(f"vLLM {rules.version} has no class of its own for a {architecture}: {fallback}")
    if served != trained:
        effect = "log-probabilities will differ by this rounding of the base"
        notes.append(f"the run held its base in {trained}, and vLLM will compute in {served}: {effect}")
    verify = shlex.join(["slimtune", "verify", str(final_path), "--at", "http://127.0.0.1:8000"])
    notes.append(f"the files were read back here; to check vLLM itself, start it, then {verify}")
    arguments = _write_script(loaded, folder, final_path, name, served, rank)
    facts = VllmExportFacts(
        name=name,
        base=base,
        base_name=base_name,
        dtype=served,
        precision="f32",
        rank=rank,
        max_lora_rank=round_up_max_lora_rank(rank),
        modules=len(layers),
        folded=folded,
        bytes=write_plain_lora_files(model, adapter, layers, folder, folded),
        arguments=arguments,
        conversion=conversion,
    )
    return WrittenExport(facts, [shlex.join(["vllm", "serve", *arguments])], notes)


def write_plain_lora_files(model: Any, adapter: str, layers: dict[str, Factors], folder: Path, folded: bool) -> int:
    """Write an adapter as a LoRA without a stored start, with scale 1 if `folded`; return the bytes of its files."""
    config, kinds = model.peft_config[adapter], model.match_report(adapter).kinds
    tensors: dict[str, Tensor] = {}
    for module, (A, B, scale) in layers.items():
        is_embedding = kinds.get(module) == "embedding"
        a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        if folded:
            A, B = A.float(), (B.double() * scale).float()
        tensors[f"base_model.model.{module}.{a}"] = A.detach().contiguous()
        tensors[f"base_model.model.{module}.{b}"] = B.detach().contiguous()
    settings = {k: v for k, v in config.to_dict().items() if k not in config.fields_not_in_peft}
    settings |= {"inference_mode": True, "init_lora_weights": True, "eva_config": None, "rank_pattern": {}}
    if not layers.keys() <= kinds.keys():  # experts, each a module of its own
        leaves = {name.rpartition(".")[2] for name in layers}
        settings |= {"target_parameters": None, "target_modules": sorted(leaves)}
    if folded:
        settings |= make_lora_config_rank_fields({n: A.shape[0] for n, (A, _, _) in layers.items()})
    write_adapter_config(folder, settings)
    metadata = adapter_files.get_adapter_tensors_and_metadata(model, adapter)[1]
    write_atomic(
        folder / adapter_files.WEIGHTS_FILE, adapter_files.serialize_to_safetensors_header_and_data(tensors, metadata)
    )
    return sum((folder / f).stat().st_size for f in (CONFIG_FILE, adapter_files.WEIGHTS_FILE))


def _write_script(loaded: TrainedModel, folder: Path, out: Path, name: str, dtype: str, rank: int) -> list[str]:
    """Write `serve.sh`, and the chat template if it is not the base's own; return what follows `vllm serve`."""
    m = loaded.recipe.model if loaded.recipe is not None else None
    options: dict[str, Any] = {"trust_remote_code": m.trust_remote_code, "revision": m.revision} if m else {}
    template = loaded.base.tokenizer.chat_template
    own = load_tokenizer(loaded.base.source.spec, **options).chat_template
    if template == own and not is_built_in_template(own):  # vLLM knows none of the built-in ones
        template = None
    if template is not None:
        write_atomic(folder / TEMPLATE, template)
    base, base_name = _locate_base(loaded)
    start = [base] + (["--served-model-name", base_name] if base_name != base else [])
    if loaded.base.source.kind == "hub":  # the Hub may get other weights later: name those that were loaded here
        revision = m.revision if m else None
        cached = try_to_load_from_cache(base, "config.json", revision=revision)
        commit = Path(cached).parent.name if isinstance(cached, str) else revision
        start += ["--revision", commit] if commit else []
    start += ["--trust-remote-code"] if m and m.trust_remote_code else []
    start += ["--dtype", dtype, "--enable-lora", "--max-lora-rank", str(round_up_max_lora_rank(rank)), "--lora-modules"]

    def make_arguments(place: str) -> list[str]:
        module = f"{name}={place}"
        if "," in module:  # then vLLM reads JSON
            module = json.dumps({"name": name, "path": place}, allow_nan=False)
        return [*start, module, *(["--chat-template", f"{place}/{TEMPLATE}"] if template else [])]

    script = f"""#!/bin/sh
# Serves the base, and the adapter in this folder as {name}: sh {SCRIPT} [more options of vllm serve]
cd -- "$(dirname -- "$0")" || exit 1
exec vllm serve {shlex.join(make_arguments("."))} "$@"
"""
    write_atomic(folder / SCRIPT, script)
    return make_arguments(str(out))


def _locate_base(loaded: TrainedModel) -> tuple[str, str]:
    """Return what vLLM loads the base from, and the name it serves it by."""
    source = loaded.base.source
    if source.kind == "hub":
        return source.path, source.path
    # vLLM serves no LoRA on a GGUF: the base is the folder the GGUF was dequantized into, as in training.
    path = get_or_make_hf_folder_and_seconds(source.path)[0] if source.kind == "gguf" else Path(source.path)
    return str(path.expanduser().resolve()), _to_plain_name(source.name)


def _to_plain_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _check_name(given: str | None, folder: str, base: str) -> str:
    """Return the adapter's name: valid in a request, in a shell line and before the `=` of --lora-modules."""
    if given is None:
        name = _to_plain_name(folder)
        return f"{name}-tuned" if name == base else name
    if not re.fullmatch(r"[A-Za-z0-9._][A-Za-z0-9._/:-]*", given):
        message = f"vLLM cannot serve the adapter by the name {given!r}"
        raise UsageError(message, "letters, digits and . _ - / : only", "--name")
    if given == base:
        raise UsageError(f"the base itself is served as {given!r}", "another name for the adapter", "--name")
    return given
