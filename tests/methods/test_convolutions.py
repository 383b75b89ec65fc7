"""Methods at convolutions, with real peft as the oracle."""

import warnings

import peft
import pytest
import torch
from adapter_checks import assert_merges
from models_zoo import shake
from torch import nn

import slimtune
from slimtune import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from slimtune.core.adapters.adapter_module import MergeUnsupported
from slimtune.errors import ConfigError, TargetError
from slimtune.export.export_support import get_export_support_flags

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be merged", "ignore:.*block", "ignore:.*invalid shape")
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
STRIDED, GROUPED = {"stride": 2, "padding": 1}, {"groups": 2, "padding": 1}
METHODS = {
    "lora": ("LoraConfig", {"r": 4, "init_lora_weights": "gaussian", "use_rslora": True}),
    "lora+bias": ("LoraConfig", {"r": 4, "lora_bias": True}),
    "lora+dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "loha+effective": ("LoHaConfig", {"r": 3, "alpha": 5, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 3}),
    "lokr+whole": ("LoKrConfig", {"r": 9, "alpha": 5}),
    "lokr+effective": ("LoKrConfig", {"r": 2, "alpha": 5, "decompose_factor": 2, "use_effective_conv2d": True}),
    "hira": ("HiraConfig", {"r": 3}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "ia3+input": ("IA3Config", {"feedforward_modules": ["conv"]}),
    "oft": ("OFTConfig", {"oft_block_size": 4}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10}),
}
CASES = [
    *[(method, 2, STRIDED) for method in METHODS],
    *[(m, 2, GROUPED) for m in METHODS if m.partition("+")[0] not in ("hira", "oft", "adalora")],
    *[(m, 1, {"padding": "same"}) for m in METHODS if m.partition("+")[0] in ("lora", "loha", "lokr", "hira")],
    *[(m, 3, {}) for m in ("lora+dora", "hira", "ia3", "ia3+input")],
    *[(m, 2, {"kernel_size": 1}) for m in ("lora", "loha+effective", "lokr", "oft")],
]
EVERY_CASE = pytest.mark.parametrize(("method", "dim", "shape"), CASES)


class Net(nn.Module):
    def __init__(self, dim=2, dtype=torch.float64, **shape):
        super().__init__()
        torch.manual_seed(0)
        self.conv = CONVOLUTIONS[dim](**{"in_channels": 8, "out_channels": 12, "kernel_size": 3, **shape}, dtype=dtype)
        self.head = nn.Linear(12, 3, dtype=dtype)

    def forward(self, x):
        return self.head(self.conv(x).tanh().flatten(2).mean(2))


def adapted(method, library=slimtune, base=None, **more):
    name, settings = METHODS[method]
    torch.manual_seed(5)
    return library.get_peft_model(base or Net(), getattr(library, name)(target_modules=["conv"], **settings, **more))


def image(dim=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 8, *[5] * dim, dtype=torch.float64, generator=generator).to(dtype)


@EVERY_CASE
def test_files_and_outputs_are_pefts(method, dim, shape, tmp_path):
    theirs, ours = (adapted(method, library, Net(dim, **shape)) for library in (peft, slimtune))
    start, expected = get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert {k: t.shape for k, t in start.items()} == {k: t.shape for k, t in expected.items()}
    assert all((start[k] - t).abs().max() < 1e-6 for k, t in expected.items())
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    # Only what the file stores: peft also trains the count of AdaLoRA's ranks.
    theirs = peft.PeftModel.from_pretrained(Net(dim, **shape), tmp_path / "theirs")
    if method == "oft":
        theirs.merge_adapter()  # its forward pass adds up overlapping patches
    ours = PeftModel.from_pretrained(Net(dim, **shape), tmp_path / "theirs")
    x = image(dim)
    assert (ours(x) - Net(dim, **shape)(x)).abs().max() > 1e-4
    assert (ours(x) - theirs(x)).abs().max() < 1e-6
    ours.save_pretrained(tmp_path / "ours")
    back = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(Net(dim, **shape), tmp_path / "ours"))
    assert all(torch.equal(t, back[k]) for k, t in get_peft_model_state_dict(ours).items())


@EVERY_CASE
def test_merges_and_differentiates_like_the_merged_weight(method, dim, shape):
    """Also with a dilation and a padding mode, which peft leaves out of LoRA's A."""
    if shape == STRIDED:
        shape = {"dilation": 2, "padding": 2, "padding_mode": "circular"}
    model, x = adapted(method, base=Net(dim, **shape)).eval(), image(dim)
    assert torch.equal(model(x), Net(dim, **shape)(x))
    shake(model)
    expected, conv, module = model(x), model.conv, model.conv.adapters["default"]
    if method.startswith("lora") and shape == GROUPED:
        with pytest.raises(MergeUnsupported, match="2 groups"):
            model.merge_adapter()
        return
    assert_merges(model, lambda m: m(x))
    plain = Net(dim, **shape)
    weight, bias = module.merge_into(plain.conv.weight.detach().flatten(1), plain.conv.bias.detach())
    merged = {"conv.weight": weight.view(conv.weight.shape), "conv.bias": bias}
    trained = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(torch.func.functional_call(plain, merged, x).square().sum(), trained)
    found = torch.autograd.grad(expected.square().sum(), trained)
    assert all((f - s).abs().max() < 1e-9 for f, s in zip(found, slopes, strict=True))
    assert torch.equal(model.unload()(x), Net(dim, **shape)(x))


