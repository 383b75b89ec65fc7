"""The adapters of several models over one base, in one packed sequence: each span of tokens uses one model's adapter.

    y[span] = W x[span] + s · B A x[span]        A, B, s: of the layer with the same name in the span's model

The models share the base's parameters (`copy_sharing_parameters`) and have adapted layers of their own, so that outside
of this each runs as if it were alone. The first model, the host, runs the sequence: the frozen products are computed
once for all tokens, the low-rank ones by span. Gradients go to every model's own parameters.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.kernels.linear_layers import get_base_layer_type
from ..core.kernels.lora_linear import add_low_rank_update
from ..errors import ModelError


def copy_sharing_parameters(model: Any) -> Any:
    """Return a copy of a model with modules of its own, and with the parameters and buffers of `model` themselves."""
    # deepcopy takes what its memo has for an object in place of a copy.
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def packing_runs_unsupported_reason_or_empty(models: Sequence[Any]) -> str:
    """Return why one packed sequence cannot run the adapters of these models exactly, "" if it can."""
    host = models[0].adapted_layers("default")
    for model in models:
        layers = model.adapted_layers("default")
        if layers.keys() != host.keys():
            return "the runs adapt different layers"
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            return "a method adds virtual tokens"
        for name, layer in layers.items():
            if get_base_layer_type(layer) != "linear" or layer.trained_copies or "default" not in layer.adapters:
                return f"{name} is adapted otherwise than by a low-rank update of a linear layer"
            module: Any = layer.adapters["default"]
            if module.takes_tokens or module.low_rank_factors() is None:
                return f"the method's update of {name} is not low-rank"
        if model.get_output_embeddings() in layers.values():
            return "the output head is adapted"
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
            return "there is dropout"
        if any(vars(m).get("attention_dropout") for m in model.modules()):
            return "there is dropout in the attention"
    return ""


class PackedSequenceAdapters:
    """During a call of the host: which adapter each span of tokens uses.

    Args:
        models: the models that share the base; the first one is the host.
        spans: `(number of the model, tokens)` of each span, in the order of the sequence.
    """

    def __init__(self, models: Sequence[Any], spans: Sequence[tuple[int, int]]) -> None:
        self.runs, self.lengths = zip(*spans, strict=True)
        layers = [model.adapted_layers("default") for model in models]
        self.factors: dict[nn.Module, list[Any]] = {
            layer: [own[name].adapters["default"].low_rank_factors() for own in layers]
            for name, layer in layers[0].items()
        }

    def run_layer(self, layer: nn.Module, base: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Return the output `(1, tokens, out)` of an adapted layer of the host for `x (1, tokens, in)`."""
        x: Tensor = args[0]
        if x.shape[-2] != sum(self.lengths):
            message = f"a {type(layer).__name__} gets {x.shape[-2]} of {sum(self.lengths)} tokens"
            raise ModelError(message, "layers that get every token of a packed sequence")
        # `split` and `cat` have backward passes that write each gradient once; slices would add up whole tensors.
        parts = zip(self.runs, base(x).split(self.lengths, -2), x.split(self.lengths, -2), strict=True)
        return torch.cat([add_low_rank_update(y, part, *self.factors[layer][run]) for run, y, part in parts], -2)


@contextmanager
def using_packed_adapters(models: Sequence[Any], spans: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Let the first model run one packed sequence with the adapters of all; see `PackedSequenceAdapters`."""
    state: Any = next(iter(models[0].adapted_layers("default").values())).active_state
    state.layer_runner = PackedSequenceAdapters(models, spans)
    try:
        yield
    finally:
        state.layer_runner = None
