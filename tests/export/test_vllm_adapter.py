"""The adapter as vLLM reads it: the same model, refused where vLLM would refuse it, served by a correct command."""

import json
import re
import shlex
import subprocess

import peft
import pytest
import torch
from hand_run import make_run
from method_cases import CASES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from slimtune.core.adapters.peft_model import PeftModel, get_peft_model
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.training.trained_model import load_run
from slimtune.errors import AdapterError, UsageError
from slimtune.export.merge import load_run_for_export
from slimtune.export.vllm import SCRIPT, TEMPLATE, write_vllm_adapter
from slimtune.methods.lora import LoraConfig

IDS = torch.tensor([[1, 5, 9, 200, 31, 7, 64, 2, 90]])
PATTERNS = {"rank_pattern": {"q_proj": 2, "1.mlp.down_proj": 6}, "alpha_pattern": {"up_proj": 3, "q_proj": 5}}
LORAS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": PATTERNS,
    "patterns of rsLoRA": {**PATTERNS, "use_rslora": True},
    "one rank for all by pattern": {"rank_pattern": {".*": 2}},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "MiCA": {"init_lora_weights": "mica"},
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "the ends": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "LoRA+": {"lr_ratio": 4, "freeze_a": True},
}


def export_vllm(run, folder, **options):
    folder.mkdir(exist_ok=True)
    written = write_vllm_adapter(load_run_for_export(run), run, folder, **options)
    return {**to_json_dict(written.facts), "commands": written.commands, "notes": written.notes}


@pytest.fixture
def exported(tmp_path, tiny_folder):
    def make(method=None, *, sections=None, **options):
        run = make_run(tmp_path / "run", tiny_folder, method=method or {}, **(sections or {}))
        return run, tmp_path / "out", export_vllm(run, tmp_path / "out", **options)

    return make


def load_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def log_p(model):
    with torch.no_grad():
        return model(IDS).logits.double().log_softmax(-1)


