"""Rows of one batch through different adapters: each row says what its adapter alone says of it."""

import copy

import pytest
import torch
from models_zoo import bert_classifier, gpt2, llama, run, shake, t5, tokens

import slimtune
from slimtune import LoraConfig, get_peft_model
from slimtune.errors import UsageError
from slimtune.kernels.lora_linear import add_low_rank_rows, list_group_adapters, stack_factors

CLOSE = 1e-9
BASE = "__base__"
QV = ["q_proj", "v_proj"]
LORAS = {
    "one": {"r": 2, "lora_alpha": 8, "target_modules": QV},
    "two": {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "words": {"r": 3, "target_modules": ["embed_tokens", "lm_head"]},
    "dora": {"r": 3, "use_dora": True, "target_modules": ["k_proj", "q_proj"]},
    "pissa": {"r": 3, "init_lora_weights": "pissa", "target_modules": QV},
    "head": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def several(base, named):
    model = None
    for seed, (name, given) in enumerate(named.items()):
        config = given if isinstance(given, slimtune.PeftConfig) else LoraConfig(**given)
        if model is None:
            model = get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        shake(model, seed=seed)
    return model.eval()


def inputs(model, ids):
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})}


def alone(model, name, ids):
    """What the base or one adapter says, whatever is active."""
    with torch.no_grad():
        if name == BASE:
            with model.disable_adapter():
                return model(**inputs(model, ids)).logits
        before = model.active_adapters
        model.set_adapter(name)
        out = model(**inputs(model, ids)).logits
        model.set_adapter(before)
        return out


def check(model, names, grad=False):
    ids = tokens(rows=len(names))
    with torch.set_grad_enabled(grad):
        mixed = model(**inputs(model, ids), adapter_names=list(names)).logits.detach()
    for at, name in enumerate(names):
        expected = alone(model, name, ids[at : at + 1])
        assert (mixed[at : at + 1] - expected).abs().max() < CLOSE, name
    return mixed


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_each_row_uses_its_adapter(grad):
    model = several(llama(), LORAS)
    before = run(model)
    mixed = check(model, ["one", "two", BASE, "words", "dora", "one", "pissa", "head", "two"], grad)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-3
    check(model, ["two", "one", "one", BASE], grad)
    check(model, ["words"] * 3, grad)
    check(model, [BASE, BASE], grad)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("base", [gpt2, t5, bert_classifier])
def test_other_architectures(base):
    kind = {"task_type": "SEQ_CLS"} if base is bert_classifier else {}
    where = {} if base is not gpt2 else {"target_modules": ["c_attn", "wte"]}
    model = several(base(), {"one": {"r": 2, **kind, **where}, "two": {"r": 4, "lora_alpha": 3, **kind}})
    check(model, ["two", BASE, "one", "one"])


def test_other_methods_mix_in():
    model = several(llama(), {"one": LORAS["one"], "scaled": slimtune.IA3Config()})
    check(model, ["scaled", "one", BASE, "scaled"])


def test_changed_factors_are_not_cached():
    model = several(llama(), {n: LORAS[n] for n in ("one", "two")})
    names = ["one", "two"]
    first = check(model, names)
    for trains in (False, True):
        model.requires_grad_(trains)
        check(model, names)
        with torch.no_grad():
            model.adapter_modules("one")["model.layers.0.self_attn.q_proj"].lora_A.weight.add_(1)
        assert (check(model, names)[0] - first[0]).abs().max() > 1e-3
    # Written past torch's count of versions, as some optimizers do, where the adapter trains.
    model.adapter_modules("two")["model.layers.0.self_attn.q_proj"].lora_A.weight.data.add_(1)
    assert (check(model, names)[1] - first[1]).abs().max() > 1e-3
    model.requires_grad_(False)
    check(model, names)
    model.float()
    model.double()
    check(model, names)
    model.delete_adapter("two")
    model.add_adapter("two", LoraConfig(r=3, target_modules=QV, init_lora_weights=False))
    check(model, names)
    twin = copy.deepcopy(model)
    shake(twin, seed=9)
    with torch.no_grad():
        for p in twin.adapter_modules("one").values():
            p.lora_A.weight.add_(1)
    check(twin, names)
    check(model, names)


def test_factors_are_stacked_once(monkeypatch):
    model = several(llama(), {n: LORAS[n] for n in ("one", "two")})
    model.requires_grad_(False)
    count = []
    monkeypatch.setattr("slimtune.adapters.mixed_batch.stack_factors", lambda *a: count.append(1) or stack_factors(*a))
    ids = tokens()
    with torch.no_grad():
        model(ids, adapter_names=["one", "two"])
        once = len(count)
        assert once == 6
        model(ids, adapter_names=["one", "two"])
        assert len(count) == once
        model(ids, adapter_names=["two", "one"])
        assert len(count) == 2 * once
        model.generate(ids, adapter_names=["two", "one"], max_new_tokens=4, do_sample=False)
        assert len(count) == 2 * once
    model.requires_grad_(True)
    with torch.no_grad():
        model.generate(ids, adapter_names=["two", "one"], max_new_tokens=4, do_sample=False)
    assert len(count) == 3 * once


