"""One adapter module at one linear layer."""

import torch

from slimtune.core.adapters.adapter_module import AdapterSite, BaseForward


def build(config, size=(24, 20), dtype=torch.float64, layer=None):
    """The adapter module of a config at a layer of `size` (inputs, outputs)."""
    torch.manual_seed(0)
    return config.build(AdapterSite("layer", "linear", *size, torch.device("cpu"), dtype, layer))


def run_layer(module, x, layer=None):
    layer = torch.nn.Identity() if layer is None else layer
    return module.forward_with_base(BaseForward(layer, layer.forward), x)


def added_weight(module, size=(24, 20)):
    return module.merge_into(torch.zeros(size[1], size[0], dtype=torch.float64), None)[0]
