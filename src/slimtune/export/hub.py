"""A run on the Hub: its adapter, a model card, and nothing else of the folder; in one commit, or not at all.

    adapter read and held against its base ─ config without paths ─ card ─ one commit

What goes is on a list; what is not on it stays here and is named. An export or a checkpoint goes as its files are.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapters import state_dict
from ..adapters.config import CONFIG_FILE, PeftConfig
from ..adapters.model import PeftModel
from ..adapters.publishing import strip_local_paths
from ..errors import AdapterError, ModelError, SlimtuneError, UsageError, format_names
from ..models.gguf_facts import read_facts
from ..models.loader import load_config
from ..run_dir import ADAPTER_FILE, RunDir
from ..setup import build_meta_model, find_adapter_folder
from ..utils.hub import Committed, commit_files, require_repo_id
from .base_model_info import get_base_model_info
from .folder import read_note
from .model_card import adapter_card
from .story import RunResults, load_run_results

log = logging.getLogger(__name__)

CARD = "README.md"
_WORDS = (
    r"tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|"
    r"merges\.txt|spiece\.model|chat_template\.(jinja|json)|preprocessor_config\.json|processor_config\.json"
)
_LEGAL = r"(LICEN[CS]E|NOTICE|USE_POLICY)(\.(md|txt))?"
_GOES = {
    "adapter": rf"{_WORDS}|{_LEGAL}",
    "checkpoint": rf"(config|generation_config)\.json|.+\.safetensors(\.index\.json)?|README\.md|{_WORDS}|{_LEGAL}",
    "gguf": rf".+\.gguf|README\.md|{_LEGAL}",
}
"""What may leave a folder, by the names of its files; of an adapter, besides its two files and its card."""

_PLACE = re.compile(r"`(?:~|\.{1,2})?/[^`\n]*?([^`/\n]+)/?`")
"""A path in a card that merging wrote; its last part may leave."""


@dataclass
class Parcel:
    """What is to be uploaded.

    Args:
        kind: "adapter", "checkpoint" or "gguf".
        files: by the names they get.
        base: what the base is called in them; None where nothing says it.
        told_by: the file of the run that the card's held-out result is from; "" for none.
        message: what the commit is called where nobody says.
        left: files of the folder that stay here.
        notes: what whoever uploads should know.
    """

    kind: str
    files: dict[str, Path | bytes]
    base: str | None = None
    told_by: str = ""
    message: str = ""
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by file."""
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in self.files.items()}


