"""PEFT's names and modules: every one exists, and a missing one says which is nearest."""

import copy
import importlib
import importlib.util
import inspect
import re

import peft
import pytest
import torch
import transformers as tf
from models_zoo import llama, run, shake
from safetensors.torch import load_file, save_file
from torch import nn

import slimtune
from slimtune import (
    AdaptionPromptConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from slimtune.compat.helpers import check_if_peft_model, rescale_adapter_scale
from slimtune.compat.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from slimtune.compat.public_names import INNER, MODULES, PUBLIC, is_peft_module, map_method_names_to_modules
from slimtune.core.adapters.method_registry import METHODS
from slimtune.errors import ConfigError

LORA = {"r": 4, "target_modules": ["q_proj"]}


def test_every_name_and_module_exists():
    for home, names in [*INNER.items(), *PUBLIC.items()]:
        module = importlib.import_module(f"slimtune.{home}")
        assert [n for n in names if not hasattr(module, n)] == [], home
    for name, home in map_method_names_to_modules().items():
        assert hasattr(importlib.import_module(f"slimtune.{home}"), name), name
    methods = (f"tuners.{name}{part}" for name in METHODS.built_in_names() for part in ("", ".layer"))
    for module in [*MODULES, *filter(is_peft_module, methods)]:
        assert importlib.import_module(f"slimtune.{module}").LoraConfig is LoraConfig


def test_names_of_a_method_are_those_that_peft_has():
    for method in METHODS.built_in_names():
        found = importlib.util.find_spec(f"peft.tuners.{method}")
        assert is_peft_module(f"tuners.{method}") == (found is not None), method
    assert {n for n in map_method_names_to_modules() if n.endswith("Model")} <= {*dir(peft)}
    targets = {n for n in map_method_names_to_modules() if n.startswith("TRANSFORMERS")}
    assert targets - {"TRANSFORMERS_MODELS_TO_TRAINABLETOKENS_TARGET_MODULES_MAPPING"} <= {*dir(peft.utils.constants)}


def test_modules_are_those_of_peft():
    from slimtune.config import PeftConfig
    from slimtune.tuners import ia3, lora
    from slimtune.tuners.lora.layer import Linear, LoraLayer
    from slimtune.utils.other import ModulesToSaveWrapper, _get_submodules

    model = get_peft_model(llama(), LoraConfig(modules_to_save=["lm_head"], **LORA))
    parent, layer, name = _get_submodules(model, "model.layers.0.self_attn.q_proj")
    assert (isinstance(layer, LoraLayer), isinstance(layer, Linear), Linear is lora.Linear) == (True, True, True)
    assert not isinstance(layer, ia3.Linear)
    assert (getattr(parent, name), isinstance(model.lm_head, ModulesToSaveWrapper)) == (layer, True)
    assert issubclass(LoraConfig, PeftConfig)


@pytest.mark.parametrize("line", ["from slimtune import LoraConfi", "from slimtune.utils import infer_devic"])
def test_missing_name_says_the_nearest(line):
    with pytest.raises(ImportError, match=r"'(LoraConfig|infer_device)'"):
        exec(line)


@pytest.mark.parametrize(("name", "near"), [("OftConfig", ["OFTConfig"]), ("FourierFTConfig", []), ("PolyConfig", [])])
def test_config_of_a_method_that_is_missing_names_no_other_method(name, near):
    with pytest.raises(ImportError) as error:
        exec(f"from slimtune import {name}")
    assert re.findall(r"\w+Config", str(error.value)) == [name, *near]


def test_mappings():
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        assert (config.name.upper(), config().peft_type) == (kind, kind)
    shared = PEFT_TYPE_TO_TUNER_MAPPING.keys() & set(peft.PEFT_TYPE_TO_TUNER_MAPPING)
    names = {k: PEFT_TYPE_TO_TUNER_MAPPING[k].__name__ for k in shared}
    assert names == {k: peft.PEFT_TYPE_TO_TUNER_MAPPING[k].__name__ for k in shared}


def test_signature_of_a_config_is_its_fields():
    assert {"r", "lora_alpha", "target_modules", "task_type"} <= inspect.signature(LoraConfig).parameters.keys()
    with pytest.raises(TypeError, match="'rank_'"):
        LoraConfig(rank_=3)


@pytest.mark.parametrize("config", [PrefixTuningConfig, AdaptionPromptConfig])
def test_required_field_is_missing_only_when_attached(config):
    with pytest.raises(ConfigError, match="None"):
        get_peft_model(llama(), config(task_type="CAUSAL_LM"))


def test_rescale_adapter_scale():
    model = shake(get_peft_model(llama(), LoraConfig(**LORA)))
    before = run(model)
    with model.disable_adapter():
        base = run(model)
    with rescale_adapter_scale(model, 0):
        assert torch.equal(run(model), base)
    assert torch.equal(run(model), before)


def test_base_state_dict_round_trip():
    base = llama()
    expected = {k: t.clone() for k, t in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(modules_to_save=["lm_head"], **LORA))
    found = slimtune.get_base_model_state_dict(model)
    assert {k: torch.equal(t, expected[k]) for k, t in found.items()} == dict.fromkeys(expected, True)
    assert slimtune.set_base_model_state_dict(model, {k: t + 1 for k, t in expected.items()}) == ([], [])
    assert torch.equal(model.unload().lm_head.weight, expected["lm_head.weight"] + 1)
    with pytest.raises(RuntimeError, match="Missing key"):
        slimtune.set_base_model_state_dict(get_peft_model(llama(), LoraConfig(**LORA)), {})


def test_load_with_another_device_and_renamed_keys(tmp_path):
    model = shake(get_peft_model(llama(), LoraConfig(**LORA)))
    model.save_pretrained(tmp_path)
    renamed = slimtune.load_peft_weights(tmp_path, key_mapping={r"^model\.layers": "layers"})
    assert next(iter(renamed)).startswith("base_model.model.layers.0")
    assert torch.equal(run(PeftModel.from_pretrained(llama(), tmp_path, torch_device="cpu")), run(model.eval()))
    assert (check_if_peft_model(tmp_path), check_if_peft_model(tmp_path / "x")) == (True, False)
    with pytest.raises(TypeError):
        slimtune.get_peft_model_state_dict(model, adapter="default")


def test_names_of_older_transformers_are_those_of_today(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tf.LlamaConfig(num_key_value_heads=2, vocab_size=128, **sizes)
    vision = tf.CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    base = tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=text, vision_config=vision)).eval()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    older = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model."}
    for new, old in older.items():
        tensors = {k.replace(f"base_model.model.{new}", f"base_model.model.{old}"): t for k, t in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")

    def describe_image(model):
        return model.get_base_model().get_image_features(pixel_values=torch.ones(1, 3, 8, 8)).last_hidden_state

    for home in (PeftModel, peft.PeftModel):
        loaded = home.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert (run(loaded) - run(model)).abs().max() < 1e-6
        assert (describe_image(loaded) - describe_image(model)).abs().max() < 1e-6


def test_resized_embeddings_are_saved_and_loaded(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(resized(tmp_path), LoraConfig(**LORA))
    nn.init.normal_(model.get_input_embeddings().weight)
    with pytest.warns(slimtune.PeftWarning, match="embeddings"):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="resized"):
        peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(resized(tmp_path), tmp_path))
    loaded = PeftModel.from_pretrained(resized(tmp_path), tmp_path)
    ids = torch.tensor([[130, 5]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def resized(folder):
    model = type(llama()).from_pretrained(folder / "base", dtype=torch.float64).eval()
    model.resize_token_embeddings(132, mean_resizing=False)
    return model


@pytest.mark.parametrize("settings", [LORA, {**LORA, "use_dora": True, "modules_to_save": ["lm_head"]}], ids=str)
def test_adapter_on_the_meta_device_is_loaded(settings):
    model = shake(get_peft_model(llama(), LoraConfig(**settings)))
    empty = get_peft_model(llama(), LoraConfig(**settings), low_cpu_mem_usage=True)
    assert {p.device.type for m in empty.adapter_modules("default").values() for p in m.parameters()} == {"meta"}
    slimtune.set_peft_model_state_dict(empty, slimtune.get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert torch.equal(run(empty.eval()), run(model.eval()))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in empty.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("top_p", [0.3, 1.0])
def test_targets_by_condition_number_are_pefts(top_p):
    from peft.helpers import find_kappa_target_modules as theirs

    model = nn.ModuleDict({str(i): nn.Linear(6, 5) for i in range(4)})
    experts = nn.Module()
    experts.down_proj = nn.Parameter(torch.randn(3, 4, 5))
    model["experts"] = experts
    found = slimtune.find_kappa_target_modules(model, top_p, show_progress=False)
    assert found == theirs(model, top_p, show_progress=False)


def test_tensors_decide_where_an_injected_adapter_goes():
    tensors = get_peft_model_state_dict(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))
    config = LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"])
    with pytest.warns(
        RuntimeWarning, match=r"PEFT config contained .*0.self_attn.v_proj.*state_dict contained .*0.*q_p"
    ):
        model = slimtune.inject_adapter_in_model(config, llama(), state_dict=tensors)
    assert get_peft_model_state_dict(model).keys() == tensors.keys()
