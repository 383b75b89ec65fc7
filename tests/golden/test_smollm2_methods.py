"""Every method that peft has, too, on SmolLM2-135M and real text, fp32: files both ways, within peft's own noise.

peft against itself: the same rows one by one instead of padded together, and the same model in float64. The second is
how far fp32 is from what is meant; ours may be no further from peft than that.
"""

import copy

import peft
import pytest
import torch
from methods_table import TABLE
from test_smollm2 import base, padded, rows  # noqa: F401 (fixtures)

import slimtune

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]
ON_LLAMA = [
    n for n, (_, _, *more) in TABLE.items() if all(m.get("llama", {}) is not None for m in more if isinstance(m, dict))
]
ALWAYS = ("OFTConfig", "LoKrConfig", "AdaLoraConfig", "PrefixTuningConfig", "TrainableTokensConfig")
FIRST = [n for c, n in {TABLE[n][0]: n for n in reversed(ON_LLAMA)}.items() if c in ALWAYS]
"""One variant of the methods with the most arithmetic of their own; `make prove` runs all variants of all methods."""


def settings_of(name, home):
    _, settings, *more = TABLE[name]
    own = next((m.get("llama", {}) for m in more if isinstance(m, dict)), {})
    merged = {"task_type": "CAUSAL_LM", **settings, **own}
    return {k: v(home) if callable(v) else v for k, v in merged.items()}


@torch.no_grad()
def said(model, some):
    """Log-probabilities of each next token, the rows padded into one batch."""
    ids, mask = padded(some)
    scores = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -ids.shape[1] :][:, :-1]
    return scores.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][mask[:, 1:].bool()]


def shaken(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    return model.eval()


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.prove) for n in ON_LLAMA])
def test_files_both_ways(name, base, rows, tmp_path, capsys):  # noqa: F811
    some = rows[:8]
    torch.manual_seed(0)
    theirs = shaken(peft.get_peft_model(copy.deepcopy(base), getattr(peft, TABLE[name][0])(**settings_of(name, peft))))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    expected = said(theirs, some)
    alone = torch.cat([said(theirs, [r]) for r in some])
    floor = max((expected - other).abs().max().item() for other in (alone, said(theirs.double(), some)))
    del theirs

    plain = said(base, some)
    ours = slimtune.PeftModel.from_pretrained(base, tmp_path / "theirs")
    try:
        found = said(ours, some)
        ours.save_pretrained(tmp_path / "ours")
    finally:
        ours.unload()
    back = said(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval(), some)
    here, there = (found - expected).abs().max().item(), (back - expected).abs().max().item()
    with capsys.disabled():
        print(
            f"\n{name}: moved {(expected - plain).abs().mean():.3f} nats; peft's file here {here:.1e}, "
            f"and back there {there:.1e}; peft against itself {floor:.1e}"
        )
    assert (expected - plain).abs().mean() > 1e-4
    assert here <= 2 * floor
    assert there <= 2 * floor
    assert torch.equal(said(base, some), plain)
