"""slimtune against peft on SmolLM2-135M and real text, fp32: never further from peft than peft is from itself.

peft against itself: the same rows one by one instead of padded together, and the same model in float64. The second is
how far fp32 is from what is meant; ours may be no further from peft than that.
"""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from parity_table import METHODS, settings_on

import slimtune

pytestmark = [
    pytest.mark.real, pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
]  # fmt: skip
TEXT = Path(__file__).parents[2] / "examples" / "devils-dictionary" / "test.jsonl"
LORA = {
    "plain": {"target_modules": "all-linear", "r": 8, "lora_alpha": 16},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 16},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 4, r"layers\.2\d\.self_attn\.v_proj": 12},
        "alpha_pattern": {"down_proj": 24},
    },
    "tied-head": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
}
CASES = {name: ("LoraConfig", settings) for name, settings in LORA.items()}
CASES |= {n: (METHODS[n][0], settings) for n in METHODS if (settings := settings_on(n, "llama")) is not None}
# One variant of the methods with the most arithmetic of their own; `make prove` runs all variants of all methods.
ALWAYS = {"oft", "lokr", "adalora", "prefix_tuning", "trainable_tokens", *LORA}


@pytest.fixture(scope="module")
def base(smollm2_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(smollm2_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    texts = [json.loads(line)["messages"][-1]["content"] for line in TEXT.read_text().splitlines()[:8]]
    return [torch.tensor(tokenizer(t)["input_ids"][:16]) for t in texts]


@torch.no_grad()
def said(model, rows):
    """Log-probabilities of each next token, the rows padded into one batch."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    scores = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -ids.shape[1] :][:, :-1]
    return scores.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][mask[:, 1:].bool()]


def shake(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * (2e-3 if "modules_to_save" in name else 0.02))
    return model.eval()


@pytest.mark.parametrize("case", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.prove) for n in CASES])
def test_files_both_ways_and_merge(case, base, rows, tmp_path, capsys):
    cls, settings = CASES[case]
    weights = {n: p.detach().clone() for n, p in base.named_parameters()}
    torch.manual_seed(0)
    theirs = shake(peft.get_peft_model(copy.deepcopy(base), getattr(peft, cls)(**settings)))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    expected = said(theirs, rows)
    alone = torch.cat([said(theirs, [r]) for r in rows])
    their_merge = None
    if case in LORA:
        theirs.merge_adapter()
        their_merge = (said(theirs, rows) - expected).abs().max().item()
        theirs.unmerge_adapter()
    floor = max((expected - other).abs().max().item() for other in (alone, said(theirs.double(), rows)))
    del theirs

    plain = said(base, rows)
    ours = slimtune.PeftModel.from_pretrained(base, tmp_path / "theirs")
    our_merge = 0.0
    try:
        found = said(ours, rows)
        ours.save_pretrained(tmp_path / "ours")
        if their_merge is not None:
            ours.merge_adapter()
            our_merge = (said(ours, rows) - found).abs().max().item()
    finally:
        ours.unload()
    back = said(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval(), rows)
    here, there = (found - expected).abs().max().item(), (back - expected).abs().max().item()
    with capsys.disabled():
        print(
            f"\n{case}: moved {(expected - plain).abs().mean():.3f} nats; peft's file here {here:.1e}, and back there "
            f"{there:.1e}; peft against itself {floor:.1e}; merge {our_merge:.1e}, peft's {their_merge}"
        )
    assert (expected - plain).abs().mean() > (0.05 if case in LORA else 1e-4)
    assert here <= 2 * floor
    assert there <= 2 * floor
    # peft's merge into a tied embedding changes the head, too, by several nats: a bound of its own keeps ours honest.
    assert our_merge <= min(2 * (their_merge or 0.0), 1e-4)
    assert all(torch.equal(p, weights[n]) for n, p in base.named_parameters())
