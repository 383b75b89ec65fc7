"""Every method trains on a base in 4 or 8 bits, by bitsandbytes, which it needs, or as GPTQ stores it."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_cases import CASES
from models_zoo import llama, run, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from slimtune import PeftModel, get_peft_model
from slimtune.core.kernels.linear_layers import is_quantized
from slimtune.core.models.quantization import KINDS, dequantize_model, resolve_quantization_and_load_args
from slimtune.export.merged_weights import LazyMergedStateDict
from slimtune.extras import bitsandbytes_loading

pytestmark = [
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]

METHODS = sorted(set(CASES) - {"full"})  # full fine-tuning refuses a quantized base
GPTQ = Path(__file__).parents[1] / "extras" / "integer_checkpoints" / "gptq"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Make a tiny Llama in a kind of quantization: `bases(kind)`."""
    folder = tmp_path_factory.mktemp("base")
    llama(dtype=torch.float32).save_pretrained(folder)

    def make(kind):
        if kind == "gptq":
            config = AutoConfig.from_pretrained(GPTQ)
            _, told = resolve_quantization_and_load_args(config, None, torch.float32, torch.device("cpu"), "tiny")
            return AutoModelForCausalLM.from_pretrained(GPTQ, config=config, dtype=torch.float32, **told).eval()
        model = llama(dtype=torch.float32)
        _, told = resolve_quantization_and_load_args(model.config, kind, torch.float32, torch.device("cpu"), "tiny")
        model = type(model).from_pretrained(folder, dtype=torch.float32, **told).eval()
        bitsandbytes_loading.prevent_cpu_weight_repacking(model)
        return model

    return make


def train(model):
    """Train a few steps on one row; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    losses = []
    model.peft_config["default"].on_train_begin(5)
    for _ in range(5):
        logits = model(input_ids=tokens(), use_cache=False).logits
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()))
        losses[-1].backward()
        assert any(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        model.update_and_allocate(len(losses))
        optimizer.zero_grad()
    model.eval()
    return [loss.item() for loss in losses]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(k, m, marks=[pytest.mark.slow] if k != "nf4" or "+" in m else [])
        for k in (*KINDS, "gptq")
        for m in METHODS
        if (k == "nf4" or "+" not in m) and (k != "gptq" or m != "adaption_prompt")  # Qwen3 normalizes its keys
    ],
)
def test_trains_loads_and_merges(method, kind, bases, tmp_path):
    base = bases(kind)
    assert any(map(is_quantized, base.modules()))
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = get_peft_model(base, CASES[method]())
    losses = train(model)
    assert losses[-1] < losses[0]
    said = run(model)
    model.save_pretrained(tmp_path)
    assert (run(PeftModel.from_pretrained(bases(kind), tmp_path)) - said).abs().max() < 1e-5
    if kind != "int8":
        plain = PeftModel.from_pretrained(dequantize_model(bases(kind), torch.float32), tmp_path)
        assert not any(map(is_quantized, plain.modules()))
        assert (run(plain) - said).abs().max() < 2e-5
        if CASES[method].cls.mergeable and CASES[method].merges:
            plain.merge_adapter()
            merged, state = dict(plain.named_parameters()), LazyMergedStateDict(model)
            for name in (n for n in state if n.endswith("_proj.weight")):
                assert torch.allclose(state[name], merged[name], atol=1e-5), name
    base = model.unload()
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
