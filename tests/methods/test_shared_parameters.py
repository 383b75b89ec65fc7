"""Parameters that modules at several sites share and train: no method of slimtune has them, `outsider/bank.py` does."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from method_cases import ALL
from models_zoo import gpt2, llama
from reference import compute_in_float64, largest_relative_error
from test_packed_step import assert_packed_equals_alone, packed_loss_and_gradients, prepare

from slimtune import get_peft_model
from slimtune.core.training.memory_savings import apply_memory_savings
from slimtune.errors import ModelError

HERE = Path(__file__).parent
BANK = runpy.run_path(str(HERE / "outsider/bank.py"))
CONTRACT = """
import sys
sys.path[:0] = ["methods/outsider", "."]
from slimtune.core.foundation.registry import register_parts
register_parts("slimtune.methods", {"bank": "bank"})
import method_cases, pytest
from bank import BankConfig
from method_cases import ALL, Case
method_cases.CASES["bank"] = Case("bank", {"r": 3, **ALL}, {"r": 2})
sys.exit(pytest.main([*sys.argv[1:], "-k", "bank", "-p", "no:cacheprovider"]))
"""


def adapted(base=llama):
    return prepare(get_peft_model(base(), BANK["BankConfig"](**ALL)))


@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize(
    "more", [{"tile": 7}, {"checkpointing": True, "offload": True, "tile": 7}], ids=["tiles", "all"]
)
def test_tiles_train_what_modules_share(base, more):
    model = adapted(base)
    loss, expected = assert_packed_equals_alone(model)
    assert any("bank_A" in name for name in expected)
    apply_memory_savings(model, **more)
    with compute_in_float64():
        same_loss, found = packed_loss_and_gradients(model)
    assert same_loss == pytest.approx(loss, rel=1e-12)
    assert largest_relative_error(found, expected) < 1e-12


def test_a_holder_that_is_not_named_is_an_error_not_a_missing_gradient():
    model = adapted()
    for module in model.adapter_modules("default").values():
        if module.shared:
            # As a method would keep it that does not know of `shared`.
            module.low_rank_factors = lambda module=module, held=module.shared[0]: (
                held.bank_A[:, : module.sizes[0]], held.bank_B[: module.sizes[1]], 1.0
            )  # fmt: skip
            module.shared = ()
    apply_memory_savings(model, tile=7)
    with pytest.raises(ModelError, match=r"`shared`"):
        packed_loss_and_gradients(model)


@pytest.mark.slow
def test_keeps_the_contract():
    files = ("methods/test_contract.py", "methods/test_packed_step.py")
    command = [sys.executable, "-c", CONTRACT, *files, "-rA"]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED methods/test_packed_step.py::test_packed_equals_alone[llama-bank]" in done.stdout
