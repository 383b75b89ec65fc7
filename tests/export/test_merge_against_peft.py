"""What merging costs compared with PEFT on SmolLM2-135M: |Δ log p| and KL to the adapter on its base, in nats.

All log-probabilities are computed in float32, so the figures are those of the weights: `pytest -s` prints them.
"""

import pytest
import torch
from hand_run import make_run
from peft import LoraConfig as TheirConfig
from peft import PeftModel as TheirModel
from peft import get_peft_model as their_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimtune.adapters.model import PeftModel
from slimtune.export.merge import merge

TEXTS = [
    "Define hope. Desire and expectation rolled into one.",
    "The capital of France is Paris, a city of about two million people.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "Marriage: the state of a community consisting of a master, a mistress and two slaves, making in all, two.",
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, smollm2_folder):
    """An adapter that PEFT wrote; its changes are about as large as a few dozen steps make them."""
    folder = tmp_path_factory.mktemp("peft")
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    config = TheirConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model, draws = their_model(base, config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.06, generator=draws)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def log_p(model, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Over all positions: log p of every token `(n, vocabulary)`, and the ids of those that come next `(n,)`."""
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    found = [model.float()(row, use_cache=False).logits[0, :-1].double().log_softmax(-1) for row in rows]
    return torch.cat(found), torch.cat([row[0, 1:] for row in rows])


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_merge_costs_no_more_than_pefts(tmp_path, smollm2_folder, adapter, dtype):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)

    def base():
        return AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=dtype)

    run = make_run(tmp_path / "run", smollm2_folder, model={"dtype": str(dtype).removeprefix("torch.")})
    (run / "adapter").rename(tmp_path / "unused")
    (run / "adapter").symlink_to(adapter)
    merge(run, tmp_path / "merged")
    adapted, following = log_p(PeftModel.from_pretrained(base(), adapter), tokenizer)
    models = {
        "slimtune": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        "PEFT": lambda: TheirModel.from_pretrained(base(), str(adapter)).merge_and_unload(),
        "no adapter": base,
    }
    print(f"\n{dtype}, {len(following)} positions")
    found = {}
    for name, load in models.items():
        merged, _ = log_p(load(), tokenizer)
        own = (merged - adapted).gather(-1, following[:, None]).abs()
        kl = (adapted.exp() * (adapted - merged)).sum(-1).mean().item()
        found[name] = {"mean": own.mean().item(), "max": own.max().item(), "kl": kl}
        print(f"{name:>10}: mean {own.mean():.3g}, max {own.max():.3g}, KL {kl:.3g}")
    assert found["no adapter"]["mean"] > 0.3
    if dtype == torch.float32:
        assert found["slimtune"]["mean"] <= 2 * found["PEFT"]["mean"]
        assert found["slimtune"]["max"] <= 2 * max(found["PEFT"]["max"], 1e-6)
    else:
        # Of weights in 8 bits: 0.02 nats hold for the divergence of what is said, not for every log-probability.
        assert found["slimtune"]["kl"] < 0.02
        assert found["slimtune"]["mean"] <= 1.1 * found["PEFT"]["mean"]
