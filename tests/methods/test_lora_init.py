"""PiSSA, OLoRA, MiCA, LoftQ: the base does not change, and files equal PEFT's. In fp32, which PEFT needs."""

import peft
import pytest
import torch
from models_zoo import gpt2, llama, run, shake, tokens
from safetensors.torch import load_file, save_file

import slimtune
from slimtune import LoraConfig, PeftModel, get_peft_model
from slimtune.errors import ConfigError, UsageError
from slimtune.methods.lora.loftq import approximate_error

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
CLOSE = 1e-5  # fp32: peft refuses float64 here
SUBTRACTED = pytest.mark.parametrize("init", ["pissa", "olora"])


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
def test_starts_equal_pefts(init, dora):
    if init == "mica" and dora:
        pytest.skip("not supported together")
    ours, theirs = (adapted(home, init, use_dora=dora) for home in (slimtune, peft))
    mine, other = slimtune.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert {k for k in mine if "start_" not in k} == set(other)
    assert max(far(mine[k], other[k]) for k in other) < 1e-6
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("init", "kind"), [("pissa", llama), ("olora", llama), ("mica", llama), ("pissa", gpt2)])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_files_work_in_both_libraries(init, kind, dora, tmp_path):
    if init == "mica" and dora:
        pytest.skip("not supported together")
    ours, theirs = (adapted(home, init, kind, use_dora=dora) for home in (slimtune, peft))
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        shake(model)
        model.save_pretrained(tmp_path / folder)
    assert far(run(ours), run(base(kind))) > 1e-2
    assert far(run(peft.PeftModel.from_pretrained(base(kind), tmp_path / "ours").eval()), run(ours)) < CLOSE
    assert far(run(PeftModel.from_pretrained(base(kind), tmp_path / "theirs")), run(theirs)) < CLOSE


@SUBTRACTED
def test_loading_our_file_needs_no_decomposition(init, tmp_path, monkeypatch):
    model = adapted(slimtune, init)
    shake(model)
    model.save_pretrained(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr("slimtune.methods.lora.layers.init_from_base_weight", refuse)
    assert torch.equal(run(PeftModel.from_pretrained(base(), tmp_path)), run(model))


def test_a_missing_random_start_warns(tmp_path):
    model = adapted(slimtune, "pissa_niter_4")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "start_" not in k}, file)
    with pytest.warns(UserWarning, match="lacks the start"):
        PeftModel.from_pretrained(base(), tmp_path)


@SUBTRACTED
def test_gradients_equal_pefts(init):
    ours, theirs = (adapted(home, init) for home in (slimtune, peft))
    ids = tokens()
    for model in (ours, theirs):
        shake(model)
        model(input_ids=ids, labels=ids).loss.backward()
    mine, other = ([p.grad.norm().item() for p in m.parameters() if p.requires_grad] for m in (ours, theirs))
    assert mine == pytest.approx(other, rel=1e-3, abs=1e-6)


@SUBTRACTED
def test_saved_as_lora_has_twice_the_rank(init, tmp_path):
    """For vLLM and llama.cpp, which do not know this initialization."""
    model = adapted(slimtune, init)
    shake(model)
    expected = run(model)
    slimtune.save_as_lora(tmp_path, model, rank=8)
    plain = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert plain.peft_config["default"].init_lora_weights is True
    assert far(run(plain), expected) < CLOSE


def test_a_rank_above_the_weight_is_refused():
    with pytest.raises(ConfigError, match=r"r is 40 at .*, whose weight has rank 32"):
        adapted(slimtune, "pissa", r=40)


def test_loftq_needs_a_quantized_base():
    with pytest.raises(ConfigError, match="replace_lora_weights_loftq"):
        get_peft_model(base(), LoraConfig(init_lora_weights="loftq"))
    model = get_peft_model(base(), LoraConfig())
    with pytest.raises(UsageError, match="no adapted layer is quantized"):
        slimtune.replace_lora_weights_loftq(model, "anywhere")


def test_loftq_with_inputs_lowers_the_output_error():
    g = torch.Generator().manual_seed(4)
    error, few = torch.randn(24, 32, generator=g), torch.randn(300, 3, generator=g)
    inputs = few @ torch.randn(3, 32, generator=g) + 0.2 * torch.randn(300, 32, generator=g)
    (up, down), (plain_up, plain_down) = approximate_error(error, 4, inputs), approximate_error(error, 4, None)
    assert (up.shape, down.shape) == ((24, 4), (4, 32))
    with_inputs, plain = (((error - a) @ inputs.t()).norm() for a in (up @ down, plain_up @ plain_down))
    assert with_inputs < 0.5 * plain
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))  # of equal size


def test_loftq_with_uniform_inputs_is_plain_loftq():
    error = torch.randn(24, 32, generator=torch.Generator().manual_seed(4))
    (up, down), (plain_up, plain_down) = approximate_error(error, 4, torch.eye(32)), approximate_error(error, 4, None)
    torch.testing.assert_close(up @ down, plain_up @ plain_down, rtol=1e-4, atol=1e-4)
