"""slimtune against peft, in numbers: one seed, files both ways, merges, gradients and training; float64, 1e-9."""

import json
import re

import peft
import pytest
import torch
from models_zoo import llama, shake, tokens
from parity_table import BASES, LORA, METHODS, QV, settings_on
from safetensors.torch import load_file

import slimtune
from slimtune.core.adapters.adapter_module import MergeUnsupported
from slimtune.core.adapters.method_registry import METHODS as METHODS_OF_SLIMTUNE
from slimtune.core.adapters.method_registry import get_method_config_class

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
CLOSE = 1e-9
# With bias="all" peft writes the biases of a module trained whole a second time, under its wrapper's names.
TWICE = re.compile(r"\.(original_module|modules_to_save)\.")
ON_BASES = {(f"{n}-{b}"): (make, METHODS[n][0], settings_on(n, b)) for n in METHODS for b, make in BASES.items()}
CASES = {n: case for n, case in ON_BASES.items() if case[2] is not None}
CASES |= {name: (make, "LoraConfig", settings) for name, (make, settings) in LORA.items()}
FAST = {n for n in CASES if n in LORA or n.endswith("-llama")}
EVERY = pytest.mark.parametrize("case", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])


def adapted(home, case, **more):
    make, cls, settings = CASES[case]
    base = make()
    torch.manual_seed(1)
    model = home.get_peft_model(base, getattr(home, cls)(**settings, **more)).eval()
    for name, parameter in model.named_parameters():
        # Above a base that is not float32, peft lets AdaLoRA's count of ranks train, which it never saves.
        parameter.requires_grad_(parameter.requires_grad and ".ranknum." not in name)
    return model


def said(model):
    """What a model says of the tokens, without the learned positions that peft leaves in front."""
    ids = tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        out = model(**inputs)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state)[:, -ids.shape[1] :]


def distance(a, b):
    """The largest difference of two answers, as they are and as log-probabilities."""
    return max((a - b).abs().max().item(), (a.log_softmax(-1) - b.log_softmax(-1)).abs().max().item())


def test_every_method_that_peft_has_is_compared():
    """Learned prompts with an encoder, and LLaMA-Adapter, are compared in `tests/methods/test_virtual_tokens.py`."""
    elsewhere = {"AdaptionPromptConfig", "PromptEncoderConfig"}
    classes = map(get_method_config_class, METHODS_OF_SLIMTUNE.built_in_names())
    expected = {cls.__name__ for cls in classes if cls.exists_in_peft}
    missing = expected - elsewhere - {cls for cls, *_ in METHODS.values()}
    assert not missing, f"a line in tests/golden/parity_table.py for {missing}"


@EVERY
def test_one_seed_gives_one_adapter(case):
    ours, theirs = (adapted(home, case) for home in (slimtune, peft))
    mine = slimtune.get_peft_model_state_dict(ours, save_embedding_layers=False)
    other = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    other = {k: t for k, t in other.items() if not TWICE.search(k)}
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in other.items()}
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    assert all((mine[k] - other[k]).abs().max() < CLOSE for k in mine)
    assert distance(said(ours), said(theirs)) < CLOSE
    if case in LORA:
        assert all(torch.equal(mine[k], other[k]) and mine[k].dtype == other[k].dtype for k in mine)


@EVERY
def test_saved_there_is_loaded_here(case, tmp_path):
    theirs = shake(adapted(peft, case))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    base = CASES[case][0]
    ours = slimtune.PeftModel.from_pretrained(base(), tmp_path)
    assert distance(said(theirs), said(base())) > 1e-3
    assert distance(said(ours), said(theirs)) < CLOSE
    expected = said(ours)
    try:
        ours.merge_adapter()
    except MergeUnsupported:
        assert not ours.active_peft_config.mergeable or case.startswith("lora+bias")
        return
    assert distance(said(ours), expected) < CLOSE
    ours.unmerge_adapter()
    assert torch.equal(said(ours), expected)


