"""LayerNorm tuning beyond the contract: PEFT's table, 16-bit bases, several adapters on one norm."""

import pytest
import torch
from models_zoo import gemma2, gpt2, llama, run, shake

from slimtune import get_peft_model
from slimtune.errors import TargetError
from slimtune.methods.bitfit import BitFitConfig
from slimtune.methods.ln_tuning import NORMS, LNTuningConfig

BASES = pytest.mark.parametrize("base", [llama, gpt2, gemma2])


def test_the_defaults_equal_pefts():
    constants = pytest.importorskip("peft.utils.constants")
    theirs = dict(constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING)
    assert set(NORMS["llava"]) < set(theirs.pop("llava"))  # PEFT also trains embeddings and heads there
    ours = {k: sorted(v) for k, v in NORMS.items() if k != "llava"}
    assert ours == {k: sorted(v) for k, v in theirs.items()}


def test_other_models_train_every_norm():
    model = llama()
    model.config.model_type = "unknown"
    assert len(get_peft_model(model, LNTuningConfig()).match_report().adapted) == 5


def test_other_layers_are_refused():
    with pytest.raises(TargetError, match="q_proj is a Linear"):
        get_peft_model(llama(), LNTuningConfig(target_modules=["q_proj"]))


@BASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_starts_as_the_base_in_any_dtype(base, dtype):
    assert torch.equal(run(get_peft_model(base(dtype=dtype), LNTuningConfig()).eval()), run(base(dtype=dtype)))


def test_a_small_step_is_not_rounded_away():
    """The weights are one, and in bfloat16 1.002 is one, too."""
    model = get_peft_model(llama(dtype=torch.bfloat16), LNTuningConfig()).eval()
    start = run(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.002)
    assert not torch.equal(run(model), start)


@BASES
def test_several_adapters_add_up(base):
    every = {"target_modules": [n for n, m in base().named_modules() if "norm" in type(m).__name__.lower()]}
    model = get_peft_model(base(), LNTuningConfig(**every)).eval()
    shake(model)
    model.add_adapter("second", LNTuningConfig(**every))
    model.add_adapter("biases", BitFitConfig(new_biases=True, **every))
    for seed, name in enumerate(("second", "biases")):
        model.set_adapter(name)
        shake(model, seed)
    model.set_adapter(["biases", "default", "second"])
    expected = run(model)
    plain = base()
    with torch.no_grad():
        for name in every["target_modules"]:
            norm, mine = plain.get_submodule(name), model.get_submodule(name).adapters
            for p, own in mine["default"].ln_tuning_layers.named_parameters():
                second = getattr(mine["second"].ln_tuning_layers, p)
                getattr(norm, p).add_(own - getattr(norm, p) + second - getattr(norm, p))
            shift = mine["biases"].bitfit_bias
            norm.register_forward_hook(lambda module, given, out, shift=shift: out + shift)
    # Gemma's norm rounds to fp32 in the middle of a float64 model.
    assert (run(plain) - expected).abs().max() < (1e-6 if base is gemma2 else 1e-9)
