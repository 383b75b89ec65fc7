"""Every method that peft has, too, against peft: one seed, files both ways, gradients, merges; float64, 1e-9."""

import peft
import pytest
import torch
from methods_table import TABLE
from models_zoo import gemma2, gpt2, llama, qwen2, run, shake, tokens

import slimtune
from slimtune.adapters.base import MergeUnsupported

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
CLOSE = 1e-9
BASES = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "gemma2": gemma2}


def _cases():
    for name, (cls, settings, *more) in TABLE.items():
        by_base = next((m for m in more if isinstance(m, dict)), {})
        notes = {m for m in more if isinstance(m, str)}
        for base in BASES:
            own = by_base.get(base, {})
            if own is not None:
                yield pytest.param(BASES[base], cls, {**settings, **own}, notes, id=f"{name}-{base}")


EVERY = pytest.mark.parametrize(("base", "cls", "settings", "notes"), list(_cases()))


def adapted(home, base, cls, settings, seed=1):
    settings = {k: v(home) if callable(v) else v for k, v in settings.items()}
    settings = {"task_type": "CAUSAL_LM", **settings}
    model = base()
    torch.manual_seed(seed)
    return as_meant(home.get_peft_model(model, getattr(home, cls)(**settings)).eval())


def as_meant(model):
    """Above a base that is not float32, peft lets AdaLoRA's count of ranks train, which it never saves."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
    return model


def said(model):
    """What a model says of the tokens, without the learned positions that peft leaves in front."""
    ids = tokens()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]


def far(a, b):
    return max((a - b).abs().max().item(), (a.log_softmax(-1) - b.log_softmax(-1)).abs().max().item())


@EVERY
def test_one_seed_gives_one_adapter(base, cls, settings, notes):
    ours, theirs = (adapted(home, base, cls, settings) for home in (slimtune, peft))
    mine = slimtune.get_peft_model_state_dict(ours)
    other = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert set(mine) == set(other)
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in other.items()}
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    if "start" not in notes:
        assert all((mine[k] - other[k]).abs().max() < CLOSE for k in mine)
        assert far(said(ours), said(theirs)) < CLOSE


@EVERY
def test_saved_there_is_loaded_here(base, cls, settings, notes, tmp_path):
    theirs = adapted(peft, base, cls, settings)
    shake(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = slimtune.PeftModel.from_pretrained(base(), tmp_path)
    assert far(said(theirs), run(base())) > 1e-3
    assert far(said(ours), said(theirs)) < CLOSE
    if type(ours.active_peft_config).mergeable:
        expected = said(ours)
        try:
            ours.merge_adapter()
        except MergeUnsupported:
            return
        assert far(said(ours), expected) < CLOSE
        ours.unmerge_adapter()
        assert torch.equal(said(ours), expected)


@EVERY
def test_saved_here_is_loaded_there(base, cls, settings, notes, tmp_path):
    ours = adapted(slimtune, base, cls, settings)
    shake(ours)
    if "fp32" in notes:
        for p in ours.trainable_parameters("default"):
            p.data.copy_(p.data.float())
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert far(said(ours), run(base())) > 1e-3
    assert far(said(ours), said(theirs)) < CLOSE


@EVERY
def test_gradients_are_the_same(base, cls, settings, notes, tmp_path):
    theirs = adapted(peft, base, cls, settings)
    shake(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = slimtune.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).eval()
    ids = tokens()
    for model in (ours, theirs):
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
        out.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).sum().backward()
    mine, other = (sorted(p.grad.double().norm().item() for p in m.parameters() if p.grad is not None)
                   for m in (ours, theirs))  # fmt: skip
    assert mine == pytest.approx(other, rel=1e-7, abs=1e-9)
