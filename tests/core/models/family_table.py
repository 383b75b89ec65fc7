"""What every family does, step by step; `test_family_table.py` compares with what is written in family_table.json."""

import json
import warnings
from pathlib import Path

import peft
import torch
from models_zoo import shake
from tiny_families import EXAMPLES, ROWS, Float64, build_family, nll_alone
from tiny_run import write_rows

import slimtune
from slimtune.core.adapters.peft_model import find_modules_without_gradient
from slimtune.core.attention.attention_functions import packing_unsupported_reason_or_empty, using_packed_attention
from slimtune.core.config import Recipe
from slimtune.core.models.lm_head import require_matching_lm_head_loss
from slimtune.core.training.loss import compute_supervised_token_nll, forward_backward, make_collator
from slimtune.core.training.train import train
from slimtune.errors import SlimtuneError
from slimtune.planning.gpu_specs import make_gpu_with_memory
from slimtune.planning.plan_request import build_plan_request
from slimtune.planning.planner import estimate_resources

FILE = Path(__file__).with_name("family_table.json")
FAMILIES = """
llama;llama (1 layer);qwen3 (2 layers);mistral;qwen2;qwen3;phi;phi3;gemma;gemma2;gemma3_text;gemma3n_text;
gemma4_text;olmo;olmo2;olmo3;cohere;cohere2;gpt2;gptj;gpt_neox;opt;bloom;mpt;stablelm;starcoder2;smollm3;lfm2;
mixtral;qwen2_moe;qwen3_moe;olmoe;gpt_oss;llama4_text;granite;granitemoe;nemotron;nemotron_h;falcon;falcon (ALiBi);
deepseek_v3;glm4_moe;qwen3_next;rwkv;recurrent_gemma;falcon_mamba;mamba;mamba2;jamba;falcon_h1;bamba;granitemoehybrid;
zamba2;qwen3_5_text;qwen3_5_moe_text;qwen3_5;mistral3;qwen2_vl;qwen2_5_vl;qwen3_vl;gemma3
""".replace("\n", "").split(";")
STEPS = ("attach", "train", "reload", "PEFT", "merge", "packed", "plan", "run")
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def one_line(error):
    """An error's own text without the family's changing parts, at most 160 characters."""
    return " ".join(str(error).split()).partition(" hint: ")[0][:160]


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.tensor(ROWS[1:2]), use_cache=False).logits


def check_steps(name, folder, tokenizer):
    """Return what each step of `STEPS` does: "works", or why it does not."""
    found = {}
    with Float64(), warnings.catch_warnings(action="ignore"):
        model = build_family(name)
        torch.manual_seed(1)
        try:
            model = slimtune.get_peft_model(model, slimtune.LoraConfig(**LORA))
        except SlimtuneError as error:
            return dict.fromkeys(STEPS, "") | {"attach": f"refused: {one_line(error)}"}
        found["attach"] = "works"
        shake(model)

        model.train()
        require_matching_lm_head_loss(model)
        collator = make_collator(model, 0)
        batch = collator(EXAMPLES)
        with using_packed_attention(model):
            before = forward_backward(model, [batch])
            unused = find_modules_without_gradient(model)
            with torch.no_grad():
                for p in (p for p in model.parameters() if p.grad is not None):
                    p -= 1e-3 * p.grad
            model.zero_grad()
            after = forward_backward(model, [batch])
        model.zero_grad()
        found["train"] = "works" if after < before else f"the loss rises from {before:.4f} to {after:.4f}"
        if unused:
            found["train"] += f"; named as without gradient: {', '.join(dict.fromkeys(map(shorten, unused)))}"

        model.eval()
        own = logits(model)
        model.save_pretrained(folder)
        for step, home in (("reload", slimtune), ("PEFT", peft)):
            try:
                loaded = home.PeftModel.from_pretrained(build_family(name), folder)
            except RuntimeError as error:
                if home is slimtune:
                    raise
                found[step] = f"HF PEFT does not load the file: {one_line(error)}"
                continue
            error = (logits(loaded.eval()) - own).abs().max()
            found[step] = "works" if error < 1e-9 else f"the logits differ by {error:.1e}"
        if reason := packing_unsupported_reason_or_empty(model):
            found["packed"] = f"padded: {reason}"
        else:
            with using_packed_attention(model), torch.no_grad():
                error = (compute_supervised_token_nll(model, batch) - nll_alone(model)).abs().max()
            found["packed"] = "works" if error < 1e-9 else f"the losses differ by {error:.1e}"
        error = (logits(model.merge_and_unload()) - own).abs().max()
        found["merge"] = "works" if error < 1e-9 else f"the logits differ by {error:.1e}"
    return found | check_run(name, folder, tokenizer)


def shorten(name):
    return ".".join(part for part in name.split(".")[-3:] if not part.isdigit())


def check_run(name, folder, tokenizer):
    """Plan and run a recipe on the family as a checkpoint, in bfloat16: one step, from the files to the report."""
    base = build_family(name, vocab_size=320).float()
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    recipe = Recipe.from_dict({
        "model": {"name": str(folder / "base"), "dtype": "bfloat16", "device": "cpu"},
        "data": {"train": str(write_rows(folder / "rows.jsonl", 4)), "max_seq_len": 64, "on_overlong": "truncate"},
        "method": {"name": "lora", "r": 4},
        "train": {"max_steps": 1, "batch_size": 2},
        "output_dir": str(folder / "run"),
    })  # fmt: skip
    found = {}
    try:
        plan = estimate_resources(build_plan_request(recipe, make_gpu_with_memory("24GiB")), advise="none")
        padded = any("padded, not packed" in note for note in plan.notes)
        agrees = padded == bool(packing_unsupported_reason_or_empty(base))
        found["plan"] = "works" if agrees else "plan and training differ in packing"
    except SlimtuneError as error:
        found["plan"] = f"not planned, and trains without a plan: {one_line(error)}"
    try:
        found["run"] = "works" if train(recipe).steps == 1 else "stopped"
    except SlimtuneError as error:
        found["run"] = f"refused: {one_line(error)}"
    return found


def read_table():
    """Return the steps of each family as they were written."""
    return json.loads(FILE.read_text())


def write_row(name, found):
    """Write what a family does in place of what was written."""
    table = {**(read_table() if FILE.exists() else {}), name: {step: found.get(step, "") for step in STEPS}}
    ordered = {n: table[n] for n in FAMILIES if n in table}
    FILE.write_text(json.dumps(ordered, indent=1) + "\n")
