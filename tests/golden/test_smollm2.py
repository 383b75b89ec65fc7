"""slimtune against peft on SmolLM2-135M and real text, fp32: never further from peft than peft is from itself.

peft against itself: the same rows padded together and one by one, which is the noise fp32 has here in any case.
"""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch

import slimtune

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]
TEXT = Path(__file__).parents[2] / "examples" / "devils-dictionary" / "test.jsonl"
ROWS, LONGEST = 20, 16

CASES = {
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


@pytest.fixture(scope="module")
def base(smollm2_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(smollm2_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    texts = [json.loads(line)["messages"][-1]["content"] for line in TEXT.read_text().splitlines()[:ROWS]]
    return [torch.tensor(tokenizer(t)["input_ids"][:LONGEST]) for t in texts]


def padded(rows):
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    return ids, mask


@torch.no_grad()
def together(model, rows):
    """Return the log-probability of each next token, the rows padded into one batch."""
    ids, mask = padded(rows)
    scores = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
    picked = scores.gather(-1, ids[:, 1:, None])[..., 0]
    return picked[mask[:, 1:].bool()]


def alone(model, rows):
    return torch.cat([together(model, [row]) for row in rows])


def randomised(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * (2e-3 if "lora" not in name else 0.02))


@pytest.fixture(scope="module")
def untouched(base, rows):
    return together(base, rows), {n: p.detach().clone() for n, p in base.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_and_merge(case, base, rows, untouched, tmp_path, capsys):
    plain, weights = untouched
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**CASES[case]))
    randomised(theirs)
    theirs.eval().save_pretrained(tmp_path, save_embedding_layers=False)
    expected, again = together(theirs, rows), alone(theirs, rows)
    theirs.merge_adapter()
    merged = together(theirs, rows)
    del theirs

    ours = slimtune.PeftModel.from_pretrained(base, tmp_path)
    try:
        found = together(ours, rows)
        ours.merge_adapter()
        ours_merged = together(ours, rows)
    finally:
        ours.unload()
    apart, floor = (found - expected).abs(), (again - expected).abs()
    our_merge, their_merge = (ours_merged - found).abs(), (merged - expected).abs()
    with capsys.disabled():
        print(
            f"\n{case}: moved {(expected - plain).abs().mean():.3f} nats; against peft mean {apart.mean():.1e} "
            f"max {apart.max():.1e}; peft against itself max {floor.max():.1e}; "
            f"merge max {our_merge.max():.1e}, peft's {their_merge.max():.1e}"
        )
    assert (expected - plain).abs().mean() > 0.05
    assert apart.mean() <= 1e-4
    assert apart.max() <= 2 * floor.max()
    # peft's merge into a tied embedding changes the head, too, by several nats: a bound of its own keeps ours honest.
    assert our_merge.max() <= min(2 * their_merge.max().item(), 1e-4)
    assert all(torch.equal(p, weights[n]) for n, p in base.named_parameters())
