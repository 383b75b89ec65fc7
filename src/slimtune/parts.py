"""Which parts plug into the core, and where each one is: the only place that knows all of them.

`slimtune/__init__.py` imports this module first, so every registry of the core is filled before it is read. Nothing
here imports torch: a part is imported when it is first asked for (core/foundation/registry.py).
"""

from pathlib import Path

from .core.foundation.registry import register_parts


def _find_modules(folder: str, *helpers: str) -> dict[str, str]:
    """Return the dotted path of each module and package in a folder of slimtune, by its name, sorted; no `helpers`."""
    files = [
        f for f in (Path(__file__).parent / folder).iterdir() if f.suffix == ".py" or (f / "__init__.py").is_file()
    ]
    return {f.stem: f"{__package__}.{folder}.{f.stem}" for f in sorted(files) if f.stem not in ("__init__", *helpers)}


def _find_export_formats() -> dict[str, str]:
    """Return the dotted path of the class `NameFormat` in each `export/name_format.py`, by the name; `merged` first."""
    files = (Path(__file__).parent / "export").glob("*_format.py")
    names = {f.stem.removesuffix("_format") for f in files} - {"export"}
    ordered = sorted(names, key=lambda name: (name != "merged", name))
    return {n: f"{__package__}.export.{n}_format:{n.title().replace('_', '')}Format" for n in ordered}


