"""Adapters on bases in NF4 and int8; needs bitsandbytes, and is skipped by name without it."""

import copy
from importlib.util import find_spec

import peft
import pytest
import torch
import transformers as tf
from models_zoo import llama, run, shake, tokens

import slimtune
from slimtune import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from slimtune.core.adapters.adapter_module import MergeUnsupported
from slimtune.core.adapters.quantized_layers import count_parameter_values
from slimtune.core.kernels.linear_layers import get_dequantized_weight, is_quantized
from slimtune.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
KINDS = {
    "nf4": NF4,
    "nf4-double": {**NF4, "bnb_4bit_use_double_quant": True},
    "nf4-in-bf16": {**NF4, "bnb_4bit_quant_storage": torch.bfloat16},
    "fp4": {**NF4, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
LORA = ("LoraConfig", {"r": 4, "target_modules": "all-linear"})
DORA = ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "v_proj"]})
IA3 = ("IA3Config", {})


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Make a small Llama in a kind of quantization: `bases(kind)`."""
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    folder = tmp_path_factory.mktemp("base")
    llama(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128).save_pretrained(folder)

    def make(kind, dtype=torch.bfloat16):
        how = {"quantization_config": tf.BitsAndBytesConfig(**KINDS[kind]), "dtype": dtype, "device_map": "cpu"}
        return tf.AutoModelForCausalLM.from_pretrained(folder, **how).eval()

    return make


def compute_gradient_norms(model):
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    return {n: p.grad.norm().item() for n, p in model.named_parameters() if p.requires_grad}


@EVERY_KIND
def test_weight_is_what_the_layer_multiplies_by(kind, bases):
    layer, x = bases(kind, torch.float32).model.layers[1].self_attn.q_proj, torch.randn(7, 64)
    assert is_quantized(layer)
    # The first call changes int8's scales; in evaluation mode some CPUs repack 4 bits and round to bf16.
    for training in (True, True, False, False):
        layer.train(training)
        weight = get_dequantized_weight(layer).float()
        assert weight.shape == (layer.out_features, layer.in_features)
        with torch.no_grad():
            y = layer(x.clone())
        # int8 rounds the inputs, too: to 127 steps of the largest in a row.
        tolerance = 0.02 if kind == "int8" else 1e-5 if training else 0.005
        assert (y - x @ weight.t()).norm() / y.norm() < tolerance


@pytest.mark.parametrize(
    ("kind", "method"),
    [("nf4", LORA), ("nf4-double", DORA), ("nf4-in-bf16", IA3), ("fp4", LORA), ("int8", LORA), ("int8", DORA)],
)
def test_adapter_trains_saves_and_unloads(kind, method, bases, tmp_path):
    cls, settings = method
    base = prepare_model_for_kbit_training(bases(kind), use_gradient_checkpointing=False)
    before = {n: p.detach().clone().view(torch.uint8) for n, p in base.named_parameters()}
    plain = run(base)
    model = get_peft_model(base, getattr(slimtune, cls)(**settings))
    assert (run(model) - plain).abs().max() < 1e-6
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    model.train()
    for _ in range(4):
        losses.append(model(input_ids=tokens(), labels=tokens()).loss)
        losses[-1].backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    expected = run(model.eval())
    assert (expected - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(bases(kind)), tmp_path)
    assert torch.equal(run(loaded), expected)
    theirs = peft.PeftModel.from_pretrained(peft.prepare_model_for_kbit_training(bases(kind)), tmp_path)
    assert (run(theirs.train()) - run(model.train())).abs().max() < 1e-4
    model.eval()
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    with pytest.raises(MergeUnsupported, match="quantized"):
        model.merge_adapter()
    assert torch.equal(run(model), expected)
    if kind != "int8":  # its layers keep state of their last call
        assert torch.equal(run(copy.deepcopy(model)), expected)
    unloaded = model.unload()
    assert torch.equal(run(unloaded), plain)
    assert all(torch.equal(p.view(torch.uint8), before[n]) for n, p in unloaded.named_parameters())


@pytest.mark.parametrize("evaluated", ["base", "model", "loaded"])
def test_gradients_pass_through_an_evaluated_base(evaluated, bases, tmp_path):
    def adapt(base):
        torch.manual_seed(0)
        return get_peft_model(base, LoraConfig(r=2, init_lora_weights=False))

    expected, base = compute_gradient_norms(adapt(bases("nf4"))), bases("nf4")
    if evaluated == "base":
        run(base)
    model = adapt(base)
    if evaluated == "model":
        run(model.eval())
    if evaluated == "loaded":
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(bases("nf4"), tmp_path)
        run(model)
        model.set_adapter("default")
    assert compute_gradient_norms(model) == pytest.approx(expected, rel=0.02)
    before = {n: vars(m).get("support_avx512bf16_for_cpu") for n, m in bases("nf4").named_modules()}
    assert {n: vars(m).get("support_avx512bf16_for_cpu") for n, m in model.unload().named_modules()} == before


@EVERY_KIND
def test_parameter_counts_equal_peft(kind, bases):
    full = sum(p.numel() for p in llama(hidden_size=64, intermediate_size=128).parameters())
    assert sum(count_parameter_values(p) for p in bases(kind).parameters()) == full
    ours = get_peft_model(bases(kind), LoraConfig(r=4))
    theirs = peft.get_peft_model(bases(kind), peft.LoraConfig(r=4))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize(("kind", "reentrant"), [("nf4", None), ("nf4", True), ("int8", False)])
def test_prepared_base_equals_peft(kind, reentrant, bases):
    how, prepared, norms = None if reentrant is None else {"use_reentrant": reentrant}, [], []
    for library in (slimtune, peft):
        base = library.prepare_model_for_kbit_training(bases(kind), gradient_checkpointing_kwargs=how)
        assert base.is_gradient_checkpointing
        prepared.append({n: (p.dtype, p.requires_grad) for n, p in base.named_parameters()})
        torch.manual_seed(0)
        model = library.get_peft_model(base, library.LoraConfig(r=2, init_lora_weights=False))
        norms.append(sorted(compute_gradient_norms(model).values()))
    assert prepared[0] == prepared[1]
    assert len(norms[0]) == 8
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_mixed_rows_sums_and_loras(kind, bases):
    model = get_peft_model(prepare_model_for_kbit_training(bases(kind)), LoraConfig(r=2))
    # int8 rounds the inputs, which differ; a weight read from 4 bits is rounded to the base's bf16.
    tolerance = 0.02 if kind == "int8" else 2e-3
    shake(model)
    model.add_adapter("dora", LoraConfig(r=3, use_dora=True))
    model.set_adapter("dora")
    shake(model)
    expected = run(model.eval())
    assert model.to_lora("dora", 64, "plain").error < 1e-5
    model.set_adapter("plain")
    assert (run(model) - expected).abs().max() < tolerance
    model.add_weighted_adapter(["default", "dora"], [1.0, 1.0], "sum", svd_rank=64)
    model.set_adapter("sum")
    with torch.no_grad():
        mixed = model(tokens(), adapter_names=["sum", "__base__"]).logits
    assert (mixed[:1] - run(model, tokens()[:1])).abs().max() < tolerance


def test_base_that_is_not_quantized_is_frozen_in_fp32():
    base = prepare_model_for_kbit_training(llama(dtype=torch.bfloat16))
    assert {(p.dtype, p.requires_grad) for p in base.parameters()} == {(torch.float32, False)}
    assert not base.is_gradient_checkpointing
    with pytest.raises(UsageError, match="adapters"):
        prepare_model_for_kbit_training(get_peft_model(llama(), LoraConfig()))
