"""PiSSA, OLoRA, MiCA and the like: the base stays, files mean the same to peft. In fp32, as peft starts them."""

from __future__ import annotations

import peft
import pytest
import torch
from models_zoo import gpt2, llama, run, same_base, shake, snapshot, tokens
from safetensors.torch import load_file, save_file

import slimtune
from slimtune import LoraConfig, PeftModel, get_peft_model
from slimtune.errors import ConfigError, UsageError
from slimtune.methods.lora.loftq import _largest

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
CLOSE = 1e-5  # fp32: peft refuses to start these in float64
IN_WEIGHT = pytest.mark.parametrize("init", ["pissa", "olora"])


def base(kind=llama):
    return kind(dtype=torch.float32)


def adapted(home, init, kind=llama, **more):
    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more}
    model = base(kind)
    torch.manual_seed(1)
    return home.get_peft_model(model, home.LoraConfig(init_lora_weights=init, **settings)).eval()


def far(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "mica", "orthogonal"])
def test_starts_as_peft_does(init, dora):
    if init == "mica" and dora:
        pytest.skip("neither has both")
    ours, theirs = (adapted(home, init, use_dora=dora) for home in (slimtune, peft))
    mine, other = slimtune.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert {k for k in mine if "start_" not in k} == set(other)
    assert max(far(mine[k], other[k]) for k in other) < 1e-6
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("init", "kind"), [("pissa", llama), ("olora", llama), ("mica", llama), ("pissa", gpt2)])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_files_mean_the_same_in_both(init, kind, dora, tmp_path):
    if init == "mica" and dora:
        pytest.skip("neither has both")
    ours, theirs = (adapted(home, init, kind, use_dora=dora) for home in (slimtune, peft))
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        shake(model)
        model.save_pretrained(tmp_path / folder)
    assert far(run(ours), run(base(kind))) > 1e-2
    assert far(run(peft.PeftModel.from_pretrained(base(kind), tmp_path / "ours").eval()), run(ours)) < CLOSE
    assert far(run(PeftModel.from_pretrained(base(kind), tmp_path / "theirs")), run(theirs)) < CLOSE


@IN_WEIGHT
def test_our_own_file_needs_no_second_decomposition(init, tmp_path, monkeypatch):
    model = adapted(slimtune, init)
    shake(model)
    model.save_pretrained(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("decomposed again")

    monkeypatch.setattr("slimtune.methods.lora.starts.from_weight", refuse)
    assert torch.equal(run(PeftModel.from_pretrained(base(), tmp_path)), run(model))


def test_a_random_start_that_the_file_leaves_out_is_told(tmp_path):
    model = adapted(slimtune, "pissa_niter_4")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "start_" not in k}, file)
    with pytest.warns(UserWarning, match="leaves out how this adapter started"):
        PeftModel.from_pretrained(base(), tmp_path)


@IN_WEIGHT
def test_gradients_are_those_of_the_base_that_peft_changes(init):
    ours, theirs = (adapted(home, init) for home in (slimtune, peft))
    ids = tokens()
    for model in (ours, theirs):
        shake(model)
        model(input_ids=ids, labels=ids).loss.backward()
    mine, other = ([p.grad.norm().item() for p in m.parameters() if p.requires_grad] for m in (ours, theirs))
    assert mine == pytest.approx(other, rel=1e-3, abs=1e-6)


@IN_WEIGHT
def test_a_16_bit_base_is_left_as_it_is(init):
    model = llama(dtype=torch.bfloat16)
    before, said = snapshot(model), run(model)
    adapter = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init)).eval()
    assert torch.equal(run(adapter), said)
    assert same_base(model, before)


@IN_WEIGHT
def test_a_plain_lora_of_twice_the_rank_does_the_same(init, tmp_path):
    """For readers that know nothing of the start: vLLM, llama.cpp, and the base as it is."""
    model = adapted(slimtune, init)
    shake(model)
    expected = run(model)
    slimtune.save_as_lora(tmp_path, model, rank=8)
    plain = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert plain.peft_config["default"].init_lora_weights is True
    assert far(run(plain), expected) < CLOSE


def test_a_rank_above_the_weights_is_refused():
    with pytest.raises(ConfigError, match=r"r is 40 at .*, whose weight has rank 32"):
        adapted(slimtune, "pissa", r=40)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "corda"}, "'corda'.*"),
        ({"init_lora_weights": "pissa_niter_x"}, "pissa_niter_x"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "r is 3"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q": 3}}, "rank_pattern is"),
        ({"rank_pattern": {"q": True}}, "rank_pattern is"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"alpha_pattern": {"q": -1}}, "alpha_pattern is"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1'"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias"),
        ({"lr_ratio": 0}, "lr_ratio"),
        ({"trainable_token_indices": [3, 3]}, "trainable_token_indices"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        LoraConfig(**settings)


def test_loftq_on_a_float_base_names_the_way():
    with pytest.raises(ConfigError, match="replace_lora_weights_loftq"):
        get_peft_model(base(), LoraConfig(init_lora_weights="loftq"))
    model = get_peft_model(base(), LoraConfig())
    with pytest.raises(UsageError, match="no adapted layer is quantized"):
        slimtune.replace_lora_weights_loftq(model, "anywhere")


def test_loftq_with_inputs_makes_up_for_what_products_miss():
    g = torch.Generator().manual_seed(4)
    lost, few = torch.randn(24, 32, generator=g), torch.randn(300, 3, generator=g)
    inputs = few @ torch.randn(3, 32, generator=g) + 0.2 * torch.randn(300, 32, generator=g)
    (up, down), (plain_up, plain_down) = _largest(lost, 4, inputs), _largest(lost, 4, None)
    assert (up.shape, down.shape) == ((24, 4), (4, 32))
    missed, plainly = (((lost - a) @ inputs.t()).norm() for a in (up @ down, plain_up @ plain_down))
    assert missed < 0.5 * plainly
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))  # neither has the larger numbers


def test_loftq_with_inputs_of_every_direction_alike_is_loftq():
    lost = torch.randn(24, 32, generator=torch.Generator().manual_seed(4))
    (up, down), (plain_up, plain_down) = _largest(lost, 4, torch.eye(32)), _largest(lost, 4, None)
    torch.testing.assert_close(up @ down, plain_up @ plain_down, rtol=1e-4, atol=1e-4)
