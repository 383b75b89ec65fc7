"""Hot-swapping: another adapter's values in a running one's place, without compiling again; all or nothing."""

import copy
import json

import pytest
import torch
from adapter_checks import unchanged
from error_facts import has_code
from models_zoo import bert_classifier, llama, run, snapshot, tokens
from several_adapters import save_adapter

from slimtune import LoraConfig, PeftModel, get_peft_model, hotswap_adapter, prepare_model_for_compiled_hotswap
from slimtune.errors import AdapterError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
QV = ["q_proj", "v_proj"]
SMALL = {"r": 2, "lora_alpha": 8, "target_modules": QV}
LARGE = {"r": 6, "lora_alpha": 3, "target_modules": QV}
CLOSE = 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        LARGE,
        {**SMALL, "use_rslora": True},
        {**LARGE, "rank_pattern": {"layers.1.self_attn.q_proj": 1}, "alpha_pattern": {"v_proj": 20}},
        {**SMALL, "target_modules": ["q_proj"]},
        {"r": 3, "init_lora_weights": "pissa", "target_modules": QV},
    ],
    ids=str,
)
def test_swap_does_not_recompile(other, tmp_path):
    first, first_logits = save_adapter(tmp_path / "a", SMALL)
    second, second_logits = save_adapter(tmp_path / "b", other, seed=2)
    model = PeftModel.from_pretrained(llama(), first)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert (run(model) - first_logits).abs().max() < CLOSE
    objects = {n: id(p) for n, p in model.named_parameters()}
    torch._dynamo.reset()
    compiled, ids = torch.compile(model, backend="eager"), tokens()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        assert (compiled(ids).logits - first_logits).abs().max() < CLOSE
        frames = torch._dynamo.utils.counters["frames"]["ok"]
        assert frames > 0
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for folder, expected in ((second, second_logits), (first, first_logits)):
            hotswap_adapter(compiled, folder, "default")
            assert (compiled(ids).logits - expected).abs().max() < CLOSE
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames
    assert objects == {n: id(p) for n, p in model.named_parameters()}


def test_swapped_adapter_saves_correctly(tmp_path):
    first, _ = save_adapter(tmp_path / "a", SMALL)
    second, logits = save_adapter(tmp_path / "b", LARGE, seed=2)
    model = PeftModel.from_pretrained(llama(), first, is_trainable=True)
    model.load_adapter(first, "beside")
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    before = snapshot(model)
    hotswap_adapter(model, second, "default")
    model.save_pretrained(tmp_path / "c")
    assert (run(PeftModel.from_pretrained(llama(), tmp_path / "c")) - logits).abs().max() < CLOSE
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) != (".default." in n)
        assert p.requires_grad == (".default." in n)
    assert list(model.peft_config) == ["default", "beside"]


def test_swap_without_preparation_grows_a_rank_unless_compiled(tmp_path):
    large, large_logits = save_adapter(tmp_path / "a", LARGE)
    small, small_logits = save_adapter(tmp_path / "b", SMALL, seed=2)
    model = PeftModel.from_pretrained(llama(), large)
    for folder, logits in ((small, small_logits), (large, large_logits)):
        hotswap_adapter(model, folder, "default")
        assert (run(model) - logits).abs().max() < CLOSE
    model = PeftModel.from_pretrained(llama(), small)
    message = r"has rank 6 and scale 0.5 at .*q_proj, 'default' has space for rank 2[^$]*prepare_model_for_compiled"
    with pytest.raises(AdapterError, match=message):
        hotswap_adapter(torch.compile(model, backend="eager"), large, "default")
    assert torch.equal(run(model), small_logits)
    hotswap_adapter(model, large, "default")
    assert (run(model) - large_logits).abs().max() < CLOSE
    model.save_pretrained(tmp_path / "c")
    assert (run(PeftModel.from_pretrained(llama(), tmp_path / "c")) - large_logits).abs().max() < CLOSE


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_with_groups_and_a_bias_of_B(groups, tmp_path):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=groups).double())
    x, outputs = torch.randn(2, 4, 5, 5).double(), []
    for r in (2, 4):
        config = LoraConfig(r=r, lora_alpha=3, lora_bias=True, init_lora_weights=False, target_modules=["0"])
        model = get_peft_model(copy.deepcopy(base), config)
        model.save_pretrained(tmp_path / str(r))
        outputs.append(model(x))
    model = PeftModel.from_pretrained(base, tmp_path / "2")
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert (model(x) - outputs[0]).abs().max() < CLOSE
    hotswap_adapter(model, tmp_path / "4", "default")
    assert (model(x) - outputs[1]).abs().max() < CLOSE
    hotswap_adapter(model, tmp_path / "2", "default")
    assert (model(x) - outputs[0]).abs().max() < CLOSE


