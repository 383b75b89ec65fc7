"""BitFit beyond the contract: which biases train, layers without one, merging."""

import pytest
import torch
from models_zoo import bert_classifier, gpt2, llama, qwen2, run, shake, snapshot

from slimtune import HiraConfig, LoraConfig, MissConfig, get_peft_model
from slimtune.adapters.base import MergeUnsupported
from slimtune.errors import TargetError
from slimtune.methods.bitfit import BitFitConfig


@pytest.mark.parametrize("base", [gpt2, qwen2])
def test_every_bias_and_nothing_else_trains(base):
    biases = {n for n in snapshot(base()) if n.endswith(".bias")}
    model = get_peft_model(base(), BitFitConfig())
    assert biases
    assert {f"{n}.bias" for n in model.match_report().adapted} == biases


def test_merging_changes_biases_only():
    model = get_peft_model(gpt2(), BitFitConfig()).eval()
    shake(model)
    expected, before = run(model), snapshot(gpt2())
    plain = model.merge_and_unload()
    assert (run(plain) - expected).abs().max() < 1e-9
    changed = {n for n, t in snapshot(plain).items() if not torch.equal(t, before[n])}
    assert changed == {n for n in before if n.endswith(".bias")}


def test_a_new_head_trains_in_full():
    report = get_peft_model(bert_classifier(), BitFitConfig(task_type="SEQ_CLS")).match_report()
    assert report.trained_whole == ("classifier",)
    assert "classifier" not in report.adapted


def test_a_base_without_biases_is_refused():
    with pytest.raises(TargetError, match="new_biases=True"):
        get_peft_model(llama(), BitFitConfig())


def test_a_target_without_a_bias_is_refused():
    with pytest.raises(TargetError, match=r"2 of 4 targets have no bias.*layers\.0\.self_attn\.o_proj"):
        get_peft_model(qwen2(), BitFitConfig(target_modules=["q_proj", "o_proj"]))


def test_new_biases_are_not_merged():
    model = get_peft_model(llama(), BitFitConfig(new_biases=True))
    assert len(model.match_report().adapted) == 2 * 7 + 5
    assert "lm_head" in model.match_report().unadapted
    with pytest.raises(MergeUnsupported, match=r"layers\.0\.self_attn\.q_proj has no bias"):
        model.merge_adapter()


@pytest.mark.parametrize("base", [gpt2, llama])
@pytest.mark.parametrize(
    "above",
    [
        lambda **m: HiraConfig(**m),
        lambda **m: LoraConfig(use_dora=True, **m),
        lambda **m: MissConfig(init_weights="bat", **m),
    ],
    ids=["hira", "dora", "bat"],
)
def test_below_a_method_that_reads_the_weight(base, above):
    """The weight below them is unchanged by a bias."""
    model = get_peft_model(base(), BitFitConfig(new_biases=True)).eval()
    model.add_adapter("above", above(target_modules="all-linear", r=2))
    shake(model)
    alone = run(model)
    model.set_adapter(["default", "above"])
    assert torch.equal(run(model), alone)
    shake(model, seed=7)
    both = run(model)
    assert (both - alone).abs().max() > 1e-3
    if base is gpt2:
        model.merge_adapter()
        assert (run(model) - both).abs().max() < 1e-9