def as_vllm_reads(out, base):
    """What vLLM computes: W + s · B A, s by r and lora_alpha alone or by the patterns; both must be the same."""
    config = json.loads((out / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter_model.safetensors")
    root = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
    model = load_base(base)
    for key, A in tensors.items():
        if ".lora_A" in key:
            module = model.get_submodule(key.removeprefix("base_model.model.").partition(".lora_A")[0])
            update = tensors[key.replace(".lora_A", ".lora_B")] @ A * (config["lora_alpha"] / root)
            module.weight = torch.nn.Parameter(module.weight + update)
    return model


@pytest.mark.parametrize("name", LORAS)
def test_every_reader_reads_the_trained_model(exported, tiny_folder, name):
    run, out, facts = exported(LORAS[name])
    trained = log_p(load_run(run).model)
    assert (log_p(load_base(tiny_folder)) - trained).abs().max() > 1e-2
    readers = [PeftModel.from_pretrained(load_base(tiny_folder), out)]
    if name != "the ends":  # PEFT lets a LoRA of tied weights change both of them
        readers += [as_vllm_reads(out, tiny_folder), peft.PeftModel.from_pretrained(load_base(tiny_folder), out)]
    assert all((log_p(model) - trained).abs().max() < 1e-4 for model in readers)
    tensors = load_file(out / "adapter_model.safetensors")
    assert facts["rank"] == max(t.shape[0] for n, t in tensors.items() if "_A" in n)


def test_uniform_lora_is_written_unchanged(exported):
    run, out, facts = exported({"use_rslora": True})
    before, after = (load_file(f / "adapter_model.safetensors") for f in (run / "adapter", out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not facts["folded"]
    assert json.loads((out / "adapter_config.json").read_text())["use_rslora"] is True


@pytest.mark.parametrize(
    ("method", "expected"),
    [({**PATTERNS, "use_rslora": True}, (6, 4, 4, False)), ({"init_lora_weights": "pissa"}, (8, 8, 8, False))],
)
def test_other_scales_are_folded(exported, method, expected):
    _, out, facts = exported(method)
    config = json.loads((out / "adapter_config.json").read_text())
    assert facts["folded"]
    assert (facts["rank"], config["r"], config["lora_alpha"], config["use_rslora"]) == expected
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["init_lora_weights"] is True


# --- what vLLM refuses -----------------------------------------------------------------------------------------------

REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora is True: vLLM does not support DoRA", True),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]", False),
    "bias": ({"bias": "all"}, "bias is 'all': vLLM does not load trained biases", False),
    "lora_bias": ({"lora_bias": True}, "lora_bias is True", False),
    "tokens": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is \[1, 2\]", False),
    "several": ({"use_dora": True, "bias": "all"}, r"bias is 'all'.*use_dora", False),
    "rank": ({"rank": 600}, "its rank is 600; vLLM's --max-lora-rank ends at 512", True),
}


@pytest.mark.parametrize(("method", "cause", "convertible"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:.*has no bias")
def test_refused_loras(exported, tmp_path, method, cause, convertible):
    with pytest.raises(AdapterError, match=cause) as caught:
        exported({"rank": 4, **method})
    assert "slimtune merge" in caught.value.hint
    assert ("--convert-to-lora" in caught.value.hint) is convertible
    assert not list((tmp_path / "out").iterdir())


def adapter_of(folder, base, config):
    """An adapter folder of any method, as `save_pretrained` leaves it."""
    model = get_peft_model(load_base(base), config)
    model.active_peft_config.base_model_name_or_path = str(base)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["adalora", "ia3", "bottleneck", "prefix_tuning"])
def test_refused_methods(tmp_path, tiny_folder, name):
    adapter = adapter_of(tmp_path / "adapter", tiny_folder, CASES[name]())
    with pytest.raises(AdapterError, match=f"{name}, .*LoRA") as caught:
        export_vllm(adapter, tmp_path)
    alternative = "slimtune merge" if CASES[name].cls.mergeable else "use it with slimtune generate and slimtune chat"
    assert alternative in caught.value.hint


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
ARCHITECTURES = {
    "gpt2": (GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=320, n_positions=64), ["c_attn"], "serves no LoRA"),
    "qwen2": (Qwen2Config(**SIZES, num_key_value_heads=2, vocab_size=320), ["lm_head"], "accepts no embedding"),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_refused_architectures(tmp_path, tiny_tokenizer, kind):
    config, targets, words = ARCHITECTURES[kind]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
    tiny_tokenizer().save_pretrained(tmp_path / kind)
    adapter = adapter_of(tmp_path / "adapter", tmp_path / kind, LoraConfig(target_modules=targets))
    with pytest.raises(AdapterError, match=words) as caught:
        export_vllm(adapter, tmp_path)
    assert "slimtune merge" in caught.value.hint
    assert "--convert-to-lora" not in caught.value.hint


def test_unknown_architecture_gives_a_note(exported, tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps({**config, "architectures": ["NewForCausalLM"]}))
    assert "NewForCausalLM" in exported()[2]["notes"][0]


@pytest.mark.parametrize("config", [LoraConfig(use_dora=True, target_modules="all-linear"), CASES["ia3"]()])
def test_conversion_to_the_nearest_lora(tmp_path, tiny_folder, config):
    adapter = adapter_of(tmp_path / "adapter", tiny_folder, config)
    trained = log_p(load_run(adapter, dtype="float32").model)
    apart = []
    for rank in (4, 32):
        out = tmp_path / f"out{rank}"
        found = export_vllm(adapter, out, convert_to_lora=rank, dtype="float32")
        apart.append((log_p(as_vllm_reads(out, tiny_folder)) - trained).abs().max().item())
        assert found["conversion"]["method"] == config.name
        assert found["rank"] == found["conversion"]["rank"] == rank
    assert apart[1] < 1e-4 < apart[0]
    assert found["conversion"]["error"] < 1e-5


# --- the command -----------------------------------------------------------------------------------------------------


def parse_lora_module(item):
    """vLLM's own rule for what follows --lora-modules."""
    if "=" in item and "," not in item:
        return tuple(item.split("=", 1))
    found = json.loads(item)
    return found["name"], found["path"]


@pytest.mark.parametrize("folder", ["out", "it's a, b=c", 'a\nb $(touch x) "c"', "-o"])
def test_command_survives_the_shell(tmp_path, tiny_folder, folder):
    run, out = make_run(tmp_path / "run", tiny_folder), tmp_path / folder
    facts = export_vllm(run, out, name="mine")
    words = shlex.split(facts["commands"][0])
    assert words[:3] == ["vllm", "serve", str(tiny_folder)]
    assert words[3:] == facts["arguments"][1:]
    options = dict(zip(words[3::2], words[4::2], strict=False))
    assert (options["--dtype"], words[words.index("--max-lora-rank") + 1]) == ("float32", "8")
    assert parse_lora_module(words[words.index("--lora-modules") + 1]) == ("mine", str(out))
    # The script gives the same from wherever the folder lies, to whatever `vllm` is.
    moved, fake = out.rename(tmp_path / "moved, = 'there'"), tmp_path / "bin"
    fake.mkdir()
    (fake / "vllm").write_text('#!/bin/sh\npwd\nfor word; do printf "%s\\0" "$word"; done\n')
    (fake / "vllm").chmod(0o755)
    script = ["sh", moved / SCRIPT, "--port", "8001"]
    ran = subprocess.run(script, env={"PATH": f"{fake}:/usr/bin:/bin"}, capture_output=True, text=True)
    place, _, arguments = ran.stdout.partition("\n")
    given = arguments.split("\0")[:-1]
    assert place == str(moved)
    assert given[given.index("--lora-modules") + 1] == "mine=."
    assert given[:2] == ["serve", str(tiny_folder)]
    assert given[-2:] == ["--port", "8001"]
    assert not (tmp_path / "x").exists()


def test_command_names_rank_and_final_folder(exported, tmp_path):
    _, out, facts = exported({"rank": 20}, final_path=tmp_path / "later")
    assert facts["max_lora_rank"] == 32
    assert facts["arguments"][-1] == f"later={tmp_path / 'later'}"
    assert not (out / TEMPLATE).exists()


def test_names(exported):
    run, out, facts = exported()
    assert facts["base_name"] == "tiny-base"
    for name in ("a=b", "a,b", "", "two words", "-x", "a\nb"):
        with pytest.raises(UsageError, match="name"):
            export_vllm(run, out, name=name)
    with pytest.raises(UsageError, match="'tiny-base'"):
        export_vllm(run, out, name="tiny-base")
    assert export_vllm(run, out, final_path=out.with_name("tiny-base"))["name"] == "tiny-base-tuned"


def test_own_chat_template(exported, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    _, out, facts = exported(sections={"data": {"chat_template": str(template)}})
    assert (out / TEMPLATE).read_text() == template.read_text()
    assert facts["arguments"][-2:] == ["--chat-template", f"{out}/{TEMPLATE}"]
    assert f"./{TEMPLATE}" in (out / SCRIPT).read_text()


def test_dtype(exported):
    run, out, facts = exported(sections={"model": {"dtype": "float64"}})
    assert facts["dtype"] == "float32"
    assert re.search(r"float64\b.*float32", facts["notes"][0])
    (run / "result.json").write_text(json.dumps({"dtype": "bfloat16"}))
    facts = export_vllm(run, out)
    assert (facts["dtype"], len(facts["notes"])) == ("bfloat16", 1)
    assert "bfloat16" in export_vllm(run, out, dtype="float32")["notes"][0]
    with pytest.raises(UsageError, match="'int8'"):
        export_vllm(run, out, dtype="int8")
