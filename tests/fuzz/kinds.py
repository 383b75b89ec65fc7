"""The kinds of input that are fuzzed: a sound one, random changes, the work done with it, and what must be true then.

Each kind has `make(rng, folder, changes)`, which writes an input with so many random changes and returns the work. The
work raises a SlimtuneError, or returns an error text for an input that was taken although the result is not what the
input says ("" if all is well).
"""

import copy
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from change_kinds import CHANGE_KINDS
from mutations import HUGE_INT, NASTY_VALUES, dump_json, mutate_bytes, mutate_json, mutate_text
from row_kinds import ROW_KINDS
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import slimtune
from slimtune.core.config import load_recipe
from slimtune.core.data.chat_template import encode_chat_with_train_mask
from slimtune.extras.row_files import read_rows

sys.path.append(str(Path(__file__).parents[1]))

from tiny_gguf import write_gguf
from tiny_tokenizer import TEMPLATES, make_tokenizer

Work = Callable[[], str]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a lion?"},
    {"role": "assistant", "content": "A large cat, obviously."},
    {"role": "user", "content": "And a mouse?"},
    {"role": "assistant", "content": "A small rodent."},
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<start_of_turn>",
           "<end_of_turn>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|end|>"]  # fmt: skip


@cache
def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=320, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, **size))


@cache
def chatml_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer((TEMPLATES / "qwen2_5.jinja").read_text(encoding="utf-8"), SPECIAL[:3])


def is_same(given: Any, taken: Any) -> bool:
    """Return whether a setting is what its file says; 1 and 1.0 are the same, 1 and True are not."""
    return given == taken and isinstance(given, bool) == isinstance(taken, bool)


# --- adapter folders --------------------------------------------------------------------------------------------------


@cache
def sound_adapters() -> list[dict[str, bytes]]:
    """Files of a sound adapter folder of each method that is loaded from strangers most."""
    task = {"task_type": "CAUSAL_LM"}
    targets = {"target_modules": ["q_proj", "down_proj"], **task}
    configs = [
        slimtune.LoraConfig(r=4, **targets),
        slimtune.LoraConfig(r=4, use_dora=True, rank_pattern={"q_proj": 2}, **targets),
        slimtune.LoraConfig(r=4, trainable_token_indices=[3, 5], modules_to_save=["lm_head"], **targets),
        slimtune.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **task),
        slimtune.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **targets),
        slimtune.LoHaConfig(r=4, **targets),
        slimtune.VeraConfig(r=4, **{**targets, "target_modules": ["q_proj"]}),
        slimtune.PromptTuningConfig(num_virtual_tokens=4, **task),
        slimtune.PrefixTuningConfig(num_virtual_tokens=4, **task),
    ]
    found = []
    for config in configs:
        model = slimtune.get_peft_model(copy.deepcopy(base_model()), config)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found.append({p.name: p.read_bytes() for p in Path(folder).iterdir() if p.suffix != ".md"})
    return found


def mutate_tensors(rng: random.Random, data: bytes) -> bytes:
    """Return a well-formed safetensors file with one tensor changed, renamed, added or removed."""
    tensors = load(data)
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    dtypes = (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float16, torch.bfloat16, torch.float64)
    change = rng.randrange(8)
    if change == 0:
        tensors[name] = tensor.to(rng.choice(dtypes))
    elif change == 1:
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([math.nan, math.inf, -math.inf])
    elif change == 2:
        tensors[name] = tensor.t().contiguous() if tensor.dim() == 2 else tensor.reshape(1, -1)
    elif change == 3:
        tensors[name] = torch.zeros(rng.choice([0, 1, 3]), *tensor.shape[1:])
    elif change == 4:
        del tensors[name]
    elif change == 5:
        tensors[rng.choice([f"{name}.extra", name.replace(".0.", ".7."), name.upper(), "x"])] = tensor.clone()
    elif change == 6:
        tensors[name.replace("layers", rng.choice(["layer", "blocks"]))] = tensors.pop(name)
    else:
        tensors = {k: t for k, t in tensors.items() if "0" not in k} or {name: tensor}
    return save(tensors)


CHECKED_FIELDS = (
    "r", "lora_alpha", "alpha", "use_dora", "use_rslora", "bias", "fan_in_fan_out", "init_r", "num_virtual_tokens"
)  # fmt: skip