def push(
    run: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    base: str | None = None,
    keep_card: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> dict[str, Any]:
    """Upload a run's adapter and its model card, or an export, in one commit.

    Args:
        run: a run folder, an adapter folder, an export, or a Hugging Face checkpoint.
        repo_id: `owner/name`; the repository is made if it is not there.
        private: True: a repository that only its owner sees; None: as the owner's default is, or as it is already.
        revision: the branch, made if it is not there; None: main.
        message: the commit's first line; None: what was uploaded.
        base: the base's Hub id, where the run knows it by a path or an alias.
        keep_card: a README.md that the repository has is left as it is.
        dry_run: nothing is sent; the card is in the result.
        token: None or True: the one that `hf auth login` or HF_TOKEN gives.
        endpoint: of the Hub; None: HF_ENDPOINT, else huggingface.co.

    Returns:
        `run`, `repo_id`, `kind`, `base`, `files` (bytes by name), `bytes`, `held_out` (the run's file the card's result
        is from), `left` (files that stayed here), `notes`; with `dry_run` `card`, else `url`, `private`, `revision`,
        `commit`, `commit_url`, `made` (whether the repository is new) and `changed` (whether there is a new commit).

    Raises:
        UsageError: no such run, a malformed id, no or a wrong token, a repository that may not be written.
        RunError: the run has no adapter yet; the Hub cannot be reached, is silent, or refuses.
        AdapterError: the adapter is damaged, or does not fit its base.
        ModelError: a checkpoint is damaged.
    """
    run = Path(run)
    require_repo_id(repo_id, owner=True)
    parcel = parcel_of(run, repo_id, base=base, token=token, endpoint=endpoint)
    sizes = parcel.sizes
    told: dict[str, Any] = {
        "run": str(run),
        "repo_id": repo_id,
        "kind": parcel.kind,
        "base": parcel.base,
        "files": sizes,
        "bytes": sum(sizes.values()),
        "held_out": parcel.told_by or None,
        "left": parcel.left,
    }
    if dry_run:
        _say(parcel.notes)
        card = parcel.files.get(CARD)
        text = card.read_text(encoding="utf-8") if isinstance(card, Path) else (card or b"").decode()
        return {**told, "notes": parcel.notes, "card": text}
    done = commit_files(
        parcel.files,
        repo_id,
        message=message if message is not None else parcel.message,
        private=private,
        revision=revision,
        keep=(CARD,) if keep_card else (),
        token=token,
        endpoint=endpoint,
    )
    notes = [*parcel.notes, *_of_the_repository(done, parcel)]
    _say(notes)
    return {
        **told,
        "repo_id": done.repo_id,
        "notes": notes,
        "url": done.url,
        "private": done.private,
        "revision": revision or "main",
        "commit": done.info.oid,
        "commit_url": done.info.commit_url,
        "made": done.made,
        "changed": done.changed,
    }


def parcel_of(
    run: Path,
    repo_id: str,
    *,
    base: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Parcel:
    """Return what `push` uploads, read and checked; raises as `push` does."""
    if (run / CONFIG_FILE).is_file() or (run / ADAPTER_FILE).is_file() or (run / "recipe.yaml").is_file():
        return _adapter(run, repo_id, base, token, endpoint)
    note = read_note(run) if run.is_dir() else None
    names = [p.name for p in run.iterdir()] if run.is_dir() else []
    if "config.json" in names:
        return _checkpoint(run, base)
    if any(n.endswith(".gguf") for n in names):
        return _gguf(run, base)
    if note is not None:
        raise UsageError(
            f"{run} is an export for {note['kind']} and holds no weights: {format_names(sorted(names))}",
            "a run, an adapter, a merged folder or one with GGUF files",
            f"push the run it was made from: {note['run']}",
        )
    RunDir.open(run)
    raise AssertionError("unreachable")


# --- an adapter ------------------------------------------------------------------------------------------------------


def _adapter(run: Path, repo_id: str, base: str | None, token: str | bool | None, endpoint: str | None) -> Parcel:
    folder = find_adapter_folder(run)
    story = load_run_results(_home(run, folder))
    tensors, fingerprint = state_dict.read_adapter_file(folder)
    config = PeftConfig.from_pretrained(folder)
    _require_numbers(folder, tensors)
    spec = story.recipe.model.name if story.recipe is not None else config.base_model_name_or_path
    if not spec:
        raise AdapterError(f"{folder} does not name its base", "base_model_name_or_path in adapter_config.json")
    notes = _require_fit(folder, spec, story)
    pinned = story.recipe.model.revision if story.recipe is not None else config.revision
    origin = get_base_model_info(
        spec, given=base, fingerprint=fingerprint, revision=pinned, token=token, endpoint=endpoint
    )
    raw = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    told = strip_local_paths(raw, origin.name) | {"base_model_name_or_path": origin.name, "revision": origin.revision}
    files: dict[str, Path | bytes] = {
        CONFIG_FILE: (json.dumps(told, indent=2, sort_keys=True) + "\n").encode(),
        ADAPTER_FILE: folder / ADAPTER_FILE,
        **_listed(folder, "adapter"),
    }
    own = _own_card(folder / CARD)
    if own is not None:
        files[CARD] = own
        notes.append(f"{folder / CARD} is uploaded as it is: it is not the one slimtune writes")
    else:
        files[CARD] = adapter_card(
            config,
            origin,
            story,
            repo_id=repo_id,
            size=(folder / ADAPTER_FILE).stat().st_size,
            parameters=sum(t.numel() for t in tensors.values()),
            tokenizer="tokenizer_config.json" in files,
            chat=any(n.startswith("chat_template.") for n in files),
        ).encode()
    left = sorted(p.name for p in folder.iterdir() if p.name not in files)
    message = f"{config.name} adapter for {origin.name}"
    return Parcel("adapter", files, origin.name, story.told_by, message, left, [*notes, *origin.notes])


def _home(run: Path, folder: Path) -> Path | None:
    """Return the run folder that tells of an adapter: its own, the one it lies in, the one it was exported from."""
    note = read_note(folder)
    places = [run, note["run"] if note else folder.resolve().parent]
    found = (p for p in places if RunDir(p).recipe_file.is_file())
    return next((p for p in found if note or RunDir(p).adapter.resolve() == folder.resolve()), None)


def _require_numbers(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    if not tensors:
        raise AdapterError(f"{folder / ADAPTER_FILE} holds no tensors", "an adapter's tensors", "train it again")
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise AdapterError(
            f"{folder / ADAPTER_FILE} holds numbers that are none in {len(bad)} of {len(tensors)} tensors, "
            f"such as {format_names(bad, 2)}",
            "finite numbers",
            "take an older checkpoint, or train at a lower learning rate",
        )


def _require_fit(folder: Path, spec: str, story: RunResults) -> list[str]:
    """Attach the adapter to its base without weights; return a note where the base cannot be had."""
    config = PeftConfig.from_pretrained(folder)
    if story.recipe is None and config.task_type not in (None, "CAUSAL_LM"):
        return [f"the adapter is for {config.task_type}: its file was read, not held against its base"]
    how: dict[str, Any] = {}
    if story.recipe is not None:
        how = {"trust_remote_code": story.recipe.model.trust_remote_code, "revision": story.recipe.model.revision}
    try:
        base = build_meta_model(load_config(spec, **how), None, torch.float32)
    except (SlimtuneError, ValueError, OSError) as e:
        return [f"the adapter's file was read, not held against its base, which is not to be had: {type(e).__name__}"]
    PeftModel.from_pretrained(base, folder, config=config)
    return []


def _own_card(file: Path) -> bytes | None:
    """Return a card that somebody wrote; None where there is none or it is the few lines that saving writes."""
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    return None if "\n# An adapter (" in text and "# `peft` reads it, too" in text else text.encode()


# --- exports and checkpoints -----------------------------------------------------------------------------------------


def _checkpoint(folder: Path, base: str | None) -> Parcel:
    found = _listed(folder, "checkpoint")
    weights = {n: f for n, f in found.items() if n.endswith(".safetensors")}
    for index in (f for n, f in found.items() if n.endswith(".index.json")):
        missing = set(_json(index).get("weight_map", {}).values()) - set(weights)
        if missing:
            raise ModelError(
                f"{folder} lacks {format_names(sorted(missing))}", "every file its index names", "merge it again"
            )
    if not weights:
        raise ModelError(
            f"{folder} holds no weights in *.safetensors", "a whole checkpoint", "save it with safetensors"
        )
    for file in weights.values():
        try:
            with safe_open(str(file), framework="pt") as f:
                f.keys()
        except SafetensorError as e:
            raise ModelError(f"{file} is no sound safetensors file: {e}", "a whole file", "merge it again") from None
    notes = _about_card(folder, found, base)
    if "auto_map" in _json(found["config.json"]):
        notes.append("its config names code of its own (auto_map), which is not uploaded")
    files: dict[str, Path | bytes] = {**found}
    for name in ("config.json", "tokenizer_config.json"):
        if name in found and (told := strip_local_paths(values := _json(found[name]))) != values:
            files[name] = (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()
    if CARD in found:
        text = found[CARD].read_text(encoding="utf-8")
        if (told_text := _PLACE.sub(r"`\1`", text)) != text:
            files[CARD] = told_text.encode()
    return Parcel("checkpoint", files, base, "", f"{folder.resolve().name}: a whole model", _left(folder, files), notes)


def _gguf(folder: Path, base: str | None) -> Parcel:
    files = _listed(folder, "gguf")
    for file in (f for n, f in files.items() if n.endswith(".gguf")):
        try:
            read_facts(file)
        except ImportError as e:
            raise ModelError("checking a GGUF file needs the package gguf", hint="pip install gguf") from e
        except Exception as e:  # whatever the reader stumbles over
            raise ModelError(f"{file} is damaged: {type(e).__name__}", "a whole GGUF file", "export again") from e
    notes = _about_card(folder, files, base)
    return Parcel("gguf", {**files}, base, "", f"{folder.resolve().name} as GGUF", _left(folder, files), notes)


def _about_card(folder: Path, files: Mapping[str, Path], base: str | None) -> list[str]:
    if base is not None:
        raise UsageError(
            f"--base is for an adapter, and {folder} is none", "a card that names the base", f"write it in {CARD}"
        )
    return [] if CARD in files else [f"{folder} has no {CARD}: the repository will have no model card"]


def _listed(folder: Path, kind: str) -> dict[str, Path]:
    found = sorted(p for p in folder.iterdir() if p.is_file() and re.fullmatch(_GOES[kind], p.name))
    return {p.name: p for p in found}


def _left(folder: Path, files: Mapping[str, Any]) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in files)


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ModelError(f"{file} is not JSON: {e}", "a whole checkpoint", "save it again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds a {type(values).__name__}", "an object: names and values", "save it again")
    return values


# --- what is said ----------------------------------------------------------------------------------------------------


def _of_the_repository(done: Committed, parcel: Parcel) -> list[str]:
    notes = []
    if done.kept:
        notes.append(f"{format_names(done.kept)} of the repository was left as it is")
    elif CARD in done.replaced and done.changed:
        notes.append(f"{CARD} of the repository was replaced (its history has the old one; --keep-card leaves it)")
    weights = [n for n in done.beside if n.endswith((".safetensors", ".bin", ".gguf", ".pt"))]
    if weights:
        notes.append(f"other weights lie in the repository, too: {format_names(weights, 4)}")
    if not done.changed:
        notes.append("all of it was there already: there is no new commit")
    return notes


def _say(notes: list[str]) -> None:
    for note in notes:
        log.warning(note)
