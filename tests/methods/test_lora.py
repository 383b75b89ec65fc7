"""LoRA beyond the contract: initializations and their files (in fp32, which PEFT needs), DoRA, learning rates, EVA."""

import copy
import json

import peft
import pytest
import torch
from adapter_checks import assert_loads, assert_merges, distance
from models_zoo import gpt2, llama, run, shake, tokens
from one_layer import build, run_layer
from peft.optimizers import create_lorafa_optimizer as pefts_lorafa
from peft.optimizers import create_loraplus_optimizer as pefts_loraplus
from reference import saved_for_backward, slope_along, storage_bytes
from safetensors.torch import load_file, save_file

import slimtune
from slimtune import IA3Config, LoraConfig, PeftModel, create_loraplus_optimizer, get_peft_model, parameter_groups
from slimtune.core.training.optimizer import build_optimizer
from slimtune.errors import ConfigError, UsageError
from slimtune.extras.lora_optimizers import create_lorafa_optimizer
from slimtune.methods.lora.dora import DoraCaching, compute_dora_row_norms
from slimtune.methods.lora.loftq import approximate_quantization_error

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


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "mica", "orthogonal"])
def test_starts_equal_pefts(init, dora):
    if init == "mica" and dora:
        pytest.skip("not supported together")
    ours, theirs = (adapted(home, init, use_dora=dora) for home in (slimtune, peft))
    mine, other = slimtune.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert {k for k in mine if "start_" not in k} == set(other)
    assert max(distance(mine[k], other[k]) for k in other) < 1e-6
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("init", "kind"), [("pissa", llama), ("olora", llama), ("mica", llama), ("pissa", gpt2)])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_files_work_in_both_libraries(init, kind, dora, tmp_path):
    if init == "mica" and dora:
        pytest.skip("not supported together")
    model = shake(adapted(slimtune, init, kind, use_dora=dora))
    assert distance(run(model), run(base(kind))) > 1e-2
    assert_loads(model, lambda: base(kind), tmp_path, close=CLOSE)


@SUBTRACTED
def test_loading_our_file_needs_no_decomposition(init, tmp_path, monkeypatch):
    model = shake(adapted(slimtune, init))
    model.save_pretrained(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr("slimtune.methods.lora.lora_modules.make_lora_a_and_b_from_base", refuse)
    assert torch.equal(run(PeftModel.from_pretrained(base(), tmp_path)), run(model))


def test_a_missing_random_start_warns(tmp_path):
    model = adapted(slimtune, "pissa_niter_4")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "start_" not in k}, file)
    with pytest.warns(UserWarning, match="'pissa_niter_4'"):
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
    model = shake(adapted(slimtune, init))
    expected = run(model)
    slimtune.save_as_lora(tmp_path, model, rank=8)
    plain = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert plain.peft_config["default"].init_lora_weights is True
    assert distance(run(plain), expected) < CLOSE


def test_a_rank_above_the_weight_is_refused():
    with pytest.raises(ConfigError, match=r"\b32\b.*\b40\b"):
        adapted(slimtune, "pissa", r=40)


def test_loftq_needs_a_quantized_base():
    with pytest.raises(ConfigError, match="replace_lora_weights_loftq"):
        get_peft_model(base(), LoraConfig(init_lora_weights="loftq"))
    model = get_peft_model(base(), LoraConfig())
    with pytest.raises(UsageError, match="quantiz"):
        slimtune.replace_lora_weights_loftq(model, "anywhere")


def test_loftq_with_inputs_lowers_the_output_error():
    g = torch.Generator().manual_seed(4)
    error, few = torch.randn(24, 32, generator=g), torch.randn(300, 3, generator=g)
    inputs = few @ torch.randn(3, 32, generator=g) + 0.2 * torch.randn(300, 32, generator=g)
    (up, down), (plain_up, plain_down) = (
        approximate_quantization_error(error, 4, inputs),
        approximate_quantization_error(error, 4, None),
    )
    assert (up.shape, down.shape) == ((24, 4), (4, 32))
    with_inputs, plain = (((error - a) @ inputs.t()).norm() for a in (up @ down, plain_up @ plain_down))
    assert with_inputs < 0.5 * plain
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))  # of equal size


