"""BitFit, (IA)³ and LayerNorm tuning beyond the contract: defaults, layers without a bias, small changes in 16 bits."""

import pytest
import torch
from adapter_checks import assert_merges
from models_zoo import bert_classifier, bert_encoder, gemma2, gpt2, llama, qwen2, run, shake, snapshot
from peft.utils import constants

from slimtune import HiraConfig, LoraConfig, MissConfig, get_peft_model
from slimtune.core.adapters.adapter_module import MergeUnsupported
from slimtune.errors import ConfigError, TargetError
from slimtune.methods.bitfit import BitFitConfig
from slimtune.methods.ia3.ia3_config import SCALED, IA3Config
from slimtune.methods.ia3.ia3_modules import ScaledInput
from slimtune.methods.ln_tuning.ln_tuning_config import NORMS, LNTuningConfig


def sort_values(table):
    return {k: sorted(v) for k, v in table.items()}


@pytest.mark.parametrize(
    ("config", "names"),
    [(IA3Config(), "ia3"), (LNTuningConfig(), "ln_tuning"), (LoraConfig(use_dora=True, r=2), "magnitude")],
    ids=["ia3", "ln_tuning", "dora"],
)
def test_a_small_change_is_not_rounded_away(config, names):
    """Factors and weights are near one, and in bfloat16 1.002 is one, too."""
    model = get_peft_model(llama(dtype=torch.bfloat16), config).eval()
    start = run(model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and names in n:
                p.mul_(1.002)
    assert not torch.equal(run(model), start)


@pytest.mark.parametrize("base", [gpt2, qwen2])
def test_bitfit_trains_every_bias_and_nothing_else(base):
    biases = {n for n in snapshot(base()) if n.endswith(".bias")}
    model = get_peft_model(base(), BitFitConfig()).eval()
    assert {f"{n}.bias" for n in model.match_report().adapted} == biases != set()
    shake(model)
    expected, before = run(model), snapshot(base())
    plain = model.merge_and_unload()
    assert (run(plain) - expected).abs().max() < 1e-9
    assert {n for n, t in snapshot(plain).items() if not torch.equal(t, before[n])} == biases


def test_bitfit_trains_a_new_head_in_full():
    report = get_peft_model(bert_classifier(), BitFitConfig(task_type="SEQ_CLS")).match_report()
    assert report.trained_whole == ("classifier",)
    assert "classifier" not in report.adapted


def test_bitfit_refuses_layers_without_bias():
    with pytest.raises(TargetError, match="new_biases=True"):
        get_peft_model(llama(), BitFitConfig())
    with pytest.raises(TargetError, match=r"\b2 of 4 .*layers\.0\.self_attn\.o_proj"):
        get_peft_model(qwen2(), BitFitConfig(target_modules=["q_proj", "o_proj"]))


def test_bitfit_does_not_merge_new_biases():
    model = get_peft_model(llama(), BitFitConfig(new_biases=True))
    assert len(model.match_report().adapted) == 2 * 7 + 5
    assert "lm_head" in model.match_report().untargeted_layers
    with pytest.raises(MergeUnsupported, match=r"layers\.0\.self_attn\.q_proj"):
        model.merge_adapter()


@pytest.mark.parametrize(
    ("base", "above"),
    [(gpt2, HiraConfig(r=2)), (llama, HiraConfig(r=2)), (gpt2, LoraConfig(r=2, use_dora=True)),
     (llama, LoraConfig(r=2, use_dora=True)), (gpt2, MissConfig(r=2, init_weights="bat"))],
    ids=["hira-gpt2", "hira-llama", "dora-gpt2", "dora-llama", "bat-gpt2"],
)  # fmt: skip
def test_a_new_bias_below_a_method_that_reads_the_weight(base, above):
    """The weight below them is unchanged by a bias."""
    above.target_modules = "all-linear"
    model = get_peft_model(base(), BitFitConfig(new_biases=True)).eval()
    model.add_adapter("above", above)
    shake(model)
    alone = run(model)
    model.set_adapter(["default", "above"])
    assert torch.equal(run(model), alone)
    shake(model, seed=7)
    assert (run(model) - alone).abs().max() > 1e-3
    if base is gpt2:
        assert_merges(model)


def inputs_scaled(config):
    model = get_peft_model(llama(), config)
    return {n.rsplit(".", 1)[-1] for n, d in model.adapter_modules("default").items() if isinstance(d, ScaledInput)}


def test_ia3_defaults_equal_pefts():
    theirs = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    assert sort_values(IA3Config.architecture_targets) == sort_values(theirs)
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {k: v for k, (_, v) in SCALED.items()} == feedforward


@pytest.mark.parametrize("feedforward", [["down_proj", "up_proj"], r".*\.(down|up)_proj"])
def test_ia3_feedforward_modules_by_name_or_regex(feedforward):
    targets = ["k_proj", "down_proj", "up_proj"]
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    assert inputs_scaled(config) == {"down_proj", "up_proj"}
    assert config.feedforward_modules == feedforward


def test_ia3_default_feedforward_modules():
    config = IA3Config()
    assert inputs_scaled(config) == {"down_proj"}
    assert config.feedforward_modules == ["down_proj"]  # written into the config
    assert inputs_scaled(IA3Config(target_modules=["k_proj"])) == set()  # the default may match no target
    model = bert_encoder()
    model.config.model_type = "unknown"
    with pytest.raises(ConfigError, match="unknown"):
        get_peft_model(model, IA3Config(target_modules=["key"]))
    get_peft_model(model, IA3Config(target_modules=["key"], feedforward_modules=[]))


def test_ia3_feedforward_modules_must_be_targets():
    with pytest.raises(TargetError, match=r"down_prj.*'down_proj'"):
        inputs_scaled(IA3Config(target_modules=r".*\.(k|down)_proj", feedforward_modules=["down_prj"]))


def test_ln_tuning_defaults_equal_pefts():
    theirs = dict(constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING)
    assert set(NORMS["llava"]) < set(theirs.pop("llava"))  # PEFT also trains embeddings and heads there
    assert sort_values({k: v for k, v in NORMS.items() if k != "llava"}) == sort_values(theirs)
    model = llama()
    model.config.model_type = "unknown"
    assert len(get_peft_model(model, LNTuningConfig()).match_report().adapted) == 5


@pytest.mark.parametrize(("base", "targets"), [(llama, ["q_proj", "norm"]), (gpt2, ["c_attn", "ln_f"])])
def test_ln_tuning_of_linear_layers_merges(base, targets):
    model = shake(get_peft_model(base(), LNTuningConfig(target_modules=targets)).eval())
    expected = run(model)
    assert (run(model.merge_and_unload()) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("base", [llama, gpt2, gemma2])
def test_several_adapters_of_a_norm_add_up(base):
    every = {"target_modules": [n for n, m in base().named_modules() if "norm" in type(m).__name__.lower()]}
    model = get_peft_model(base(), LNTuningConfig(**every)).eval()
    model.add_adapter("second", LNTuningConfig(**every))
    model.add_adapter("biases", BitFitConfig(new_biases=True, **every))
    for seed, name in enumerate(("default", "second", "biases")):
        model.set_adapter(name)
        shake(model, seed)
    model.set_adapter(["biases", "default", "second"])
    expected = run(model)
    plain = base()
    with torch.no_grad():
        for name in every["target_modules"]:
            norm, mine = plain.get_submodule(name), model.get_submodule(name).adapters
            for p, own in mine["default"].ln_tuning_layers.named_parameters():
                second = getattr(mine["second"].ln_tuning_layers, p)
                getattr(norm, p).add_(own - getattr(norm, p) + second - getattr(norm, p))
            shift = mine["biases"].bitfit_bias
            norm.register_forward_hook(lambda module, given, out, shift=shift: out + shift)
    # Gemma's norm rounds to fp32 in the middle of a float64 model.
    assert (run(plain) - expected).abs().max() < (1e-6 if base is gemma2 else 1e-9)
