import torch
from models_zoo import llama

from slimtune.extras.layer_inputs import MAX_INPUTS, collect_layer_inputs, collect_second_moments


def test_inputs_of_layers():
    """Layers with the same input share one tensor."""
    model = llama().eval()
    block = model.model.layers[0]
    layers = {n: block.self_attn.get_submodule(n) for n in ("q_proj", "k_proj", "o_proj")}
    rows = [[5, 9, 17], [4, 4, 4, 4]]
    found = collect_layer_inputs(model, layers, rows)
    assert found["q_proj"] is found["k_proj"]
    assert found["q_proj"].shape == (7, model.config.hidden_size)
    expected = torch.cat([block.input_layernorm(model.model.embed_tokens(torch.tensor(r))) for r in rows]).detach()
    order = torch.cdist(found["q_proj"], expected).argmin(1)
    torch.testing.assert_close(found["q_proj"], expected[order])
    assert not any(m._forward_pre_hooks for m in layers.values())


def test_second_moments_are_those_of_the_inputs_of_all_tokens():
    model = llama().eval()
    block = model.model.layers[0]
    layers = {n: block.get_submodule(n) for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")}
    layers["unused"] = torch.nn.Linear(4, 4)
    rows = [[5, 9, 17], [4, 4, 4, 4], [8] * 600]  # of several batches
    inputs, found = collect_layer_inputs(model, layers, rows, 10_000), collect_second_moments(model, layers, rows)
    assert found["self_attn.q_proj"] is found["self_attn.k_proj"]
    assert found.keys() == inputs.keys()
    for name, x in inputs.items():
        torch.testing.assert_close(found[name], x.t() @ x / 607)


def test_number_of_inputs():
    model = llama().eval()
    layers = {"up": model.model.layers[0].mlp.up_proj}
    assert len(collect_layer_inputs(model, layers, [list(range(3, 40))] * 60)["up"]) <= MAX_INPUTS
    assert collect_layer_inputs(model, {"unused": torch.nn.Linear(4, 4)}, [[3, 4]]) == {}