def test_trained_head_is_swapped(tmp_path):
    first, _ = save_adapter(tmp_path / "a", {"task_type": "SEQ_CLS"}, bert_classifier)
    second, logits = save_adapter(tmp_path / "b", {"task_type": "SEQ_CLS", "r": 4}, bert_classifier, seed=2)
    without_head, _ = save_adapter(tmp_path / "c", {"r": 4}, bert_classifier, seed=2)
    model = PeftModel.from_pretrained(bert_classifier(), first)
    hotswap_adapter(model, second, "default")
    with pytest.raises(AdapterError, match=r"'default' 'classifier\.weight'"):
        hotswap_adapter(model, without_head, "default")
    assert (run(model) - logits).abs().max() < CLOSE


def test_methods_without_factors_need_same_settings(tmp_path):
    dora = {"r": 3, "use_dora": True, "target_modules": QV}
    first, _ = save_adapter(tmp_path / "a", dora)
    second, logits = save_adapter(tmp_path / "b", dora, seed=2)
    other, _ = save_adapter(tmp_path / "c", {**dora, "lora_alpha": 99})
    model = PeftModel.from_pretrained(llama(), first)
    objects = {n: id(p) for n, p in model.named_parameters()}
    hotswap_adapter(model, second, "default")
    with pytest.raises(AdapterError, match=r"lora_alpha .*99"):
        hotswap_adapter(model, other, "default")
    with pytest.raises(UsageError, match="LinearDora"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert torch.equal(run(model), logits)
    assert objects == {n: id(p) for n, p in model.named_parameters()}


def test_misfit_raises_and_copies_nothing(tmp_path):
    first, _ = save_adapter(tmp_path / "a", SMALL)
    model = PeftModel.from_pretrained(llama(), first)
    wider, _ = save_adapter(tmp_path / "b", {**SMALL, "target_modules": ["q_proj", "o_proj"]})
    other_base, _ = save_adapter(tmp_path / "c", SMALL, lambda: llama(intermediate_size=64))
    lying, _ = save_adapter(tmp_path / "d", LARGE)
    file = lying / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 2}))
    for folder, name, error, message in [
        (wider, "default", AdapterError, "changes 2 modules that 'default' does not"),
        (other_base, "default", AdapterError, "trained on another base"),
        (lying, "default", AdapterError, "size mismatch for"),
        (tmp_path / "none", "default", UsageError, "there is no folder"),
        (first, "defaults", UsageError, "did you mean 'default'"),
    ]:
        with unchanged(model), pytest.raises(error, match=message):
            hotswap_adapter(model, folder, name)
        assert list(model.peft_config) == ["default"]
    model.merge_adapter()
    with pytest.raises(UsageError, check=has_code("merge-differs")):
        hotswap_adapter(model, first, "default")


def test_prepare_must_precede_compile():
    model = get_peft_model(llama(), LoraConfig(**LARGE))
    compiled = torch.compile(model, backend="eager")
    for wrong, arguments, message in [
        (model, {"target_rank": 4}, "target_rank is 4, and adapter .* has rank 6"),
        (llama(), {"target_rank": 4}, "a LlamaForCausalLM has no adapters"),
        (compiled, {"target_rank": 8}, "already compiled"),
        (model, {"check_compiled": "no"}, "check_compiled is .no."),
    ]:
        with pytest.raises(UsageError, match=message):
            prepare_model_for_compiled_hotswap(wrong, **arguments)
    with pytest.warns(UserWarning, match="compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    assert model.peft_config["default"].r == model.peft_config["default"].lora_alpha == 8
    assert {p.requires_grad for n, p in model.named_parameters() if "lora_" in n} == {True}
