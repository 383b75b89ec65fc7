"""`slimtune push`: an adapter, a merged model or GGUF files on the Hub, with a model card, in one commit.

    read and check the files ─ remove local paths from configs ─ model card ─ one commit

Only files on the list are uploaded, if they are what their names say; the others are named in the result. Links are
followed only inside the folder.
"""

import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..core.adapters import adapter_files
from ..core.adapters.peft_config import CONFIG_FILE, PeftConfig, format_adapter_config
from ..core.adapters.peft_model import PeftModel
from ..core.foundation.files import read_json_object, to_json
from ..core.foundation.formatting import format_bytes
from ..core.kernels.linear_layers import is_finite
from ..core.models.base_config import load_convertible_base_config
from ..core.training.run_dir import ADAPTER_FILE, RunDir, find_adapter_folder
from ..errors import AdapterError, RunError, SlimtuneError, UsageError, format_names
from ..evaluation.run_results import RunResults, load_run_results
from ..extras import model_card
from ..extras.hub_commits import HubCommitResult, commit_files, require_no_tokens, require_repo_id
from ..extras.model_card import CARD_FILE, strip_local_paths
from ..planning.meta_model import build_adapted_meta_model
from .base_model_info import BaseModelInfo, fetch_base_model_info
from .export_format import EXPORT_FORMATS, LICENCE_FILES, TOKENIZER_FILES
from .export_results import PushContents, PushedCommit, PushPreview, PushResult
from .manifest import read_export_manifest
from .merged_format import read_checkpoint_json
from .vllm import is_served_unchanged_by_vllm, round_up_max_lora_rank

log = logging.getLogger(__name__)

ADAPTER_EXTRAS = rf"{TOKENIZER_FILES}|{LICENCE_FILES}"
"""Names of files that may be uploaded of an adapter beside its two files and its card; a format has its own pattern."""
MAX_TEXT_BYTES = 128 << 20
"""Largest file of text; the largest tokenizer.json have 40 MB."""


@dataclass
class HubUpload:
    """What is to be uploaded."""

    kind: str  # "adapter", "checkpoint" or "gguf"
    folder: Path
    files: dict[str, Path | bytes]  # contents by their names on the Hub
    message: str  # default first line of the commit
    base: str | None = None  # name of the base in the files
    eval_file: str | None = None  # file of the run with the held-out result in the card
    notes: list[str] = field(default_factory=list)  # what the user should know


def push(
    run: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    base_hub_id: str | None = None,
    keep_card: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
) -> PushPreview | PushResult:
    """Upload a run's adapter with a model card, or an export, in one commit.

    Args:
        run: a run folder, an adapter folder, an export, or a Hugging Face checkpoint.
        repo_id, private, revision, token: as for `commit_files`.
        message: first line of the commit; None: what is uploaded.
        base_hub_id: Hub id of the base, where the run names it by a path or an alias.
        keep_card: do not replace a README.md in the repository.
        dry_run: check everything, send nothing; the result contains the card.

    Raises:
        UsageError: no such run, a malformed id, no token, an invalid one, a repository that it may not write to, a file
            that contains a token, or weights that are a link to a file outside the folder.
        RunError: the run has no adapter yet, or a damaged file; the Hub cannot be reached, does not answer, or refuses.
        AdapterError: the adapter is damaged, contains NaN or Inf, or does not fit its base.
        ModelError: a checkpoint is damaged.
    """
    run = Path(run)
    require_repo_id(repo_id, require_owner=True)
    upload = _prepare_upload(run, repo_id, base_hub_id, token)
    sizes = {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in upload.files.items()}
    contents = PushContents(
        run=str(run),
        repo_id=repo_id,
        kind=upload.kind,
        base=upload.base,
        files=sizes,
        bytes=sum(sizes.values()),
        eval_file=upload.eval_file,
        skipped=sorted(p.name for p in upload.folder.iterdir() if p.name not in upload.files),
        notes=upload.notes,
    )
    result: PushPreview | PushResult
    if dry_run:
        require_no_tokens(upload.files, token)
        card = upload.files.get(CARD_FILE, b"")
        result = PushPreview(contents, (card.read_bytes() if isinstance(card, Path) else card).decode())
    else:
        done = commit_files(
            upload.files,
            repo_id,
            message=message if message is not None else upload.message,
            private=private,
            revision=revision,
            keep_if_existing=(CARD_FILE,) if keep_card else (),
            token=token,
        )
        notes = [*upload.notes, *_describe_repository(done, upload)]
        commit = PushedCommit(
            url=done.url,
            private=done.private,
            revision=revision or "main",
            commit=done.info.oid,
            commit_url=done.info.commit_url,
            created=done.created,
            committed=done.committed,
        )
        result = PushResult(replace(contents, repo_id=done.repo_id, notes=notes), commit)
    for note in result.contents.notes:
        log.warning(note)
    return result


