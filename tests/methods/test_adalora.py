"""AdaLoRA's training step by step beside peft's; and its schedule, penalty and files, which peft cannot check."""

import peft
import pytest
import torch
from models_zoo import gpt2, llama, run, shake, tokens

import slimtune
from slimtune import AdaLoraConfig, PeftModel, get_peft_model
from slimtune.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
QV = ["q_proj", "v_proj"]


def model_of(**settings):
    torch.manual_seed(0)
    return get_peft_model(llama(), AdaLoraConfig(init_r=4, target_r=1, target_modules=QV, **settings))


def step(model, number):
    model.zero_grad()
    ids = tokens(seed=number)
    model(input_ids=ids, labels=ids).loss.backward()
    model.update_and_allocate(number)


def modules(model):
    return list(model.adapter_modules("default").values())


def test_the_schedule_needs_a_number_of_steps():
    model = model_of()
    with pytest.raises(ConfigError, match=r"total_step.*None"):
        model.update_and_allocate(1)
    model.active_peft_config.on_train_begin(20)
    assert model.active_peft_config.total_step == 20
    model.active_peft_config.on_train_begin(30)
    assert model.active_peft_config.total_step == 20
    with pytest.raises(ConfigError, match=r"total_step.*3"):
        AdaLoraConfig(tinit=2, tfinal=1).on_train_begin(3)


def test_training_adds_the_regularization_loss():
    model = model_of(orth_reg_weight=0.5)
    ids = tokens()
    expected_loss = model.regularization_loss()
    sides = [P for d in modules(model) for P in (d.lora_A, d.lora_B.t())]
    expected = [torch.linalg.matrix_norm(P @ P.t() - torch.eye(4)).item() for P in sides]
    assert expected_loss.item() == pytest.approx(0.5 * sum(expected) / len(sides))
    with_it = model.train()(input_ids=ids, labels=ids).loss.item()
    without = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert with_it - without == pytest.approx(expected_loss.item(), rel=1e-5)
    assert model_of(orth_reg_weight=0.0).regularization_loss() is None


def test_a_pruned_rank_can_return():
    model = shake(model_of(total_step=50))
    step(model, 1)
    first = [d.kept_ranks.clone() for d in modules(model)]
    assert 0 < sum(int(f.sum()) for f in first) < 16
    for at in range(2, 12):
        with torch.no_grad():  # an optimizer moves zeros too
            for module, kept in zip(modules(model), first, strict=True):
                module.lora_E.copy_(torch.where(kept, 1e-3, 1.0)[:, None])
        step(model, at)
    assert any((d.kept_ranks & ~f).any() for d, f in zip(modules(model), first, strict=True))


def test_the_file_has_the_kept_ranks(tmp_path):
    model = shake(model_of(total_step=3))
    expected = {}
    for at in (1, 2, 3):
        step(model, at)
        model.eval().save_pretrained(tmp_path / str(at))
        expected[at] = run(model)
    model.train()
    assert sum(int(d.kept_ranks.sum()) for d in modules(model)) == 4
    assert not torch.equal(expected[1], expected[3])
    model.load_adapter(tmp_path / "1", "default")  # the ranks of step 3 are gone
    assert torch.equal(run(model), expected[1])
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(llama(), tmp_path / "again")
    assert torch.equal(run(again), expected[1])
    ranks = [sum(kept) for kept in again.active_peft_config.rank_pattern.values()]
    assert [len(d.lora_A) for d in modules(again)] == ranks


def test_a_layer_with_no_ranks_runs_and_merges(tmp_path):
    model = shake(model_of(total_step=2))
    with torch.no_grad():
        modules(model)[0].lora_E.zero_()
    step(model, 1)
    step(model, 2)
    assert not modules(model)[0].kept_ranks.any()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert modules(again)[0].lora_A.shape == (0, 32)
    expected = run(model.eval())
    assert (run(again) - expected).abs().max() < 1e-12
    again.merge_adapter()
    assert (run(again) - expected).abs().max() < 1e-9


def test_setting_r_warns():
    with pytest.warns(UserWarning, match="`r`"):
        AdaLoraConfig(r=16)


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
