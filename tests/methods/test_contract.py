"""What every method promises, run over each of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from adapter_checks import assert_merges, run_with
from method_cases import CASES, config
from models_zoo import gemma2, gpt2, llama, run, same_base, shake, snapshot, tokens
from reference import compute_in_float64, slope_along

import slimtune
from slimtune import PeftModel, get_peft_model
from slimtune.core.adapters.adapter_module import MergeUnsupported
from slimtune.core.adapters.method_registry import get_method_config_class, list_methods
from slimtune.errors import ModelError, UsageError
from slimtune.extras.adapter_strength import AdapterTensorInterpolator
from slimtune.planning.memory_trace import trace_training_step
from slimtune.planning.plan_request import MicroBatchWorkload

pytestmark = [
    pytest.mark.parametrize(
        "method", [pytest.param(name, marks=[pytest.mark.slow] * ("+" in name)) for name in sorted(CASES)]
    ),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
# Gemma 2 needs eager attention for its soft-cap, and that gives NaN for a padded row in float64.
BASES = {"llama": llama, "gpt2": gpt2, "gemma2": lambda: gemma2(torch.float32)}
TWO_BASES = pytest.mark.parametrize("base", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
EVERY_BASE = pytest.mark.parametrize(
    "base", ["llama", *(pytest.param(base, marks=pytest.mark.slow) for base in BASES if base != "llama")]
)
CLOSE = 1e-9
PROMPTS = {"prompt_tuning", "p_tuning", "prefix_tuning"}
TOLERANCE = {"llama": CLOSE, "gpt2": CLOSE, "gemma2": 2e-5}


def adapted(method, base="llama", **more):
    return shake(get_peft_model(BASES[base](), config(method, base, **more))).eval()


def is_mergeable(method):
    return CASES[method].cls.mergeable and CASES[method].merges


def loss_of(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model):
    model.zero_grad()
    loss_of(model, tokens()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def train(model, batches, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for ids in batches:
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_every_method_has_a_case(method):
    assert {name.partition("+")[0] for name in CASES} == set(list_methods())
    name = method.partition("+")[0]
    assert get_method_config_class(name) is get_method_config_class(name.upper())
    assert get_method_config_class(name).name == name
    assert type(config(method)).name == name


@TWO_BASES
def test_starts_as_the_base(method, base):
    model = get_peft_model(BASES[base](), config(method, base)).eval()
    assert torch.equal(run(model), run(BASES[base]())) is CASES[method].identity


def test_trains_only_its_own_parameters(method):
    base = llama()
    names = {n for n, _ in base.named_parameters()}
    model = get_peft_model(base, config(method))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not trained & names
    assert set(gradients(model)) == trained
    assert all(not p.requires_grad for n, p in model.named_parameters() if n in names)
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)


@TWO_BASES
def test_gradient_is_the_derivative(method, base):
    """Against central differences, along a random direction in each parameter, through the whole model in float64."""
    if not CASES[method].exact_gradient:
        pytest.skip("the method leaves a part of the gradient out by design; compared with peft instead")
    model = adapted(method, base)
    with compute_in_float64():
        found, generator = gradients(model), torch.Generator().manual_seed(2)
        for name, p in ((n, p) for n, p in model.named_parameters() if p.requires_grad):
            direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            slope = slope_along(p, direction, lambda: loss_of(model, tokens()))
            assert (found[name] * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize(("other", "width", "dtype"), [(False, 32, torch.float32), (True, 24, torch.bfloat16)])
def test_saved_and_loaded_is_the_same(method, tmp_path, other, width, dtype):
    def base():
        return llama(dtype=dtype, layers=2, hidden_size=width, intermediate_size=width + 8)

    model = shake(get_peft_model(base(), config(method, **(CASES[method].other if other else {}))).eval())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    for (n, p), (m, q) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert (n, p.dtype) == (m, q.dtype)
        assert torch.equal(p, q), n
    assert torch.equal(run(model), run(loaded))
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == expected
    assert torch.equal(run(model), run(trainable.eval()))


@TWO_BASES
def test_merged_equals_the_forward(method, base):
    model = adapted(method, base)
    expected, before = run(model), snapshot(BASES[base]())
    assert (expected - run(BASES[base]())).abs().max() > 1e-4
    if not is_mergeable(method):
        with pytest.raises(MergeUnsupported):
            model.merge_adapter()
        assert torch.equal(run(model), expected)
        assert same_base(model, before)
        return
    model.merge_adapter(safe_merge=True)
    merged = run(model)
    assert (merged - expected).abs().max() < CLOSE
    with model.disable_adapter():
        assert torch.equal(run(model), run(BASES[base]()))
    assert torch.equal(run(model), merged)
    model.unmerge_adapter()
    assert same_base(model, before)
    assert torch.equal(run(model), expected)
    plain = model.merge_and_unload()
    assert type(plain) is type(BASES[base]())
    assert set(plain.state_dict()) == set(BASES[base]().state_dict())
    assert (run(plain) - expected).abs().max() < CLOSE


def test_disabled_is_the_base(method):
    model = adapted(method)
    expected = run(model)
    with model.disable_adapter():
        assert torch.equal(run(model), run(llama()))
    assert torch.equal(run(model), expected)


def test_strength_scales_the_change(method, tmp_path):
    model = get_peft_model(llama(), config(method)).eval()
    weakest = run(model) if method.partition("+")[0] in PROMPTS else run(llama())
    shake(model)
    trained, expected = {n: p.clone() for n, p in model.named_parameters()}, run(model)
    strength, changes = AdapterTensorInterpolator(model, "default"), []
    for s in (0.0, 0.1, 0.5):
        strength.set(s)
        changes.append((run(model) - weakest).abs().max().item())
    assert changes[0] < CLOSE < changes[1] < changes[2]
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(llama(), tmp_path)), run(model))
    strength.set(1.0)
    assert all(torch.equal(p, trained[n]) for n, p in model.named_parameters())
    assert torch.equal(run(model), expected)


def test_the_config_is_saved_and_loaded(method, tmp_path):
    saved = config(method, task_type="CAUSAL_LM")
    saved.save_pretrained(tmp_path)
    loaded = slimtune.PeftConfig.from_pretrained(tmp_path)
    assert (type(loaded), loaded) == (type(saved), saved)


def test_builds_on_meta(method):
    real = get_peft_model(llama(), config(method))
    with torch.device("meta"):
        fake = get_peft_model(llama(), config(method))
    assert all(p.device.type == "meta" for p in fake.parameters())
    assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in fake.named_parameters()}


def test_a_forward_reads_no_tensor_values(method):
    """`slimtune plan` runs the training step on fake tensors, which have no values to branch on or to print."""
    job = MicroBatchWorkload(llama().config, config(method), torch.float32, lengths=(40, 24))
    try:
        trace_training_step(job, stop_after_backward=True)
    except ModelError as e:
        pytest.fail(f"{type(config(method)).__module__}: a forward must not read tensor values: {e.message}")


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
    if not CASES[method].cls.trains_every_weight:  # two copies of the same weight cannot be active together
        model.set_adapter(["default", "second"])
        assert model.active_adapters == ["default", "second"]
        both = run(model)
        assert (both - first).abs().max() > 1e-5
        assert (both - second).abs().max() > 1e-5
        if is_mergeable(method):
            model.merge_adapter()
            assert (run(model) - both).abs().max() < CLOSE
            with pytest.warns(UserWarning, match="set_adapter"):
                model.set_adapter("default")
            assert (run(model) - first).abs().max() < CLOSE
    model.set_adapter("default")
    model.rename_adapter("second", "third")
    model.set_adapter("third")
    assert torch.equal(run(model), second)
    model.delete_adapter("third")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(run(model), first)
    with pytest.raises(UsageError, match=r"'defaults'.*'default'"):
        model.set_adapter("defaults")
    model.delete_adapter("default")
    assert torch.equal(run(model), run(llama()))


def test_nests_with_a_lora(method):
    """Two adapters run one inside the other, whatever their methods."""
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
    if is_mergeable(method):
        assert_merges(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(method, reentrant):
    plain, base = adapted(method), llama()
    if reentrant:  # enabled before the adapter is attached, or after it
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model = get_peft_model(base, config(method))
    if not reentrant:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shake(model)
    expected, found = gradients(plain.train()), gradients(model.train())
    assert set(expected) == set(found)
    assert all((expected[n] - found[n]).abs().max() < 1e-12 for n in expected)


@EVERY_BASE
def test_packed_equals_alone(method, base):
    """Rows in one sequence, separated by their positions, give the logits of each row alone."""
    model = adapted(method, base)
    rows = [tokens(1, n, seed=n) for n in (5, 8, 3)]
    packed = torch.cat(rows, dim=1)
    positions = torch.cat([torch.arange(r.shape[1]) for r in rows])[None]
    with torch.no_grad():
        together = model(input_ids=packed, position_ids=positions, use_cache=False).logits
        alone = [model(input_ids=r, use_cache=False).logits for r in rows]
    assert together.shape[1] == packed.shape[1]
    assert (together - torch.cat(alone, dim=1)).abs().max() < TOLERANCE[base]


@pytest.mark.parametrize(("base", "side"), [("llama", "left"), ("gpt2", "right"), ("gemma2", "left")])
def test_padded_equals_alone(method, base, side):
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
    assert (both[0] - alone[0]).abs().max() < TOLERANCE[base]
    assert (both[1][mask[1].bool()] - alone[1]).abs().max() < TOLERANCE[base]


@EVERY_BASE
def test_generate_with_a_cache_equals_without(method, base):
    model = adapted(method, base)
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0  # padded on the left
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    outputs = [model.generate(ids, attention_mask=mask, use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    with_cache, without = (torch.stack(s.logits) for s in outputs)
    assert (with_cache - without).abs().max() < TOLERANCE[base]


def test_mixed_batch_equals_rows_alone(method):
    model = adapted(method)
    for name, adapter in (("second", config(method, **CASES[method].other)), ("lora", CASES["lora"]())):
        model.add_adapter(name, adapter)
        model.set_adapter(name)
        shake(model, seed=len(name))
    model.set_adapter("default")
    names = ["second", "__base__", "default", "lora", "second"]
    ids = tokens(5, 8)
    mask = torch.ones_like(ids)
    mask[2:, 6:] = 0
    with torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
        for i, name in enumerate(names):
            row = {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}
            alone = run_with(model, name, lambda row=row: model(**row).logits)
            assert (mixed[i] - alone[0])[mask[i].bool()].abs().max() < CLOSE, name


def test_a_copy_is_independent(method):
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


@TWO_BASES
def test_the_base_comes_back(method, base):
    def describe(model):
        parameters = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
        return parameters, {n: (type(m), set(vars(m))) for n, m in model.named_modules()}

    model = BASES[base]()
    model.get_input_embeddings().weight.requires_grad_(False)
    before, description = snapshot(model), describe(model)
    peft = get_peft_model(model, config(method, base))
    assert peft is model
    assert same_base(model, before)
    start = run(peft)
    train(peft, [tokens()] * 3)
    assert not torch.equal(run(peft), start)
    assert same_base(model, before)
    plain = peft.unload()
    assert plain is model
    assert describe(model) == description
    assert same_base(model, before)
    assert torch.equal(run(model), run(BASES[base]()))


def test_training_lowers_the_loss(method):
    model = get_peft_model(llama(), config(method))
    before = loss_of(model, tokens()).item()
    train(model, [tokens()] * 8, lr=2e-2)
    assert loss_of(model, tokens()).item() < before - 1e-3


def test_trains_under_autocast(method):
    model = shake(get_peft_model(llama(dtype=torch.float32), config(method)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, tokens())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert any(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_adapter_is_fp32_on_a_16_bit_base(method):
    plain = run(llama(dtype=torch.bfloat16))
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        base = llama(dtype=torch.bfloat16)
        before = snapshot(base)
        model = get_peft_model(base, config(method), autocast_adapter_dtype=autocast).eval()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        assert torch.equal(run(model), plain) is CASES[method].identity
        assert run(model).dtype == torch.bfloat16
        train(model, [tokens()])
        assert same_base(model, before)
