"""Engines that serve an adapter, a part of it, another scale or the base: the verdict says which, over HTTP alone."""

import copy
import math

import peft
import pytest
import torch
from chatml import CHATML
from engine_dialects import serving
from fault_walk import TEMPLATE, describe_verdict
from faulty_adapters import copy as copy_adapter
from faulty_adapters import edit_config, edit_tensors, rename, save_adapter

import slimtune
from slimtune.errors import ModelError, RunError, UsageError
from slimtune.export.engine_diagnosis import CAUSES_IN_ADAPTER
from slimtune.export.expected_logps import AdapterReference, ReferenceText, judge_engine_against_adapter
from slimtune.export.verify import ServedPlace, check_adapter
from slimtune.generation.http_engines import read_log_prob
from slimtune.generation.inference_engines import TransformersInferenceEngine


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A base folder, an adapter of PEFT, the tokenizer, and the model with the adapter as PEFT computes it."""
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_llama(initializer_range=0.2, num_hidden_layers=4)
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    words = [i for i in range(3, 320) if "!" <= tokenizer.decode([i]) <= "~"]
    base.lm_head.weight.data[[i for i in range(320) if i not in words]] = 0  # answers are texts
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapter = save_adapter(copy.deepcopy(base), folder / "adapter", lora_alpha=16)
    edit_tensors(adapter, lambda t: {k: v * 0.5 if "lora_B" in k else v for k, v in t.items()})
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter).eval()
    return folder / "base", adapter, tokenizer, model, base


def change(model, factor, part=""):
    """A copy whose modules with `part` in their name have another strength."""
    other = copy.deepcopy(model)
    for name, module in other.named_modules():
        if isinstance(getattr(module, "scaling", None), dict) and part in name:
            module.scaling["default"] *= factor
    return other


def check(pair, models, dialect, name="tuned", precision="f32", **settings):
    base, adapter, tokenizer, *_ = pair
    settings = {"template": TEMPLATE, **settings}
    with serving(models, tokenizer, dialect, **settings) as url:
        return check_adapter(adapter, str(base), ServedPlace(url, name=name, timeout=20, precision=precision))


EVIDENCE = {
    "vllm": "log-probabilities", "echo": "log-probabilities", "answers": "log-probabilities of its answers",
    "ollama": "log-probabilities of its answers", "greedy": "greedy answers",
    "mlx": "log-probabilities of its answers", "chat": "log-probabilities of its answers",
}  # fmt: skip


@pytest.mark.parametrize("dialect", ["vllm", "echo", "answers", "ollama", "mlx", "chat"])
def test_applied(pair, dialect):
    result = check(pair, {"tuned": pair[3]}, dialect)
    assert (result.checks[0].cause, result.checks[0].passed, result.passed) == ("applied", True, True), result.checks[0]
    assert result.checks[0].evidence == EVIDENCE[dialect]


def roll_matrices(pair):
    """The models of a server whose adapter is another one of the same shapes."""
    tuned = copy.deepcopy(pair[3])
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = parameter.data.roll(1, 0)
    return {"base": pair[4], "tuned": tuned}


def change_base(pair):
    """The models of a server whose base has one other matrix."""
    base = copy.deepcopy(pair[4])
    torch.nn.init.normal_(base.model.layers[0].mlp.up_proj.weight, std=0.3)
    return {"base": base, "tuned": peft.PeftModel.from_pretrained(copy.deepcopy(base), pair[1]).eval()}


SERVE_BASE, SERVE_TUNED = (lambda pair: {"tuned": pair[4]}), (lambda pair: {"tuned": pair[3]})
IN_FRONT = {"front": [1], "counts": True}
SERVED_FAULTS = {
    # verdict, where it was reported, the server's protocol, what it serves, how
    "text-on-wrapper": ("not-applied", "vllm-project/vllm#48019", "vllm", SERVE_BASE, {}),
    "no-configured-module": ("not-applied", "vllm-project/vllm#55193", "echo", SERVE_BASE, {}),
    "adapter-of-modelfile": ("not-applied", "generative-computing/mellea#1651", "ollama", SERVE_BASE, {}),
    "adapter-as-model-id": ("not-applied", "huggingface/peft#1468", "answers", SERVE_BASE, {}),
    "adapter-path": ("not-applied", "ml-explore/mlx-lm#1248", "mlx", SERVE_BASE, {}),
    "chats-of-the-base": ("not-applied", "ml-explore/mlx-lm#1745", "chat", SERVE_BASE, {}),
    "words-alone": ("not-applied", "unslothai/unsloth#2142", "greedy", SERVE_BASE, {}),
    "base-for-every-name": ("not-applied", "vllm-project/vllm#34186", "vllm",
        lambda pair: {"base": pair[4], "tuned": pair[3]}, {"lies": True, "parents": {"tuned": "base"}}),
    "scale-of-rslora": ("another-scale 0.5", "vllm-project/vllm#10798", "vllm",
        lambda pair: {"tuned": change(pair[3], 0.5)}, {}),
    "scale-twice": ("another-scale 2", "NVIDIA/TensorRT-LLM#1668", "vllm",
        lambda pair: {"tuned": change(pair[3], 2)}, {}),
    "alpha-unread": ("another-scale 0.25", "NVIDIA/TensorRT-LLM#1477", "echo",
        lambda pair: {"tuned": change(pair[3], 0.25)}, {}),
    "scale-unsaved": ("another-scale 0.5", "ml-explore/mlx-examples#622", "ollama",
        lambda pair: {"tuned": change(pair[3], 0.5)}, {}),
    "module-unwired": ("partly (down_proj)", "vllm-project/vllm#37877", "vllm",
        lambda pair: {"tuned": change(pair[3], 0, ".mlp.down_proj")}, {}),
    "last-layer-unwired": ("partly (layer 3)", "vllm-project/vllm#41754", "vllm",
        lambda pair: {"tuned": change(pair[3], 0, ".layers.3.")}, {}),
    "another-base": ("another-base", "huggingface/peft#1932", "vllm", change_base, {"parents": {"tuned": "base"}}),
    "adapter-of-before": ("another-adapter", "vllm-project/vllm#42125", "vllm", roll_matrices,
        {"parents": {"tuned": "base"}}),
    "another-template": ("another-template", "hiyouga/LlamaFactory#6320", "vllm", SERVE_TUNED,
        {"template": "### {}\n"}),
    "template-of-chats": ("another-template", "ollama/ollama#8363", "chat", SERVE_TUNED,
        {"template": "### {}\n", "counts": True}),
    "bos-in-chats": ("another-template", "defog-ai/sql-eval#141", "vllm", SERVE_TUNED, {"bos": [1]}),
    "bos-in-echo": ("another-template", "twinnydotdev/twinny#314", "echo", SERVE_TUNED, IN_FRONT),
    "bos-in-answers": ("another-template", "twinnydotdev/twinny#314", "answers", SERVE_TUNED, IN_FRONT),
    "bos-in-ollama": ("another-template", "twinnydotdev/twinny#314", "ollama", SERVE_TUNED, IN_FRONT),
    "bos-in-mlx": ("another-template", "defog-ai/sql-eval#141", "mlx", SERVE_TUNED, IN_FRONT),
    "template-around-the-prompt": ("another-template", "BerriAI/litellm#39724", "answers", SERVE_TUNED,
        {"front": list(range(3, 20)), "counts": True}),
    "prompt-cut": ("another-template", "ollama/ollama#17889", "ollama", SERVE_TUNED, {"cut": 6, "counts": True}),
    "log-probs-of-the-choice": ("not-proven", "ggml-org/llama.cpp#7197", "answers", SERVE_TUNED, {"zeros": True}),
    "log-probs-of-0": ("not-proven", "standardcompletions/rfcs#11", "ollama", SERVE_TUNED, {"zeros": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED_FAULTS)
def test_fault_of_a_server_is_named(pair, name):
    cause, _, dialect, make_models, settings = SERVED_FAULTS[name]
    result = check(pair, make_models(pair), dialect, **settings)
    assert (describe_verdict(result.checks[0]), result.passed) == (cause, False), result.checks[0]
    assert result.checks[0].evidence == ("greedy answers" if cause == "not-proven" else EVIDENCE[dialect])
    assert (result.repair is not None) == (cause.split()[0] in CAUSES_IN_ADAPTER)


def test_another_base(pair, tiny_llama):
    other = tiny_llama(seed=5, initializer_range=0.2, num_hidden_layers=4)
    assert check(pair, {"tuned": other}, "vllm").checks[0].cause == "another-base"


def test_cut_prompt_of_a_server_that_echoes(pair):
    with pytest.raises(RunError):
        check(pair, {"tuned": pair[3]}, "echo", cut=20)


@pytest.mark.parametrize(("index", "cause"), [(3, "applied"), (4, "not-applied")])
def test_likeliest_tokens_without_the_one_that_is_asked_for(pair, index, cause):
    verdict = check(pair, {"tuned": pair[index]}, "vllm", shown=-4).checks[0]
    assert verdict.cause == cause, verdict
    assert verdict.positions < 100


@pytest.mark.parametrize("value", [None, -9999.0, "-1.5", 0.7, True])
def test_value_that_is_no_log_probability(pair, value):
    if value is None or value == -9999.0:
        assert math.isnan(read_log_prob(value))
    else:
        with pytest.raises(ModelError):
            read_log_prob(value)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v1/chat/completions", "/v1/completions"])
def test_address_with_a_path_of_the_api(pair, path):
    base, adapter, tokenizer, model, _ = pair
    with serving({"tuned": model}, tokenizer, "echo") as url:
        place = ServedPlace(f"{url}{path}", name="tuned", precision="f32")
        assert check_adapter(adapter, str(base), place).checks[0].cause == "applied"


def test_rounding_beyond_the_precision(pair):
    assert check(pair, {"tuned": pair[3]}, "vllm", noise=0.1).checks[0].cause == "rounding"


def test_rounding_of_the_precision(pair):
    assert check(pair, {"tuned": pair[3]}, "vllm", noise=0.003).checks[0].cause == "applied"


def test_equal_words_alone_prove_nothing(pair):
    result = check(pair, {"tuned": pair[3]}, "greedy")
    assert (result.checks[0].cause, result.checks[0].passed, result.passed) == ("not-proven", None, False)


def test_file_with_other_names_is_computed_as_trained(pair, tmp_path):
    folder = copy_adapter(pair[1], tmp_path / "renamed")
    rename(folder, "base_model.model.", "_orig_mod.base_model.model.")
    result = check((pair[0], folder, *pair[2:]), {"tuned": pair[4]}, "vllm")
    assert [f.code for f in result.file.findings] == ["key-prefix"]
    assert result.checks[0].cause == "not-applied"


def test_unknown_name_lists_what_there_is(pair):
    with pytest.raises(UsageError, match="'other'"):
        check(pair, {"other": pair[3]}, "vllm")


def test_name_is_needed_where_several_are_served(pair):
    with pytest.raises(UsageError, match="'a', 'b'"):
        check(pair, {"a": pair[3], "b": pair[4]}, "vllm", name=None)


def test_the_only_adapter_needs_no_name(pair):
    models = {"base": pair[4], "tuned": pair[3]}
    assert check(pair, models, "vllm", name=None, parents={"tuned": "base"}).checks[0].cause == "applied"


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"status": 503}, RunError), ({"key": "k"}, UsageError), ({"status": 500}, RunError), ({"status": 429}, RunError)],
)
def test_server_that_refuses(pair, settings, error):
    with pytest.raises(error):
        check(pair, {"tuned": pair[3]}, "vllm", **settings)


def test_key_is_read_from_the_environment(pair, monkeypatch):
    monkeypatch.setenv("SLIMTUNE_SERVER_KEY", "k")
    assert check(pair, {"tuned": pair[3]}, "echo", key="k").checks[0].cause == "applied"


def test_server_that_hangs(pair):
    base, adapter, tokenizer, model, _ = pair
    with serving({"tuned": model}, tokenizer, "vllm", delay=1) as url, pytest.raises(ModelError):
        check_adapter(adapter, str(base), ServedPlace(url, name="tuned", timeout=0.2))


def test_nobody_answers(pair):
    with pytest.raises(ModelError):
        check_adapter(pair[1], str(pair[0]), ServedPlace("http://127.0.0.1:9", timeout=1))


def test_merged_folder(pair, tmp_path):
    merged = copy.deepcopy(pair[3]).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    pair[2].save_pretrained(tmp_path / "merged")
    place = ServedPlace(merged=tmp_path / "merged", precision="f32")
    assert check_adapter(pair[1], str(pair[0]), place).checks[0].cause == "applied"
    pair[4].save_pretrained(tmp_path / "merged")
    assert check_adapter(pair[1], str(pair[0]), place).checks[0].cause == "not-applied"


def test_without_the_base_nothing_is_proven(pair):
    _, adapter, tokenizer, model, _ = pair
    edit_config(adapter, base_model_name_or_path=None)
    with serving({"tuned": model}, tokenizer, "vllm") as url:
        result = check_adapter(adapter, None, ServedPlace(url, name="tuned"))
    assert (result.passed, result.checks[0].cause) == (False, None)


def test_wrong_engine_fails_also_where_no_cause_can_be_computed(tiny_llama, tiny_tokenizer, monkeypatch):
    """A method without a strength has no variants; what differs still differs."""

    def refuse(*_):
        raise UsageError("the method has no strength")

    monkeypatch.setattr("slimtune.export.engine_diagnosis.AdapterTensorInterpolator", refuse)
    base, tokenizer = tiny_llama(initializer_range=0.2), tiny_tokenizer()
    adapted = slimtune.get_peft_model(copy.deepcopy(base), slimtune.LoraConfig(target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    other = TransformersInferenceEngine("other", tiny_llama(seed=3, initializer_range=0.2), tokenizer)
    reference = AdapterReference(adapted.eval(), tokenizer, [ReferenceText("", list(range(3, 40)))])
    verdict = judge_engine_against_adapter(reference, other, "f32")
    assert (verdict.passed, verdict.cause) == (False, "not-proven")