def test_loftq_with_uniform_inputs_is_plain_loftq():
    error = torch.randn(24, 32, generator=torch.Generator().manual_seed(4))
    (up, down), (plain_up, plain_down) = (
        approximate_quantization_error(error, 4, torch.eye(32)),
        approximate_quantization_error(error, 4, None),
    )
    torch.testing.assert_close(up @ down, plain_up @ plain_down, rtol=1e-4, atol=1e-4)


def dora(**more):
    return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "use_dora": True, **more})


def test_dora_saves_little_more_memory():
    def count_saved_bytes(config):
        base = llama(dtype=torch.bfloat16, hidden_size=64, intermediate_size=192)
        model, ids = get_peft_model(base, config).train(), tokens(2, 32)
        run = lambda: model(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
        return storage_bytes(saved_for_backward(run, ignore=list(model.parameters())))

    assert count_saved_bytes(dora()) < 1.25 * count_saved_bytes(dora(use_dora=False))


def test_dora_caching_keeps_the_norms_in_evaluation_mode(monkeypatch):
    model = shake(get_peft_model(llama(), dora()).eval())
    expected, count = run(model), []
    counted = lambda *args: count.append(1) or compute_dora_row_norms(*args)  # noqa: E731
    monkeypatch.setattr("slimtune.methods.lora.dora.compute_dora_row_norms", counted)
    with DoraCaching():
        outputs = run(model), run(model), run(model.train())
    assert len(count) == 2 * len(model.adapter_modules("default"))  # the first call, and that in training mode
    assert all(torch.equal(out, expected) for out in outputs)


def test_dora_row_norms():
    W, A, B = (torch.randn(s, dtype=torch.float64) for s in ((7, 5), (3, 5), (7, 3)))
    found = compute_dora_row_norms(W.square().sum(1), W, A, B, 1.7)
    assert torch.allclose(found, (W + 1.7 * B @ A).norm(dim=1), rtol=1e-12)


def test_dora_trains_a_row_of_zeros():
    base = llama()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[3] = 0
    before = run(base)
    model = get_peft_model(base, dora()).eval()
    assert torch.equal(run(model), before)
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("base", [llama, gpt2], ids=["llama", "gpt2"])
def test_dora_scales_the_adapter_below(base):
    """(IA)³ below also changes the bias, which GPT-2 has."""
    targets = {"llama": "o_proj", "gpt2": "c_attn"}[base.__name__]
    settings = {"target_modules": [targets]}
    model = shake(get_peft_model(base(), IA3Config(**settings, feedforward_modules=[]), "below"))
    model.add_adapter("above", dora(**settings))
    model.set_adapter(["below", "above"])
    shake(model)
    assert_merges(model.eval())


def test_dora_passes_gradients_to_a_trained_bias():
    model = shake(get_peft_model(gpt2(), dora(target_modules=["c_attn"], bias="lora_only")).eval())
    ids = tokens()
    bias = next(p for n, p in model.named_parameters() if "modules_to_save" in n and p.requires_grad)

    def loss_of():
        return model(input_ids=ids).logits.log_softmax(-1)[..., 5].sum()

    loss_of().backward()
    direction = torch.randn(bias.shape, generator=torch.Generator().manual_seed(0), dtype=bias.dtype)
    slope = slope_along(bias, direction, loss_of)
    assert slope == pytest.approx((bias.grad * direction).sum().item(), rel=1e-5)


def test_dora_measures_a_changed_base_again():
    model = shake(get_peft_model(llama(), dora()).eval())
    run(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert_merges(twin)


TARGETS = {"target_modules": ["q_proj", "embed_tokens"]}


def trained_names(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "make_groups", [lambda m: parameter_groups(m, 1e-3, 0.1), lambda m: build_optimizer(m, lr=1e-3).param_groups]
)
def test_groups_give_b_its_rate(make_groups):
    model = get_peft_model(llama(), LoraConfig(**TARGETS, lr_ratio=16))
    rates = {id(p): g["lr"] for g in make_groups(model) for p in g["params"]}
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert rates[id(p)] == pytest.approx(16e-3 if "_B" in n else 1e-3)


def test_vectors_do_not_decay():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    groups = parameter_groups(model, 1e-3, 0.1)
    assert {(g["params"][0].dim(), g["weight_decay"]) for g in groups} == {(2, 0.1), (1, 0.0)}


def test_loraplus_has_pefts_groups():
    def list_groups(home, make):
        model = home.get_peft_model(llama(), home.LoraConfig(**TARGETS))
        optimizer = make(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1)
        return [(g["lr"], g["weight_decay"], sorted(p.shape for p in g["params"])) for g in optimizer.param_groups]

    groups = list_groups(slimtune, create_loraplus_optimizer)
    assert groups == list_groups(peft, pefts_loraplus)
    assert len(groups) == 4


def test_lora_fa_equals_pefts(monkeypatch):
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)  # it would round the gradients
    curves, ids = [], tokens()
    for home, make in ((slimtune, create_lorafa_optimizer), (peft, pefts_lorafa)):
        model = adapted(home, True, rank_pattern={"q_proj": 3}, modules_to_save=["lm_head"]).train()
        optimizer, losses = make(model, 4, 16, lr=1e-2, weight_decay=0.1), []
        for _ in range(4):
            losses.append(model(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        curves.append([loss.item() for loss in losses])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0][-1] < curves[0][0]
    with pytest.raises(ConfigError, match=r"lora_alpha.*\b8\b"):
        create_lorafa_optimizer(adapted(slimtune, True), 4, 8, lr=1e-2)
    with pytest.warns(UserWarning, match="LoRA-FA"):
        create_lorafa_optimizer(get_peft_model(llama(), LoraConfig(target_modules=["embed_tokens"])), 8, 8, lr=1e-2)


def test_a_frozen_a_keeps_no_input():
    layer, x = torch.nn.Linear(64, 8).requires_grad_(False), torch.randn(100, 64, requires_grad=True)
    largest = []
    for freeze in (False, True):
        module = build(LoraConfig(r=2, freeze_a=freeze), (64, 8), torch.float32)
        saved = saved_for_backward(lambda module=module: run_layer(module, x, layer), ignore=list(layer.parameters()))
        largest.append(max(t.numel() for t in saved))
    assert largest == [100 * 64, 100 * 2]


def test_a_frozen_a_does_not_train():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], freeze_a=True))
    names = trained_names(model)
    assert names
    assert all("lora_B" in n for n in names)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("other")
    model.set_adapter("default")
    assert trained_names(model) == names
    with pytest.raises(ConfigError, match=r"freeze_a=True.*Embedding"):
        get_peft_model(llama(), LoraConfig(target_modules=["embed_tokens"], freeze_a=True))


