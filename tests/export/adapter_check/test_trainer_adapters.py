"""Adapters that LLaMA-Factory and ms-swift wrote (`write_trainer_adapters.py`): no alarm, and PEFT computes them."""

from pathlib import Path

import pytest
from faulty_adapters import copy
from write_trainer_adapters import FOLDER, make_trainer_base

from slimtune.export.adapter_repair.repair_adapter import repair_adapter
from slimtune.export.verify import check_adapter

ADAPTERS = sorted(str(folder.relative_to(FOLDER)) for folder in FOLDER.glob("*/*"))
OF_PISSA, OF_LLAMA_FACTORY = {"start-in-base"}, {"template"}
"""What is so: PiSSA's start is in the base, and LLaMA-Factory's chatml is not the base's own template."""


@pytest.fixture(scope="module")
def trainer_base(tmp_path_factory) -> Path:
    return make_trainer_base(tmp_path_factory.mktemp("trainers") / "base")


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_alarm(trainer_base, name):
    result = check_adapter(FOLDER / name, str(trainer_base))
    known = (OF_PISSA if "pissa" in name else set()) | (OF_LLAMA_FACTORY if "llamafactory" in name else set())
    assert {f.code for f in result.file.findings} == known
    assert (result.passed, result.file.placed) == (True, result.file.tensors)
    assert min(layer.norm for layer in result.file.layers) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_computes_it(trainer_base, tmp_path, name):
    result = repair_adapter(copy(FOLDER / name, tmp_path / "given"), "peft", tmp_path / "out", str(trainer_base))
    assert (result.proof.passed, result.proof.engine) == (True, "PEFT"), result.proof
