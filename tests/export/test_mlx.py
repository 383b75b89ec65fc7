"""Runs as adapters of mlx-lm and as MLX folders, checked inside mlx-lm; and what mlx-lm cannot hold."""

import json
from pathlib import Path

import pytest
import torch
from hand_run import save_adapter_of
from mlx_bases import FAMILIES, save_base
from safetensors.torch import load_file, save_file

from slimtune import IA3Config, LoraConfig
from slimtune.errors import AdapterError, ModelError, UsageError
from slimtune.export import expected_logps as reference
from slimtune.export.exporter import export
from slimtune.export.verify import verify
from slimtune.extras.mlx_names import add_fields_mlx_lm_reads, select_layers_and_keys
from slimtune.generation.mlx_engine import MlxEngine, is_mlx_lm_installed

needs_mlx = pytest.mark.skipif(not is_mlx_lm_installed(), reason="mlx-lm is not installed")
pytestmark = pytest.mark.slow  # each process that tests mlx-lm imports it for 10 s
LORA = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def make_base(tmp_path_factory, tiny_tokenizer):
    """Make a tiny base of a family as transformers saves it, once each."""
    made = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save_base(family, tmp_path_factory.mktemp(family), tiny_tokenizer())
        return made[family]

    return make


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    for name, value in {"MAX_TOKENS": 48, "MAX_POSITIONS": 100, "MAX_ANSWERS": 1, "ANSWER_TOKENS": 6}.items():
        monkeypatch.setattr(reference, name, value)


@pytest.mark.slow
@needs_mlx
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("more", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapter_computes_in_mlx_lm_what_was_trained(family, more, make_base, tmp_path):
    run = save_adapter_of(make_base(family), tmp_path / "run", LoraConfig(**LORA, **more))
    found = export(run, "mlx", tmp_path / "out")
    assert found.check.passed
    assert found.check.max_difference < 1e-4
    assert found.check.effect > 0.05
    assert found.check.prompts_equal == found.check.prompts > 0


@needs_mlx
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_folder_computes_in_mlx_lm_what_was_trained(family, make_base, tmp_path):
    run = save_adapter_of(make_base(family), tmp_path / "run", LoraConfig(**LORA))
    found = export(run, "mlx", tmp_path / "out", {"merged": True, "precision": "f32"})
    assert found.check.passed
    assert found.check.max_difference < 1e-4
    assert found.check.effect > 0.05


@needs_mlx
def test_text_part_of_a_model_that_sees_images(make_base, tmp_path):
    text = {**LORA, "target_modules": r"model\.language_model\..*_proj"}
    run = save_adapter_of(make_base("gemma3"), tmp_path / "run", LoraConfig(**text))
    for number, options in enumerate([{}, {"merged": True, "precision": "f32"}]):
        found = export(run, "mlx", tmp_path / f"out{number}", options)
        assert found.check.max_difference < 1e-4
        assert found.check.effect > 0.05
    both = save_adapter_of(make_base("gemma3"), tmp_path / "both", LoraConfig(**LORA))
    with pytest.raises(AdapterError):
        export(both, "mlx", tmp_path / "out")


@needs_mlx
@pytest.mark.parametrize(("precision", "bits"), [("8bit", 8), ("4bit", 4)])
def test_quantized_folder_has_the_effect_and_says_how_it_is_quantized(precision, bits, make_base, tmp_path):
    run = save_adapter_of(make_base("llama"), tmp_path / "run", LoraConfig(**LORA))
    options = {"merged": True, "precision": precision, "group_size": 32}
    found = export(run, "mlx", tmp_path / "out", options)
    assert found.check.passed
    assert (found.check.base_mean_difference is not None) == (bits == 4)  # which is judged beside the base
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {k: config["quantization"][k] for k in ("bits", "group_size")} == {"bits": bits, "group_size": 32}
    assert config["rope_theta"] == 50_000.0
    assert {"tokenizer.json", "chat_template.jinja", "model.safetensors"} <= set(found.files)
    assert load_file(tmp_path / "out/model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint32


@needs_mlx
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2, 3]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    ],
    ids=["other layers", "last layers", "patterns", "pissa", "ends"],
)
def test_what_one_rank_and_the_last_layers_do_not_say_arrives_as_well(settings, make_base, tmp_path):
    run = save_adapter_of(make_base("mistral"), tmp_path / "run", LoraConfig(**{**LORA, **settings}))
    found = export(run, "mlx", tmp_path / "out")
    assert found.check.passed
    assert found.check.max_difference < 1e-4
    assert found.check.effect > 0.01


def test_layers_and_keys():
    last = [f"model.layers.{i}.{key}" for i in (2, 3) for key in ("self_attn.q_proj", "mlp.up_proj")]
    assert select_layers_and_keys([*last, "lm_head"], 4) == (2, ["self_attn.q_proj", "mlp.up_proj", "lm_head"])
    assert select_layers_and_keys(last, 5) == (5, last)
    assert select_layers_and_keys(last[:-1], 4) == (4, last[:-1])


@needs_mlx
def test_damaged_matrix_is_named_and_a_wrong_base_found(make_base, tmp_path):
    run = save_adapter_of(make_base("llama"), tmp_path / "run", LoraConfig(**LORA))
    export(run, "mlx", tmp_path / "out")
    file = tmp_path / "out/adapters.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.lora_b"] *= 1.01
    save_file(tensors, file)
    (check,) = verify(tmp_path / "out").checks
    assert check.passed is False
    assert "up_proj" in check.reason


