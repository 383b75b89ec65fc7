"""HiRA, LoHa, LoKr, MiSS, OFT, SHiRA and VeRA beyond the contract: memory, dropout, sizes, files."""

import pytest
import torch
from adapter_checks import assert_merges
from method_cases import CASES
from models_zoo import bert_encoder, gemma3, llama, run, shake, snapshot, t5
from one_layer import added_weight, build, run_layer
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTLayer
from reference import AllocationRecorder, saved_for_backward
from safetensors.torch import load_file, save_file

from slimtune import HiraConfig, LoHaConfig, LoKrConfig, LoraConfig, MissConfig, OFTConfig, PeftModel, get_peft_model
from slimtune.core.adapters.adapter_module import BaseForward
from slimtune.errors import AdapterError, ConfigError, TargetError
from slimtune.methods.lokr.lokr_modules import factorize_size
from slimtune.methods.oft.oft_modules import nearest_divisor
from slimtune.methods.shira import ShiraConfig
from slimtune.methods.vera import VeraConfig

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("method", ["hira", "loha+wide", "lokr", "miss+bat", "shira", "vera"])
def test_backward_saves_no_matrix(method):
    model = shake(get_peft_model(llama(), CASES[method](target_modules=[NAME])))
    layer, x = model.get_submodule(NAME), torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    saved = saved_for_backward(lambda: layer(x), ignore=[*model.parameters(), *model.buffers(), x])
    assert all(t.numel() < 32 * 32 for t in saved)


@pytest.mark.parametrize(
    "config",
    [LoKrConfig(r=2), LoKrConfig(r=99), LoKrConfig(r=2, decompose_both=True), LoKrConfig(r=99, decompose_factor=3),
     ShiraConfig(r=1)],
    ids=["lokr", "whole", "both", "factor", "shira"],
)  # fmt: skip
@pytest.mark.parametrize("size", [(48, 36), (30, 200), (200, 30)])
def test_forward_makes_no_matrix(config, size):
    config.init_weights = False
    module, x = build(config, size), torch.randn(2, size[0], dtype=torch.float64)
    zeros = torch.zeros(2, size[1], dtype=torch.float64)
    with AllocationRecorder() as made:
        y = module(x, zeros)
    assert (y - x @ added_weight(module, size).t()).abs().max() < 1e-12
    assert made.largest < size[0] * size[1] * 8


@pytest.mark.parametrize(
    ("config", "rescale"), [(LoHaConfig, True), (LoKrConfig, False), (LoKrConfig, True)], ids=["loha", "lokr", "scaled"]
)
def test_rank_dropout(config, rescale):
    scale = {"rank_dropout_scale": rescale} if config is LoKrConfig else {}
    module = build(config(r=2, init_weights=False, rank_dropout=0.5, **scale)).train()
    x, y = torch.randn(3, 24, dtype=torch.float64), torch.zeros(3, 20, dtype=torch.float64)
    torch.manual_seed(4)
    dropped = module(x, y)
    assert module.low_rank_factors() is None
    torch.manual_seed(4)
    mask = (torch.rand(20) > 0.5).double()
    assert (dropped - module.eval()(x, y) * (mask / mask.mean() if rescale else mask)).abs().max() < 1e-6


def test_module_dropout_skips_the_layer():
    module = build(LoHaConfig(r=2, init_weights=False, module_dropout=0.5)).train()
    x, y = torch.randn(3, 24, dtype=torch.float64), torch.ones(3, 20, dtype=torch.float64)
    assert 5 < sum(torch.equal(module(x, y), y) for _ in range(40)) < 35


@pytest.mark.parametrize(
    "config", [LoHaConfig(r=3, init_weights=False), MissConfig(r=7, init_weights=False)], ids=["loha", "miss"]
)
def test_factors_equal_the_merge(config):
    module = build(config)
    A, B, scale = module.low_rank_factors()
    assert (scale * B @ A - added_weight(module)).abs().max() < 1e-14
    assert build(LoHaConfig(r=4)).low_rank_factors() is None  # 4² ranks are no fewer numbers than the weight


def test_sizes_equal_pefts():
    for size in range(1, 130):
        for n in (-1, *range(1, 140)):
            assert factorize_size(size, n) == factorization(size, n), (size, n)
            assert n < 0 or nearest_divisor(size, n) == OFTLayer.adjust_oft_parameters(None, size, n), (size, n)


