"""Bottleneck adapters: the `adapters` library's numbers, and the adapted modules of each architecture."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as tf
from models_zoo import bert_classifier, distilbert_classifier, gpt2, llama, run, shake, t5
from safetensors import safe_open
from tiny_families import build

from slimtune import BottleneckConfig, get_peft_model, set_peft_model_state_dict
from slimtune.errors import ConfigError, TargetError

GOLDEN = Path(__file__).parent.parent / "golden" / "bottleneck_golden.safetensors"
opt, neox, bloom = (partial(build, family, num_hidden_layers=2) for family in ("opt", "gpt_neox", "bloom"))


def adapt(model, **settings):
    return get_peft_model(model, BottleneckConfig(**settings))


def adapted_modules(model, **settings):
    return adapt(model, **settings).match_report().adapted


@pytest.mark.parametrize("case", ["houlsby", "pfeiffer", "parallel", "mixed"])
def test_logits_equal_the_adapters_library(case):
    with safe_open(GOLDEN, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        about = {k: json.loads(v) for k, v in file.metadata().items()}
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**about["sizes"]))
    base.load_state_dict({k.removeprefix("base."): t for k, t in tensors.items() if k.startswith("base.")})
    base = base.double().eval()
    plain = run(base, tensors["ids"])
    model = adapt(base, **about["cases"][case]).eval()
    own = {k.removeprefix(f"{case}/"): t for k, t in tensors.items() if k.startswith(f"{case}/base_model.")}
    set_peft_model_state_dict(model, own)
    expected = tensors[f"{case}/logits"]
    assert (run(model, tensors["ids"]) - expected).abs().max() < 1e-9
    assert (plain - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("base", "layers", "attention", "feed_forward"),
    [
        (llama, "model.layers", "self_attn", "mlp"),
        (gpt2, "transformer.h", "attn", "mlp"),
        (neox, "gpt_neox.layers", "attention", "mlp"),
        (opt, "model.decoder.layers", "self_attn", "fc2"),
        # Their sub-layers add the residual themselves: the adapter is before that.
        (bloom, "transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
        (bert_classifier, "bert.encoder.layer", "attention.output.dense", "output.dense"),
        (distilbert_classifier, "distilbert.transformer.layer", "attention", "ffn"),
    ],
)
def test_every_layer_has_its_adapters(base, layers, attention, feed_forward):
    both = tuple(f"{layers}.{i}.{name}" for i in range(2) for name in (attention, feed_forward))
    assert adapted_modules(base(), style="houlsby") == both
    assert adapted_modules(base(), style="pfeiffer") == (f"{layers}.0", f"{layers}.1")
    if base in (opt, bloom, bert_classifier):
        with pytest.raises(TargetError, match=r"\.0\b.*module"):
            adapt(base(), style="parallel")


def test_encoder_and_decoder():
    assert len(adapted_modules(t5(), style="houlsby")) == 8
    model = shake(adapt(t5(), style="parallel").eval())
    assert (run(model) - run(t5())).abs().max() > 1e-3


def test_unknown_layers_are_refused():
    mamba = tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=128))
    with pytest.raises(TargetError, match=r"\b0 .*\b2 .*MambaForCausalLM"):
        adapt(mamba)
    model = llama()
    del model.model.layers[1].mlp
    with pytest.raises(TargetError, match=r"model\.layers\.1 .*feed-forward"):
        adapt(model, style="houlsby")


def test_layers_are_chosen_or_left_out():
    assert adapted_modules(llama(layers=3), layers_to_transform=[1]) == ("model.layers.1",)
    assert adapted_modules(llama(layers=3), leave_out=[0, 2]) == ("model.layers.1",)
    with pytest.raises(TargetError, match="leave_out: '3'"):
        adapt(llama(layers=3), leave_out=[3])


def test_target_modules_are_adapted_as_given():
    model = adapt(llama(), target_modules=["mlp", "k_proj"], bottleneck_size=3).eval()
    own = dict(model.named_parameters())
    at = "model.layers.0.self_attn.k_proj.adapters.default.adapter"
    assert (own[f"{at}_down.weight"].shape, own[f"{at}_up.weight"].shape) == ((3, 16), (16, 3))
    assert len(model.match_report().adapted) == 4


def test_each_layer_has_its_own_size():
    model = adapt(llama(), reduction_factor={1: 4, "default": 32})
    sizes = [t.shape[0] for n, t in model.named_parameters() if n.endswith("adapter_down.weight")]
    assert sizes == [1, 8]
    with pytest.raises(TargetError, match=r"'7'.*\n  expected: .*'0', '1'"):
        adapt(llama(), reduction_factor={7: 4, "default": 32})
    with pytest.raises(ConfigError, match=r"reduction_factor.* 1\b"):
        adapt(llama(), reduction_factor={0: 4})


def test_fields_override_the_style():
    config = BottleneckConfig(style="pfeiffer", mh_adapter=True, scaling=0.5)
    assert (config.mh_adapter, config.output_adapter, config.original_ln_before) == (True, True, False)
    assert (config.non_linearity, config.scaling, config.reduction_factor) == ("relu", 0.5, 16)
    assert BottleneckConfig(bottleneck_size=8).reduction_factor is None
    # Fields of the library that are missing here are accepted at their defaults.
    assert BottleneckConfig(phm_layer=False, inv_adapter=None, original_ln_after=True) == BottleneckConfig()


def test_bert_init_changes_the_model_a_little():
    torch.manual_seed(0)
    assert 1e-8 < (run(adapt(llama(), init_weights="bert").eval()) - run(llama())).abs().max() < 1e-2
