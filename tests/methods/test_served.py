"""Rows of every method in the server's batches: logits are those of the method alone."""

import pytest
import torch
from adapter_checks import run_with
from method_cases import CASES
from models_zoo import llama, run, shake

from slimtune import LoraConfig, get_peft_model
from slimtune.core.adapters.active_adapters import BASE_ROW
from slimtune.generation.model_runner import GenerationRow, MultiAdapterRunner

ALONE = {"prompt_tuning", "p_tuning", "prefix_tuning"}
"""Methods whose rows share no batch with others."""
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", sorted(CASES))
def test_served_rows_equal_the_method_alone(method):
    model = shake(get_peft_model(llama(), CASES[method]()))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("other")
    shake(model, seed=6)
    model.eval()
    texts = {"default": list(range(5, 16)), "other": [7, 8], BASE_ROW: list(range(20, 25))}
    runner, shared, found = MultiAdapterRunner(model), None, {}
    batches = []
    for name, text in texts.items():
        row = GenerationRow(name)
        logits, batch = runner.prefill(row, text)
        found[row] = (text, [logits[0]])
        if runner.shares_batches(name) and shared is not None:
            shared.join(batch)
            continue
        shared = batch if runner.shares_batches(name) else shared
        batches.append(batch)
    assert runner.shares_batches("default") is (method.partition("+")[0] not in ALONE)
    for token in (9, 30, 4):
        for batch in batches:
            for row in batch.rows:
                row.next_token = token
            for row, logits in zip(list(batch.rows), runner.decode(batch), strict=True):
                found[row][1].append(logits)
    for row, (text, logits) in found.items():
        for n, each in enumerate(logits):
            ids = torch.tensor([[*text, 9, 30, 4][: len(text) + n]])
            alone = run_with(model, row.adapter_or_base, lambda ids=ids: run(model, ids))[0, -1]
            assert (each - alone).abs().max() < 1e-5, (row.adapter_or_base, n)
