"""SHiRA beyond the contract: which entries train, custom masks, memory."""

import pytest
import torch
from models_zoo import llama, run, shake, snapshot
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from slimtune import PeftModel, get_peft_model
from slimtune.errors import AdapterError, ConfigError
from slimtune.methods.shira import ShiraConfig

NAME = "model.layers.0.self_attn.q_proj"
Q = {"target_modules": [NAME], "r": 3}


def places(model):
    return model.get_submodule(NAME).adapters["default"].shira_indices


def test_only_the_chosen_entries_change():
    model = get_peft_model(llama(), ShiraConfig(**Q))
    rows, columns = places(model).long()
    shake(model)
    model.merge_adapter()
    changed = (model.get_submodule(NAME).weight != snapshot(llama())[f"{NAME}.weight"]).nonzero()
    assert torch.equal(changed, torch.stack([rows, columns], dim=1))
    assert len(changed) == 3 * (32 + 32)


def test_the_seed_chooses_the_entries():
    chosen = [places(get_peft_model(llama(), ShiraConfig(random_seed=s, **Q))) for s in (1, 1, 2)]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])


def test_a_custom_mask_is_saved(tmp_path):
    def largest(layer, r):
        flat = layer.weight.abs().flatten()
        mask = torch.zeros_like(flat).scatter_(0, flat.topk(r * sum(layer.weight.shape)).indices, 1)
        return mask.view_as(layer.weight)

    config = ShiraConfig(mask_type="largest", **Q)
    config.mask_fn = largest
    model = get_peft_model(llama(), config).eval()
    rows, columns = places(model).long()
    weight = model.get_submodule(NAME).weight.abs()
    assert weight[rows, columns].min() >= weight.flatten().topk(rows.numel()).values.min()
    shake(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(llama(), tmp_path)), run(model))


def test_a_missing_or_wrong_mask_is_refused():
    config = ShiraConfig(mask_type="largest", **Q)
    with pytest.raises(ConfigError, match="mask_fn is not set"):
        get_peft_model(llama(), config)
    config.mask_fn = lambda layer, r: torch.ones_like(layer.weight)
    with pytest.raises(ConfigError, match="1,024 ones"):
        get_peft_model(llama(), config)


def test_more_entries_than_the_weight_are_refused():
    with pytest.raises(ConfigError, match="r up to 16"):
        get_peft_model(llama(), ShiraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("wrong", ["outside", "twice"])
def test_invalid_indices_in_a_file_are_refused(wrong, tmp_path):
    get_peft_model(llama(), ShiraConfig(**Q)).save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    key = next(k for k in file if k.endswith("shira_indices"))
    file[key][:, 1] = torch.tensor([32, 0]) if wrong == "outside" else file[key][:, 0]
    save_file(file, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="shira_indices"):
        PeftModel.from_pretrained(llama(), tmp_path)


class Largest(TorchDispatchMode):
    """Records the size of the largest dense tensor that is allocated."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.layout == torch.strided and not out._is_view():
            self.most = max(self.most, out.numel())
        return out


def test_forward_allocates_no_dense_matrix():
    model = get_peft_model(llama(), ShiraConfig(target_modules=[NAME], r=1))
    delta, kept = model.get_submodule(NAME).adapters["default"], []
    x, y = torch.randn(3, 32, dtype=torch.float64, requires_grad=True), torch.randn(3, 32, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), Largest() as made:
        delta(x, y)
    assert 0 < made.most < 32 * 32
    assert all(t.numel() < 32 * 32 for t in kept)
