"""What every method promises, run over each of them: a method cannot be half there."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_zoo import gpt2, llama, run, same_base, shake, snapshot, tokens

import slimtune.methods
from slimtune import PeftModel, get_peft_model
from slimtune.contract.delta import Site
from slimtune.errors import UsageError

pytestmark = [
    pytest.mark.parametrize("method", sorted(CASES)),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
BASES = pytest.mark.parametrize("base", [llama, gpt2], ids=["llama", "gpt2"])


def grads(model, rows=None):
    model.zero_grad()
    ids = tokens() if rows is None else rows
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def steps(model, count=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for at in range(count):
        ids = tokens(seed=at)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def adapted(method, base=llama, **more):
    model = get_peft_model(base(), CASES[method](**more))
    shake(model)
    return model.eval()


def test_every_method_has_a_case(method):
    assert {name.partition("+")[0] for name in CASES} == set(slimtune.methods.built_in())
    assert slimtune.methods.config_class(method).name == method
    assert slimtune.methods.config_class(method.upper()).name == method


@BASES
def test_starts_as_the_base(method, base):
    before = run(base())
    assert torch.equal(run(get_peft_model(base(), CASES[method]()).eval()), before)


def test_trains_its_own_parameters_alone(method):
    base = llama()
    names = {n for n, _ in base.named_parameters()}
    model = get_peft_model(base, CASES[method]())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not trained & names
    assert set(grads(model)) == trained
    assert all(not p.requires_grad for n, p in model.named_parameters() if n in names)
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_gradient_is_the_derivative(method, kind):
    site = Site("layer", kind, 5, 4, torch.device("cpu"), torch.float64)
    delta = CASES[method](**CASES[method].other).build(site)
    with torch.no_grad():
        for p in delta.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    names = [n for n, _ in delta.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in delta.parameters()]
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True) if kind == "linear" else torch.tensor([0, 4, 2])

    def call(x, y, *parameters):
        return torch.func.functional_call(delta, dict(zip(names, parameters, strict=True)), (x, y))

    assert torch.autograd.gradcheck(call, (x, y, *values))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    r=st.integers(1, 9),
    alpha=st.integers(1, 64),
    width=st.sampled_from([8, 16, 24]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_saved_and_loaded_is_the_same(method, tmp_path_factory, r, alpha, width, dtype):
    def base():
        return llama(dtype=dtype, layers=1, hidden_size=width, intermediate_size=width + 4)

    model = get_peft_model(base(), CASES[method](r=r, lora_alpha=alpha)).eval()
    shake(model)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base(), folder)
    for (n, p), (m, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert n == m
        assert p.dtype == q.dtype
        assert torch.equal(p, q)
    assert torch.equal(run(model), run(again))
    assert not any(p.requires_grad for p in again.parameters())


@BASES
def test_merged_is_the_forward(method, base):
    model = adapted(method, base)
    expected, before = run(model), snapshot(base())
    assert (expected - run(base())).abs().max() > 1e-3
    model.merge_adapter(safe_merge=True)
    assert (run(model) - expected).abs().max() < 1e-9
    model.unmerge_adapter()
    assert same_base(model, before)
    assert torch.equal(run(model), expected)
    plain = model.merge_and_unload()
    assert type(plain) is type(base())
    assert set(plain.state_dict()) == set(base().state_dict())
    assert (run(plain) - expected).abs().max() < 1e-9


def test_disabled_is_the_base_bit_for_bit(method):
    model = adapted(method)
    expected, plain = run(model), run(llama())
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), expected)
    model.merge_adapter()
    merged = run(model)
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), merged)


def test_builds_on_meta(method):
    real = get_peft_model(llama(), CASES[method]())
    with torch.device("meta"):
        fake = get_peft_model(llama(), CASES[method]())
    assert all(p.device.type == "meta" for p in fake.parameters())
    assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in fake.named_parameters()}


def test_two_adapters_on_one_model(method):
    model = adapted(method)
    first = run(model)
    model.add_adapter("second", CASES[method](**CASES[method].other))
    assert torch.equal(run(model), first)
    model.set_adapter("second")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".second." in n for n in trained)
    assert torch.equal(run(model), run(llama()))
    shake(model, seed=11)
    second = run(model)
    model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default", "second"]
    both = run(model)
    assert (both - first).abs().max() > 1e-3
    assert (both - second).abs().max() > 1e-3
    model.merge_adapter()
    assert (run(model) - both).abs().max() < 1e-9
    with pytest.raises(UsageError, match="merged into the base"):
        model.set_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(run(model), first)
    with pytest.raises(UsageError, match="only adapter"):
        model.delete_adapter("default")
    with pytest.raises(UsageError, match="did you mean 'default'"):
        model.set_adapter("defaults")


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_gives_the_same_gradients(method, reentrant, when):
    plain = adapted(method)
    base = llama()
    settings = {"use_reentrant": reentrant}
    if when == "before":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    model = get_peft_model(base, CASES[method]())
    if when == "after":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    shake(model)
    model.train()
    plain.train()
    expected, found = grads(plain), grads(model)
    assert set(expected) == set(found)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


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
    model = base()
    model.get_input_embeddings().weight.requires_grad_(False)
    before, flags = snapshot(model), {n: p.requires_grad for n, p in model.named_parameters()}
    kinds = {n: type(m) for n, m in model.named_modules()}
    notes = {n: set(vars(m)) for n, m in model.named_modules()}
    objects = {n: id(p) for n, p in model.named_parameters()}
    peft = get_peft_model(model, CASES[method]())
    assert peft is model
    assert same_base(model, before)
    steps(peft)
    assert not torch.equal(run(peft), run(base()))
    assert same_base(model, before)
    plain = peft.unload()
    assert plain is model
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {n: id(p) for n, p in model.named_parameters()} == objects
    assert {n: set(vars(m)) for n, m in model.named_modules()} == notes
    assert same_base(model, before)
    assert torch.equal(run(model), run(base()))


def test_the_adapter_is_fp32_above_a_16_bit_base(method):
    model = get_peft_model(llama(dtype=torch.bfloat16), CASES[method]())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert run(model).dtype == torch.bfloat16
    half = get_peft_model(llama(dtype=torch.bfloat16), CASES[method](), autocast_adapter_dtype=False)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.bfloat16}


def test_the_config_survives_its_file(method, tmp_path):
    config = CASES[method](task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    again = slimtune.PeftConfig.from_pretrained(tmp_path)
    assert type(again) is type(config)
    assert again == config
