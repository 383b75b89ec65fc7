"""Write `integer_checkpoints/`: tiny bases that gptqmodel quantized and wrote, and what it computes with them.

gptqmodel is no dependency. Installed into a folder of its own, it is found by PYTHONPATH:

    pip install --no-deps --target LIBRARIES gptqmodel and what it imports
    PYTHONPATH=LIBRARIES:src:tests python tests/extras/make_integer_checkpoints.py

Each folder holds the checkpoint and `expected.safetensors`: in fp16 the dequantized weights, by name, and logits.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from models_zoo import tokens
from safetensors.torch import save_file
from tiny_families import build

FOLDER = Path(__file__).parent / "integer_checkpoints"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "head_dim": 16, "vocab_size": 320}
SIZES |= {"num_hidden_layers": 1, "max_position_embeddings": 512}
AWQ_SIZES = {"intermediate_size": 128, "num_key_value_heads": 4}  # it takes 64 outputs at a time
GPTQ = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "format": "gptq"}
CHECKPOINTS = {
    "gptq": ("qwen3", GPTQ),
    "gptq_act_order": ("qwen3", {**GPTQ, "desc_act": True, "sym": False, "format": "gptq_v2"}),
    "gptq_2_bits": ("qwen3", {**GPTQ, "bits": 2}),
    "gptq_8_bits": ("qwen3", {**GPTQ, "bits": 8, "group_size": -1, "sym": False, "act_group_aware": False}),
    "gptq_experts": ("qwen3_moe", GPTQ),
    "awq": ("qwen3", {"bits": 4, "group_size": 32, "sym": False, "format": "gemm", "method": "awq"}),
}


def dequantize(module: Any, settings: dict[str, Any]) -> torch.Tensor:
    """Return the weight `(in, out)` of one of gptqmodel's layers."""
    if settings.get("method") != "awq":
        return module.dequantize_weight()
    return dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size)


def make(name: str, work: Path) -> None:
    family, settings = CHECKPOINTS[name]
    torch.manual_seed(0)
    sizes = SIZES | (AWQ_SIZES if name == "awq" else {})
    build(family, **sizes).half().save_pretrained(work / "plain")
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 300, (128,), generator=generator).tolist() for _ in range(64)]
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    model = GPTQModel.load(str(work / "plain"), QuantizeConfig(**settings))
    model.quantize(calibration, batch_size=8)
    model.save(str(work / "packed"))
    (FOLDER / name).mkdir(parents=True, exist_ok=True)
    loaded = GPTQModel.load(str(work / "packed"), backend=BACKEND.TORCH, dtype=torch.float16)
    with torch.no_grad():
        expected = {"logits": loaded.model(tokens()).logits}
    for module_name, module in loaded.model.named_modules():
        if hasattr(module, "qweight"):
            expected[f"{module_name}.weight"] = dequantize(module, settings).t()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(work / "packed" / file, FOLDER / name)
    save_file({n: t.detach().contiguous() for n, t in expected.items()}, FOLDER / name / "expected.safetensors")


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