def test_copy_of_a_layer_copies_no_other():
    model = several(llama(), {n: LORAS[n] for n in ("one", "two")})
    with torch.no_grad():
        model(tokens(), adapter_names=["one", "two"])
    copied = copy.deepcopy(model.model.layers[0].self_attn.q_proj)
    assert not copied.active_state._stacks
    assert model._adapter_state.active_state._stacks


def test_gradients_reach_each_rows_adapter():
    model = several(llama(), {n: LORAS[n] for n in ("one", "two")})
    model.set_requires_grad(["one", "two"])
    ids = tokens()
    model(ids, labels=ids, adapter_names=["one", "two"]).logits.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert {n.split(".adapters.")[1].split(".")[0] for n in found} == {"one", "two"}
    for at, name in enumerate(["one", "two"]):
        model.zero_grad()
        model.set_adapter(name)
        model(ids[at : at + 1]).logits.square().sum().backward()
        for n, p in model.named_parameters():
            if f".{name}." in n:
                assert (p.grad - found[n]).abs().max() < CLOSE


def test_dropout_applies_per_adapter():
    model = several(llama(), {"one": {**LORAS["one"], "lora_dropout": 0.5}, "two": LORAS["two"]})
    ids = tokens()
    check(model, ["one", "two"])
    model.train()
    torch.manual_seed(0)
    first = model(ids, adapter_names=["one", "two"]).logits
    second = model(ids, adapter_names=["one", "two"]).logits
    assert (first[0] - second[0]).abs().max() > 1e-6
    assert (first[1] - second[1]).abs().max() < CLOSE


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("base", [llama, t5])
def test_generate(base, beams):
    where = {"target_modules": ["q", "v"] if base is t5 else QV}
    model = several(base(), {"one": {"r": 2, **where}, "two": {"r": 4, "lora_alpha": 30, **where}})
    ids, names = tokens(rows=4), ["two", BASE, "one", "two"]
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    mixed = model.generate(ids, adapter_names=names, **how)
    for at, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                expected = model.generate(ids[at : at + 1], **how)
        else:
            model.set_adapter(name)
            expected = model.generate(ids[at : at + 1], **how)
        assert torch.equal(mixed[at : at + 1], expected)


WRONG = [
    (["one"], "adapter_names is 1 names for a batch of 2 rows"),
    (["one", "two", "one"], "adapter_names is 3 names for a batch of 2 rows"),
    ([], "adapter_names is 0 names for a batch of 2 rows"),
    ("one", "adapter_names is 'one' for a batch of 2 rows"),
    (["one", "tow"], "there is no adapter 'tow'; did you mean 'two'"),
    (["one", "_base_"], "there is no adapter '_base_'"),
]


@pytest.mark.parametrize(("names", "said"), WRONG)
@pytest.mark.parametrize("door", ["call", "generate", "embeddings"])
def test_wrong_names_are_rejected(names, said, door):
    model = several(llama(), {n: LORAS[n] for n in ("one", "two")})
    before = run(model)
    ids = tokens()
    call, given = {
        "call": (model, {"input_ids": ids}),
        "generate": (model.generate, {"inputs": ids, "max_new_tokens": 2}),
        "embeddings": (model, {"inputs_embeds": model.get_input_embeddings()(ids)}),
    }[door]
    with pytest.raises(UsageError, match=said):
        call(**given, adapter_names=names)
    assert torch.equal(run(model), before)


def test_merged_adapter_is_rejected():
    model = several(llama(), {n: LORAS[n] for n in ("one", "two")})
    model.merge_adapter()
    with pytest.raises(UsageError, match="is merged into the base"):
        model(tokens(), adapter_names=["one", "two"])


def test_row_groups():
    assert list_group_adapters(["a", "a", "b", "b", "b", "b"]) == ["a", "b", "b"]
    assert list_group_adapters(["a", "b", "b"]) == ["a", "b", "b"]
    assert list_group_adapters(["a"] * 5) == ["a"]
    generator = torch.Generator().manual_seed(0)
    x, y, A, B = (torch.randn(s, generator=generator) for s in ((6, 3, 5), (6, 3, 4), (2, 5), (4, 2)))
    out = add_low_rank_rows(y, x, *stack_factors([(A, B, 0.5), None, (A[:1], B[:, :1], 2.0)], x))
    assert torch.equal(out[2:4], y[2:4])
    assert torch.allclose(out[:2], y[:2] + 0.5 * x[:2] @ A.t() @ B.t(), atol=1e-6)
    assert torch.allclose(out[4:], y[4:] + 2.0 * x[4:] @ A[:1].t() @ B[:, :1].t(), atol=1e-6)
