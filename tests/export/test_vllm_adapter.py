"""The adapter as vLLM reads it: the same model, refused where vLLM would refuse it, served by a correct command."""

import json
import shlex
import subprocess

import peft
import pytest
import torch
from hand_run import make_run
from methods.cases import CASES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from slimtune.adapters.model import PeftModel, get_peft_model
from slimtune.errors import AdapterError, UsageError
from slimtune.export.merge import load_trained
from slimtune.export.vllm import SCRIPT, TEMPLATE, is_served_unchanged, write_vllm_adapter
from slimtune.methods.lora import LoraConfig
from slimtune.setup import load_run


def export_vllm(run, folder, **options):
    return write_vllm_adapter(load_trained(run), run, folder, **options)


IDS = torch.tensor([[1, 5, 9, 200, 31, 7, 64, 2, 90]])
PATTERNS = {"rank_pattern": {"q_proj": 2, "1.mlp.down_proj": 6}, "alpha_pattern": {"up_proj": 3, "q_proj": 5}}
SHIPS = {
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


@pytest.fixture
def exported(tmp_path, tiny_folder):
    def make(method=None, *, base=tiny_folder, change=lambda model: None, more=None, **asked):
        run = make_run(tmp_path / "run", base, method=method or {}, change=change, **(more or {}))
        out = tmp_path / "out"
        out.mkdir()
        return run, out, export_vllm(run, out, **asked)

    return make


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.double().log_softmax(-1)


def as_vllm_reads(out, base):
    """What vLLM computes: W + s · B A, s by r and lora_alpha alone or by the patterns; both must be the same."""
    config = json.loads((out / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter_model.safetensors")
    root = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for key, A in tensors.items():
        if ".lora_A" in key:
            module = model.get_submodule(key.removeprefix("base_model.model.").partition(".lora_A")[0])
            update = tensors[key.replace(".lora_A", ".lora_B")] @ A * (config["lora_alpha"] / root)
            module.weight = torch.nn.Parameter(module.weight + update)
    return model


@pytest.mark.parametrize("method", SHIPS.values(), ids=SHIPS)
def test_every_reader_reads_the_trained_model(exported, tiny_folder, method):
    run, out, facts = exported(method)
    trained = logits(load_run(run).model)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    assert (logits(base) - trained).abs().max() > 1e-2
    if method is not SHIPS["the ends"]:
        assert (logits(as_vllm_reads(out, tiny_folder)) - trained).abs().max() < 1e-4
        # PEFT lets a LoRA of tied weights change both of them.
        theirs = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), out
        )
        assert (logits(theirs) - trained).abs().max() < 1e-4
    assert (logits(PeftModel.from_pretrained(base, out)) - trained).abs().max() < 1e-4
    assert facts["rank"] == max(
        t.shape[0] for n, t in load_file(out / "adapter_model.safetensors").items() if "_A" in n
    )


def test_a_uniform_lora_is_written_unchanged_and_other_scales_are_folded(exported, tmp_path):
    run, out, facts = exported({"use_rslora": True})
    before, after = (load_file(f / "adapter_model.safetensors") for f in (run / "adapter", out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not facts["folded"]
    assert json.loads((out / "adapter_config.json").read_text())["use_rslora"] is True
    for name, method, expected in (
        ("patterns", {**PATTERNS, "use_rslora": True}, (6, 4, 4, False)),
        ("pissa", {"init_lora_weights": "pissa"}, (8, 8, 8, False)),
    ):
        (tmp_path / name).mkdir()
        run = make_run(tmp_path / f"{name}-run", tmp_path / "tiny-base", method=method)
        facts = export_vllm(run, tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert facts["folded"]
        assert (facts["rank"], config["r"], config["lora_alpha"], config["use_rslora"]) == expected
        assert config["rank_pattern"] == config["alpha_pattern"]
        assert config["init_lora_weights"] is True


REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora is True: vLLM does not support DoRA", True),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]", False),
    "bias": ({"bias": "all"}, "bias is 'all': vLLM does not load trained biases", False),
    "lora_bias": ({"lora_bias": True}, "lora_bias is True", False),
    "tokens": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is \[1, 2\]", False),
    "several": ({"use_dora": True, "bias": "all"}, r"bias is 'all'.*use_dora", False),
    "rank": ({"r": 600}, "its rank is 600; vLLM's --max-lora-rank ends at 512", True),
}


@pytest.mark.parametrize(("method", "cause", "convertible"), REFUSED.values(), ids=REFUSED)
def test_what_vllm_refuses_is_refused_with_the_alternatives(exported, tmp_path, method, cause, convertible):
    given = {"r": 4, **method}
    with pytest.raises(AdapterError, match=cause) as caught:
        exported({"rank": given.pop("r"), **given})
    assert "slimtune merge" in caught.value.hint
    assert ("--convert-to-lora" in caught.value.hint) is convertible
    assert not list((tmp_path / "out").iterdir())


def adapter_of(folder, base, config):
    """An adapter folder of any method, as `save_pretrained` leaves it."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    model.active_peft_config.base_model_name_or_path = str(base)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["adalora", "ia3", "bottleneck", "prefix_tuning"])
def test_other_methods_are_refused_with_the_alternatives(tmp_path, tiny_folder, name):
    case = CASES[name]
    adapter = adapter_of(tmp_path / "adapter", tiny_folder, case())
    with pytest.raises(AdapterError, match=f"its method is {name}, and vLLM only loads LoRA") as caught:
        export_vllm(adapter, tmp_path)
    assert ("slimtune merge" in caught.value.hint) is case.cls.mergeable
    if not case.cls.mergeable:
        assert caught.value.hint == "use it with slimtune generate and slimtune chat: it does not change weights"


@pytest.mark.parametrize("config", [LoraConfig(use_dora=True, target_modules="all-linear"), CASES["ia3"]()])
def test_conversion_to_the_nearest_lora(tmp_path, tiny_folder, config):
    adapter = adapter_of(tmp_path / "adapter", tiny_folder, config)
    trained = logits(load_run(adapter, dtype="float32").model)
    apart = []
    for rank in (4, 32):
        out = tmp_path / f"out{rank}"
        out.mkdir()
        found = export_vllm(adapter, out, convert_to_lora=rank, dtype="float32")
        apart.append((logits(as_vllm_reads(out, tiny_folder)) - trained).abs().max().item())
        assert found["conversion"]["method"] == config.name
        assert found["rank"] == found["conversion"]["rank"] == rank
    assert apart[1] < 1e-4 < apart[0]
    assert found["conversion"]["error"] < 1e-5


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
ARCHITECTURES = {
    "gpt2": (GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=320, n_positions=64), ["c_attn"], "serves no LoRA"),
    "qwen2": (Qwen2Config(**SIZES, num_key_value_heads=2, vocab_size=320), ["lm_head"], "accepts no embedding"),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_architecture_that_accepts_no_such_lora(tmp_path, tiny_tokenizer, kind):
    config, targets, words = ARCHITECTURES[kind]
    base = tmp_path / kind
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    adapter = adapter_of(tmp_path / "adapter", base, LoraConfig(target_modules=targets))
    with pytest.raises(AdapterError, match=words) as caught:
        export_vllm(adapter, tmp_path)
    assert "slimtune merge" in caught.value.hint
    assert "--convert-to-lora" not in caught.value.hint


def test_an_unknown_architecture_gives_a_warning(exported, tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps({**config, "architectures": ["NewForCausalLM"]}))
    _, _, facts = exported()
    assert "has no class of its own for a NewForCausalLM" in facts["notes"][0]


# --- the line --------------------------------------------------------------------------------------------------------


def parse_lora_module(item):
    """vLLM's own rule for what follows --lora-modules."""
    if "=" in item and "," not in item:
        return tuple(item.split("=", 1))
    found = json.loads(item)
    return found["name"], found["path"]


@pytest.mark.parametrize("folder", ["out", "it's a, b=c", 'a\nb $(touch x) "c"', "-o"])
def test_the_command_survives_the_shell_whatever_the_path(tmp_path, tiny_folder, folder):
    run = make_run(tmp_path / "run", tiny_folder)
    out = tmp_path / folder
    out.mkdir()
    facts = export_vllm(run, out, name="mine")
    words = shlex.split(facts["commands"][0])
    assert words[:3] == ["vllm", "serve", str(tiny_folder)]
    assert words[3:] == facts["arguments"][1:]
    options = dict(zip(words[3::2], words[4::2], strict=False))
    assert options["--dtype"] == "float32"
    assert parse_lora_module(words[words.index("--lora-modules") + 1]) == ("mine", str(out))
    assert words[words.index("--max-lora-rank") + 1] == "8"
    # The script gives the same from wherever the folder lies, to whatever `vllm` is.
    moved = out.rename(tmp_path / "moved, = 'there'")
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "vllm").write_text('#!/bin/sh\npwd\nfor word; do printf "%s\\0" "$word"; done\n')
    (fake / "vllm").chmod(0o755)
    ran = subprocess.run(
        ["sh", moved / SCRIPT, "--port", "8001"], env={"PATH": f"{fake}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    where, _, said = ran.stdout.partition("\n")
    assert where == str(moved)
    given = said.split("\0")[:-1]
    assert given[given.index("--lora-modules") + 1] == "mine=."
    assert given[:2] == ["serve", str(tiny_folder)]
    assert given[-2:] == ["--port", "8001"]
    assert not (tmp_path / "x").exists()


def test_the_command_names_rank_and_final_folder(exported, tmp_path):
    _, out, facts = exported({"rank": 20}, out=tmp_path / "later")
    assert facts["max_lora_rank"] == 32
    assert facts["arguments"][-1] == f"later={tmp_path / 'later'}"
    assert not (out / TEMPLATE).exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"use_rslora": True, "init_lora_weights": "gaussian"}, True),
        ({"use_dora": True}, False),
        ({"rank_pattern": {"q_proj": 2}}, False),
        ({"init_lora_weights": "pissa"}, False),
        ({"bias": "all"}, False),
        ({"r": 600}, False),
    ],
)
def test_which_adapter_files_every_release_reads(settings, expected):
    assert is_served_unchanged(LoraConfig(**settings)) is expected