def test_hira_passes_gradients_to_a_lora_below():
    model = get_peft_model(llama(), LoraConfig(target_modules=[NAME], r=2))
    model.add_adapter("above", HiraConfig(target_modules=[NAME], r=2))
    model.set_adapter(["default", "above"])
    shake(model)
    layer, x = model.get_submodule(NAME), torch.randn(5, 32, dtype=torch.float64)
    trained = [p for p in layer.adapters.parameters() if p.requires_grad]
    found = torch.autograd.grad(layer(x).square().sum(), trained)
    A, B, scale = layer.adapters["default"].low_rank_factors()
    above = layer.adapters["above"]
    weight = (layer.weight + scale * B @ A) * (1 + above.hira_B @ above.hira_A)
    expected = torch.autograd.grad((x @ weight.t()).square().sum(), trained)
    assert all((f - e).abs().max() < 1e-9 for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("base", [llama, gemma3])
def test_hira_at_a_scaled_embedding(base):
    """PEFT adds an unscaled change to a scaled embedding, and its merge differs from its forward."""
    model = get_peft_model(base(), HiraConfig(r=2, target_modules=["embed_tokens"])).eval()
    assert torch.equal(run(model), run(base()))
    shake(model)
    assert (run(model) - run(base())).abs().max() > 1e-3
    assert_merges(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 25}, r"`r` \(25\) must be less than or equal to in_features \(24\)"),
        ({"r": 5, "init_weights": "bat"}, "r is 5, at layer"),
        ({"r": 4, "init_weights": "mini", "mini_r": 6}, r"mini_r is 6, at layer(?s:.*)hint: mini_r=2"),
    ],
)
def test_miss_refuses_sizes_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(MissConfig(**settings))


def test_bat_passes_gradients_to_the_adapter_below():
    """It reads the weight as the adapter below changed it."""
    layer = torch.nn.Linear(40, 80, bias=False, dtype=torch.float64).requires_grad_(False)
    above, below = (
        build(c, (40, 80), layer=layer)
        for c in (MissConfig(r=4, init_weights="bat"), LoraConfig(r=2, init_lora_weights=False))
    )
    torch.nn.init.normal_(above.miss_block)
    x = torch.randn(2, 40, dtype=torch.float64)
    y = above.forward_with_base(BaseForward(layer, lambda x: run_layer(below, x, layer), [below]), x)
    weight = above.merge_into(below.merge_into(layer.weight, None)[0], None)[0]
    parameters = [*below.parameters(), *above.parameters()]
    found, expected = (torch.autograd.grad(out.square().sum(), parameters) for out in (y, x @ weight.t()))
    assert all((f - e).abs().max() < 1e-9 * e.abs().max() for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("settings", "bound"), [({"use_cayley_neumann": False}, 1e-13), ({"num_cayley_neumann_terms": 40}, 1e-9)]
)
def test_oft_keeps_lengths(settings, bound):
    module, x = build(OFTConfig(oft_block_size=6, init_weights=False, **settings)), torch.randn(9, 24).double()
    assert (run_layer(module, x) - x).abs().max() > 0.1
    assert (run_layer(module, x).norm(dim=1) - x.norm(dim=1)).abs().max() < bound


def test_oft_in_bf16_rounds_the_change_only():
    """Rounding R itself would stretch its inputs: 0.9982 on its diagonal is 1 in bf16."""
    module = build(OFTConfig(oft_block_size=2), dtype=torch.float32)
    torch.nn.init.constant_(module.oft_R.weight, 0.03)
    x = torch.randn(4000, 24).bfloat16()
    exact, found = run_layer(module, x.float()), run_layer(module, x).float()
    assert ((exact * found).sum() / exact.square().sum()).item() == pytest.approx(1, abs=2e-4)


def test_coft_limits_the_rotation():
    module = build(OFTConfig(r=4, oft_block_size=0, coft=True, eps=0.1, init_weights=False)).eval()
    x, before = torch.randn(9, 24, dtype=torch.float64), module.oft_R.weight.detach().clone()
    y = run_layer(module, x)
    assert torch.equal(module.oft_R.weight, before)
    assert torch.equal(run_layer(module.train(), x), y)
    assert (module.oft_R.weight.norm(dim=1) * 2**0.5 - 0.1 / 2).abs().max() < 1e-12


def test_oft_dropped_blocks_are_the_identity():
    module = build(OFTConfig(oft_block_size=4, module_dropout=0.5, init_weights=False)).train()
    x = torch.randn(9, 24, dtype=torch.float64)
    assert (run_layer(module, x) == x).view(9, 6, 4).all(2).all(0).sum() == 3
    assert torch.equal(
        module.merge_into(torch.eye(24).double(), None)[0], module.eval().merge_into(torch.eye(24).double(), None)[0]
    )  # a merge drops none


