"""A short AdaLoRA training, step by step beside peft's: losses, penalty included, which ranks go, and the file."""

import peft
import pytest
import torch
from models_zoo import gpt2, llama, run, tokens

import slimtune

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
STEPS = 14


def trained(home, base, **settings):
    config = {"init_r": 6, "target_r": 2, "total_step": STEPS, "target_modules": "all-linear", **settings}
    made = base()
    torch.manual_seed(1)
    model = home.get_peft_model(made, home.AdaLoraConfig(task_type="CAUSAL_LM", **config)).train()
    for name, p in model.named_parameters():
        # Above a base that is not float32, peft lets its count of ranks train.
        p.requires_grad_(p.requires_grad and ".ranknum." not in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    allocate = model.update_and_allocate if home is slimtune else model.base_model.update_and_allocate
    losses, left = [], []
    for step in range(1, STEPS + 1):
        ids = tokens(seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        left.append(sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n))
    return model.eval(), losses, left


@pytest.mark.parametrize(
    ("base", "settings"),
    [(llama, {"tinit": 3, "tfinal": 4, "deltaT": 2, "beta1": 0.5, "beta2": 0.9}),
     (gpt2, {"tfinal": 5, "orth_reg_weight": 0.0, "lora_alpha": 32})],
    ids=["llama", "gpt2"],
)  # fmt: skip
def test_training_is_pefts(base, settings, tmp_path):
    ours, mine, ranks = trained(slimtune, base, **settings)
    theirs, other, their_ranks = trained(peft, base, **settings)
    assert mine == pytest.approx(other, rel=1e-6)  # transformers' loss rounds to float32
    assert ranks == their_ranks
    layers = len(ours.peft_config["default"].rank_pattern)
    assert ranks[-1] == 2 * layers < ranks[0] <= 6 * layers
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)  # takes the adapter's name out of the keys
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    ours.save_pretrained(tmp_path / "ours")
    said = run(ours)
    assert (said - run(theirs)).abs().max() < 1e-9
    assert (said - run(base())).abs().max() > 1e-2
    for home in (peft, slimtune):
        for folder in ("ours", "theirs"):
            again = home.PeftModel.from_pretrained(base(), tmp_path / folder).eval()
            assert (run(again) - said).abs().max() < 1e-6, (home, folder)
