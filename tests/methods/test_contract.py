"""What every method promises, run over each of them: a method cannot be half there."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_zoo import gemma2, gpt2, llama, run, same_base, shake, snapshot, tokens
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import slimtune.methods
from slimtune import PeftModel, get_peft_model
from slimtune.adapters.base import MergeUnsupported
from slimtune.errors import UsageError

pytestmark = [
    pytest.mark.parametrize("method", sorted(CASES)),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
# In float64 transformers' eager attention, which Gemma 2 needs for its soft-cap, makes NaN of a padded row.
ZOO = {"llama": llama, "gpt2": gpt2, "gemma2": lambda: gemma2(torch.float32)}
BASES = pytest.mark.parametrize("base", ["llama", "gpt2"])
CLOSE = 1e-9
BY_BASE = {"llama": CLOSE, "gpt2": CLOSE, "gemma2": 2e-5}


def config(method, base="llama", **more):
    return CASES[method](**(CASES[method].on_gpt2 if base == "gpt2" else {}), **more)


def adapted(method, base="llama", **more):
    model = get_peft_model(ZOO[base](), config(method, base, **more))
    shake(model)
    return model.eval()


def two(method, base="llama"):
    """A model with two different adapters of one method, the first active."""
    model = adapted(method, base)
    model.add_adapter("second", config(method, base, **CASES[method].other))
    model.set_adapter("second")
    shake(model, seed=11)
    model.set_adapter("default")
    return model


def loss_of(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def grads(model):
    model.zero_grad()
    loss_of(model, tokens()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def steps(model, count=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for at in range(count):
        loss_of(model, tokens(seed=at)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_every_method_has_a_case(method):
    assert {name.partition("+")[0] for name in CASES} == set(slimtune.methods.method_names())
    name = method.partition("+")[0]
    assert slimtune.methods.config_class(name) is slimtune.methods.config_class(name.upper())
    assert slimtune.methods.config_class(name).name == name
    assert type(config(method)).name == name


@BASES
def test_starts_as_the_base_where_promised(method, base):
    model = get_peft_model(ZOO[base](), config(method, base)).eval()
    assert torch.equal(run(model), run(ZOO[base]())) is CASES[method].identity


def test_trains_its_own_parameters_alone(method):
    base = llama()
    names = {n for n, _ in base.named_parameters()}
    model = get_peft_model(base, config(method))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not trained & names
    assert set(grads(model)) == trained
    assert all(not p.requires_grad for n, p in model.named_parameters() if n in names)
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)


@BASES
def test_gradient_is_the_derivative(method, base, monkeypatch):
    """Against central differences, along a random direction in each parameter, through the whole model in float64."""
    if not CASES[method].exact_gradient:
        pytest.skip("a part of the gradient is left out by design (see the method's page); compared with peft instead")
    # transformers' norm rounds to fp32 in the middle of a float64 model.
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, 1e-6))
    model = adapted(method, base)
    found, step = grads(model), 1e-5
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        at, losses = p.detach().clone(), []
        for sign in (1, -1):
            with torch.no_grad():
                p.copy_(at + sign * step * direction)
                losses.append(loss_of(model, tokens()).item())
        with torch.no_grad():
            p.copy_(at)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert (found[name] * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8), name


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    other=st.booleans(),
    width=st.sampled_from([16, 24, 32]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_saved_and_loaded_is_the_same(method, tmp_path_factory, other, width, dtype):
    def base():
        return llama(dtype=dtype, layers=2, hidden_size=width, intermediate_size=width + 8)

    model = get_peft_model(base(), config(method, **(CASES[method].other if other else {}))).eval()
    shake(model)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base(), folder)
    for (n, p), (m, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert n == m
        assert p.dtype == q.dtype
        assert torch.equal(p, q), n
    assert torch.equal(run(model), run(again))
    assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(base(), folder, is_trainable=True)
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == expected


@BASES
def test_merged_is_the_forward_or_refused_by_name(method, base):
    model = adapted(method, base)
    expected, before = run(model), snapshot(ZOO[base]())
    assert (expected - run(ZOO[base]())).abs().max() > 1e-4
    if not type(model.active_peft_config).mergeable or not CASES[method].merges:
        with pytest.raises(MergeUnsupported):
            model.merge_adapter()
        assert torch.equal(run(model), expected)
        assert same_base(model, before)
        return
    model.merge_adapter(safe_merge=True)
    assert (run(model) - expected).abs().max() < CLOSE
    model.unmerge_adapter()
    assert same_base(model, before)
    assert torch.equal(run(model), expected)
    plain = model.merge_and_unload()
    assert type(plain) is type(ZOO[base]())
    assert set(plain.state_dict()) == set(ZOO[base]().state_dict())
    assert (run(plain) - expected).abs().max() < CLOSE


def test_disabled_is_the_base_bit_for_bit(method):
    model = adapted(method)
    expected, plain = run(model), run(llama())
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), expected)
    if type(model.active_peft_config).mergeable and CASES[method].merges:
        model.merge_adapter()
        merged = run(model)
        with model.disable_adapter():
            assert torch.equal(run(model), plain)
        assert torch.equal(run(model), merged)


def test_builds_on_meta(method):
    real = get_peft_model(llama(), config(method))
    with torch.device("meta"):
        fake = get_peft_model(llama(), config(method))
    assert all(p.device.type == "meta" for p in fake.parameters())
    assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in fake.named_parameters()}


def test_two_adapters_on_one_model(method):
    model = adapted(method)
    first = run(model)
    model.add_adapter("second", config(method, **CASES[method].other))
    assert torch.equal(run(model), first)
    model.set_adapter("second")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".second." in f".{n}" for n in trained)
    assert torch.equal(run(model), run(llama())) is CASES[method].identity
    shake(model, seed=11)
    second = run(model)
    if CASES[method].cls.trains_every_weight:
        with pytest.raises(UsageError, match="both train"):
            model.set_adapter(["default", "second"])
        return
    model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default", "second"]
    both = run(model)
    assert (both - first).abs().max() > 1e-5
    assert (both - second).abs().max() > 1e-5
    if type(model.active_peft_config).mergeable and CASES[method].merges:
        model.merge_adapter()
        assert (run(model) - both).abs().max() < CLOSE
        with pytest.raises(UsageError, match="merged into the base"):
            model.set_adapter("default")
        model.unmerge_adapter()
    model.rename_adapter("second", "third")
    assert torch.equal(run(model), both)
    model.delete_adapter("third")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(run(model), first)
    with pytest.raises(UsageError, match="only adapter"):
        model.delete_adapter("default")
    with pytest.raises(UsageError, match="did you mean 'default'"):
        model.set_adapter("defaults")


def test_beside_a_lora(method):
    """Deltas nest: what runs is the one around the other, whatever the methods."""
    model = adapted(method)
    alone = run(model)
    model.add_adapter("lora", CASES["lora"]())
    model.set_adapter(["lora", "default"])
    assert torch.equal(run(model), alone)
    model.set_adapter("lora")
    shake(model, seed=13)
    model.set_adapter(["lora", "default"])
    both = run(model)
    assert (both - alone).abs().max() > 1e-4
    if type(model.peft_config["default"]).mergeable and CASES[method].merges:
        model.merge_adapter()
        assert (run(model) - both).abs().max() < CLOSE


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_gives_the_same_gradients(method, reentrant, when):
    plain = adapted(method)
    base = llama()
    how = {"use_reentrant": reentrant}
    if when == "before":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    model = get_peft_model(base, config(method))
    if when == "after":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    shake(model)
    model.train()
    plain.train()
    expected, found = grads(plain), grads(model)
    assert set(expected) == set(found)
    assert all((expected[n] - found[n]).abs().max() < 1e-12 for n in expected)


@pytest.mark.parametrize("base", ["llama", "gpt2", "gemma2"])
def test_packed_is_alone(method, base):
    """Rows laid end to end, told apart by positions, say what each says alone."""
    model = adapted(method, base)
    rows = [tokens(1, n, seed=n) for n in (5, 8, 3)]
    packed = torch.cat(rows, dim=1)
    positions = torch.cat([torch.arange(r.shape[1]) for r in rows])[None]
    with torch.no_grad():
        together = model(input_ids=packed, position_ids=positions, use_cache=False).logits
        alone = [model(input_ids=r, use_cache=False).logits for r in rows]
    assert together.shape[1] == packed.shape[1]
    assert (together - torch.cat(alone, dim=1)).abs().max() < BY_BASE[base]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("base", ["llama", "gpt2", "gemma2"])
def test_padded_is_alone(method, base, side):
    model = adapted(method, base)
    long, short = tokens(1, 8, seed=1), tokens(1, 5, seed=2)
    blank, ones = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    order = (blank, short) if side == "left" else (short, blank)
    marks = (blank, ones) if side == "left" else (ones, blank)
    ids = torch.cat([long, torch.cat(order, dim=1)])
    mask = torch.cat([torch.ones_like(long), torch.cat(marks, dim=1)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        alone = [model(input_ids=r).logits[0] for r in (long, short)]
    assert (both[0] - alone[0]).abs().max() < BY_BASE[base]
    assert (both[1][mask[1].bool()] - alone[1]).abs().max() < BY_BASE[base]


@pytest.mark.parametrize("base", ["llama", "gpt2", "gemma2"])
def test_generating_with_a_cache_is_without(method, base):
    model = adapted(method, base)
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0  # padded on the left
    said = [
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0,
            eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        )
        for cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(said[0].sequences, said[1].sequences)
    with_cache, without = (torch.stack(s.logits) for s in said)
    assert (with_cache - without).abs().max() < BY_BASE[base]


def test_a_mixed_batch_is_each_row_alone(method):
    model = two(method)
    model.add_adapter("lora", CASES["lora"]())
    model.set_adapter("lora")
    shake(model, seed=13)
    model.set_adapter("default")
    names = ["second", "__base__", "default", "lora", "second"]
    ids = tokens(5, 8)
    mask = torch.ones_like(ids)
    mask[2:, 6:] = 0
    with torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
        for at, name in enumerate(names):
            row = {"input_ids": ids[at : at + 1], "attention_mask": mask[at : at + 1]}
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(**row).logits
            else:
                model.set_adapter(name)
                alone = model(**row).logits
            assert (mixed[at] - alone[0])[mask[at].bool()].abs().max() < CLOSE, name


def test_a_copy_stands_alone(method):
    model = adapted(method)
    expected = run(model)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert torch.equal(run(twin), expected)
    shake(twin, seed=17)
    assert not torch.equal(run(twin), expected)
    assert torch.equal(run(model), expected)
    twin.unload()
    assert torch.equal(run(twin), run(llama()))
    assert torch.equal(run(model), expected)


@BASES
def test_the_base_comes_back(method, base):
    model = ZOO[base]()
    model.get_input_embeddings().weight.requires_grad_(False)
    before, flags = snapshot(model), {n: p.requires_grad for n, p in model.named_parameters()}
    kinds = {n: type(m) for n, m in model.named_modules()}
    notes = {n: set(vars(m)) for n, m in model.named_modules()}
    objects = {n: id(p) for n, p in model.named_parameters()}
    peft = get_peft_model(model, config(method, base))
    assert peft is model
    assert same_base(model, before)
    start = run(peft)
    steps(peft)
    assert not torch.equal(run(peft), start)
    assert same_base(model, before)
    plain = peft.unload()
    assert plain is model
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {n: id(p) for n, p in model.named_parameters()} == objects
    assert {n: set(vars(m)) for n, m in model.named_modules()} == notes
    assert same_base(model, before)
    assert torch.equal(run(model), run(ZOO[base]()))


def test_training_lowers_the_loss(method):
    model = get_peft_model(llama(), config(method))
    before = loss_of(model, tokens()).item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    for _ in range(8):
        loss_of(model, tokens()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model.eval(), tokens()).item() < before - 1e-3


def test_the_adapter_is_fp32_above_a_16_bit_base(method):
    model = get_peft_model(llama(dtype=torch.bfloat16), config(method))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert run(model).dtype == torch.bfloat16
    steps(model, 1)
    half = get_peft_model(llama(dtype=torch.bfloat16), config(method), autocast_adapter_dtype=False)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.bfloat16}
    steps(half, 1)


def test_the_config_survives_its_file(method, tmp_path):
    before = config(method, task_type="CAUSAL_LM")
    before.save_pretrained(tmp_path)
    again = slimtune.PeftConfig.from_pretrained(tmp_path)
    assert type(again) is type(before)
    assert again == before
