"""What maps are given: a sample of their own inputs, one tensor for maps that are given one."""

import torch
from models_zoo import llama

from slimtune.utils.calibration import MAX_INPUTS, collect_layer_inputs


def test_inputs_are_those_of_the_maps_and_shared_where_they_are_one():
    model = llama().eval()
    names = ("q_proj", "k_proj", "o_proj")
    maps = {n: model.model.layers[0].self_attn.get_submodule(n) for n in names}
    rows = [[5, 9, 17], [4, 4, 4, 4]]
    found = collect_layer_inputs(model, maps, rows)
    assert found["q_proj"] is found["k_proj"]
    assert found["q_proj"].shape == (7, model.config.hidden_size)
    block = model.model.layers[0]
    wanted = torch.cat([block.input_layernorm(model.model.embed_tokens(torch.tensor(r))) for r in rows])
    order = torch.cdist(found["q_proj"], wanted.detach()).argmin(1)
    torch.testing.assert_close(found["q_proj"], wanted.detach()[order])
    assert not any(m._forward_pre_hooks for m in maps.values())


def test_no_more_are_kept_than_said():
    model = llama().eval()
    maps = {"up": model.model.layers[0].mlp.up_proj}
    assert len(collect_layer_inputs(model, maps, [list(range(3, 40))] * 60)["up"]) <= MAX_INPUTS
    assert collect_layer_inputs(model, {"unused": torch.nn.Linear(4, 4)}, [[3, 4]]) == {}