@EVERY
@pytest.mark.slow
def test_saved_here_is_loaded_there(case, tmp_path):
    ours = shake(adapted(slimtune, case))
    if "fp32" in METHODS.get(case.rpartition("-")[0], ()):
        for p in ours.trainable_parameters("default"):
            p.data.copy_(p.data.float())
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(CASES[case][0](), tmp_path).eval()
    assert distance(said(ours), said(CASES[case][0]())) > 1e-3
    assert distance(said(ours), said(theirs)) < CLOSE


@pytest.mark.parametrize("case", LORA)
def test_files_are_the_same(case, tmp_path):
    files, configs = [], []
    for home in (slimtune, peft):
        adapted(home, case).save_pretrained(tmp_path, save_embedding_layers=False)
        files.append({k for k in load_file(tmp_path / "adapter_model.safetensors") if not TWICE.search(k)})
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        configs.append({k: sorted(v) if isinstance(v, list) else v for k, v in config.items()})
    assert files[0] == files[1]
    # Notes of the library's own, and what each finds out by itself when it attaches.
    shared = set(configs[0]) & set(configs[1]) - {"auto_mapping", "peft_version", "modules_to_save", "fan_in_fan_out"}
    if CASES[case][2].get("target_modules") in (None, "all-linear"):
        shared -= {"target_modules"}
    assert {k: configs[0][k] for k in shared} == {k: configs[1][k] for k in shared}


@pytest.mark.parametrize(
    "case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES if c not in LORA]
)
def test_gradients_are_the_same(case, tmp_path):
    theirs = shake(adapted(peft, case))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = slimtune.PeftModel.from_pretrained(CASES[case][0](), tmp_path, is_trainable=True).eval()
    ids = tokens()
    for model in (ours, theirs):
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
        out.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).sum().backward()
    mine, other = (sorted(p.grad.double().norm().item() for p in m.parameters() if p.grad is not None)
                   for m in (ours, theirs))  # fmt: skip
    assert mine == pytest.approx(other, rel=1e-7, abs=1e-9)


def losses(model, steps=5):
    """The losses of some AdamW steps."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    curve = []
    for seed in range(steps):
        labels = ids = tokens(seed=seed)
        if "bert" in model.config.model_type:
            labels = ids % 3 if "Token" in type(model).__name__ else ids[:, 0] % 3
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("case", [c for c in LORA if c != "bert-encoder"])
def test_training_is_the_same(case):
    ours, theirs = (adapted(home, case) for home in (slimtune, peft))
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the base's own; what is left to compare is the adapter
    curve = losses(ours)
    assert curve[0] != curve[-1]
    assert curve == pytest.approx(losses(theirs), abs=CLOSE, rel=0)
    assert distance(said(ours.eval()), said(theirs.eval())) < 1e-7


def test_lora_dropout_draws_as_pefts():
    curves = []
    for home in (slimtune, peft):
        model = adapted(home, "plain", lora_dropout=0.3)
        torch.manual_seed(9)
        curves.append(losses(model))
    assert curves[0] == pytest.approx(curves[1], abs=CLOSE, rel=0)


def test_several_adapters_as_in_peft():
    models = []
    for home in (slimtune, peft):
        model = home.get_peft_model(llama(), home.LoraConfig(**QV, init_lora_weights=False))
        torch.manual_seed(4)
        model.add_adapter("two", home.LoraConfig(target_modules=["k_proj"], r=2, init_lora_weights=False))
        models.append(model.eval())
    ours, theirs = models
    peft.set_peft_model_state_dict(theirs, slimtune.get_peft_model_state_dict(ours))
    assert distance(said(ours), said(theirs)) < CLOSE
    for model in models:
        model.set_adapter("two")
    assert distance(said(ours), said(theirs)) < CLOSE
    with ours.disable_adapter(), theirs.disable_adapter():
        assert distance(said(ours), said(theirs)) < CLOSE
    for model in models:
        model.delete_adapter("two")
    assert ours.active_adapter == theirs.active_adapter == "default"
    assert distance(said(ours), said(theirs)) < CLOSE
