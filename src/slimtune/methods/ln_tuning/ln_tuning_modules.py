"""LayerNorm tuning's adapter modules."""

from typing import Any

from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterModule, AdapterSite, BaseForward
from ...core.kernels.linear_layers import get_base_layer_type, is_quantized, is_weight_transposed
from ...errors import TargetError


class TrainedNorm(AdapterModule):
    """`w' ⊙ n(x) + b'`."""

    def __init__(self, site: AdapterSite) -> None:
        super().__init__()
        if is_quantized(site.module):
            raise TargetError(f"{site.name} is quantized, so it cannot train", "norms, or a base in 16 or 32 bits")
        self.is_transposed = is_weight_transposed(site.module)
        self.ln_tuning_layers = nn.Module()
        for name in ("weight", "bias"):
            base: Any = getattr(site.module, name, None)
            if base is not None:
                start = base.detach().to(site.device, site.dtype, copy=True)
                self.ln_tuning_layers.register_parameter(name, nn.Parameter(start))
                self.register_buffer(f"base_{name}", start.clone(), persistent=False)

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        trained = dict(self.ln_tuning_layers.named_parameters())
        # The copies keep their dtype, since 16 bits would round away what they learn; these layers allow one dtype.
        has_one_dtype = isinstance(base.module, nn.LayerNorm) or get_base_layer_type(base.module) == "linear"
        inputs = x.to(trained["weight"].dtype) if has_one_dtype else x
        y = base.run_base_with(trained, inputs)
        if base.inner_modules:
            # Other adapters changed this norm's output already: add what the copies change of the base's output.
            before = {name: getattr(self, f"base_{name}") for name in trained}
            return (base(x) + (y - base.run_base_with(before, inputs))).to(x.dtype)
        return y.to(x.dtype)

    def get_no_op_values(self, site: AdapterSite) -> dict[str, Tensor]:
        return {n: self.get_buffer(n.replace("ln_tuning_layers.", "base_")) for n, _ in self.named_parameters()}

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias, each plus the change of its copy."""
        merged: dict[str, Any] = {"weight": weight, "bias": bias}
        for name, p in self.ln_tuning_layers.named_parameters():
            change = p.to(weight.dtype) - getattr(self, f"base_{name}").to(weight.dtype)
            merged[name] = merged[name] + (change.t() if name == "weight" and self.is_transposed else change)
        return merged["weight"], merged["bias"]
