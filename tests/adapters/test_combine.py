"""Weighted sums of adapters, and adapters as a LoRA: against peft, against the changes themselves, and refused."""

import peft
import pytest
import torch
from models_zoo import bert_classifier, gpt2, llama, run, shake
from safetensors.torch import load_file

import slimtune
from slimtune import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from slimtune.adapters.layer import get_site
from slimtune.errors import SlimtuneError, UsageError
from slimtune.kernels.low_rank import weighted_sum

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
CLOSE = 1e-9
NAMES = ["default", "two", "three"]


@pytest.fixture(autouse=True)
def wide():
    """peft keeps the weights of a sum in torch's default dtype, which is what limits how near it comes."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def several(base, *settings):
    """A model with an adapter for each of the settings, all of them doing something."""
    model = None
    for name, given in zip(NAMES, settings, strict=False):
        config = given if isinstance(given, slimtune.PeftConfig) else LoraConfig(**given)
        if model is None:
            model = get_peft_model(base(), config, name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        shake(model, seed=len(name))
    return model.eval()


def there(cls):
    if not hasattr(slimtune, cls):
        pytest.skip(f"slimtune has no {cls}")


def as_peft(model, base, folder):
    model.save_pretrained(folder)
    names = list(model.peft_config)
    theirs = peft.PeftModel.from_pretrained(base(), folder if names[0] == "default" else folder / names[0], names[0])
    for name in names[1:]:
        theirs.load_adapter(folder / name, name)
    return theirs.eval()


def change(model, name):
    """What an adapter adds to each weight."""
    found, report = {}, model.match_report(name)
    for at, delta in model.adapter_modules(name).items():
        if report.kinds[at] != "model":  # what its deltas share
            weight = get_site(at, report.kinds[at], model).weight()
            with torch.no_grad():
                found[at] = delta.merge_into(weight, None)[0] - weight
    return found


ONE = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
TWO = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
WIDER = {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"]}
GPT2 = [{"r": 4, "target_modules": ["c_attn"]}, {"r": 4, "lora_alpha": 3, "target_modules": ["c_attn", "wte"]}]
THIN = {"density": 0.5}


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ((ONE, TWO), {"combination_type": "linear"}),
        ((ONE, WIDER), {"combination_type": "cat"}),
        ((ONE, WIDER), {}),
        ((ONE, WIDER), {"svd_rank": 3}),
        ((ONE, WIDER), {"svd_rank": 5, "svd_clamp": 0.9}),
        ((ONE, TWO), {"combination_type": "ties", **THIN}),
        ((ONE, TWO), {"combination_type": "ties", "majority_sign_method": "frequency", **THIN}),
        ((ONE, WIDER), {"combination_type": "ties_svd", "svd_rank": 8, **THIN}),
        ((ONE, TWO), {"combination_type": "magnitude_prune", **THIN}),
        ((ONE, WIDER), {"combination_type": "magnitude_prune_svd", **THIN}),
        ((ONE, TWO, {**TWO, "lora_alpha": 1}), {"combination_type": "ties", **THIN}),
        ((ONE,), {"combination_type": "svd"}),
        (GPT2, {"combination_type": "linear"}),
        (GPT2, {"combination_type": "cat"}),
        (GPT2, {"svd_rank": 5}),
    ],
    ids=str,
)
def test_weighted_sum_equals_peft(settings, how, tmp_path):
    base = gpt2 if settings is GPT2 else llama
    ours = several(base, *settings)
    theirs = as_peft(ours, base, tmp_path)
    names, weights = NAMES[: len(settings)], [0.7, -0.4, 1.3][: len(settings)]
    for model in (ours, theirs):
        model.add_weighted_adapter(names, weights, "sum", **how)
        model.set_adapter("sum")
    assert (run(ours) - run(base())).abs().max() > 1e-3
    assert (run(ours) - run(theirs)).abs().max() < CLOSE
    ours.save_pretrained(tmp_path / "out", selected_adapters=["sum"])
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "out" / "sum").eval()
    assert (run(again) - run(ours)).abs().max() < CLOSE


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_equals_peft_for_the_same_draws(kind, tmp_path):
    ours = several(llama, ONE, TWO)
    theirs = as_peft(ours, llama, tmp_path)
    made = []
    for model in (ours, theirs):
        # Draw when the new adapter's own start has been drawn: it is overwritten.
        drawn = torch.bernoulli
        generator = torch.Generator().manual_seed(3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "bernoulli", lambda p, g=generator, d=drawn: d(p, generator=g))
            model.add_weighted_adapter(["default", "two"], [0.7, 0.9], "sum", kind, density=0.6)
        model.set_adapter("sum")
        made.append(run(model))
    assert (made[0] - made[1]).abs().max() < CLOSE


def test_dare_keeps_the_mean():
    part = torch.randn(200, 200)
    torch.manual_seed(0)
    thinned = weighted_sum([part], [1.0], "dare_linear", 0.25)
    assert 0.2 < (thinned != 0).double().mean() < 0.3
    assert torch.equal(thinned[thinned != 0], part[thinned != 0] / 0.25)


METHODS = [
    LoraConfig(r=2, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
]
OTHERS = [
    ("LoraConfig", {"r": 3, "use_dora": True, "target_modules": ["q_proj", "k_proj"]}),
    ("LoraConfig", {"r": 3, "init_lora_weights": "pissa", "target_modules": ["q_proj", "k_proj"]}),
    ("IA3Config", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ("LoHaConfig", {"r": 2, "target_modules": ["q_proj", "k_proj"]}),
    ("LoKrConfig", {"r": 2, "target_modules": ["q_proj", "k_proj"]}),
    ("VeraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    ("OFTConfig", {"oft_block_size": 4, "target_modules": ["q_proj"]}),
]


@pytest.mark.parametrize(("cls", "settings"), OTHERS, ids=lambda v: str(v))
def test_methods_mix_and_full_rank_is_exact(cls, settings):
    there(cls)
    model = several(llama, *METHODS, getattr(slimtune, cls)(**settings))
    model.add_weighted_adapter(NAMES, [0.5, -1.5, 2.0], "sum", svd_rank=128)
    parts, found = [change(model, n) for n in NAMES], change(model, "sum")
    for at in found:
        expected = sum(w * p[at] for w, p in zip([0.5, -1.5, 2.0], parts, strict=True) if at in p)
        assert (found[at] - expected).abs().max() < CLOSE
    assert set(found) == set().union(*parts)


@pytest.mark.parametrize("kind", ["cat", "linear", "ties"])
def test_factor_sums_need_factors(kind):
    model = several(llama, METHODS[0], {"use_dora": True})
    with pytest.raises(UsageError, match=f"combination_type='{kind}' needs A and B, which adapter 'two' does not have"):
        model.add_weighted_adapter(["default", "two"], [1, 1], "sum", kind, density=0.5)


def test_svd_rank_is_required_without_factors():
    model = several(llama, METHODS[0], {"use_dora": True})
    with pytest.raises(UsageError, match="svd_rank is not given, and adapter 'two' has no rank"):
        model.add_weighted_adapter(["default", "two"], [1, 1], "sum")


def test_ranks_by_layer_are_saved(tmp_path):
    model = several(llama, ONE, {**WIDER, "rank_pattern": {"layers.1.self_attn.q_proj": 1}})
    model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "sum", "cat")
    config = model.peft_config["sum"]
    assert config.target_modules == ["q_proj", "v_proj", "o_proj"]
    assert config.rank_pattern == config.alpha_pattern
    ranks = {n: d.low_rank_factors()[0].shape[0] for n, d in model.adapter_modules("sum").items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 10
    assert ranks["model.layers.1.self_attn.q_proj"] == 5
    assert ranks["model.layers.1.self_attn.v_proj"] == 4
    assert {d.low_rank_factors()[2] for d in model.adapter_modules("sum").values()} == {1.0}
    model.set_adapter("sum")
    both = run(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(llama(), tmp_path / "sum")), both)
    model.set_adapter(["default", "two"])
    assert (run(model) - both).abs().max() < CLOSE


def test_sum_is_inactive_and_others_unchanged():
    model = several(llama, ONE, TWO)
    before, said = {n: p.clone() for n, p in model.named_parameters()}, run(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    model.add_weighted_adapter(["default", "two"], [1, 1], "sum")
    assert model.active_adapters == ["two"]
    assert torch.equal(run(model), said)
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in before.items())
    assert flags == {n: p.requires_grad for n, p in model.named_parameters() if ".sum." not in n}
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)


def test_trained_head_is_copied():
    model = several(bert_classifier, {"task_type": "SEQ_CLS"}, {"r": 2, "target_modules": ["key"]})
    model.add_weighted_adapter(["two", "default"], [1, 1], "sum", svd_rank=12)
    model.set_adapter("sum")
    once = run(model)
    model.set_adapter(["default", "two"])
    assert (run(model) - once).abs().max() < CLOSE
    model.add_adapter("head", LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(UsageError, match="'default' and 'head' both train classifier in full"):
        model.add_weighted_adapter(["default", "head"], [1, 1], "none")


REFUSED = [
    (([], []), {}, "0 adapters and 0 weights"),
    ((["default", "two"], [1]), {}, "2 adapters and 1 weights"),
    ((["default", "twoo"], [1, 1]), {}, "did you mean 'two'"),
    ((["default", "two"], [1, 1]), {"combination_type": "lineal"}, "did you mean 'linear'"),
    ((["default", "two"], [1, 1]), {"combination_type": "linear"}, r"ranks at .*q_proj are {'default': 4, 'two': 6}"),
    ((["default", "two"], [1, 1]), {"combination_type": "ties"}, "density is None"),
    ((["default", "two"], [1, 1]), {"combination_type": "dare_linear", "density": 1.5}, "density is 1.5"),
    ((["default", "two"], [1, 1]), {"svd_rank": 0}, "svd_rank is 0"),
    ((["default", "two"], [1, 1]), {"svd_clamp": 7}, "svd_clamp is 7"),
    ((["default", "two"], [1, 1]), {"majority_sign_method": "most"}, "majority_sign_method is 'most'"),
    (
        (["default", "three"], [1, 1]),
        {"svd_rank": 8},
        "'three' cannot become a LoRA, at .*c_attn.bias: it",
    ),
]


@pytest.mark.parametrize(("given", "how", "said"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_invalid_arguments_leave_model_unchanged(given, how, said):
    if "c_attn" in said:
        model = several(gpt2, {}, {}, {"bias": "lora_only"})
    else:
        model = several(llama, ONE, WIDER, ONE)
    with pytest.raises(UsageError, match=said):
        model.add_weighted_adapter(*given, "sum", **how)
    assert list(model.peft_config) == NAMES
    with pytest.raises(UsageError, match="'two' cannot be the name of a new adapter"):
        model.add_weighted_adapter(["default"], [1], "two")


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 3}),
        ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
        ("LNTuningConfig", {}),
        ("BottleneckConfig", {}),
    ],
)
def test_methods_without_weight_change_are_rejected(cls, settings):
    there(cls)
    model = several(llama, ONE, getattr(slimtune, cls)(**settings))
    with pytest.raises(UsageError, match="adapter 'two' cannot become a LoRA, at"):
        model.add_weighted_adapter(["default", "two"], [1, 1], "sum", svd_rank=8)
    with pytest.raises(UsageError, match="adapter 'two' cannot become a LoRA, at"):
        model.to_lora("two", 8)


def test_merged_adapter_is_rejected():
    model = several(llama, ONE, TWO)
    model.merge_adapter()
    with pytest.raises(UsageError, match="is merged into the base"):
        model.to_lora("default", 2)


@pytest.mark.parametrize(("cls", "settings"), [("LoraConfig", ONE), *OTHERS], ids=lambda v: str(v))
def test_an_adapter_becomes_a_lora(cls, settings, tmp_path):
    there(cls)
    model = several(llama, getattr(slimtune, cls)(**settings))
    expected, dense = run(model), change(model, "default")
    report = model.to_lora("default", 32, "full")
    model.set_adapter("full")
    assert (run(model) - expected).abs().max() < CLOSE
    assert report.error < CLOSE
    report = model.to_lora("default", 2)
    found = change(model, "default_lora")
    assert set(report.errors) == set(found) == set(dense)
    for at, error in report.errors.items():
        assert error == pytest.approx(float((found[at] - dense[at]).norm() / dense[at].norm()), abs=1e-9)
    lost, whole = (sum(float((a - b).norm() ** 2) for a, b in zip(x, y, strict=True)) for x, y in
                   ((dense.values(), found.values()), (dense.values(), [0 * d for d in dense.values()])))  # fmt: skip
    assert report.error == pytest.approx((lost / whole) ** 0.5, abs=1e-9)
    assert str(report).startswith("'default' as a LoRA 'default_lora' of rank 2 on ")
    report = save_as_lora(tmp_path, model, 0.9)
    assert report.error**2 <= 0.1
    assert list(model.peft_config) == ["default", "full", "default_lora"]
    config, tensors = convert_to_lora(model, 0.9)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in written.items()}
    assert all(config.rank_pattern.get(n, config.r) == r for n, r in report.ranks.items())
    small = PeftModel.from_pretrained(llama(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert (run(small) - run(theirs)).abs().max() < CLOSE


@pytest.mark.parametrize("rank", [3, 0.8])
def test_convert_to_lora_equals_peft(rank, tmp_path):
    there("LoHaConfig")
    model = several(llama, slimtune.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]))
    theirs = as_peft(model, llama, tmp_path)
    config, tensors = convert_to_lora(model, rank)
    other, expected = peft.convert_to_lora(theirs, rank)
    assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in expected.items()}
    if isinstance(rank, float):
        assert {n: config.rank_pattern.get(n, config.r) for n in other.rank_pattern} == other.rank_pattern
    for key in expected:
        if "lora_A" in key:
            other_key = key.replace("lora_A", "lora_B")
            far = tensors[other_key] @ tensors[key] - expected[other_key] @ expected[key]
            assert far.abs().max() < 1e-5  # peft's is made in float32


@pytest.mark.parametrize("rank", [0, -1, 1.5, 0.0, True])
def test_invalid_rank(rank):
    model = several(llama, ONE)
    with pytest.raises(SlimtuneError, match="rank is"):
        model.to_lora("default", rank)
