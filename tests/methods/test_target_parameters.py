"""LoRA on parameters: numbers and files of PEFT's `ParamWrapper`, in each layout of experts and each way to run."""

import peft
import pytest
import torch
from adapter_checks import assert_loads, distance
from models_zoo import same_base, shake, snapshot, tokens
from safetensors.torch import load_file
from tiny_families import build

import slimtune
from slimtune import LoraConfig, get_peft_model
from slimtune.core.adapters.adapter_tensors import get_adapter_tensors
from slimtune.errors import ConfigError, MixedBatchError, SlimtuneError, TargetError
from slimtune.methods.lora.low_rank_weight import LowRankWeight

KINDS = ("qwen3_moe", "mixtral", "gpt_oss", "olmoe", "llama4_text")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def moe(kind="qwen3_moe", dtype=torch.float64, implementation="eager"):
    model = build(kind, num_hidden_layers=2).to(dtype)
    model.config._experts_implementation = implementation
    return model


def adapted(home, base, **settings):
    torch.manual_seed(1)
    settings = {"target_modules": [], "target_parameters": BOTH, "init_lora_weights": False, **settings}
    return home.get_peft_model(base, home.LoraConfig(r=4, lora_alpha=16, **settings)).eval()


def run_step(home, model):
    """Return the logits and the adapter's gradients by their key in a file."""
    logits = model(input_ids=tokens()).logits
    logits.double().logsumexp(-1).sum().backward()
    tensors = get_adapter_tensors(model, "default") if home is slimtune else dict(model.named_parameters())
    return logits, {k.replace(".default", ""): p.grad for k, p in tensors.items() if p.requires_grad}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank_pattern": {"experts.down_proj": 3}}])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_pefts(kind, settings):
    (mine, my_grads), (other, their_grads) = (
        run_step(home, adapted(home, moe(kind), **settings)) for home in (slimtune, peft)
    )
    assert distance(mine, other) < 1e-9
    assert my_grads.keys() == their_grads.keys()
    assert max(distance(my_grads[k], their_grads[k]) for k in my_grads) < 1e-9


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_no_update_has_the_size_of_the_weight(kind, implementation, monkeypatch):
    settings = {"dtype": torch.float32, "implementation": implementation}
    theirs, their_grads = run_step(peft, adapted(peft, moe(kind, **settings), rank_pattern={"down_proj": 3}))
    monkeypatch.setattr(LowRankWeight, "materialize", None)
    ours, our_grads = run_step(slimtune, adapted(slimtune, moe(kind, **settings), rank_pattern={"down_proj": 3}))
    assert distance(ours, theirs) < 1e-4 * theirs.abs().max()
    assert max(distance(our_grads[k], their_grads[k]) / their_grads[k].abs().max() for k in our_grads) < 1e-4


def test_one_seed_gives_one_adapter_and_files_load_both_ways(tmp_path):
    for home in (slimtune, peft):
        adapted(home, moe("gpt_oss"), init_lora_weights="gaussian").save_pretrained(tmp_path / home.__name__)
    ours, theirs = (load_file(tmp_path / home.__name__ / "adapter_model.safetensors") for home in (slimtune, peft))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert_loads(adapted(slimtune, moe("gpt_oss")), lambda: moe("gpt_oss"), tmp_path / "trained")


ALL = {"target_modules": "all-linear", "rank_pattern": {"down_proj": 3, "o_proj|up_proj": 2}}
REGEX = {
    "target_modules": r".*(o_proj|(gate|up|down)_proj|embed_tokens)",
    "alpha_pattern": {r"shared_experts?\.up_proj": 5},
}
LAYERS = {"target_modules": ["down_proj"], "layers_to_transform": [1]}


@pytest.mark.parametrize(
    ("family", "settings"),
    [("deepseek_v3", ALL), ("glm4_moe", ALL), ("qwen3_next", ALL), ("deepseek_v3", REGEX), ("deepseek_v3", LAYERS)],
)
def test_peft_loads_adapters_of_shared_experts(family, settings, tmp_path):
    """PEFT takes their linear layers, and those of dense layers, for the experts of older checkpoints."""
    model = get_peft_model(build(family, num_hidden_layers=2), LoraConfig(r=4, **settings))
    report = model.match_report()
    assert {kind for name, kind in report.kinds.items() if name.endswith("_proj")} == {"linear"}
    shake(model)
    assert_loads(model, lambda: build(family, num_hidden_layers=2), tmp_path, lambda m: m(tokens()).logits, 1e-6)
    loaded = slimtune.PeftModel.from_pretrained(build(family, num_hidden_layers=2), tmp_path)
    assert loaded.match_report().kinds == report.kinds


def test_peft_files_of_models_with_shared_experts_load(tmp_path):
    settings = {"target_modules": ["q_a_proj", "down_proj"], "target_parameters": ["shared_experts.gate_proj.weight"]}
    model = shake(peft.get_peft_model(build("deepseek_v3"), peft.LoraConfig(**settings)))
    model.save_pretrained(tmp_path)
    loaded = slimtune.PeftModel.from_pretrained(build("deepseek_v3"), tmp_path)
    assert distance(loaded(tokens()).logits, model(tokens()).logits) < 1e-6


