"""Hot-swapping: another adapter's values in a running one's place, without compiling again; all or nothing."""

import json

import pytest
import torch
from models_zoo import bert_classifier, llama, run, shake, tokens

import slimtune
from slimtune import LoraConfig, PeftModel, get_peft_model, hotswap_adapter, prepare_model_for_compiled_hotswap
from slimtune.errors import AdapterError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
QV = ["q_proj", "v_proj"]
SMALL = {"r": 2, "lora_alpha": 8, "target_modules": QV}
LARGE = {"r": 6, "lora_alpha": 3, "target_modules": QV}
CLOSE = 1e-12


def saved(folder, settings, base=llama, seed=1):
    """The folder of an adapter, and what a model says with it."""
    config = settings if isinstance(settings, slimtune.PeftConfig) else LoraConfig(**settings)
    model = get_peft_model(base(), config)
    shake(model, seed=seed)
    model.save_pretrained(folder)
    return folder, run(model.eval())


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


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
    first, said_first = saved(tmp_path / "a", SMALL)
    second, said_second = saved(tmp_path / "b", other, seed=2)
    model = PeftModel.from_pretrained(llama(), first)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert (run(model) - said_first).abs().max() < CLOSE
    objects = {n: id(p) for n, p in model.named_parameters()}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    ids = tokens()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        assert (compiled(ids).logits - said_first).abs().max() < CLOSE
        frames = torch._dynamo.utils.counters["frames"]["ok"]
        assert frames > 0
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for folder, expected in ((second, said_second), (first, said_first)):
            hotswap_adapter(compiled, folder, "default")
            assert (compiled(ids).logits - expected).abs().max() < CLOSE
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames
    assert objects == {n: id(p) for n, p in model.named_parameters()}


def test_swapped_adapter_saves_correctly(tmp_path):
    first, _ = saved(tmp_path / "a", SMALL)
    second, said = saved(tmp_path / "b", LARGE, seed=2)
    model = PeftModel.from_pretrained(llama(), first, is_trainable=True)
    model.load_adapter(first, "beside")
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    beside = {n: t for n, t in values(model).items() if ".beside." in n}
    hotswap_adapter(model, second, "default")
    model.save_pretrained(tmp_path / "c")
    assert (run(PeftModel.from_pretrained(llama(), tmp_path / "c")) - said).abs().max() < CLOSE
    assert all(torch.equal(t, dict(model.named_parameters())[n]) for n, t in beside.items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".default." in n
    }
    assert list(model.peft_config) == ["default", "beside"]


def test_swap_without_preparation_needs_smaller_rank(tmp_path):
    first, said_first = saved(tmp_path / "a", LARGE)
    second, said = saved(tmp_path / "b", SMALL, seed=2)
    model = PeftModel.from_pretrained(llama(), first)
    hotswap_adapter(model, second, "default")
    assert (run(model) - said).abs().max() < CLOSE
    before = values(model)
    hotswap_adapter(model, first, "default")
    assert (run(model) - said_first).abs().max() < CLOSE
    small = PeftModel.from_pretrained(llama(), second)
    before = values(small)
    with pytest.raises(
        AdapterError, match=r"has rank 6 and scale 0.5 at .*q_proj, 'default' has space for rank 2"
    ) as e:
        hotswap_adapter(small, first, "default")
    assert "prepare_model_for_compiled_hotswap" in str(e.value)
    assert all(torch.equal(t, dict(small.named_parameters())[n]) for n, t in before.items())


def test_trained_head_is_swapped(tmp_path):
    first, _ = saved(tmp_path / "a", {"task_type": "SEQ_CLS"}, bert_classifier)
    second, said = saved(tmp_path / "b", {"task_type": "SEQ_CLS", "r": 4}, bert_classifier, seed=2)
    bare, _ = saved(tmp_path / "c", {"r": 4}, bert_classifier, seed=2)
    model = PeftModel.from_pretrained(bert_classifier(), first)
    hotswap_adapter(model, second, "default")
    assert (run(model) - said).abs().max() < CLOSE
    with pytest.raises(AdapterError, match=r"trains in full nothing, 'default' 'classifier.weight'"):
        hotswap_adapter(model, bare, "default")
    assert (run(model) - said).abs().max() < CLOSE


def test_methods_without_factors_need_same_settings(tmp_path):
    dora = {"r": 3, "use_dora": True, "target_modules": QV}
    first, _ = saved(tmp_path / "a", dora)
    second, said = saved(tmp_path / "b", dora, seed=2)
    other, _ = saved(tmp_path / "c", {**dora, "lora_alpha": 99})
    model = PeftModel.from_pretrained(llama(), first)
    objects = {n: id(p) for n, p in model.named_parameters()}
    hotswap_adapter(model, second, "default")
    assert torch.equal(run(model), said)
    assert objects == {n: id(p) for n, p in model.named_parameters()}
    with pytest.raises(AdapterError, match="trained with other settings: lora_alpha is 99"):
        hotswap_adapter(model, other, "default")
    with pytest.raises(UsageError, match=r"is not a plain LoRA at .*LinearDora"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert torch.equal(run(model), said)


def spoil_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_misfit_raises_and_copies_nothing(tmp_path):
    first, said = saved(tmp_path / "a", SMALL)
    model = PeftModel.from_pretrained(llama(), first)
    before, kinds = values(model), {n: type(m) for n, m in model.named_modules()}
    wider, _ = saved(tmp_path / "b", {**SMALL, "target_modules": ["q_proj", "o_proj"]})
    other_base, _ = saved(tmp_path / "c", SMALL, lambda: llama(intermediate_size=64))
    lying, _ = saved(tmp_path / "d", LARGE)
    spoil_config(lying, r=2)
    cases = [
        (wider, "default", AdapterError, "changes 2 modules that 'default' does not, such as"),
        (other_base, "default", AdapterError, "trained on another base"),
        (lying, "default", AdapterError, "tensors have another shape"),
        (tmp_path / "none", "default", UsageError, "there is no folder"),
        (first, "defaults", UsageError, "did you mean 'default'"),
    ]
    for folder, name, error, message in cases:
        with pytest.raises(error, match=message):
            hotswap_adapter(model, folder, name)
        assert list(model.peft_config) == ["default"]
        assert {n: type(m) for n, m in model.named_modules()} == kinds
        assert all(torch.equal(t, before[n]) for n, t in values(model).items())
        assert torch.equal(run(model), said)
    model.merge_adapter()
    with pytest.raises(UsageError, match="is merged into the base"):
        hotswap_adapter(model, first, "default")


def test_prepare_must_precede_compile(tmp_path):
    model = get_peft_model(llama(), LoraConfig(**LARGE))
    with pytest.raises(UsageError, match="target_rank is 4, but adapter 'default' has rank 6"):
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    with pytest.raises(UsageError, match="a LlamaForCausalLM has no adapters"):
        prepare_model_for_compiled_hotswap(llama(), target_rank=4)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(UsageError, match="already compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="already compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    assert model.peft_config["default"].r == model.peft_config["default"].lora_alpha == 8
    with pytest.raises(UsageError, match="check_compiled is 'no'"):
        prepare_model_for_compiled_hotswap(model, check_compiled="no")
    assert {p.requires_grad for n, p in model.named_parameters() if "lora_" in n} == {True}