def check_adapter(model: Any, folder: Path) -> str:
    """Return how a loaded adapter differs from its files."""
    saved = load_file(folder / "adapter_model.safetensors")
    state = slimtune.get_peft_model_state_dict(model)
    for name, tensor in saved.items():
        if not tensor.is_floating_point():
            if tensor.dtype not in (torch.int64, torch.int32):
                return f"a tensor of {tensor.dtype} was loaded: {name}"
        elif not tensor.isfinite().all():
            return f"a tensor that is not finite was loaded: {name}"
        if name in state and not torch.equal(state[name].float(), tensor.float()):
            return f"the tensor {name} is not the file's"
    if absent := [n for n in state if n not in saved and "lm_head" not in n and "embed_tokens" not in n]:
        return f"tensors that the file lacks were loaded: {absent[:3]}"
    if ignored := [n for n in saved if n not in state and "lm_head" not in n and "embed_tokens" not in n]:
        return f"tensors of the file were ignored: {ignored[:3]}"
    given = json.loads((folder / "adapter_config.json").read_text())
    taken = model.peft_config["default"].to_dict()
    for key in CHECKED_FIELDS:
        if given.get(key) is not None and key in taken and not is_same(given[key], taken[key]):
            return f"{key} is {taken[key]!r}, the file says {given[key]!r}"
        if isinstance(taken.get(key), float) and not math.isfinite(taken[key]):
            return f"{key} is {taken[key]}"
    return ""


def make_adapter(rng: random.Random, folder: Path, changes: int) -> Work:
    files = dict(rng.choice(sound_adapters()))
    for _ in range(changes):
        if rng.random() < 0.6:
            text = files["adapter_config.json"].decode(errors="replace")
            if rng.random() < 0.2:
                files["adapter_config.json"] = mutate_text(rng, text).encode("utf-8", "surrogatepass")
            else:
                try:
                    config = json.loads(text)
                except (ValueError, RecursionError):
                    continue
                if isinstance(config, dict) and rng.random() < 0.5:  # fields that decide what is built
                    fields = [
                        k for k in config if "target" in k or "pattern" in k or "init" in k or k in ("r", "lora_alpha")
                    ]
                    config[rng.choice(fields or list(config))] = rng.choice(
                        [*NASTY_VALUES, HUGE_INT, "pissa_niter_1000000000"]
                    )
                else:
                    config = mutate_json(rng, config)
                files["adapter_config.json"] = dump_json(rng, config).encode("utf-8", "surrogatepass")
        elif rng.random() < 0.5:
            try:
                files["adapter_model.safetensors"] = mutate_tensors(rng, files["adapter_model.safetensors"])
            except (SafetensorError, ValueError, RuntimeError, IndexError):
                continue
        else:
            header = 8 + int.from_bytes(files["adapter_model.safetensors"][:8], "little", signed=False)
            files["adapter_model.safetensors"] = mutate_bytes(rng, files["adapter_model.safetensors"], 0, header)
    for name, data in files.items():
        (folder / name).write_bytes(data)

    def work() -> str:
        base = copy.deepcopy(base_model())
        before = {k: v.clone() for k, v in base.state_dict().items()}
        model = slimtune.PeftModel.from_pretrained(base, folder)
        if error := check_adapter(model, folder):
            return error
        with torch.no_grad():
            logits = model(input_ids=torch.arange(8)[None]).logits
        if not logits.isfinite().all():
            return "the adapted model's logits are not finite"
        after = model.unload().state_dict()
        return "" if all(torch.equal(before[k], after[k]) for k in before) else "the base did not come back"

    return work


# --- rows -------------------------------------------------------------------------------------------------------------

ROW_FORMATS: list[dict[str, Any]] = [
    {"messages": CHAT},
    {
        "messages": CHAT[1:3],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"prompt": "What is a lion?", "completion": "A large cat."},
    {"instruction": "Translate", "input": "lion", "output": "Löwe"},
    {"text": "A lion is a large cat."},
]


def strict_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def flatten_strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [s for v in value.values() for s in flatten_strings(v)]
    if isinstance(value, list):
        return [s for v in value for s in flatten_strings(v)]
    return [value] if isinstance(value, str) else []


