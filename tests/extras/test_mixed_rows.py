"""Rows of one batch through different adapters: each row's logits are those of its adapter alone."""

import copy

import pytest
import torch
from adapter_checks import distance, run_with
from error_facts import has_code
from models_zoo import bert_classifier, gpt2, llama, qwen2, run, t5, tokens
from several_adapters import add_adapters

from slimtune import IA3Config, LoraConfig
from slimtune.errors import UsageError
from slimtune.extras.mixed_batch import (
    add_low_rank_per_row,
    list_adapter_per_equal_row_group,
    stack_lora_factors_scaled_into_b,
)

CLOSE = 1e-9
BASE = "__base__"
QV = ["q_proj", "v_proj"]
ONE = {"r": 2, "lora_alpha": 8, "target_modules": QV}
TWO = {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}
LORAS = {
    "one": ONE,
    "two": TWO,
    "words": {"r": 3, "target_modules": ["embed_tokens", "lm_head"]},
    "dora": {"r": 3, "use_dora": True, "target_modules": ["k_proj", "q_proj"]},
    "pissa": {"r": 3, "init_lora_weights": "pissa", "target_modules": QV},
    "head": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.fixture
def model():
    return add_adapters(llama(), {"one": ONE, "two": TWO})


def assert_rows_equal_alone(model, names, grad=False):
    ids = tokens(rows=len(names))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})}
    with torch.set_grad_enabled(grad):
        mixed = model(**inputs, adapter_names=list(names)).logits.detach()
    for row, name in enumerate(names):
        alone = run_with(model, name, lambda row=row: run(model, ids[row : row + 1]))
        assert distance(mixed[row : row + 1], alone) < CLOSE, name
    return mixed


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_each_row_uses_its_adapter(grad):
    model = add_adapters(llama(), LORAS)
    before = run(model)
    names = ["one", "two", BASE, "words", "dora", "one", "pissa", "head", "two"]
    mixed = assert_rows_equal_alone(model, names, grad)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-3
    for names in (["two", "one", "one", BASE], ["words"] * 3, [BASE, BASE]):
        assert_rows_equal_alone(model, names, grad)
    assert torch.equal(run(model), before)


