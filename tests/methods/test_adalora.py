"""AdaLoRA's schedule, penalty and files, which peft cannot check."""

import pytest
import torch
from models_zoo import llama, run, shake, tokens

from slimtune import AdaLoraConfig, PeftModel, get_peft_model
from slimtune.errors import ConfigError

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
    with pytest.raises(ConfigError, match="total_step is None"):
        model.update_and_allocate(1)
    model.active_peft_config.on_train_begin(20)
    assert model.active_peft_config.total_step == 20
    model.active_peft_config.on_train_begin(30)
    assert model.active_peft_config.total_step == 20
    with pytest.raises(ConfigError, match="total_step is 3"):
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
    model = model_of(total_step=50)
    shake(model)
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
    model = model_of(total_step=3)
    shake(model)
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
    model = model_of(total_step=2)
    shake(model)
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
    with pytest.warns(UserWarning, match="`r` is not used"):
        AdaLoraConfig(r=16)
