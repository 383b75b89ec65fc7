"""Upload of an adapted model's adapters to the Hub, with a model card."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from ..core.adapters.peft_config import CONFIG_FILE, write_adapter_config
from ..core.adapters.peft_model import PeftModel
from .hub_commits import commit_files, require_repo_id
from .model_card import CARD_FILE, get_public_base_id, render_default_card, strip_local_paths, write_model_card

log = logging.getLogger(__name__)


class AdapterUploadMixin(PeftModel):
    """Mixed into adapted models: `push_to_hub`."""

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write the README.md of an adapter folder; a README of the user's keeps its text and gets new metadata."""
        tags = getattr(self, "model_tags", None) or ()
        write_model_card(self.active_peft_config, Path(output_dir), tags)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        max_shard_size: int | str | None = None,
        tags: list[str] | None = None,
        **hub: Any,
    ) -> CommitInfo:
        """Upload the adapters, as `save_pretrained` writes them, in one commit.

        A README.md in the repository is not replaced. `slimtune push RUN` writes a longer one.

        Args:
            repo_id: `owner/name`, or `name` for a repository of your own; it is created if it does not exist.
            max_shard_size: ignored, because an adapter is one file.
            tags: further tags of a new README.md.
            hub: private, token, revision and create_pr, as in `utils.hub.commit_files`, which also lists the errors.
        """
        require_repo_id(repo_id)
        config = self.active_peft_config
        if not get_public_base_id(config):
            name = Path(config.base_model_name_or_path or "").name
            hint = "set base_model_name_or_path of the adapter's config to its Hub id"
            log.warning("others cannot find the base %r: %s", name, hint)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder)
            files: dict[str, Path | bytes] = {}
            for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CARD_FILE):
                if path.name == CONFIG_FILE:
                    write_adapter_config(path.parent, strip_local_paths(json.loads(path.read_text())))
                files[str(path.relative_to(folder))] = path
            files[CARD_FILE] = render_default_card(config, tags or ()).encode()
            message = commit_message or f"Upload {config.peft_type} adapter"
            keep = (CARD_FILE,)
            return commit_files(
                files, repo_id, message=message, description=commit_description, keep_if_existing=keep, **hub
            ).info