def test_names_that_cannot_be_served_are_refused(exported):
    run, out, _ = exported()
    for name in ("a=b", "a,b", "", "two words", "-x", "a\nb"):
        with pytest.raises(UsageError, match="vLLM cannot serve the adapter by the name"):
            export_vllm(run, out, name=name)


def test_the_adapter_cannot_have_the_bases_name(exported):
    run, out, facts = exported()
    with pytest.raises(UsageError, match="the base itself is served as 'tiny-base'"):
        export_vllm(run, out, name="tiny-base")
    assert export_vllm(run, out, out=out.with_name("tiny-base"))["name"] == "tiny-base-tuned"
    assert facts["base_name"] == "tiny-base"


def test_the_runs_own_chat_template_is_included(exported, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    _, out, facts = exported(more={"data": {"chat_template": str(template)}})
    assert (out / TEMPLATE).read_text() == template.read_text()
    assert facts["arguments"][-2:] == ["--chat-template", f"{out}/{TEMPLATE}"]
    assert f"./{TEMPLATE}" in (out / SCRIPT).read_text()


def test_float64_runs_are_served_in_float32_with_a_warning(exported):
    facts = exported(more={"model": {"dtype": "float64"}})[2]
    assert facts["dtype"] == "float32"
    assert "held its base in float64, and vLLM will compute in float32" in facts["notes"][0]


def test_the_dtype_is_the_one_the_run_had(exported, tmp_path):
    run, out, facts = exported()
    assert (facts["dtype"], len(facts["notes"])) == ("float32", 1)
    (run / "result.json").write_text(json.dumps({"dtype": "bfloat16"}))
    assert export_vllm(run, out)["dtype"] == "bfloat16"
    assert "held its base in bfloat16" in export_vllm(run, out, dtype="float32")["notes"][0]
    with pytest.raises(UsageError, match="dtype is 'int8'"):
        export_vllm(run, out, dtype="int8")