def _prepare_upload(run: Path, repo_id: str, base: str | None, token: str | bool | None) -> HubUpload:
    """Return what `push` uploads, after reading and checking it."""
    names = sorted(p.name for p in run.iterdir()) if run.is_dir() else []
    if {CONFIG_FILE, ADAPTER_FILE, "recipe.yaml"} & set(names):
        return _prepare_adapter(run, repo_id, base, token)
    for chosen in (EXPORT_FORMATS.load(name)() for name in EXPORT_FORMATS.names()):
        if not chosen.upload_kind or not any(re.fullmatch(chosen.upload_marker, name) for name in names):
            continue
        if base is not None:
            hint = f"write it in {CARD_FILE}"
            raise UsageError(f"--base is for adapters, and {run} is a whole model", "a card that names it", hint)
        notes: list[str] = []
        files = _collect_files(run, chosen.upload_files, (), notes)
        message = chosen.check_upload(run, files, notes)
        if CARD_FILE not in files:
            notes.append(f"{run} has no {CARD_FILE}: the repository gets no model card")
        return HubUpload(chosen.upload_kind, run, files, message, notes=notes)
    if manifest := read_export_manifest(run):
        raise UsageError(
            f"{run} is an export for {manifest.kind}, which is not uploaded: {format_names(names)}",
            "a run, an adapter, a merged model or GGUF files",
            f"push the run it was made from: {manifest.run}",
        )
    RunDir.open(run)
    raise AssertionError("unreachable")


def _prepare_adapter(run: Path, repo_id: str, base: str | None, token: str | bool | None) -> HubUpload:
    folder = find_adapter_folder(run)
    notes: list[str] = []
    found = _collect_files(folder, ADAPTER_EXTRAS, (CONFIG_FILE, ADAPTER_FILE), notes)
    run_dir, file, card = _find_run_dir(run, folder), folder / ADAPTER_FILE, folder / CARD_FILE
    results = load_run_results(run_dir) if run_dir is not None else RunResults()
    recipe = results.recipe
    tensors, metadata = adapter_files.read_adapter_tensors_and_metadata(folder)
    config = PeftConfig.from_pretrained(folder)
    if not tensors:
        raise AdapterError(
            f"{file} contains no tensors", "the tensors of an adapter", "train it again", code="safetensors-damaged"
        )
    if broken := [k for k, t in tensors.items() if t.is_floating_point() and not is_finite(t)]:
        names = f"{len(broken)} of {len(tensors)} tensors, such as {format_names(broken, 2)}"
        hint = "use an older checkpoint, or train with a lower learning rate"
        raise AdapterError(f"{file} contains NaN or Inf in {names}", "finite numbers", hint)
    name = recipe.model.name if recipe is not None else config.base_model_name_or_path
    if not name:
        raise AdapterError(
            f"{folder} does not name its base", "base_model_name_or_path in adapter_config.json", code="wrong-base"
        )
    notes += _check_fits_base(folder, config, name, results)
    revision = recipe.model.revision if recipe is not None else config.revision
    fingerprint = metadata.get(adapter_files.BASE_FINGERPRINT)
    info = fetch_base_model_info(
        name, given_hub_id=base, trained_fingerprint=fingerprint, revision=revision, token=token
    )
    values = strip_local_paths(read_json_object(folder / CONFIG_FILE), info.name)
    values |= {"base_model_name_or_path": info.name, "revision": info.revision}
    files: dict[str, Path | bytes] = {CONFIG_FILE: format_adapter_config(values).encode(), ADAPTER_FILE: file, **found}
    if _is_inside(card, folder) and not model_card.is_slimtune_default_card(card.read_text(encoding="utf-8")):
        files[CARD_FILE] = card
        notes.append(f"{card} is uploaded unchanged, because slimtune did not write it")
    else:
        files[CARD_FILE] = render_adapter_card(
            config,
            info,
            results,
            repo_id=repo_id,
            file_bytes=file.stat().st_size,
            parameters=sum(t.numel() for t in tensors.values()),
            tokenizer_id=repo_id if "tokenizer_config.json" in files else info.name,
            chat=any(n.startswith("chat_template.") for n in files),
        ).encode()
    eval_file = results.held_out.file_name if results.held_out is not None else None
    if eval_file is None and results.result.get("validation_loss") is not None:
        eval_file = RunDir(run).result_file.name
    message = f"{config.name} adapter for {info.name}"
    return HubUpload("adapter", folder, files, message, info.name, eval_file, [*notes, *info.notes])


def render_adapter_card(
    config: Any, base_info: BaseModelInfo, results: RunResults, *, repo_id: str, **facts: Any
) -> str:
    """Return the card of an adapter on the Hub.

    `facts`: `file_bytes`, `parameters` (values in the file), `tokenizer_id`, and `chat` (it has a chat template).
    """
    name, vllm_command = repo_id.rpartition("/")[2], ""
    if is_served_unchanged_by_vllm(config):
        rank, module = str(round_up_max_lora_rank(config.r)), f"{name}={repo_id}"
        options = ["--enable-lora", "--max-lora-rank", rank, "--lora-modules", module]
        vllm_command = shlex.join(["vllm", "serve", " ".join(base_info.name.split()), *options])
    data = model_card.make_card_data(
        config, base_info.hub_id, base_info.licence.metadata if base_info.licence else None
    )
    facts |= {"title": name, "repo_id": repo_id, "results": results, "vllm_command": vllm_command}
    return model_card.render_model_card(
        data, config, base=base_info, base_id=base_info.hub_id, base_name=base_info.name, **facts
    )