def test_oft_block_sizes_that_do_not_divide():
    for settings in ({"oft_block_size": 5}, {"r": 5, "oft_block_size": 0}):
        with pytest.warns(UserWarning, match=r"layer .*\b24\b.*\b[46]\b"):
            build(OFTConfig(**settings))
    with pytest.raises(ConfigError, match=r"layer .*\b25\b(?s:.*)oft_block_size=5"):
        build(OFTConfig(oft_block_size=2), (25, 20))


def shira(**settings):
    config = ShiraConfig(target_modules=[NAME], r=3, **settings)
    model = get_peft_model(llama(), config).eval()
    return model, model.get_submodule(NAME).adapters["default"].shira_indices


def test_shira_changes_the_chosen_entries_only():
    model, indices = shira(random_seed=1)
    assert torch.equal(indices, shira(random_seed=1)[1])
    assert not torch.equal(indices, shira(random_seed=2)[1])
    shake(model)
    model.merge_adapter()
    changed = (model.get_submodule(NAME).weight != snapshot(llama())[f"{NAME}.weight"]).nonzero()
    assert torch.equal(changed, indices.long().t())
    assert len(changed) == 3 * (32 + 32)


def test_shira_custom_mask(tmp_path):
    config = ShiraConfig(mask_type="largest", target_modules=[NAME], r=3)
    with pytest.raises(ConfigError, match="mask_fn"):
        get_peft_model(llama(), config)
    config.mask_fn = lambda layer, r: torch.ones_like(layer.weight)
    with pytest.raises(ConfigError, match="1,024 ones"):
        get_peft_model(llama(), config)

    def largest(layer, r):
        flat = layer.weight.abs().flatten()
        mask = torch.zeros_like(flat).scatter_(0, flat.topk(r * sum(layer.weight.shape)).indices, 1)
        return mask.view_as(layer.weight)

    config.mask_fn = largest
    model = get_peft_model(llama(), config).eval()
    layer = model.get_submodule(NAME)
    chosen = torch.zeros(32, 32).index_put((*layer.adapters["default"].shira_indices.long(),), torch.ones(()))
    assert torch.equal(chosen, largest(layer, 3).float())
    shake(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(llama(), tmp_path)), run(model))


def test_shira_refuses_more_entries_than_the_weight():
    with pytest.raises(ConfigError, match=r"\b16\b"):
        get_peft_model(llama(), ShiraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("wrong", ["outside", "twice"])
def test_shira_refuses_invalid_indices(wrong, tmp_path):
    shira()[0].save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    key = next(k for k in file if k.endswith("shira_indices"))
    file[key][:, 1] = torch.tensor([32, 0]) if wrong == "outside" else file[key][:, 0]
    save_file(file, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="shira_indices"):
        PeftModel.from_pretrained(llama(), tmp_path)


def vera(folder, **settings):
    """A saved model, and the tensors of its file that are not trained."""
    model = shake(get_peft_model(llama(), VeraConfig(r=8, target_modules="all-linear", **settings)).eval())
    model.save_pretrained(folder)
    file = load_file(folder / "adapter_model.safetensors")
    return model, {k: tuple(t.shape) for k, t in file.items() if "lambda" not in k}


def test_vera_layers_share_two_matrices(tmp_path):
    model, shared = vera(tmp_path)
    assert len({id(d.shared[0]) for n, d in model.adapter_modules("default").items() if n != "model"}) == 1
    assert shared == {"base_model.vera_A": (8, 48), "base_model.vera_B": (48, 8)}


def test_vera_without_projection_draws_it_from_the_seed(tmp_path):
    model, shared = vera(tmp_path, save_projection=False, projection_prng_key=3)
    assert not shared
    torch.manual_seed(99)
    assert torch.equal(run(PeftModel.from_pretrained(llama(), tmp_path)), run(model))
    config = VeraConfig.from_pretrained(tmp_path)
    config.save_projection = True
    config.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"base_model\.vera_A"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_vera_without_a_match_is_refused():
    """The backbone, where the matrices are stored, does not count as a target."""
    with pytest.raises(TargetError, match="query"):
        get_peft_model(llama(), VeraConfig(target_modules=r".*\.query"))


@pytest.mark.parametrize("base", [bert_encoder, t5])
def test_vera_on_a_model_that_is_its_own_backbone(base):
    model = shake(get_peft_model(base(), VeraConfig(r=8)).eval())
    assert not torch.equal(run(model), run(base()))
    assert torch.equal(run(model.unload()), run(base()))
