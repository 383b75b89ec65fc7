"""One fingerprint of what a run was trained on, compared wherever its adapter is used.

It says which weights, config, tokenizer and chat template the base had, which rows the run had, in which order, and
which recipe. It stands in the run folder before the first step (fingerprint.json), in the metadata of every adapter
file that the run writes, so in every checkpoint, and in result.json (the weights).

    resumed run                    weights, config, tokenizer, template, rows, recipe
    run or adapter folder, used    weights, config, tokenizer, template; by `eval` rows, too, if it takes held-out ones
                                   from the file that was trained on
    --init-adapter                 weights, config; another tokenizer or template is told
    PeftModel.from_pretrained      weights, config of the model that is given: told (trained_base_check.py)
    adapters that become one       weights, config of each; another tokenizer or template is told

What differs is refused; `--accept-changed PARTS` goes on all the same. What cannot change results is not compared:
paths, times, dtype, device and quantization of a load, how the weights are divided into files.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

from ..core.adapters.adapter_files import TRAINING_FINGERPRINT, WEIGHTS_FILE
from ..core.config import Recipe
from ..core.foundation.files import read_json_object, to_json, write_atomic
from ..core.foundation.fingerprint import get_rope_settings, normalize_config_numbers
from ..core.models.loader import LoadedBase
from ..core.training.checkpoint import list_checkpoints
from ..core.training.datasets import RunDatasets
from ..core.training.run_dir import RunDir, find_adapter_folder
from ..errors import AdapterError, SlimtuneError, UsageError, format_names
from .accepted_changes import BASE_PARTS, PARTS, combine_with_accepted_changes
from .base_digests import (
    hash_text,
    hash_tokenizer_by_part,
    hash_weights_by_projection,
    read_safetensors_header_and_data_start,
    require_base_folder,
    require_cached_snapshot,
)  # fmt: skip
from .row_digest import hash_rows

log = logging.getLogger(__name__)
_compared_folders: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
"""Folders of the adapters that were compared with the files of a model in memory."""

CONFIG_FIELDS_WITHOUT_EFFECT = frozenset({
    "dtype", "torch_dtype", "transformers_version", "architectures", "auto_map", "quantization_config", "use_cache",
    "id2label", "label2id", "num_labels", "problem_type", "tokenizer_class", "return_dict", "output_hidden_states",
    "output_attentions", "output_router_logits", "router_aux_loss_coef", "torchscript", "use_bfloat16",
    "chunk_size_feed_forward", "pruned_heads", "gradient_checkpointing", "pretraining_tp", "task_specific_params",
    "finetuning_task", "rope_theta", "rope_scaling", "rope_parameters",  # compared as "rope"
})  # fmt: skip
"""Fields of a config that do not change a forward pass in evaluation mode; so are those with the words below."""
_WORDS_WITHOUT_EFFECT = ("token_id", "drop", "init", "attn_implementation", "experts_implementation")
RECIPE_FIELDS_WITHOUT_EFFECT = frozenset({
    "output_dir", "model.name", "model.device", "model.trust_remote_code", "data.train", "data.validation", "data.test",
    "data.chat_template", "data.general_text", "train.on_nonfinite", "train.report_to", "train.save_total_limit",
})  # fmt: skip
"""Settings that change no step, or only say where something is: what is there is compared itself."""


@dataclass(frozen=True)
class TrainingFingerprint:
    """What a run was trained on; None: not known."""

    weights: dict[str, str] | None = None
    """Hash of the base's weights by their kind ("q_proj.weight"), over all layers."""
    config: dict[str, Any] | None = None
    """Fields of the base's config that change its forward pass; those of inner configs by dotted names."""
    tokenizer: dict[str, str] | None = None
    """Hash of each part of the tokenizer."""
    template: str | None = None
    """Hash of the chat template's text, "" without one."""
    rows: dict[str, list[Any]] | None = None
    """Number of rows and hash of their tokens, labels and order, of "training", "validation" and "test" rows."""
    recipe: dict[str, Any] | None = None
    """Settings by dotted path."""

    def get_base_parts(self) -> Self:
        """Return the fingerprint without rows and recipe."""
        return dataclasses.replace(self, rows=None, recipe=None)

    def to_json(self) -> str:
        """Return the fingerprint as JSON, the same text for the same fingerprint."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        return json.dumps({"version": 1, **known}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote; raise ValueError if it is damaged."""
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(values.get("template", ""), str):
            raise ValueError("it is no fingerprint")
        if not all(isinstance(values.get(n, {}), dict) for n in PARTS if n != "template"):
            raise ValueError("it is no fingerprint")
        return cls(**{name: values[name] for name in PARTS if name in values})