@needs_mlx
def test_base_with_another_rope_theta_is_found(make_base, tmp_path):
    run = save_adapter_of(make_base("llama"), tmp_path / "run", LoraConfig(**LORA))
    export(run, "mlx", tmp_path / "out")
    file = tmp_path / "out/base/config.json"  # as transformers 5 writes it, mlx-lm takes 10,000
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "rope_theta"}))
    (check,) = verify(tmp_path / "out").checks
    assert (check.passed, check.cause) == (False, "another-base")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (IA3Config(task_type="CAUSAL_LM"), "--merged"),
        (LoraConfig(**LORA, modules_to_save=["lm_head"]), "lm_head"),
        (LoraConfig(**{**LORA, "target_modules": ["embed_tokens"]}), "embed_tokens"),
        (LoraConfig(**LORA, bias="lora_only"), "biases"),
    ],
    ids=["ia3", "modules_to_save", "tied embedding", "bias"],
)
def test_what_mlx_lm_cannot_hold_is_refused_by_name(config, found, make_base, tmp_path):
    run = save_adapter_of(make_base("qwen2"), tmp_path / "run", config)
    with pytest.raises(AdapterError) as error:
        export(run, "mlx", tmp_path / "out")
    assert found in f"{error.value}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "4bit"},
        {"merged": True, "precision": "4bitt"},
        {"merged": True, "group_size": 64},
        {"merged": True, "precision": "4bit", "group_size": 48},
        {"merged": True, "convert_to_lora": 8},
    ],
)
def test_impossible_options(options, tmp_path):
    with pytest.raises(UsageError):
        export(tmp_path, "mlx", tmp_path / "out", options)


def test_another_method_as_the_nearest_lora(make_base, tmp_path):
    run = save_adapter_of(make_base("llama"), tmp_path / "run", IA3Config(task_type="CAUSAL_LM"))
    found = export(run, "mlx", tmp_path / "out", {"convert_to_lora": 0.99}, verify=False)
    assert 0 < found.facts["conversion"]["error"] < 0.15


def test_without_mlx_lm_an_adapter_is_written_unproven_and_few_bits_are_refused(make_base, tmp_path, monkeypatch):
    monkeypatch.setattr("slimtune.generation.mlx_engine.is_mlx_lm_installed", lambda: False)
    monkeypatch.setattr("slimtune.export.mlx.is_mlx_lm_installed", lambda: False)
    run = save_adapter_of(make_base("llama"), tmp_path / "run", LoraConfig(**LORA))
    assert export(run, "mlx", tmp_path / "adapter").check.passed is None
    assert export(run, "mlx", tmp_path / "folder", {"merged": True}).check.passed is None
    with pytest.raises(ModelError):
        export(run, "mlx", tmp_path / "small", {"merged": True, "precision": "4bit"})
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "type": "llama3", "factor": 8.0}},
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            },
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3},
        ),
    ],
    ids=["default", "llama3", "gemma3"],
)
def test_config_has_the_names_that_mlx_lm_reads(config, expected):
    for fields in (add_fields_mlx_lm_reads(config), add_fields_mlx_lm_reads({"text_config": config})["text_config"]):
        assert {name: fields[name] for name in expected} == expected
        assert fields["rope_parameters"] == config["rope_parameters"]


@needs_mlx
def test_factor_that_mlx_lm_rounds_is_no_difference(make_base, tmp_path, monkeypatch, slimtune_json):
    """√96 of this base's embeddings is 9.8125 there, 9.798 in float32: 0.02 nats, which no adapter has to do with."""
    run = save_adapter_of(make_base("gemma3_text"), tmp_path / "run", LoraConfig(**LORA))
    export(run, "mlx", tmp_path / "whole", {"merged": True, "precision": "f32"}, verify=False)
    (found,) = slimtune_json("check", run, "--mlx", tmp_path / "whole")["checks"]
    assert (found["cause"], found["max_difference"] < 1e-4) == ("applied", True)
    monkeypatch.setattr(MlxEngine, "rounds_embedding_scale", False)
    (found,) = slimtune_json("check", run, "--mlx", tmp_path / "whole")["checks"]
    assert (found["cause"], found["max_difference"] > 1e-3) == ("applied", True)


@pytest.mark.slow
@needs_mlx
def test_check_asks_mlx_lm_about_a_folder(make_base, tmp_path, slimtune, slimtune_json):
    run = save_adapter_of(make_base("qwen3"), tmp_path / "run", LoraConfig(**LORA))
    export(run, "mlx", tmp_path / "beside", verify=False)
    export(run, "mlx", tmp_path / "whole", {"merged": True}, verify=False)
    for folder in (tmp_path / "beside", tmp_path / "whole"):
        found = slimtune_json("check", run, "--mlx", folder)
        assert (found["passed"], found["checks"][0]["cause"]) == (True, "applied")
    config = tmp_path / "beside/adapter_config.json"
    values = json.loads(config.read_text())
    values["lora_parameters"]["scale"] *= 2
    config.write_text(json.dumps(values))
    done = slimtune("check", run, "--mlx", tmp_path / "beside", "--json")
    assert done.exit_code == 1
    (found,) = json.loads(done.stdout)["checks"]
    assert (found["cause"], found["scale"]) == ("another-scale", pytest.approx(2, rel=0.05))
    assert slimtune("check", run, "--mlx", tmp_path / "nowhere").exit_code == 2
    assert slimtune("check", run, "--mlx", tmp_path / "whole", "--merged", tmp_path / "whole").exit_code == 2
