"""Adapters on bases in NF4 and int8; needs bitsandbytes, and is skipped by name without it."""

import copy
from importlib.util import find_spec

import peft
import pytest
import torch
import transformers as tf
from models_zoo import llama, run, tokens

import slimtune
from slimtune import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from slimtune.adapters.base import MergeUnsupported
from slimtune.adapters.quantized import count_values
from slimtune.errors import UsageError
from slimtune.utils.linear_layers import get_weight, is_quantized

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4-twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                  "bnb_4bit_compute_dtype": torch.float32},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4-in-bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32,
                    "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}  # fmt: skip
EVERY = pytest.mark.parametrize("kind", sorted(KINDS))
METHODS = [
    ("LoraConfig", {"r": 4, "target_modules": "all-linear"}),
    ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "v_proj"]}),
    ("IA3Config", {}),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Make a small Llama in a kind of quantization: `bases(kind)`."""
    folder = tmp_path_factory.mktemp("base")
    llama(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128).save_pretrained(folder)

    def make(kind, dtype=torch.bfloat16):
        settings = tf.BitsAndBytesConfig(**KINDS[kind])
        model = tf.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, dtype=dtype, device_map="cpu"
        )
        return model.eval()

    return make


def there(cls):
    if not hasattr(slimtune, cls):
        pytest.skip(f"slimtune has no {cls}")
    return getattr(slimtune, cls)


def stir(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.dtype) * 0.1)


@needs_bitsandbytes
@EVERY
def test_the_weight_is_what_the_layer_multiplies_by(kind, bases):
    model = bases(kind, torch.float32)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    for name in ("q_proj", "k_proj"):
        layer = model.model.layers[1].self_attn.get_submodule(name)
        assert is_quantized(layer)
        # The first call moves int8's scales; in evaluation mode some CPUs lay 4 bits out anew and round to bf16.
        for training in (True, True, False, False):
            layer.train(training)
            weight = get_weight(layer).float()
            assert weight.shape == (layer.out_features, layer.in_features)
            with torch.no_grad():
                y = layer(x.clone())
            # int8 rounds the inputs, too: to 127 steps of the largest in a row.
            room = 0.02 if kind == "int8" else 1e-5 if training else 0.005
            assert (y - x @ weight.t()).norm() / y.norm() < room


@needs_bitsandbytes
@EVERY
@pytest.mark.parametrize(("cls", "settings"), METHODS, ids=str)
def test_an_adapter_trains_saves_and_leaves(kind, cls, settings, bases, tmp_path):
    config = there(cls)(**settings)
    base = prepare_model_for_kbit_training(bases(kind), use_gradient_checkpointing=False)
    before = {n: p.detach().clone().view(torch.uint8) for n, p in base.named_parameters()}
    plain = run(base)
    model = get_peft_model(base, config)
    assert (run(model) - plain).abs().max() < 1e-6
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    model.train()
    for _ in range(4):
        losses.append(model(input_ids=tokens(), labels=tokens()).loss)
        losses[-1].backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval()
    expected = run(model)
    assert (expected - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(prepare_model_for_kbit_training(bases(kind)), tmp_path)
    assert torch.equal(run(again), expected)
    theirs = peft.PeftModel.from_pretrained(peft.prepare_model_for_kbit_training(bases(kind)), tmp_path)
    assert (run(theirs.train()) - run(model.train())).abs().max() < 1e-4
    model.eval()
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    with pytest.raises(MergeUnsupported, match="is quantized: load the base in 16 or 32 bits"):
        model.merge_adapter()
    assert torch.equal(run(model), expected)
    if kind != "int8":  # its scales have moved, and its layers hold notes of their last call
        twin = copy.deepcopy(model)
        assert torch.equal(run(twin), expected)
    unloaded = model.unload()
    assert torch.equal(run(unloaded), plain)
    assert all(torch.equal(p.view(torch.uint8), before[n]) for n, p in unloaded.named_parameters())


@needs_bitsandbytes
@pytest.mark.parametrize("first", ["eval", "attach"])
def test_gradients_pass_through_a_base_that_was_evaluated(first, bases, tmp_path):
    def grads(model):
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        return {n: p.grad.norm().item() for n, p in model.named_parameters() if p.requires_grad}

    def made(before=lambda base: None):
        base = bases("nf4")
        before(base)
        torch.manual_seed(0)
        return get_peft_model(base, LoraConfig(r=2, init_lora_weights=False))

    expected = grads(made())
    model = made(lambda base: run(base.eval())) if first == "eval" else made()
    if first == "attach":
        run(model.eval())
    assert grads(model) == pytest.approx(expected, rel=0.02)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bases("nf4"), tmp_path)
    run(loaded)
    loaded.set_adapter("default")
    assert grads(loaded) == pytest.approx(expected, rel=0.02)
    kept = {n: vars(m).get("support_avx512bf16_for_cpu") for n, m in bases("nf4").named_modules()}
    assert {n: vars(m).get("support_avx512bf16_for_cpu") for n, m in loaded.unload().named_modules()} == kept


@needs_bitsandbytes
@EVERY
def test_parameters_are_counted_as_peft_counts_them(kind, bases):
    ours = get_peft_model(bases(kind), LoraConfig(r=4))
    theirs = peft.get_peft_model(bases(kind), peft.LoraConfig(r=4))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    full = llama(hidden_size=64, intermediate_size=128)
    assert sum(count_values(p) for p in bases(kind).parameters()) == sum(p.numel() for p in full.parameters())


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_prepared_base_is_pefts(kind, reentrant, bases):
    how = None if reentrant is None else {"use_reentrant": reentrant}
    ours = prepare_model_for_kbit_training(bases(kind), gradient_checkpointing_kwargs=how)
    theirs = peft.prepare_model_for_kbit_training(bases(kind), gradient_checkpointing_kwargs=how)
    assert {n: (p.dtype, p.requires_grad) for n, p in ours.named_parameters()} == {
        n: (p.dtype, p.requires_grad) for n, p in theirs.named_parameters()
    }
    assert ours.is_gradient_checkpointing
    assert theirs.is_gradient_checkpointing
    grads = []
    for home, base in ((slimtune, ours), (peft, theirs)):
        torch.manual_seed(0)
        model = home.get_peft_model(base, home.LoraConfig(r=2, init_lora_weights=False)).train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        grads.append(sorted(p.grad.norm().item() for p in model.parameters() if p.grad is not None))
    assert len(grads[0]) == 8
    assert grads[0] == pytest.approx(grads[1], rel=1e-3)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_rows_sums_and_loras_on_a_quantized_base(kind, bases):
    model = get_peft_model(prepare_model_for_kbit_training(bases(kind)), LoraConfig(r=2))
    # int8 rounds the inputs, which differ; a weight read from 4 bits is rounded to the base's bf16.
    near = 0.02 if kind == "int8" else 2e-3
    stir(model)
    model.add_adapter("dora", LoraConfig(r=3, use_dora=True))
    model.set_adapter("dora")
    stir(model)
    said = run(model.eval())
    assert model.to_lora("dora", 64, "plain").error < 1e-5
    model.set_adapter("plain")
    assert (run(model) - said).abs().max() < near
    model.add_weighted_adapter(["default", "dora"], [1.0, 1.0], "sum", svd_rank=64)
    model.set_adapter("sum")
    with torch.no_grad():
        mixed = model(tokens(), adapter_names=["sum", "__base__"]).logits
        assert (mixed[:1] - model(tokens()[:1]).logits).abs().max() < near


def test_a_base_that_is_not_quantized_is_frozen_and_put_into_fp32():
    base = prepare_model_for_kbit_training(llama(dtype=torch.bfloat16))
    assert {(p.dtype, p.requires_grad) for p in base.parameters()} == {(torch.float32, False)}
    assert not base.is_gradient_checkpointing
    with pytest.raises(UsageError, match="already has adapters"):
        prepare_model_for_kbit_training(get_peft_model(llama(), LoraConfig()))
