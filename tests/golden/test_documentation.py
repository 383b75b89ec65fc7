"""Snippets of PEFT's quick tour, LoRA guide and quantization guide: only the import changes, the logits are equal.

Every snippet gets `base()`, a small model in fp32, `ids` and `folder`, and leaves its model in `model`.
"""

from importlib.util import find_spec

import pytest
import torch
from models_zoo import llama, run, shake, tokens

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

SNIPPETS = {
    "quick tour": """
from peft import LoraConfig, TaskType, get_peft_model, AutoPeftModelForCausalLM
config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
base().save_pretrained(folder / "base")
from transformers import AutoModelForCausalLM
model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
model.print_trainable_parameters()
shake(model)
model.save_pretrained(folder / "adapter")
model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
assert model.generate(input_ids=ids, max_new_tokens=3).shape[1] == ids.shape[1] + 3
""",
    "initialization and rank patterns": """
from peft import LoraConfig, get_peft_model
config = LoraConfig(use_rslora=True, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"],
                    rank_pattern={"v_proj": 4}, alpha_pattern={"0.self_attn.q_proj": 16})
model = get_peft_model(base(), config)
shake(model)
""",
    "merging, and several adapters": """
from peft import LoraConfig, PeftModel, get_peft_model
model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"]))
shake(model)
model.save_pretrained(folder)
model = PeftModel.from_pretrained(base(), folder, adapter_name="first")
model.load_adapter(folder, adapter_name="second")
model.add_weighted_adapter(["first", "second"], [0.7, 0.3], adapter_name="both", combination_type="linear")
model.set_adapter("both")
model.delete_adapter("first")
model = model.merge_and_unload()
""",
    "layer replication": """
from peft import LoraConfig, get_peft_model
model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]))
shake(model)
""",
    "trained tokens and tied weights": """
from peft import LoraConfig, get_peft_model
model = get_peft_model(base(tie=True), LoraConfig(trainable_token_indices=[3, 5], ensure_weight_tying=True,
                                                  target_modules="all-linear"))
shake(model)
""",
    "QLoRA": """
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
import torch, transformers
base(hidden_size=64, intermediate_size=128).save_pretrained(folder / "base")
config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                         bnb_4bit_compute_dtype=torch.float32)
model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config, device_map="cpu")
model = prepare_model_for_kbit_training(model)
config = LoraConfig(r=16, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], lora_dropout=0.05,
                    bias="none", task_type="CAUSAL_LM")
model = get_peft_model(model, config)
model.train()
model(input_ids=ids, labels=ids).loss.backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
shake(model)
""",
}  # fmt: skip


def logits(snippet, folder):
    names = {
        "base": lambda **sizes: llama(dtype=torch.float32, **sizes),
        "ids": tokens(),
        "folder": folder,
        "shake": shake,
    }
    torch.manual_seed(0)
    exec(snippet, names)
    return run(names["model"].eval()).float()


SLOW = pytest.mark.slow  # peft asks the Hub about a local folder
EVERY = [pytest.param(name, marks=SLOW if name == "quick tour" else ()) for name in SNIPPETS]


@pytest.mark.parametrize("name", EVERY)
def test_only_the_import_changes(name, tmp_path):
    if name == "QLoRA" and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    ours = logits(SNIPPETS[name].replace("from peft import", "from slimtune import"), tmp_path / "ours")
    theirs = logits(SNIPPETS[name], tmp_path / "theirs")
    # On a CPU, bitsandbytes computes with a base in another layout, in bf16, where nothing trains.
    assert (ours - theirs).abs().max() < (5e-3 if name == "QLoRA" else 1e-4)
    assert (ours - run(llama(dtype=torch.float32))).abs().max() > 1e-3