def check_rows(rows: list[Any], text: str) -> str:
    """Return how rows differ from the JSON lines they were read from."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(rows) != len(lines):
        return f"{len(lines)} lines became {len(rows)} rows"
    for row, line in zip(rows, lines, strict=True):
        try:
            record = json.loads(line, object_pairs_hook=strict_object)
        except ValueError as error:
            return f"a line that is not sound JSON was taken: {error}"
        given = flatten_strings(record)
        for message in row.messages:
            content = message.get("content", "")
            if content and content not in given and not any(content in g or g in content for g in given if g):
                return f"the row has words that its line lacks: {content[:60]!r}"
        for column in ("label", "images", "rejected"):
            if column in record:
                return f"a row with the column {column!r} was taken"
    return ""


def make_rows(rng: random.Random, folder: Path, changes: int) -> Work:
    form = rng.choice(ROW_FORMATS)
    rows = [copy.deepcopy(form) for _ in range(4)]
    lines = [json.dumps(row) for row in rows]
    for _ in range(changes):
        i = rng.randrange(len(lines))
        lines[i] = dump_json(rng, mutate_json(rng, rows[i])) if rng.random() < 0.6 else mutate_text(rng, lines[i])
    text = "\n".join(lines) + "\n"
    data = text.encode("utf-8", "surrogatepass")
    if changes > 1:
        data = mutate_bytes(rng, data)
    other = rng.choice(["rows.jsonl", "rows.json", "rows.csv", "rows.txt", "rows.parquet"])
    file = folder / (other if changes and rng.random() < 0.4 else "rows.jsonl")
    file.write_bytes(data)

    def work() -> str:
        rows = read_rows(file)
        for row in rows:
            if row.messages:
                encode_chat_with_train_mask(chatml_tokenizer(), row.messages, row.tools)
        return check_rows(rows, data.decode("utf-8-sig")) if file.suffix == ".jsonl" else ""

    return work


# --- recipes ----------------------------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "model": {"name": "smollm2-135m", "dtype": "float32"},
    "data": {"train": "rows.jsonl", "max_seq_len": 512, "validation_fraction": 0.1},
    "method": {"name": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
    "train": {"epochs": 2, "batch_size": 8, "learning_rate": 2e-4, "warmup_ratio": 0.1, "weight_decay": 0.0, "seed": 3},
    "output_dir": "runs/one",
}
HOSTILE_YAML = [
    "1: 2\n", "~: x\n", "true: x\n", "x: 2024-13-45\n", "x: !!int abc\n", "? [a]\n: b\n", "x: " + "[" * 2500,
    "x: " + "1" * 5000 + "\n", "!!python/object/apply:os.system ['true']\n", "x: &a [*a]\n",
]  # fmt: skip


def make_recipe(rng: random.Random, folder: Path, changes: int) -> Work:
    tree: Any = copy.deepcopy(RECIPE)
    for _ in range(changes):
        tree = mutate_json(rng, tree)
    text = yaml.safe_dump(tree, sort_keys=False) if rng.random() < 0.7 else json.dumps(tree)
    if changes and rng.random() < 0.4:
        text = mutate_text(rng, text)
    if changes and rng.random() < 0.05:
        text += rng.choice(HOSTILE_YAML)
    (folder / "recipe.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    (folder / "rows.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")

    def work() -> str:
        recipe = load_recipe(folder / "recipe.yaml")
        given = yaml.safe_load(text)
        taken = recipe.to_dict()
        for section in ("data", "train", "method"):
            values = given.get(section)
            for key, value in values.items() if isinstance(values, dict) else ():
                mine = taken[section].get(key)
                if key in taken[section] and isinstance(value, int | float) and not is_same(value, mine):
                    return f"{section}.{key} is {mine!r}, the file says {value!r}"
                if isinstance(mine, float) and not math.isfinite(mine):
                    return f"{section}.{key} is {mine}"
        return ""

    return work


# --- chat templates ---------------------------------------------------------------------------------------------------

HOSTILE_JINJA = [
    "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ undefined | tojson }}", "{% import 'x' as y %}", "{% include 'x' %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 10 ** 10 ** 8 }}",
    "{{ 'x' * 10 ** 9 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ ''.__class__.__mro__ }}",
    "{{ messages.clear() }}", "{{ messages.__class__ }}", "{{ [1] * 10 ** 9 }}", "{{ range(10 ** 12) | list }}",
    "{{ 'a'.join(range(10 ** 8)) }}", "{{ '%1000000000d' % 1 }}", "{{ '{:>1000000000}'.format(1) }}",
    "{{ raise_exception('\x1b[2J') }}", "{{ messages[99] }}", "{{ messages[0]['content'] }}", "{% break %}",
    "{{ 'x' | center(10 ** 10) }}", "{{ strftime_now('%s' * 999) }}", "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
]  # fmt: skip


def make_template(rng: random.Random, folder: Path, changes: int) -> Work:
    text = rng.choice(sorted(TEMPLATES.glob("*.jinja"))).read_text(encoding="utf-8")
    for _ in range(changes):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(HOSTILE_JINJA) + text[at:] if rng.random() < 0.5 else mutate_text(rng, text)
    first = rng.choice([0, 1]) if changes else 1  # Gemma's templates refuse a system message
    messages = copy.deepcopy(CHAT[first : rng.choice([3, 5])])
    (folder / "template.jinja").write_bytes(text.encode("utf-8", "surrogatepass"))

    def work() -> str:
        tokenizer = make_tokenizer(text, SPECIAL)
        row = encode_chat_with_train_mask(tokenizer, messages)
        learned = tokenizer.decode([i for i, s in zip(row.input_ids, row.supervised, strict=True) if s])
        everything = tokenizer.decode(row.input_ids)
        for message in messages:
            content = message["content"]
            if content not in everything:
                return f"the text leaves out {content!r}"
            once = everything.count(content) == 1  # a template may repeat it in the assistant's turn
            if once and (message["role"] == "assistant") != (content in learned):
                return f"{content!r} is {'' if content in learned else 'not '}learned"
        return ""

    return work


# --- GGUF files -------------------------------------------------------------------------------------------------------


@cache
def sound_gguf() -> bytes:
    model = copy.deepcopy(base_model())
    tokenizer = copy.deepcopy(chatml_tokenizer())
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = SPECIAL[1], SPECIAL[2], SPECIAL[0]
    tokenizer.add_tokens(["Ġa", "Ġ1"])
    model.resize_token_embeddings(len(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(Path(folder) / "base.gguf", model, tokenizer).read_bytes()


def check_gguf(model_folder: Path, file: Path) -> str:
    """Return how the folder made of a GGUF file differs from what the package `gguf` reads in it."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    config = json.loads((model_folder / "config.json").read_text())
    for key, field in (
        ("llama.block_count", "num_hidden_layers"),
        ("llama.embedding_length", "hidden_size"),
        ("llama.feed_forward_length", "intermediate_size"),
        ("llama.attention.head_count", "num_attention_heads"),
        ("llama.attention.head_count_kv", "num_key_value_heads"),
        ("llama.attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ):
        if (found := reader.get_field(key)) is None:
            return f"{key} is missing, and {field} was made up: {config[field]}"
        if not math.isclose(found.contents(), config[field], rel_tol=1e-5):
            return f"{field} is {config[field]}, the file says {found.contents()}"
    weights = {k: t for f in model_folder.glob("*.safetensors") for k, t in load_file(f).items()}
    if bad := [k for k, t in weights.items() if not t.isfinite().all()]:
        return f"weights that are not finite were taken: {bad[:3]}"
    total = sum(int(np.prod(t.shape)) for t in reader.tensors)
    if total != sum(t.numel() for t in weights.values()):
        return f"the file has {total} values, the base {sum(t.numel() for t in weights.values())}"
    return ""


def make_gguf(rng: random.Random, folder: Path, changes: int) -> Work:
    data = sound_gguf()
    for _ in range(changes):
        data = mutate_bytes(rng, data, 0, 12_000 if rng.random() < 0.8 else None)
    file = folder / "base.gguf"
    file.write_bytes(data)

    def work() -> str:
        from slimtune.extras.gguf_loading import get_or_make_hf_folder_and_seconds

        os.environ["SLIMTUNE_CACHE"] = str(folder / "cache")
        made, _ = get_or_make_hf_folder_and_seconds(file)
        try:
            return check_gguf(made, file)
        finally:
            shutil.rmtree(folder / "cache", ignore_errors=True)

    return work


KINDS: dict[str, Callable[[random.Random, Path, int], Work]] = {
    "adapter": make_adapter,
    "rows": make_rows,
    "recipe": make_recipe,
    "template": make_template,
    "gguf": make_gguf,
    **ROW_KINDS,
    **CHANGE_KINDS,
}
