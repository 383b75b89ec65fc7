"""`push_to_hub` of a PeftModel."""

import copy
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.utils import PushToHubMixin

from ..utils.hub import commit_files, require_repo_id
from .config import CONFIG_FILE
from .model_card import CARD_FILE, public_base, render_saved_card, strip_local_paths

log = logging.getLogger(__name__)


class AdapterPublishing(PushToHubMixin):
    """The part of a `PeftModel` that uploads adapters to the Hub."""

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
        """Upload the adapters, as `save_pretrained` writes them, in one commit.

        A README.md in the repository is not replaced. `slimtune push RUN` writes a longer one.

        Args:
            repo_id: `owner/name`, or `name` for a repository of your own; it is created if it does not exist.
            commit_message: first line of the commit.
            commit_description: the other lines.
            private: whether a new repository is private; None: the owner's default.
            token: None or True: the one of `hf auth login` or HF_TOKEN.
            revision: branch, created if it does not exist; None: main.
            create_pr: open a pull request.
            max_shard_size: ignored, because an adapter is one file; transformers has it.
            tags: further tags of a new README.md.

        Raises:
            UsageError: a malformed id, no token, an invalid one, or a repository that it may not write to.
            RunError: the Hub cannot be reached, or refuses.
        """
        require_repo_id(repo_id)
        config = copy.copy(self.active_peft_config)
        if not public_base(config):
            name = config.base_model_name_or_path
            log.warning(
                "others cannot find the base %r: set base_model_name_or_path of the adapter's config to its Hub id",
                name and Path(name).name,
            )
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder)
            paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != CARD_FILE]
            files: dict[str, Path | bytes] = {str(p.relative_to(folder)): p for p in paths}
            for name in files:
                if name.endswith(CONFIG_FILE):
                    values = strip_local_paths(json.loads((folder / name).read_text(encoding="utf-8")))
                    files[name] = (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
            files[CARD_FILE] = render_saved_card(config, tags or ()).encode()
            return commit_files(
                files,
                repo_id,
                message=commit_message or f"Upload {config.peft_type} adapter",
                description=commit_description,
                private=private,
                revision=revision,
                create_pr=create_pr,
                keep=(CARD_FILE,),
                token=token,
            ).info