@pytest.mark.parametrize("method", METHODS)
def test_mixed_batches_and_several_adapters(method):
    model = adapted(method)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["conv", "head"], init_lora_weights=False))
    shake(model)
    model.eval()
    x, alone = image(), {"__base__": Net()(image())}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model(x)
    rows = ["other", "__base__", "default"]
    mixed = model(x, adapter_names=rows)
    assert all((mixed[i] - alone[name][i]).abs().max() < 1e-9 for i, name in enumerate(rows))
    model.set_adapter(["default", "other"])
    together = model(x)
    assert min((together - a).abs().max() for a in alone.values()) > 1e-5
    assert_merges(model, lambda m: m(x))


@pytest.mark.parametrize("method", METHODS)
def test_on_a_bf16_base(method):
    model, x = adapted(method, base=Net(dtype=torch.bfloat16)), image(dtype=torch.bfloat16)
    assert torch.equal(model(x), Net(dtype=torch.bfloat16)(x))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    shake(model)
    found = model(x)
    found.float().sum().backward()
    merged = model.merge_and_unload().double()(image())
    assert (found.double() - merged).abs().max() < 0.05


def test_dropout_and_rank_pattern():
    model = adapted("lora", rank_pattern={"conv": 2}, lora_dropout=0.5)
    assert (model.conv.in_features, model.conv.out_features) == (8, 12)  # PEFT's names
    shake(model)
    assert get_peft_model_state_dict(model)["base_model.model.conv.lora_A.weight"].shape == (2, 8, 3, 3)
    assert not torch.equal(model(image()), model(image()))
    assert torch.equal(model.eval()(image()), model(image()))
    rows = shake(adapted("loha", rank_dropout=0.5).train())
    untouched = (rows.conv(image()) - Net().conv(image())).abs().amax(dim=(0, 2, 3)) < 1e-12
    assert 0 < untouched.sum() < 12


@pytest.mark.parametrize("combination", ["svd", "cat", "linear"])
def test_weighted_sum(combination):
    model = adapted("lora")
    model.add_adapter("other", LoraConfig(r=4, target_modules=["conv"], init_lora_weights=False))
    shake(model)
    settings = {"svd_rank": 8} if combination == "svd" else {}
    names = ["default", "other"] if combination != "linear" else ["default"]
    model.add_weighted_adapter(names, [0.7, -0.4][: len(names)], "sum", combination, **settings)
    change = 0
    for name, weight in zip(names, (0.7, -0.4), strict=False):
        A, B, scale = model.conv.adapters[name].low_rank_factors()
        change += weight * scale * B @ A
    model.set_adapter("sum")
    conv = Net().conv
    conv.weight.data += change.view_as(conv.weight)
    assert (model.conv(image()) - conv(image())).abs().max() < 1e-9


@pytest.mark.parametrize("method", ["loha", "hira", "oft"])
def test_converts_to_a_lora(method):
    model = shake(adapted(method))
    report = model.to_lora("default", 12)
    assert report.error < 1e-9
    expected = model.eval()(image())
    model.set_adapter(report.adapter)
    assert (model(image()) - expected).abs().max() < 1e-9


def test_refusals():
    for method in ("hira", "oft", "adalora"):
        with pytest.raises(NotImplementedError, match="groups"):
            adapted(method, base=Net(**GROUPED))
    with pytest.raises(ConfigError, match=r"\b3\b.*conv .*groups=2"):
        get_peft_model(Net(**GROUPED), LoraConfig(r=3, target_modules=["conv"]))
    with pytest.raises(ConfigError, match=r"'pissa'.*conv\b"):
        get_peft_model(Net(), LoraConfig(init_lora_weights="pissa", target_modules=["conv"]))
    with pytest.raises(ConfigError, match=r"conv .*Conv3d"):
        adapted("loha+effective", base=Net(3))
    with pytest.raises(TargetError, match=r"conv .*Conv2d.*vera"):
        get_peft_model(Net(), slimtune.VeraConfig(target_modules=["conv"]))
    standardized = type("StandardizedConv2d", (nn.Conv2d,), {"forward": lambda self, x: x})
    base = Net()
    base.conv.__class__ = standardized
    with pytest.raises(TargetError, match="StandardizedConv2d"):
        adapted("lora", base=base)
    parametrized = Net()
    nn.utils.parametrizations.weight_norm(parametrized.conv)
    with pytest.raises(TargetError, match=r"conv .*ParametrizedConv2d.*lora"):
        adapted("lora", base=parametrized)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        formats = get_export_support_flags(adapted("lora"))
    assert (formats.merged, formats.gguf, formats.vllm, formats.as_lora) == (True, False, False, False)