OBJECTIVE_HELPERS = (
    "pair_objective", "reference_logps", "policy_objective", "policy_run", "policy_losses", "group_advantages",
    "sampler_check", "prompt_rows", "teacher_divergence", "teacher_rows", "teacher_objective", "teacher_run",
    "teacher_logps", "reward_probes", "sampled_answers", "token_objective",
)  # fmt: skip
PARTS: dict[str, dict[str, str]] = {
    "slimtune.methods": _find_modules("methods"),
    "slimtune.objectives": {"sft": "slimtune.objectives.sft"}  # the default first
    | _find_modules("objectives", *OBJECTIVE_HELPERS),
    "slimtune.row_sources": {"files": "slimtune.extras.row_files:open_rows"},
    "slimtune.row_readers": {
        ".jsonl": "slimtune.extras.row_readers:JSONL",
        ".ndjson": "slimtune.extras.row_readers:JSONL",
        ".json": "slimtune.extras.row_readers:JSON",
        ".csv": "slimtune.extras.row_readers:CSV",
        ".tsv": "slimtune.extras.row_readers:TSV",
        ".parquet": "slimtune.extras.row_readers:PARQUET",
        ".txt": "slimtune.extras.row_readers:TEXT",
        ".md": "slimtune.extras.row_readers:TEXT",
    },
    "slimtune.row_formats": {
        "chat": "slimtune.extras.row_formats.chats:CHAT",
        "instruction": "slimtune.extras.row_formats.chats:INSTRUCTION",
        "sharegpt": "slimtune.extras.row_formats.chats:SHAREGPT",
        "prompt-completion": "slimtune.extras.row_formats.texts:PROMPT_COMPLETION",
        "text": "slimtune.extras.row_formats.texts:TEXT",
        "document": "slimtune.extras.row_formats.documents:DOCUMENT",
        "preference": "slimtune.extras.row_formats.preferences:PREFERENCE",
        "ranked-preference": "slimtune.extras.row_formats.preferences:RANKED_PREFERENCE",
        "unpaired-preference": "slimtune.extras.row_formats.preferences:UNPAIRED_PREFERENCE",
        "classification": "slimtune.extras.row_formats.classification:CLASSIFICATION",
        "prompt": "slimtune.extras.row_formats.prompts:PROMPT",
    },
    "slimtune.compat": {"peft": "slimtune.compat.hook"},
    "slimtune.peft_subclasses": {"peft": "slimtune.compat.peft_registration:make_subclass_with_peft_parent"},
    # A call goes through them in this order: the rows' adapters are chosen before the tokens that these change.
    "slimtune.model_mixins": {
        "peft_names": "slimtune.compat.model_names:PeftModelNamesMixin",
        "mixed_batch": "slimtune.extras.mixed_batch:MixedBatchCallsMixin",
        "activated_lora": "slimtune.methods.lora.alora_calls:ActivatedLoraCallsMixin",
        "lora_conversion": "slimtune.extras.lora_conversion:PeftModelToLoraMixin",
        "trained_base": "slimtune.extras.trained_base_check:TrainedBaseCheckMixin",
        "adapter_upload": "slimtune.extras.adapter_upload:AdapterUploadMixin",
    },
    "slimtune.folder_writers": {"model_card": "slimtune.extras.model_card:write_model_card"},
    "slimtune.known_models": {"slimtune": "slimtune.extras.known_models"},
    "slimtune.base_quantizations": dict.fromkeys(("nf4", "int8", "fp4"), "slimtune.extras.bitsandbytes_loading")
    | {
        "mxfp4": "slimtune.extras.mxfp4_quantizer",
        "fp8": "slimtune.extras.stored_quantizations:FP8",
        "compressed-tensors": "slimtune.extras.stored_quantizations:COMPRESSED_TENSORS",
        **dict.fromkeys(("gptq", "awq"), "slimtune.extras.integer_checkpoints"),
    },
    "slimtune.base_readers": {"gguf": "slimtune.extras.gguf_loading"},
    "slimtune.config_checks": {"damage": "slimtune.extras.damaged_config"},
    "slimtune.template_renderers": {"jinja": "slimtune.extras.template_sandbox:render_sandboxed_template"},
    "slimtune.fingerprint_checks": {"files": "slimtune.extras.training_fingerprint"},
    "slimtune.trackers": {"accelerate": "slimtune.extras.trackers"},
    "slimtune.thread_counts": {"continuous": "slimtune.extras.thread_count:ContinuousThreadCountTuner"},
    "slimtune.strength_searches": {
        "interpolation": "slimtune.extras.adapter_strength:search_and_set_strength_within_budget"
    },
    "slimtune.loss_scalers": {"dynamic": "slimtune.extras.loss_scaling:compute_gradients_with_loss_scale"},
    "slimtune.optimizers": {"adamw-8bit": "slimtune.extras.adamw_8bit:build_adamw_8bit"},
    "slimtune.step_roundings": {"stochastic": "slimtune.extras.stochastic_rounding:round_steps_stochastically"},
    "slimtune.chat_template_setters": {"files": "slimtune.extras.chat_templates:set_chat_template"},
    "slimtune.tool_hints": {"bases": "slimtune.extras.known_models:make_tools_hint"},
    "slimtune.chat_templates": {
        "chatml": "slimtune.extras.chat_templates:CHATML",
        "llama3": "slimtune.extras.chat_templates:LLAMA3",
        "gemma": "slimtune.extras.chat_templates:GEMMA",
        "plain": "slimtune.extras.chat_templates:PLAIN",  # the last: it fits every vocabulary
    },
    "slimtune.data_reports": {"rows": "slimtune.evaluation.data_report.report_builder:DataReportBuilder"},
    "slimtune.general_texts": {"files": "slimtune.evaluation.general_text:load_general_text"},
    "slimtune.run_locks": {"files": "slimtune.extras.run_lock:RunLock"},
    "slimtune.policy_samplers": {"model": "slimtune.generation.policy_sampler:sample_policy_answers"},
    "slimtune.server_samplers": {"http": "slimtune.generation.server_sampler:ServerSampler"},
    "slimtune.teacher_servers": {"http": "slimtune.generation.teacher_server:open_teacher_server"},
    "slimtune.memory_probes": {"longest": "slimtune.planning.memory_probe:probe_memory_and_write_plan"},
    "slimtune.export_support": {"formats": "slimtune.export.export_support:get_export_support_flags"},
    "slimtune.weight_roundings": {"gguf": "slimtune.export.gguf_roundings:find_weight_roundings"},
    "slimtune.run_reports": {"html": "slimtune.evaluation.run_report:write_run_report_and_list_damage"},
    "slimtune.export_formats": _find_export_formats(),
}
"""Registry → name of the part → its dotted path."""

for group, paths in PARTS.items():
    register_parts(group, paths)