class FingerprintDifference(NamedTuple):
    """A part that has changed, and what differs in it."""

    part: str
    text: str


# --- what there is now ------------------------------------------------------------------------------------------------


def fingerprint_base(base: LoadedBase) -> TrainingFingerprint:
    """Return the fingerprint of a loaded base; weights and tokenizer are None if its files are not found."""
    template = base.tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    found = TrainingFingerprint(
        config=select_forward_config_fields(base.loaded_config), template=hash_chat_template(template)
    )
    try:
        folder = require_base_folder(base)
        weights, tokenizer = hash_weights_by_projection(folder), hash_tokenizer_by_part(folder, base.tokenizer)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning(f"whether {base.source.spec} has changed is not proven: {error}")
        return found
    return dataclasses.replace(found, weights=weights or None, tokenizer=tokenizer)


def hash_chat_template(text: str | None) -> str:
    """Return the hash of a chat template's text; line ends at its end are not counted."""
    return hash_text(text.rstrip("\n")) if text else ""


def select_forward_config_fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields of a config's dictionary that change the forward pass, by dotted name."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if name in CONFIG_FIELDS_WITHOUT_EFFECT or name[:1] == "_" or any(w in name for w in _WORDS_WITHOUT_EFFECT):
            continue
        if name.endswith("_config") and isinstance(value, Mapping):
            fields |= select_forward_config_fields(value, f"{prefix}{name}.")
        elif value is not None:
            fields[prefix + name] = normalize_config_numbers(value)
    if rope := get_rope_settings(config):
        fields[f"{prefix}rope"] = rope
    return json.loads(to_json(fields))  # as it is read back


def fingerprint_rows(data: RunDatasets) -> dict[str, list[Any]]:
    """Return number and hash of a run's rows, by what they are for; parts without rows are left out."""
    parts = {"training": data.train, "validation": data.validation, "test": data.test}
    return {name: [len(rows.documents), hash_rows(rows.documents)[:32]] for name, rows in parts.items() if len(rows)}


