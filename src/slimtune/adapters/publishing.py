"""An adapter on the Hub: `push_to_hub`, and a config that names no place on this disk."""

from __future__ import annotations

import copy
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.utils import PushToHubMixin

from ..utils.hub import commit_files, require_repo_id
from .config import CONFIG_FILE
from .state_dict import write_model_card

log = logging.getLogger(__name__)

_CARD = "README.md"


def strip_local_paths(values: Mapping[str, Any], base: str | None = None) -> dict[str, Any]:
    """Return a JSON file's values as others may read them: a path becomes its last part.

    Args:
        values: of an adapter_config.json or another config.
        base: what the base is called in place of what the config calls it; None: the last part of that.
    """
    told = {k: _named(k, v) for k, v in values.items()}
    if values.get("base_model_name_or_path"):
        theirs = values["base_model_name_or_path"]
        told["base_model_name_or_path"] = base or told["base_model_name_or_path"]
        tokenizer = values.get("tokenizer_name_or_path")
        if tokenizer and (tokenizer == theirs or _is_place(tokenizer)):
            told["tokenizer_name_or_path"] = told["base_model_name_or_path"]
    return told


def is_hub_id(name: str | None) -> bool:
    """Return whether a base's name can be one on the Hub: `org/name`, and no folder here."""
    return bool(name) and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))) and not Path(str(name)).exists()


class AdapterPublishing(PushToHubMixin):
    """The part of a `PeftModel` that puts adapters on the Hub."""

    def push_to_hub(
        self: Any,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """Upload the adapters as `save_pretrained` writes them, in one commit.

        A README.md that the repository has already is left as it is. `slimtune push RUN` tells more in it.

        Args:
            repo_id: `owner/name`, or `name` for a repository of your own; it is made if it is not there.
            commit_message: the commit's first line.
            commit_description: more about it.
            private: whether a new repository is private; None: as the owner's default is.
            token: None or True: the one that `hf auth login` or HF_TOKEN gives.
            revision: the branch, made if it is not there; None: main.
            create_pr: open a pull request.
            max_shard_size: taken for transformers' sake; an adapter is one file.
            tags: more tags for a new README.md.

        Raises:
            UsageError: the id's form, no or a wrong token, or a repository that may not be written.
            RunError: the Hub cannot be reached, or refuses.
        """
        del max_shard_size
        require_repo_id(repo_id)
        config = copy.copy(self.active_peft_config)
        if not is_hub_id(config.base_model_name_or_path):
            log.warning(
                "others cannot find the base %r: set base_model_name_or_path of the adapter's config to its Hub id",
                config.base_model_name_or_path and Path(config.base_model_name_or_path).name,
            )
            config.base_model_name_or_path = None  # which the Hub would refuse in a card
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            self.save_pretrained(folder)
            for card in folder.rglob(_CARD):
                card.unlink()
            write_model_card(config, folder)
            files: dict[str, Path | bytes] = {
                str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()
            }
            for name in files:
                if name.endswith(CONFIG_FILE):
                    told = strip_local_paths(json.loads((folder / name).read_text()))
                    files[name] = (json.dumps(told, indent=2, sort_keys=True) + "\n").encode()
            if tags:
                more = "".join(f"- {json.dumps(t)}\n" for t in tags)
                text = (folder / _CARD).read_text().replace("tags:\n", f"tags:\n{more}", 1)
                files[_CARD] = text.encode()
            return commit_files(
                files,
                repo_id,
                message=commit_message or f"Upload {config.peft_type} adapter",
                description=commit_description,
                private=private,
                revision=revision,
                create_pr=create_pr,
                keep=(_CARD,),
                token=token,
            ).info


def _named(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _named(k, v) for k, v in value.items()}
    if isinstance(value, list):
        return [_named(key, v) for v in value]
    if isinstance(value, str) and (_is_place(value) or (key.endswith("_or_path") and value.startswith(_HERE))):
        return Path(value).name
    return value


_HERE = ("/", "~", "./", "../", "\\")


def _is_place(text: str) -> bool:
    """Return whether a text names a file or folder of this disk, by more than its bare name."""
    if "/" not in text or "\n" in text or len(text) > 1000:
        return False
    return Path(text).expanduser().exists()
