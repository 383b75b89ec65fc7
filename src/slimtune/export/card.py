"""The README.md of a merged checkpoint: what it was made of, how, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..contract.config import PeftConfig
from ..models.source import Source
from ..recipe import Recipe

# What the Hub's front matter, the table below or nobody reads.
_UNTOLD = ("base_model_name_or_path", "peft_type", "peft_version", "auto_mapping", "inference_mode", "revision")


def card(
    source: Source, config: PeftConfig, recipe: Recipe | None, made: Mapping[str, Any], name: str, chat: bool
) -> str:
    """Return the text of the card.

    Args:
        source: where the base came from.
        config: of the adapter.
        recipe: of the run, if there is one.
        made: `dtype`, `max_difference`, `mean_difference`, `effect` and `positions` of the merge.
        name: the folder's name.
        chat: whether the tokenizer has a chat template.
    """
    # The Hub reads `base_model` as an id: a path of this disk would be a dead link.
    front = [f"base_model: {json.dumps(source.path)}", "base_model_relation: finetune"] if source.kind == "hub" else []
    front += ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- slimtune", f"- {config.name}"]
    settings = {k: v for k, v in config.to_dict().items() if k not in _UNTOLD and v not in (None, [], {})}
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# {name}",
            "",
            f"`{source.name}` with a {config.peft_type} adapter merged into its weights. "
            "It needs neither slimtune nor peft.",
            "",
            "| | |",
            "| --- | --- |",
            f"| base | `{source.spec}` |",
            f"| method | {config.name} |",
            f"| weights | {made['dtype']} |",
            *_training(recipe),
            f"| against the adapter | log-probabilities differ by {made['mean_difference']:.2g} nats on average, "
            f"{made['max_difference']:.2g} at most, over {made['positions']} positions of text; the adapter changes "
            f"them by {made['effect']:.2g} on average |",
            "",
            "## Settings of the adapter",
            "",
            "```json",
            json.dumps(settings, indent=2, sort_keys=True, default=str),
            "```",
            "",
            "## Use",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})",
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})",
            *(_CHAT if chat else _PLAIN),
            "answer = model.generate(**prompt, max_new_tokens=128)",
            'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
            "```",
            "",
        ]
    )


_CHAT = (
    'messages = [{"role": "user", "content": "…"}]',
    'asked = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}',
    "prompt = tokenizer.apply_chat_template(messages, **asked)",
)
_PLAIN = ('prompt = tokenizer("…", return_tensors="pt")',)


def _training(recipe: Recipe | None) -> list[str]:
    if recipe is None:
        return []
    train = recipe.train
    length = f"{train.max_steps} steps" if train.max_steps is not None else f"{train.epochs:g} epochs"
    rows = train.batch_size * train.accumulate
    return [
        f"| training | {length}, learning rate {train.learning_rate:g}, batches of {rows} rows, seed {train.seed} |"
    ]
