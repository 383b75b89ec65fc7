"""Cards of uploaded adapters and merged models; the text is in `adapters/model_card.md.j2`."""

import shlex
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from ..adapters.config import PeftConfig
from ..adapters.model_card import make_card_data, render_card
from ..config import Recipe
from ..models.registry import ModelSource
from ..run_dir import RunResults
from .base_model_info import BaseModelInfo
from .vllm import is_served_unchanged, round_up_rank


def render_merged_card(
    source: ModelSource, config: PeftConfig, recipe: Recipe | None, merge: Mapping[str, Any], name: str, chat: bool
) -> str:
    """Return the card of a merged model.

    Args:
        source: of the base.
        config: of the adapter.
        recipe: of the run, if there is one.
        merge: `dtype`, `max_difference`, `mean_difference`, `effect` and `positions` of the merge.
        name: of the folder.
        chat: whether the tokenizer has a chat template.
    """
    # The Hub reads `base_model` as an id: a local path would be a dead link.
    hub_id = source.path if source.kind == "hub" else None
    data = ModelCardData(
        base_model=hub_id,
        base_model_relation="finetune" if hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["slimtune", config.name],
    )
    return render_card(
        data,
        config,
        title=name,
        merge=merge,
        base_id=hub_id,
        base_name=source.spec,
        results=RunResults(recipe),
        repo_id=name,
        chat=chat,
    )


def render_adapter_card(
    config: PeftConfig,
    base: BaseModelInfo,
    results: RunResults,
    *,
    repo_id: str,
    file_bytes: int,
    parameters: int,
    has_tokenizer: bool,
    chat: bool,
) -> str:
    """Return the card of an adapter on the Hub.

    Args:
        config: of the adapter.
        base: its base, as others can find it.
        results: of the run.
        repo_id: where the adapter is uploaded to.
        file_bytes: size of the adapter's file.
        parameters: number of values in it.
        has_tokenizer: whether a tokenizer is uploaded with it.
        chat: whether the tokenizer has a chat template.
    """
    return render_card(
        make_card_data(config, base.hub_id, base.licence.metadata if base.licence else None),
        config,
        title=repo_id.rpartition("/")[2],
        base=base,
        base_id=base.hub_id,
        base_name=base.name,
        results=results,
        repo_id=repo_id,
        file_bytes=file_bytes,
        parameters=parameters,
        tokenizer_id=repo_id if has_tokenizer else base.name,
        chat=chat,
        vllm_command=_vllm_command(config, base, repo_id),
    )


def _vllm_command(config: Any, base: BaseModelInfo, repo_id: str) -> str:
    """Return the command that serves the adapter beside its base; "" where vLLM refuses or misreads it."""
    if not is_served_unchanged(config):
        return ""
    name = repo_id.rpartition("/")[2]
    lora = ["--enable-lora", "--max-lora-rank", str(round_up_rank(config.r)), "--lora-modules", f"{name}={repo_id}"]
    return shlex.join(["vllm", "serve", " ".join(base.name.split()), *lora])