def test_what_peft_cannot_load_is_said():
    with pytest.warns(UserWarning, match=r"PEFT .*shared_experts\.down_proj.* lora_dropout.*0\.1"):
        get_peft_model(build("deepseek_v3"), LoraConfig(target_modules=["down_proj"], lora_dropout=0.1))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_merge_disable_and_unload(kind):
    plain = moe(kind, torch.bfloat16)
    before = snapshot(plain)
    expected = plain(tokens()).logits
    model = adapted(slimtune, plain, init_lora_weights=False)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    with_adapter = model(tokens()).logits
    model.merge_adapter(safe_merge=True)
    assert distance(model(tokens()).logits, with_adapter) < 0.03 * with_adapter.abs().max()
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, expected)
    assert torch.equal(model(tokens()).logits, with_adapter)
    assert same_base(model.unload(), before)


def test_merged_weights_equal_pefts():
    ours, theirs = (adapted(home, moe("gpt_oss")).merge_and_unload().state_dict() for home in (slimtune, peft))
    assert max(distance(ours[k], theirs[k]) for k in theirs) < 1e-12


def test_two_active_adapters_add_up():
    def make(home):
        model = adapted(home, moe())
        torch.manual_seed(2)
        model.add_adapter("other", home.LoraConfig(target_modules=[], target_parameters=BOTH, init_lora_weights=False))
        (model.base_model if home is peft else model).set_adapter(["default", "other"])
        return model

    assert distance(*(make(home)(tokens()).logits for home in (slimtune, peft))) < 1e-9


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for reentrant in (None, True, False):
        model = adapted(slimtune, moe())
        if reentrant is not None:
            model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        grads.append(run_step(slimtune, model)[1])
    assert all(distance(grads[0][k], g[k]) < 1e-12 for g in grads[1:] for k in g)


@pytest.mark.parametrize("field", ["lora_dropout", "use_dora", "lora_bias", "init_lora_weights"])
def test_settings_without_a_meaning_are_refused(field):
    value = {"lora_dropout": 0.1, "init_lora_weights": "pissa"}.get(field, True)
    with pytest.raises(ConfigError, match=rf"{field} .*model\.layers\.0\.mlp\.experts\.down_proj"):
        get_peft_model(moe(), LoraConfig(target_modules=[], target_parameters=BOTH, **{field: value}))


def test_names_that_match_nothing_are_refused():
    with pytest.raises(TargetError, match=r"down_pro\b.*'down_proj'"):
        get_peft_model(moe(), LoraConfig(target_modules=["q_proj"], target_parameters=["down_pro"]))
    with pytest.raises(TargetError, match="rank_pattern"):
        adapted(slimtune, moe(), rank_pattern={"experts.up_proj": 2})
    with pytest.raises(TargetError, match="q_proj"):
        get_peft_model(moe(), LoraConfig(target_modules=["q_proj"], target_parameters=["q_proj.weight"]))


def test_a_matrix_of_a_linear_layer_is_adapted_like_the_layer():
    logits = []
    for settings in ({"target_modules": ["q_proj"]}, {"target_parameters": ["q_proj.weight"]}):
        model = adapted(slimtune, moe(), **{"target_parameters": None, **settings})
        logits.append(model(tokens()).logits)
    assert distance(*logits) < 1e-12


def test_rows_with_different_adapters_and_weighted_sums_are_refused():
    model = adapted(slimtune, moe())
    with pytest.raises(MixedBatchError):
        model(tokens(), adapter_names=["default", "__base__"])
    with pytest.raises(SlimtuneError, match="target_parameters"):
        model.add_weighted_adapter(["default"], [0.5], "mean")


def test_all_linear_includes_the_experts(tmp_path):
    model = adapted(slimtune, moe(), target_modules="all-linear", target_parameters=None)
    report = model.match_report()
    assert "experts × 2" in str(report)
    assert report.untargeted_layers == ("model.embed_tokens", "lm_head")
    assert_loads(model, moe, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lora_dropout": 0.1}, "lora_dropout is 0.1"), ({"exclude_modules": ["mlp.experts"]}, None),
     ({"target_parameters": []}, None)],
)  # fmt: skip
def test_all_linear_says_when_it_leaves_the_experts_out(settings, message, recwarn, tmp_path):
    model = get_peft_model(moe(), LoraConfig(target_modules="all-linear", **settings))
    said = [str(w.message) for w in recwarn if "leaves out the experts" in str(w.message)]
    assert [message in text for text in said] == ([True] if message else [])
    assert set(model.match_report().kinds.values()) == {"linear"}
    model.save_pretrained(tmp_path)
    for home in (slimtune, peft):
        loaded = home.PeftModel.from_pretrained(moe(), tmp_path)
        assert not [n for n, _ in loaded.named_parameters() if "lora_" in n and "experts" in n]


def test_all_linear_leaves_routers_frozen():
    model = moe("llama4_text")
    assert isinstance(model.model.layers[0].feed_forward.router, torch.nn.Linear)
    model = adapted(slimtune, model, target_modules="all-linear", target_parameters=None)
    assert not [n for n in model.match_report().adapted if "router" in n]
    model(tokens())


def test_experts_without_a_gradient_are_found():
    model = adapted(slimtune, moe())
    run_step(slimtune, model)
    model.get_parameter("model.layers.0.mlp.experts.adapters.default.lora_B.weight").grad.view(-1, 4, 4)[..., 2] = 0
    model.update_and_allocate(1)
    modules = model.adapter_modules("default")
    expected = {"model.layers.0.mlp.experts.down_proj": [2]}
    assert model.peft_config["default"].find_untrained_experts(modules) == expected
    again = adapted(slimtune, moe())
    for name, module in again.adapter_modules("default").items():
        module.load_extra_state(modules[name].extra_state())
    assert again.peft_config["default"].find_untrained_experts(again.adapter_modules("default")) == expected