def _find_run_dir(run: Path, folder: Path) -> RunDir | None:
    """Return the run of an adapter: `run` itself, the one that contains the folder, or the one it was exported from."""
    if manifest := read_export_manifest(folder):
        candidates = [RunDir(run), RunDir(manifest.run)]
    else:
        candidates = [r for r in map(RunDir, (run, folder.resolve().parent)) if r.adapter.resolve() == folder.resolve()]
    return next((r for r in candidates if r.recipe_file.is_file()), None)


def _check_fits_base(folder: Path, config: PeftConfig, name: str, results: RunResults) -> list[str]:
    """Load the adapter into its base without weights; return a note where the base cannot be built here."""
    options: dict[str, Any] = {}
    if results.recipe is not None:
        model = results.recipe.model
        options = {"trust_remote_code": model.trust_remote_code, "revision": model.revision}
    elif config.task_type not in (None, "CAUSAL_LM"):
        return [f"the adapter is for {config.task_type}: its file was read, but not loaded into its base"]
    try:
        base = build_adapted_meta_model(load_convertible_base_config(name, **options), None, torch.float32)
    except (SlimtuneError, ValueError, OSError) as e:
        return [f"the adapter's file was read, but not loaded into its base, which is missing here: {type(e).__name__}"]
    PeftModel.from_pretrained(base, folder, config=config)
    return []


def _collect_files(folder: Path, pattern: str, own: Sequence[str], notes: list[str]) -> dict[str, Path | bytes]:
    """Return the files in a folder that may be uploaded, by name, JSON without local paths; the others get a note.

    `pattern` is of the names; `own` are names of files that the caller adds itself.

    UsageError means that a file without which there is nothing to upload is a link to a file elsewhere.
    """
    files: dict[str, Path | bytes] = {}
    for file in sorted(folder.iterdir()):
        name = file.name
        if not file.is_file() or not (name in own or re.fullmatch(pattern, name)):
            continue
        if not _is_inside(file, folder):
            if name in (*own, "config.json") or file.suffix in (".safetensors", ".gguf"):
                message = f"{file} is a link to a file outside the folder"
                raise UsageError(message, "the file itself", shlex.join(["cp", "-rL", str(folder), "COPY"]))
            notes.append(f"{name} is a link to a file outside the folder, and is not uploaded")
        elif fault := _find_content_fault(file):
            notes.append(f"{name} is not uploaded: {fault}")
        elif name not in own:
            files[name] = _strip_json(file)
    return files


def _is_inside(file: Path, folder: Path) -> bool:
    return file.is_file() and file.resolve().is_relative_to(folder.resolve())


def _find_content_fault(file: Path) -> str:
    """Return why a file is not what its name says, "" if it is; weights are checked where they are read."""
    if file.suffix in (".safetensors", ".gguf") or file.name in (CARD_FILE, "config.json"):
        return ""
    if file.suffix == ".model":
        with file.open("rb") as f:  # a sentencepiece model begins with its first piece, field 1 of a protobuf message
            return "" if f.read(1) == b"\n" else "it is not a sentencepiece model"
    if file.stat().st_size > MAX_TEXT_BYTES:
        return f"it has more than {format_bytes(MAX_TEXT_BYTES)}"
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return "it is not UTF-8 text"
    if file.suffix == ".json":
        try:
            values = read_json_object(file)
        except RunError:
            return "it is not a JSON object"
        if file.name == "vocab.json" and not all(isinstance(v, int) for v in values.values()):
            return "it does not map tokens to ids"
    elif file.name == "merges.txt":
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        if any(len(line.split(" ")) != 2 for line in lines):
            return "its lines are not pairs of tokens"
    return ""


def _strip_json(file: Path) -> Path | bytes:
    """Return a JSON file of settings without local paths as bytes, every other file as it is."""
    if not file.name.endswith("config.json"):
        return file
    values = read_checkpoint_json(file)
    stripped = strip_local_paths(values)
    return file if stripped == values else (to_json(stripped, indent=2) + "\n").encode()


def _describe_repository(done: HubCommitResult, upload: HubUpload) -> list[str]:
    """Return what the user should know about the files that were in the repository before."""
    notes = []
    if done.not_uploaded_files:
        notes.append(f"{format_names(done.not_uploaded_files)} in the repository was not replaced")
    elif CARD_FILE in done.existing_files and done.committed:
        notes.append(f"{CARD_FILE} in the repository was replaced (the history has the old one; --keep-card keeps it)")
    weights = (".safetensors", ".bin", ".gguf", ".pt")
    if others := sorted(n for n in done.existing_files - set(upload.files) if n.endswith(weights)):
        notes.append(f"the repository contains other weights, too: {format_names(others, 4)}")
    if not done.committed:
        notes.append("the repository has all of the files already: there is no new commit")
    return notes
