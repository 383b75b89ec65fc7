"""Weighted sums of adapters, and adapters as a LoRA: against PEFT, and against the changes of the weights."""

import peft
import pytest
import torch
from error_facts import has_code
from models_zoo import bert_classifier, gpt2, llama, run
from safetensors.torch import load_file
from several_adapters import add_adapters

import slimtune
from slimtune import LoraConfig, PeftModel, convert_to_lora, save_as_lora
from slimtune.core.adapters.adapted_layer import read_adapter_site
from slimtune.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
CLOSE = 1e-9
NAMES = ["default", "two", "three"]
QV, QK, QO = ["q_proj", "v_proj"], ["q_proj", "k_proj"], ["q_proj", "o_proj"]
ONE = {"r": 4, "lora_alpha": 6, "target_modules": QV}
TWO = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
WIDER = {"r": 6, "lora_alpha": 3, "target_modules": QO}
DORA = {"use_dora": True}
GPT2 = [{"r": 4, "target_modules": ["c_attn"]}, {"r": 4, "lora_alpha": 3, "target_modules": ["c_attn", "wte"]}]


@pytest.fixture(autouse=True)
def float64_default():
    """PEFT keeps the weights of a sum in torch's default dtype, which limits how close it comes."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_model(base, *settings):
    return add_adapters(base(), dict(zip(NAMES, settings, strict=False)))


def load_in_peft(model, base, folder):
    model.save_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(base(), folder)
    for name in list(model.peft_config)[1:]:
        theirs.load_adapter(folder / name, name)
    return theirs.eval()


def weight_changes(model, name):
    """What an adapter adds to each weight."""
    found, kinds = {}, model.match_report(name).kinds
    for layer, module in model.adapter_modules(name).items():
        if kinds[layer] != "model":  # parameters that the modules share
            weight = read_adapter_site(layer, kinds[layer], model).weight()
            with torch.no_grad():
                found[layer] = module.merge_into(weight, None)[0] - weight
    return found


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ((ONE, TWO), {"combination_type": "linear"}),
        ((ONE, WIDER), {"combination_type": "cat"}),
        ((ONE, WIDER), {}),
        ((ONE, WIDER), {"svd_rank": 5, "svd_clamp": 0.9}),
        ((ONE, TWO), {"combination_type": "ties", "majority_sign_method": "frequency"}),
        ((ONE, WIDER), {"combination_type": "ties_svd", "svd_rank": 8}),
        ((ONE, TWO), {"combination_type": "magnitude_prune"}),
        ((ONE, WIDER), {"combination_type": "magnitude_prune_svd"}),
        ((ONE, TWO, {**TWO, "lora_alpha": 1}), {"combination_type": "ties"}),
        ((ONE,), {"combination_type": "svd"}),
        (GPT2, {"combination_type": "linear"}),
        (GPT2, {"combination_type": "cat"}),
        (GPT2, {"svd_rank": 5}),
    ],
    ids=str,
)
def test_weighted_sum_equals_peft(settings, how, tmp_path):
    base = gpt2 if settings is GPT2 else llama
    ours = make_model(base, *settings)
    theirs = load_in_peft(ours, base, tmp_path)
    names, weights = NAMES[: len(settings)], [0.7, -0.4, 1.3][: len(settings)]
    for model in (ours, theirs):
        model.add_weighted_adapter(names, weights, "sum", density=0.5, **how)
        model.set_adapter("sum")
    assert (run(ours) - run(base())).abs().max() > 1e-3
    assert (run(ours) - run(theirs)).abs().max() < CLOSE
    ours.save_pretrained(tmp_path / "out", selected_adapters=["sum"])
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "out" / "sum").eval()
    assert (run(loaded) - run(ours)).abs().max() < CLOSE


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_equals_peft_for_the_same_draws(kind, tmp_path):
    ours = make_model(llama, ONE, TWO)
    logits, draw = [], torch.bernoulli
    for model in (ours, load_in_peft(ours, llama, tmp_path)):
        generator = torch.Generator().manual_seed(3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "bernoulli", lambda p, g=generator: draw(p, generator=g))
            model.add_weighted_adapter(["default", "two"], [0.7, 0.9], "sum", kind, density=0.6)
        model.set_adapter("sum")
        logits.append(run(model))
    assert (logits[0] - logits[1]).abs().max() < CLOSE


METHODS = [
    LoraConfig(r=2, lora_alpha=8, use_rslora=True, target_modules=QV),
    LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
]
OTHERS = [
    ("LoraConfig", {"r": 3, "use_dora": True, "target_modules": QK}),
    ("LoraConfig", {"r": 3, "init_lora_weights": "pissa", "target_modules": QK}),
    ("IA3Config", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ("LoHaConfig", {"r": 2, "target_modules": QK}),
    ("LoKrConfig", {"r": 2, "target_modules": QK}),
    ("VeraConfig", {"r": 4, "target_modules": QO}),
    ("OFTConfig", {"oft_block_size": 4, "target_modules": ["q_proj"]}),
]


@pytest.mark.parametrize(("cls", "settings"), OTHERS, ids=str)
def test_methods_mix_and_full_rank_is_exact(cls, settings):
    model = make_model(llama, *METHODS, getattr(slimtune, cls)(**settings))
    weights = [0.5, -1.5, 2.0]
    model.add_weighted_adapter(NAMES, weights, "sum", svd_rank=128)
    parts, found = [weight_changes(model, n) for n in NAMES], weight_changes(model, "sum")
    for layer in found:
        expected = sum(w * p[layer] for w, p in zip(weights, parts, strict=True) if layer in p)
        assert (found[layer] - expected).abs().max() < CLOSE
    assert set(found) == set().union(*parts)


def test_sums_of_ia3_equal_pefts(tmp_path):
    settings = [("q_proj", "down_proj"), ("v_proj", "down_proj")]
    configs = [slimtune.IA3Config(target_modules=[*names], feedforward_modules=["down_proj"]) for names in settings]
    model = make_model(llama, *configs)
    theirs = load_in_peft(model, llama, tmp_path)
    for each in (model, theirs):
        each.add_weighted_adapter(NAMES[:2], [0.5, 1.5], "sum")
        each.set_adapter("sum")
    assert (run(model) - run(theirs)).abs().max() < CLOSE


@pytest.mark.parametrize("field", ["trainable_token_indices", "alora_invocation_tokens"])
def test_sums_keep_tokens(field):
    lora = {"r": 2, "target_modules": QV, field: [3, 5]}
    model = make_model(lambda: llama(tie=True), lora, lora)
    expected = run(model)
    model.add_weighted_adapter(NAMES[:2], [0.0, 1.0], "sum")
    model.set_adapter("sum")
    assert (run(model) - expected).abs().max() < CLOSE
    assert getattr(model.peft_config["sum"], field) == [3, 5]


def test_ranks_by_layer_are_saved(tmp_path):
    model = make_model(llama, ONE, {**WIDER, "rank_pattern": {"layers.1.self_attn.q_proj": 1}})
    model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "sum", "cat")
    config = model.peft_config["sum"]
    assert config.target_modules == {"q_proj", "v_proj", "o_proj"}
    assert config.rank_pattern == config.alpha_pattern
    factors = {n: d.low_rank_factors() for n, d in model.adapter_modules("sum").items()}
    names = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]
    assert [factors[f"model.{n}"][0].shape[0] for n in names] == [10, 5, 4]
    assert {scale for _, _, scale in factors.values()} == {1.0}
    model.set_adapter("sum")
    logits = run(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(llama(), tmp_path / "sum")), logits)
    model.set_adapter(["default", "two"])
    assert (run(model) - logits).abs().max() < CLOSE


def test_sum_is_inactive_and_others_unchanged():
    model = make_model(llama, ONE, TWO)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    model.add_weighted_adapter(["default", "two"], [1, 1], "sum")
    assert model.active_adapters == ["two"]
    for n, p in model.named_parameters():
        value, trains = before.get(n, (p, False))
        assert torch.equal(p, value)
        assert p.requires_grad == trains
        assert (n in before) != (".sum." in n)


def test_trained_head_is_copied():
    model = make_model(bert_classifier, {"task_type": "SEQ_CLS"}, {"r": 2, "target_modules": ["key"]})
    model.add_weighted_adapter(["two", "default"], [1, 1], "sum", svd_rank=12)
    model.set_adapter("sum")
    logits = run(model)
    model.set_adapter(["default", "two"])
    assert (run(model) - logits).abs().max() < CLOSE
    model.add_adapter("head", LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(UsageError, match="'classifier'"):
        model.add_weighted_adapter(["default", "head"], [1, 1], "none")


BOTH = (["default", "two"], [1, 1])
REFUSED = [
    (([], []), {}, "0 adapters and 0 weights"),
    ((["default", "two"], [1]), {}, "2 adapters and 1 weights"),
    ((["default", "two"], [float("nan"), 1]), {}, "weights is .nan, 1."),
    ((["default", "two"], [1, float("inf")]), {"combination_type": "cat"}, "weights is .1, inf."),
    ((["default", "two"], ["x", 1]), {}, "weights is .'x', 1."),
    ((["default", "twoo"], [1, 1]), {}, "did you mean 'two'"),
    (BOTH, {"combination_type": "lineal"}, "did you mean 'linear'"),
    (BOTH, {"combination_type": "linear"}, r"ranks at .*q_proj are {'default': 4, 'two': 6}"),
    (BOTH, {"combination_type": "ties"}, "density is None"),
    (BOTH, {"combination_type": "dare_linear", "density": 1.5}, "density is 1.5"),
    (BOTH, {"svd_rank": 0}, "svd_rank is 0"),
    (BOTH, {"svd_clamp": 7}, "svd_clamp is 7"),
    (BOTH, {"majority_sign_method": "most"}, "majority_sign_method is 'most'"),
    ((["default", "three"], [1, 1]), {}, "svd_rank is not given, and adapter 'three' has no rank"),
    ((["default", "three"], [1, 1]), {"combination_type": "cat"}, "needs A and B, which adapter 'three' does not have"),
]


@pytest.mark.parametrize(("given", "how", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_invalid_arguments_leave_model_unchanged(given, how, message):
    model = make_model(llama, ONE, WIDER, DORA)
    with pytest.raises(UsageError, match=message):
        model.add_weighted_adapter(*given, "sum", **how)
    assert list(model.peft_config) == NAMES
    with pytest.raises(UsageError, match="'two'"):
        model.add_weighted_adapter(["default"], [1], "two")


@pytest.mark.parametrize(
    ("base", "cls", "settings"),
    [
        (llama, "PromptTuningConfig", {"num_virtual_tokens": 3}),
        (llama, "LNTuningConfig", {}),
        (llama, "BottleneckConfig", {}),
        (gpt2, "LoraConfig", {"bias": "lora_only"}),
    ],
)
def test_methods_without_weight_change_are_rejected(base, cls, settings):
    model = make_model(base, {}, getattr(slimtune, cls)(**settings))
    for convert in (
        lambda: model.add_weighted_adapter(["default", "two"], [1, 1], "sum", svd_rank=8),
        lambda: model.to_lora("two", 8),
    ):
        with pytest.raises(UsageError, match=r"'two'.*LoRA"):
            convert()


@pytest.mark.parametrize(("cls", "settings"), [("LoraConfig", ONE), *OTHERS], ids=str)
def test_lora_of_full_rank_is_exact_and_errors_are_measured(cls, settings):
    model = make_model(llama, getattr(slimtune, cls)(**settings))
    expected, exact = run(model), weight_changes(model, "default")
    report = model.to_lora("default", 32, "full")
    model.set_adapter("full")
    assert (run(model) - expected).abs().max() < CLOSE
    assert report.error < CLOSE
    report, found = model.to_lora("default", 2), weight_changes(model, "default_lora")
    assert set(report.errors) == set(found) == set(exact)
    lost = {n: float((found[n] - exact[n]).norm()) for n in exact}
    total = sum(float(exact[n].norm()) ** 2 for n in exact)
    assert report.errors == pytest.approx({n: lost[n] / float(exact[n].norm()) for n in exact}, abs=CLOSE)
    assert report.error == pytest.approx((sum(x**2 for x in lost.values()) / total) ** 0.5, abs=CLOSE)
    assert str(report).startswith("'default' as a LoRA 'default_lora' of rank 2 on ")


def test_lora_with_a_fraction_of_the_norm_is_saved(tmp_path):
    model = make_model(llama, slimtune.LoHaConfig(r=4, target_modules=QV))
    report = save_as_lora(tmp_path, model, 0.9)
    assert report.error**2 <= 0.1
    assert list(model.peft_config) == ["default"]
    config, tensors = convert_to_lora(model, 0.9)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in saved.items()}
    assert all(config.rank_pattern.get(n, config.r) == r for n, r in report.ranks.items())
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert (run(PeftModel.from_pretrained(llama(), tmp_path)) - run(theirs)).abs().max() < CLOSE


@pytest.mark.parametrize("rank", [3, 0.8])
def test_convert_to_lora_equals_peft(rank, tmp_path):
    model = make_model(llama, slimtune.LoHaConfig(r=4, target_modules=QV))
    other, expected = peft.convert_to_lora(load_in_peft(model, llama, tmp_path), rank)
    config, tensors = convert_to_lora(model, rank)
    assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in expected.items()}
    if isinstance(rank, float):
        assert {n: config.rank_pattern.get(n, config.r) for n in other.rank_pattern} == other.rank_pattern
    for A in [k for k in expected if "lora_A" in k]:
        B = A.replace("lora_A", "lora_B")
        assert (tensors[B] @ tensors[A] - expected[B] @ expected[A]).abs().max() < 1e-5  # PEFT computes in float32


def test_to_lora_refuses_invalid_ranks_and_merged_adapters():
    model = make_model(llama, ONE)
    for rank in (0, -1, 1.5, 0.0, True):
        with pytest.raises(UsageError, match=r"rank (is|of)"):
            model.to_lora("default", rank)
    model.merge_adapter()
    with pytest.raises(UsageError, check=has_code("merge-differs")):
        model.to_lora("default", 2)