BIAS = {"target_modules": QV, "bias": "lora_only"}
OTHERS = {
    "gpt2": (gpt2, {"r": 2, "target_modules": ["c_attn", "wte"]}, {"r": 4, "lora_alpha": 3}),
    "t5": (t5, {"r": 2}, {"r": 4, "lora_alpha": 3}),
    "classifier": (bert_classifier, {"r": 2, "task_type": "SEQ_CLS"}, {"r": 4, "task_type": "SEQ_CLS"}),
    "ia3": (llama, ONE, IA3Config()),
    "biases": (qwen2, {**BIAS, "use_rslora": True}, {**BIAS, "r": 3}),
    "biases and dora": (qwen2, {**BIAS, "use_dora": True}, {**BIAS, "r": 3, "use_dora": True}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_architectures_and_methods(case):
    make, one, two = OTHERS[case]
    assert_rows_equal_alone(add_adapters(make(), {"one": one, "two": two}), ["two", BASE, "one", "one"])


def get_lora_A(model, name):
    return model.adapter_modules(name)["model.layers.0.self_attn.q_proj"].lora_A.weight


def test_changed_factors_are_not_cached(model):
    names = ["one", "two"]
    A, B = (get_lora_A(model, n) for n in names)
    first = assert_rows_equal_alone(model, names)
    for trains in (False, True):
        model.requires_grad_(trains)
        assert_rows_equal_alone(model, names)
        with torch.no_grad():
            A.add_(1)
        assert (assert_rows_equal_alone(model, names)[0] - first[0]).abs().max() > 1e-3
    B.data.add_(1)  # not counted in B's version, as in some optimizers
    assert (assert_rows_equal_alone(model, names)[1] - first[1]).abs().max() > 1e-3
    model.requires_grad_(False)
    assert_rows_equal_alone(model, names)
    model.float()
    model.double()
    assert_rows_equal_alone(model, names)
    model.delete_adapter("two")
    model.add_adapter("two", LoraConfig(r=3, target_modules=QV, init_lora_weights=False))
    assert_rows_equal_alone(model, names)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        get_lora_A(twin, "one").add_(1)
    for changed in (twin, model):
        assert_rows_equal_alone(changed, names)


def test_factors_are_stacked_once(model, monkeypatch):
    stacked = []
    monkeypatch.setattr(
        "slimtune.extras.mixed_batch.stack_lora_factors_scaled_into_b",
        lambda *a: stacked.append(1) or stack_lora_factors_scaled_into_b(*a),
    )
    ids = tokens()

    def count(call, *names, **how):
        stacked.clear()
        with torch.no_grad():
            call(ids, adapter_names=names, **how)
        return len(stacked)

    model.requires_grad_(False)
    generation = {"max_new_tokens": 4, "do_sample": False}
    assert count(model, "one", "two") == 6
    assert count(model, "one", "two") == 0
    assert count(model, "two", "one") == 6
    assert count(model.generate, "two", "one", **generation) == 0
    copied = copy.deepcopy(model.model.layers[0].self_attn.q_proj)
    assert not copied.active_state.caches, "a copy of a layer copies no other layer"
    model.requires_grad_(True)
    assert count(model.generate, "two", "one", **generation) == 6


def test_gradients_reach_each_rows_adapter(model):
    model.set_requires_grad(["one", "two"])
    ids = tokens()
    model(ids, labels=ids, adapter_names=["one", "two"]).logits.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert {n.split(".adapters.")[1].split(".")[0] for n in found} == {"one", "two"}
    for row, name in enumerate(["one", "two"]):
        model.zero_grad()
        model.set_adapter(name)
        model(ids[row : row + 1]).logits.square().sum().backward()
        assert all((p.grad - found[n]).abs().max() < CLOSE for n, p in model.named_parameters() if f".{name}." in n)


def test_training_after_inference_mode(model):
    inputs = {"input_ids": tokens(), "adapter_names": ["one", "two"]}
    with torch.inference_mode():
        model(**inputs)
    model(**inputs, labels=tokens()).loss.backward()


def test_dropout_applies_per_adapter():
    model = add_adapters(llama(), {"one": {**ONE, "lora_dropout": 0.5}, "two": TWO})
    assert_rows_equal_alone(model, ["one", "two"])
    model.train()
    first, second = (model(tokens(), adapter_names=["one", "two"]).logits for _ in range(2))
    assert (first[0] - second[0]).abs().max() > 1e-6
    assert (first[1] - second[1]).abs().max() < CLOSE


@pytest.mark.parametrize(("base", "beams"), [(llama, 1), (llama, 3), (t5, 3)])
def test_generate(base, beams):
    model = add_adapters(base(), {"one": {"r": 2}, "two": {"r": 4, "lora_alpha": 30}})
    ids, names = tokens(rows=4), ["two", BASE, "one", "two"]
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    mixed = model.generate(ids, adapter_names=names, **how)
    for row, name in enumerate(names):
        expected = run_with(model, name, lambda row=row: model.generate(ids[row : row + 1], **how))
        assert torch.equal(mixed[row : row + 1], expected)


WRONG = [
    (["one"], "has 1 names for 2 rows"),
    (["one", "two", "one"], "has 3 names for 2 rows"),
    ([], "has 0 names for 2 rows"),
    ("one", "has 'one' for 2 rows"),
    (["one", "tow"], "tow.*; did you mean 'two'"),
    (["one", "_base_"], "has .*_base_"),
]


@pytest.mark.parametrize(("names", "message"), WRONG)
def test_wrong_names_are_rejected(model, names, message):
    ids = tokens()
    embeddings = model.get_input_embeddings()(ids)
    for call in (
        lambda: model(ids, adapter_names=names),
        lambda: model.forward(ids, adapter_names=names),
        lambda: model(inputs_embeds=embeddings, adapter_names=names),
        lambda: model.generate(inputs=ids, max_new_tokens=2, adapter_names=names),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_merged_adapter_is_rejected(model):
    model.merge_adapter()
    with pytest.raises(UsageError, check=has_code("merge-differs")):
        model(tokens(), adapter_names=["one", "two"])


def test_checkpointed_layers_are_recomputed_with_the_adapters_of_their_call():
    grads = []
    for checkpointing in (False, True):
        model = add_adapters(llama(), {"one": ONE, "two": TWO}).train()
        model.set_adapter(["one", "two"])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = [model(input_ids=tokens(), adapter_names=names).logits for names in (["one", "two"], ["two", BASE])]
        sum(logits.sin().sum() for logits in calls).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_row_groups():
    assert list_adapter_per_equal_row_group(["a", "a", "b", "b", "b", "b"]) == ["a", "b", "b"]
    assert list_adapter_per_equal_row_group(["a", "b", "b"]) == ["a", "b", "b"]
    assert list_adapter_per_equal_row_group(["a"] * 5) == ["a"]
    generator = torch.Generator().manual_seed(0)
    x, y, A, B = (torch.randn(s, generator=generator) for s in ((6, 3, 5), (6, 3, 4), (2, 5), (4, 2)))
    out = add_low_rank_per_row(y, x, *stack_lora_factors_scaled_into_b([(A, B, 0.5), None, (A[:1], B[:, :1], 2.0)], x))
    assert torch.equal(out[2:4], y[2:4])
    assert torch.allclose(out[:2], y[:2] + 0.5 * x[:2] @ A.t() @ B.t(), atol=1e-6)
    assert torch.allclose(out[4:], y[4:] + 2.0 * x[4:] @ A[:1].t() @ B[:, :1].t(), atol=1e-6)
