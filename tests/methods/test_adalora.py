"""AdaLoRA's schedule, penalty and files, where peft is no measure."""

from __future__ import annotations

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


def deltas(model):
    return list(model.adapter_modules("default").values())


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"init_r": 4}, "init_r is 4"),
        ({"tinit": 5, "tfinal": 5, "total_step": 10}, "total_step is 10"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"use_rslora": True}, "no field 'use_rslora'"),
    ],
)
def test_bad_settings_are_refused(settings, got):
    with pytest.raises(ConfigError, match=got):
        AdaLoraConfig(**settings)


def test_without_a_number_of_steps_there_is_no_schedule():
    model = model_of()
    with pytest.raises(ConfigError, match="total_step is None"):
        model.update_and_allocate(1)
    model.active_peft_config.on_train_begin(20)
    assert model.active_peft_config.total_step == 20
    model.active_peft_config.on_train_begin(30)
    assert model.active_peft_config.total_step == 20
    with pytest.raises(ConfigError, match="total_step is 3"):
        AdaLoraConfig(tinit=2, tfinal=1).on_train_begin(3)


def test_the_penalty_is_on_the_loss_while_training_alone():
    model = model_of(orth_reg_weight=0.5)
    ids = tokens()
    penalty = model.regularization_loss()
    sides = [P for d in deltas(model) for P in (d.lora_A, d.lora_B.t())]
    expected = [torch.linalg.matrix_norm(P @ P.t() - torch.eye(4)).item() for P in sides]
    assert penalty.item() == pytest.approx(0.5 * sum(expected) / len(sides))
    with_it = model.train()(input_ids=ids, labels=ids).loss.item()
    without = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert with_it - without == pytest.approx(penalty.item(), rel=1e-5)
    assert model_of(orth_reg_weight=0.0).regularization_loss() is None


def test_a_rank_that_is_out_can_come_back():
    model = model_of(total_step=50)
    shake(model)
    step(model, 1)
    first = [d.left.clone() for d in deltas(model)]
    assert 0 < sum(int(f.sum()) for f in first) < 16
    for at in range(2, 12):
        with torch.no_grad():  # as an optimizer moves zeros, too
            for delta, left in zip(deltas(model), first, strict=True):
                delta.lora_E.copy_(torch.where(left, 1e-3, 1.0)[:, None])
        step(model, at)
    assert any((d.left & ~f).any() for d, f in zip(deltas(model), first, strict=True))


def test_the_file_holds_the_ranks_that_are_left_and_is_loaded_over_more(tmp_path):
    model = model_of(total_step=3)
    shake(model)
    expected = {}
    for at in (1, 2, 3):
        step(model, at)
        model.eval().save_pretrained(tmp_path / str(at))
        expected[at] = run(model)
    model.train()
    assert sum(int(d.left.sum()) for d in deltas(model)) == 4
    assert not torch.equal(expected[1], expected[3])
    model.load_adapter(tmp_path / "1", "default")  # the last step's ranks are forgotten
    assert torch.equal(run(model), expected[1])
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(llama(), tmp_path / "again")
    assert torch.equal(run(again), expected[1])
    ranks = [sum(left) for left in again.active_peft_config.rank_pattern.values()]
    assert [len(d.lora_A) for d in deltas(again)] == ranks


def test_a_layer_without_a_rank_runs_and_merges(tmp_path):
    model = model_of(total_step=2)
    shake(model)
    with torch.no_grad():
        deltas(model)[0].lora_E.zero_()
    step(model, 1)
    step(model, 2)
    assert not deltas(model)[0].left.any()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert deltas(again)[0].lora_A.shape == (0, 32)
    expected = run(model.eval())
    assert (run(again) - expected).abs().max() < 1e-12
    again.merge_adapter()
    assert (run(again) - expected).abs().max() < 1e-9


def test_the_rank_of_lora_is_told_to_do_nothing():
    with pytest.warns(UserWarning, match="does not use r"):
        AdaLoraConfig(r=16)