def test_other_readers_see_nothing_new(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    assert not {"lr_ratio", "freeze_a"} & set(json.loads((tmp_path / "adapter_config.json").read_text()))
    LoraConfig(lr_ratio=2, freeze_a=True).save_pretrained(tmp_path)
    again = slimtune.PeftConfig.from_pretrained(tmp_path)
    assert (again.lr_ratio, again.freeze_a) == (2, True)


BATCHES = [{"input_ids": tokens(8, 32, seed=s), "attention_mask": torch.ones(8, 32).long()} for s in range(3)]
EVA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": "eva"}


def eva_model(**eva):
    torch.manual_seed(1)
    return get_peft_model(base(), LoraConfig(**EVA, eva_config=slimtune.EvaConfig(**eva)))


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_equals_pefts(rho):
    ours = eva_model(rho=rho)
    slimtune.initialize_lora_eva_weights(ours, BATCHES)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**EVA, eva_config=peft.EvaConfig(rho=rho)))
    peft.initialize_lora_eva_weights(theirs, BATCHES, show_progress_bar=False)
    a, b = slimtune.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert {k: t.shape for k, t in a.items()} == {k: t.shape for k, t in b.items()}
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    assert ours.peft_config["default"].alpha_pattern == theirs.peft_config["default"].alpha_pattern


def test_eva_starts_unchanged_and_is_saved(tmp_path):
    model = eva_model()
    slimtune.initialize_lora_eva_weights(model, BATCHES)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(run(model.eval()), run(base()))
    assert any(p.requires_grad for p in model.parameters())
    shake(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(base(), tmp_path)), run(model))


def test_eva_refuses_small_batches_and_other_adapters():
    with pytest.raises(UsageError, match="8 positions"):
        slimtune.initialize_lora_eva_weights(eva_model(), [{"input_ids": tokens(1, 3)}])
    with pytest.raises(UsageError, match="EVA"):
        slimtune.initialize_lora_eva_weights(get_peft_model(base(), LoraConfig()), BATCHES)