def select_step_changing_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe that can change a step, by dotted path."""
    settings: dict[str, Any] = {}
    for section, values in recipe.to_dict().items():
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if f"{section}.{name}" not in RECIPE_FIELDS_WITHOUT_EFFECT:
                settings[f"{section}.{name}"] = value
    return json.loads(to_json(settings))


# --- what differs -----------------------------------------------------------------------------------------------------


def compare_fingerprints(before: TrainingFingerprint, now: TrainingFingerprint) -> list[FingerprintDifference]:
    """Return what differs between what a run was trained on and what there is now; what one side lacks is left out."""
    found: list[FingerprintDifference] = []
    changed = _find_changed(before.weights, now.weights, both=False)
    # A tied head is written by some versions and left out by others.
    if changed := [name for name in changed if name != "lm_head.weight" or _is_in_both(name, before, now)]:
        found.append(FingerprintDifference("weights", f"the weights {format_names(changed, 4)}"))
    if changed := _find_changed(before.config, now.config, both=True):
        found.append(
            FingerprintDifference("config", f"the config ({_format_values(changed, before.config, now.config)})")
        )
    if changed := _find_changed(before.tokenizer, now.tokenizer, both=True):
        found.append(FingerprintDifference("tokenizer", f"the tokenizer ({', '.join(changed)})"))
    if None not in (before.template, now.template) and before.template != now.template:
        text = "the chat template"
        if not before.template or not now.template:
            text += " (there was none)" if now.template else " (there is none now)"
        found.append(FingerprintDifference("template", text))
    if changed := _find_changed(before.rows, now.rows, both=False):
        found.append(FingerprintDifference("rows", _describe_rows(changed, before.rows or {}, now.rows or {})))
    if changed := _find_changed(before.recipe, now.recipe, both=True):
        found.append(
            FingerprintDifference("recipe", f"the recipe ({_format_values(changed, before.recipe, now.recipe)})")
        )
    return found


def _find_changed(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None, both: bool) -> list[str]:
    """Return the keys whose values differ; with `both` only of those that both sides have."""
    if before is None or now is None:
        return []
    keys = [k for k in before if k in now] if both else [*before, *(k for k in now if k not in before)]
    return [key for key in keys if before.get(key) != now.get(key)]


def _is_in_both(name: str, before: TrainingFingerprint, now: TrainingFingerprint) -> bool:
    return name in (before.weights or {}) and name in (now.weights or {})


def _format_values(names: list[str], before: Any, now: Any) -> str:
    texts = [f"{name}: {_shorten(before[name])} then, {_shorten(now[name])} now" for name in names]
    return "; ".join([*texts[:6], *([f"… ({len(texts) - 6} more)"] if len(texts) > 6 else [])])


def _shorten(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else f"{text[:57]}…"


def _describe_rows(names: list[str], before: Mapping[str, list[Any]], now: Mapping[str, list[Any]]) -> str:
    counts = {name: (before.get(name, [0])[0], now.get(name, [0])[0]) for name in names}
    texts = [
        f"the {name} rows ({then} then, {here} now)" if then != here else f"the {name} rows (content or order)"
        for name, (then, here) in counts.items()
    ]
    return ", ".join(texts)


def _split_by_acceptance(differences: list[FingerprintDifference], accept: Collection[str]) -> tuple[str, str]:
    """Return what is refused, as a text, and the flag that accepts all of it; what is accepted is told."""
    accepted = combine_with_accepted_changes(accept)
    if told := [d.text for d in differences if d.part in accepted]:
        log.warning(f"changed since the training, and accepted: {'; '.join(told)}")
    refused = [d for d in differences if d.part not in accepted]
    parts = [part for part in PARTS if part in accepted or any(part == d.part for d in refused)]
    return "; ".join(d.text for d in refused), f"--accept-changed {','.join(parts)}"


# --- who compares -----------------------------------------------------------------------------------------------------


def require_recipe_unchanged_since_start(run: RunDir, recipe: Recipe, accept: Collection[str]) -> None:
    """Raise UsageError unless a run that is resumed with a recipe was started with it.

    It is compared with the recipe in the run folder, and that one with the run's fingerprint: it may have been edited.
    """
    own = run.load_recipe()
    if (before := read_run_fingerprint(run)) is not None:
        now = TrainingFingerprint(recipe=select_step_changing_settings(own))
        _require_unchanged_run(run, compare_fingerprints(before, now), accept)
    then, now_ = own.to_dict(), recipe.to_dict()
    changed = [
        f"{section}.{name}: {then[section].get(name)!r} then, {now_[section].get(name)!r} now"
        for section in then
        if section != "output_dir"
        for name in then[section] | now_[section]
        if then[section].get(name) != now_[section].get(name)
        and (section, name) != ("train", "on_nonfinite")  # changes no step that is done
    ]
    if changed and "recipe" not in combine_with_accepted_changes(accept):
        message = f"the recipe is not the one that the run in {run.path} was started with: {'; '.join(changed)}"
        raise UsageError(message, "the same recipe", f"{run.resume_command()}, or another --out")


def fingerprint_run(
    run: RunDir, recipe: Recipe, data: RunDatasets, base: LoadedBase, resume: bool, init_adapter: Path | None,
    accept: Collection[str],
) -> TrainingFingerprint:  # fmt: skip
    """Return what a run is trained on, after comparing it with what a resumed run, or `init_adapter`, had.

    A resumed run's fingerprint.json is then what is returned.

    Raises:
        UsageError: something that the run was started with has changed.
        AdapterError: `init_adapter` was trained on another base.
    """
    now = dataclasses.replace(
        fingerprint_base(base), rows=fingerprint_rows(data), recipe=select_step_changing_settings(recipe)
    )
    if resume:
        if (before := read_run_fingerprint(run)) is None:
            text = f"{run.path} does not say what it was started with: whether base or rows have changed is not proven"
            log.warning(text)
        else:
            without_recipe = dataclasses.replace(now, recipe=None)  # compared before anything was loaded
            _require_unchanged_run(run, compare_fingerprints(before, without_recipe), accept)
        write_atomic(run.fingerprint_file, now.to_json())
    elif init_adapter is not None and (before := read_adapter_fingerprint(find_adapter_folder(init_adapter))):
        differences = compare_fingerprints(before, now.get_base_parts())
        needed = ("weights", "config")
        _require_unchanged_base(init_adapter, base, [d for d in differences if d.part in needed], accept)
        if told := [d.text for d in differences if d.part not in needed and d.part not in accept]:
            log.warning(f"changed since {init_adapter} was trained: {'; '.join(told)}")
    return now


def mark_as_compared(model: Any, adapter_folder: Path) -> None:
    """Note that an adapter is compared with the base `model` elsewhere: putting it on says nothing more."""
    _compared_folders.setdefault(model, set()).add(str(adapter_folder))


def require_base_unchanged_since_training(path: Path, base: LoadedBase, accept: Collection[str] = ()) -> None:
    """Raise AdapterError if the base has changed since an adapter was trained on it.

    `path` is a run folder or an adapter folder. What is in `accept` may have changed; if that is everything, nothing
    of the base is read.
    """
    folder = find_adapter_folder(path)
    before = read_adapter_fingerprint(folder)
    if before is None:
        if folder != path:  # of an older version; adapters of other libraries never have one
            text = f"{path} does not say what it was trained on: whether its base has changed is not proven"
            log.warning(text)
        return
    mark_as_compared(base.model, folder)
    if not frozenset(BASE_PARTS) <= combine_with_accepted_changes(accept):
        _require_unchanged_base(path, base, compare_fingerprints(before, fingerprint_base(base)), accept)


def describe_changed_model(model: Any, config: Any, source: str, before: TrainingFingerprint) -> list[str]:
    """Return what of a model in memory differs from what the adapter `source` was trained on, and what is not proven.

    `config` is the config of the model's base. Weights are compared in the files that the model was loaded from. What
    `require_base_unchanged_since_training` has compared for this model is not compared again.
    """
    if source in _compared_folders.get(model, ()):
        return []
    accepted = combine_with_accepted_changes(())
    name = getattr(model, "name_or_path", None) or f"this {type(model).__name__}"
    now, texts = TrainingFingerprint(), []
    if "config" not in accepted and hasattr(config, "to_dict"):
        now = TrainingFingerprint(config=select_forward_config_fields(config.to_dict()))
    if "weights" not in accepted and before.weights:
        try:
            now = dataclasses.replace(now, weights=_hash_files_of_model(model))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            texts.append(f"whether {name} has the weights that {source} was trained on is not proven: {error}")
    if found := compare_fingerprints(before, now):
        parts = tuple(difference.part for difference in found)
        texts.append(
            f"the base {name} has changed since {source} was trained on it: {'; '.join(d.text for d in found)}; its "
            f"answers may be wrong. `with slimtune.accept_changes({parts}):` loads without this warning"
        )
    return texts


def _hash_files_of_model(model: Any) -> dict[str, str]:
    name = getattr(model, "name_or_path", None)
    if not name:
        raise LookupError("it was not loaded from files")
    folder = Path(name)
    if not os.path.isdir(name):
        folder = require_cached_snapshot(name, None)
        if len(list(folder.parent.iterdir())) > 1:
            raise LookupError("several of its revisions are in the Hub's cache, and the model does not say which it is")
    if not (weights := hash_weights_by_projection(folder)):
        raise LookupError(f"{folder} contains no safetensors")
    return weights


def combine_training_fingerprints(texts: Mapping[str, str | None]) -> str:
    """Return what adapters that become one were trained on, as JSON, from that of each by its name; None: not known.

    Base, tokenizer and template are those of the adapters that say so; rows and recipe are left out unless all have
    the same.

    Raises:
        AdapterError: two of them were trained on bases with other weights or another config.
    """
    accepted = combine_with_accepted_changes(())
    known = {name: TrainingFingerprint.from_json(text) for name, text in texts.items() if text is not None}
    first, combined = next(iter(known.items()))
    left_out = {
        part
        for part in ("rows", "recipe")
        if len(known) < len(texts) or any(getattr(other, part) != getattr(combined, part) for other in known.values())
    }
    for name, other in known.items():
        differences = compare_fingerprints(combined.get_base_parts(), other.get_base_parts())
        if refused := [d.text for d in differences if d.part in ("weights", "config") and d.part not in accepted]:
            raise AdapterError(
                f"the adapters {first!r} and {name!r} were trained on different bases: {'; '.join(refused)}",
                "adapters that were trained on one base",
                "train one again on the base of the other; `with slimtune.accept_changes(…):` goes on all the same",
                code="wrong-base",
            )
        if differences:
            different = "; ".join(d.text for d in differences)
            log.warning(f"the adapters {first!r} and {name!r} were not trained with the same: {different}")
        left_out |= {d.part for d in differences}
        missing = {part: getattr(other, part) for part in BASE_PARTS if getattr(combined, part) is None}
        combined = dataclasses.replace(combined, **missing)
    return dataclasses.replace(combined, **dict.fromkeys(left_out)).to_json()


def require_rows_unchanged_since_training(path: Path, data: RunDatasets) -> None:
    """Raise AdapterError if rows that a run set aside may be rows that it was trained on: its file has changed."""
    before = read_adapter_fingerprint(find_adapter_folder(path))
    if before is None or before.rows is None:
        return
    now = TrainingFingerprint(rows=fingerprint_rows(data))
    refused, flag = _split_by_acceptance(compare_fingerprints(before, now), ())
    if refused:
        raise AdapterError(
            f"the rows of {path} have changed since it was trained: {refused}; rows that it was trained on may "
            "be among those set aside",
            "the file as it was trained on",
            f"put the old file back, give others (--data FILE), or go on all the same: {flag}",
            code="wrong-base",
        )


def read_run_fingerprint(run: RunDir) -> TrainingFingerprint | None:
    """Return what a run was started with, from its folder, what that lacks from its adapter files; None: not known."""
    found = TrainingFingerprint()
    with suppress(SlimtuneError, ValueError, TypeError):  # not there, or damaged
        found = TrainingFingerprint.from_json(to_json(read_json_object(run.fingerprint_file)))
    for folder in (*reversed(list_checkpoints(run.checkpoints)), run.adapter):
        if (other := read_adapter_fingerprint(folder)) is not None:
            lacking = [part for part in PARTS if getattr(found, part) is None]
            found = dataclasses.replace(found, **{part: getattr(other, part) for part in lacking})
    return found if found != TrainingFingerprint() else None


def read_adapter_fingerprint(folder: Path) -> TrainingFingerprint | None:
    """Return what an adapter was trained on, from its file; None if it does not say so, or is damaged."""
    try:
        metadata = read_safetensors_header_and_data_start(folder / WEIGHTS_FILE)[0].get("__metadata__", {})
        return TrainingFingerprint.from_json(metadata[TRAINING_FINGERPRINT])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _require_unchanged_run(run: RunDir, differences: list[FingerprintDifference], accept: Collection[str]) -> None:
    refused, flag = _split_by_acceptance(differences, accept)
    if refused:
        raise UsageError(
            f"the run in {run.path} was started with something else: {refused}",
            "what the run was started with: with another the steps would not line up",
            f"put the old one back, train again with another --out, or go on all the same: {flag}",
            code="wrong-base",
        )


def _require_unchanged_base(
    path: Path, base: LoadedBase, differences: list[FingerprintDifference], accept: Collection[str]
) -> None:
    refused, flag = _split_by_acceptance(differences, accept)
    if refused:
        raise AdapterError(
            f"the base {base.source.spec} has changed since {path} was trained on it: {refused}",
            "the base, tokenizer and chat template that the adapter was trained with",
            f"put the old base back, train again, or go on all the same: {flag}",
            code="wrong-base",
        )
