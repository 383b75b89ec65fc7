"""A model card, the README.md of what leaves the house: what it was made of, how, and how to use it.

An adapter's is made for the Hub: what it names, others can find; no path of this disk. A merged checkpoint's is made
for whoever merged, and says the base as it was typed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from ..adapters.config import PeftConfig
from ..adapters.publishing import strip_local_paths
from ..adapters.registry import built_in_methods
from ..config import Recipe
from ..models.source import ModelSource
from ..utils.formatting import format_bytes, format_count
from .base_model_info import BaseModelInfo
from .story import RunResults

# What the Hub's front matter, the table below or nobody reads.
_UNTOLD = ("base_model_name_or_path", "peft_type", "peft_version", "auto_mapping", "inference_mode", "revision")
OURS_ALONE = frozenset({"bottleneck", "bitfit"})
"""Built-in methods that PEFT has not."""
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""


def card(
    source: ModelSource, config: PeftConfig, recipe: Recipe | None, made: Mapping[str, Any], name: str, chat: bool
) -> str:
    """Return the text of a merged checkpoint's card.

    Args:
        source: where the base came from.
        config: of the adapter.
        recipe: of the run, if there is one.
        made: `dtype`, `max_difference`, `mean_difference`, `effect` and `positions` of the merge.
        name: the folder's name.
        chat: whether the tokenizer has a chat template.
    """
    # The Hub reads `base_model` as an id: a path of this disk would be a dead link.
    front: dict[str, Any] = {}
    if source.kind == "hub":
        front = {"base_model": source.path, "base_model_relation": "finetune"}
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["slimtune", config.name]}
    return "\n".join(
        [
            *_front(front),
            f"# {name}",
            "",
            f"`{source.name}` with a {config.peft_type} adapter merged into its weights. "
            "It needs neither slimtune nor peft.",
            "",
            *_table(
                {
                    "base": _code(source.spec),
                    "method": config.name,
                    "weights": made["dtype"],
                    "training": _training(RunResults(recipe)),
                    "against the adapter": "log-probabilities differ by "
                    f"{made['mean_difference']:.2g} nats on average, {made['max_difference']:.2g} at most, over "
                    f"{made['positions']} positions of text; the adapter changes them by {made['effect']:.2g} on "
                    "average",
                }
            ),
            "",
            "## Settings of the adapter",
            "",
            *_settings(config.to_dict()),
            "",
            "## Use",
            "",
            *_python(
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})",
                f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})",
                *(_CHAT if chat else _PLAIN),
                *_ANSWER,
            ),
            "",
        ]
    )


def adapter_card(
    config: PeftConfig,
    origin: BaseModelInfo,
    story: RunResults,
    *,
    repo_id: str,
    size: int,
    parameters: int,
    tokenizer: bool,
    chat: bool,
) -> str:
    """Return the text of an adapter's card.

    Args:
        config: of the adapter.
        origin: its base, as others can find it.
        story: what the run tells.
        repo_id: where the adapter will lie.
        size: of the adapter's file, in bytes.
        parameters: numbers in it.
        tokenizer: whether a tokenizer lies beside it.
        chat: whether that has a chat template.
    """
    front: dict[str, Any] = {"base_model": origin.hub_id, "base_model_relation": "adapter"} if origin.hub_id else {}
    front |= {"library_name": "peft", **(origin.licence.front if origin.licence else {})}
    front |= {"pipeline_tag": "text-generation"} if config.task_type == "CAUSAL_LM" else {}
    front |= {"tags": ["slimtune", config.name]}
    every = story.result.get("total_params")
    share = f", {100 * parameters / every:.2f} % of base and adapter" if every else ""
    return "\n".join(
        [
            *_front(front),
            f"# {repo_id.rpartition('/')[2]}",
            "",
            f"A {config.name} adapter for {_base(origin)}: {format_count(parameters)} parameters{share}, "
            f"{format_bytes(size)}. Made with slimtune.",
            "",
            *_table(
                {
                    "base": _base(origin) + (f" at {_code(origin.revision)}" if origin.revision else ""),
                    "trained on": f"{_code(origin.copy)}, a quantized copy of the base" if origin.copy else "",
                    "licence of the base": f"{_text(origin.licence.name)} (says {_text(origin.licence.told_by)})"
                    if origin.licence
                    else "unknown",
                    "method": config.name,
                    "data": _data(story),
                    "training": _training(story),
                    "held out": _held_out(story),
                    "memory": _memory(story),
                }
            ),
            "",
            *(_MEANING if story.evaluation else ()),
            "## Use",
            "",
            *_use(config, origin, repo_id, tokenizer, chat),
            "## Settings",
            "",
            *_settings(config.to_dict()),
            "",
        ]
    )


_CHAT = (
    'messages = [{"role": "user", "content": "…"}]',
    'asked = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}',
    "prompt = tokenizer.apply_chat_template(messages, **asked)",
)
_PLAIN = ('prompt = tokenizer("…", return_tensors="pt")',)
_ANSWER = (
    "answer = model.generate(**prompt, max_new_tokens=128)",
    'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
)
_MEANING = (
    "Losses are nats a token over what the assistant says, base and tuned on the same rows; the interval is a paired "
    "bootstrap over rows.",
    "",
)


# --- the facts -------------------------------------------------------------------------------------------------------


def _data(story: RunResults) -> str:
    if story.recipe is None:
        return ""
    rows, tokens = story.result.get("rows"), story.result.get("supervised_tokens")
    told = _code(story.recipe.data.train.name) + (f", {rows} rows" if rows is not None else "")
    return told + (f"; {tokens} tokens learned from" if tokens is not None else "")


def _training(story: RunResults) -> str:
    if story.recipe is None:
        return ""
    train, steps = story.recipe.train, story.result.get("steps")
    length = f"{train.max_steps} steps" if train.max_steps is not None else f"{train.epochs:g} epochs"
    if steps is not None:
        length = f"{steps} steps, {story.result.get('epochs') or 0:.3g} epochs"
    rows, dtype = train.batch_size * train.gradient_accumulation_steps, story.result.get("dtype")
    quantization = story.result.get("quantization")
    held = f", base in {f'{quantization}, computing in ' if quantization else ''}{dtype}" if dtype else ""
    return f"{length}, learning rate {train.learning_rate:g}, batches of {rows} rows, seed {train.seed}{held}"


def _held_out(story: RunResults) -> str:
    found, loss = story.evaluation, story.result.get("validation_loss")
    if found:
        low, high = found["loss_reduction_ci95"]
        what = "validation rows" if found.get("split") == "validation" else _code(_last(found.get("data", "")))
        return (
            f"{what}, {found['rows']} rows: loss {found['base_loss']:.3f} before, {found['tuned_loss']:.3f} after; "
            f"better by {found['loss_reduction']:.3f}, 95 % interval {low:.3f} to {high:.3f}"
        )
    if loss is not None:
        return f"loss {loss:.3f} nats a token on the validation rows; the base was not measured"
    return "not measured"


def _memory(story: RunResults) -> str:
    plan, probe = story.plan.get("plan") or {}, story.plan.get("probe") or {}
    need, longest, peak = plan.get("need_bytes"), probe.get("bytes"), story.result.get("peak_bytes")
    told = []
    if need:
        told.append(f"planned {format_bytes(need['low'])} to {format_bytes(need['high'])}")
    if longest:
        told.append(f"the longest pass took {format_bytes(longest)}")
    if peak:
        told.append(f"the run {format_bytes(peak)} at most on {_text(str(story.result.get('device', 'its device')))}")
    return "; ".join(told)


# --- how to use it ---------------------------------------------------------------------------------------------------


def _use(config: PeftConfig, origin: BaseModelInfo, repo_id: str, tokenizer: bool, chat: bool) -> list[str]:
    base, here = json.dumps(origin.hub_id or origin.name), json.dumps(repo_id)
    words = repo_id if tokenizer else origin.hub_id or origin.name
    ask = [
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(words)})",
        *(_CHAT if chat else _PLAIN),
        *_ANSWER,
    ]
    told = ["With slimtune:", "", *_python(
        "from transformers import AutoTokenizer",
        "",
        "from slimtune import AutoPeftModelForCausalLM",
        "",
        f"model = AutoPeftModelForCausalLM.from_pretrained({here})",
        *ask,
    ), ""]  # fmt: skip
    if config.name in built_in_methods() and config.name not in OURS_ALONE:
        told += ["With peft:", "", *_python(
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({base})",
            f"model = PeftModel.from_pretrained(base, {here})",
            *ask,
        ), ""]  # fmt: skip
    else:
        told += [f"peft has no method {_code(config.name)} and does not read this file.", ""]
    serve = _vllm(config, origin, repo_id)
    if serve:
        told += ["With vLLM:", "", "```sh", serve, "```", ""]
    elif config.mergeable:
        told += ["vLLM does not take this adapter as it is. Merged into its base it serves it as any other model:", ""]
        told += [*_python(
            "from slimtune import AutoPeftModelForCausalLM",
            "",
            f"model = AutoPeftModelForCausalLM.from_pretrained({here})",
            'model.merge_and_unload().save_pretrained("merged")',
        ), ""]  # fmt: skip
    else:
        told += ["vLLM does not serve this method, and it is no change of weights that could be merged.", ""]
    return told


def _vllm(config: Any, origin: BaseModelInfo, repo_id: str) -> str:
    """Return the line that serves the adapter as it is, "" where releases of vLLM refuse or misread it."""
    start = config.init_lora_weights if config.ships_as_lora else None
    odd = not config.ships_as_lora or any(
        (
            config.use_dora,
            config.bias != "none",
            config.lora_bias,
            config.modules_to_save,
            config.trainable_token_indices,
            config.rank_pattern,
            config.alpha_pattern,
            start not in (True, False, "gaussian", "eva", "orthogonal"),
            config.r > _RANKS[-1],
        )
    )
    if odd:
        return ""
    rank = next(r for r in _RANKS if r >= config.r)
    name = repo_id.rpartition("/")[2]
    lora = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={repo_id}"]
    return shlex.join(["vllm", "serve", origin.hub_id or " ".join(origin.name.split()), *lora])


# --- Markdown --------------------------------------------------------------------------------------------------------


def _front(values: Mapping[str, Any]) -> list[str]:
    return ["---", yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def _table(rows: Mapping[str, str]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {name} | {told} |" for name, told in rows.items() if told)]


def _settings(values: Mapping[str, Any]) -> list[str]:
    told = {k: v for k, v in strip_local_paths(values).items() if k not in _UNTOLD and v not in (None, [], {})}
    return ["```json", json.dumps(told, indent=2, sort_keys=True, default=str), "```"]


def _python(*lines: str) -> list[str]:
    return ["```python", *lines, "```"]


def _base(origin: BaseModelInfo) -> str:
    if origin.hub_id:
        return f"[{origin.hub_id}](https://huggingface.co/{origin.hub_id})"
    return _code(origin.name)


def _last(place: str) -> str:
    return place.replace("\\", "/").rpartition("/")[2]


def _code(text: str) -> str:
    """Return text as code that cannot leave its cell of a table."""
    return f"`{_text(text).replace('`', chr(39))}`"


def _text(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
