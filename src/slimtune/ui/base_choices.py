"""The bases that the first page offers: those on this machine first."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..extras.known_models import PACKAGED, load_known_models_by_alias


class BaseChoice(NamedTuple):
    """One of the bases that have a short name."""

    name: str
    params: int
    licence: str
    is_gated: bool  # whether the Hub asks for an account that has accepted its licence
    is_here: bool  # whether nothing is downloaded


def list_base_choices() -> list[BaseChoice]:
    """Return the bases that have a short name: those on this machine first, the smallest first."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    def is_here(name: str, hub_ids: Sequence[str]) -> bool:
        if name in PACKAGED and importlib.util.find_spec(PACKAGED[name].package) is not None:
            return True
        folders = (repo_folder_name(repo_id=hub_id, repo_type="model") for hub_id in hub_ids)
        return any(Path(HF_HUB_CACHE, folder, "snapshots").is_dir() for folder in folders)

    bases = [
        BaseChoice(name, facts["params"], facts["licence"], bool(facts["gated"]), is_here(name, facts["hub"]))
        for name, facts in load_known_models_by_alias().items()
    ]
    return sorted(bases, key=lambda base: (not base.is_here, base.params))
