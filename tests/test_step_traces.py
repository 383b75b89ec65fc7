"""The step as it is runs on fake tensors, which have shapes and no values: nothing in it hangs on data.

So a plan can run the real step of a model that is too large for the machine it is made on.
"""

import models_zoo as zoo
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

import slimtune
from slimtune.attention.register import packed_attention
from slimtune.data.collator import Collator
from slimtune.train_step.loss import step_loss

MODELS = ["llama", "qwen2", "gemma2", "gemma3", "gpt2"]
BEGIN = list(range(3, 14))
ROWS = [BEGIN + list(range(20, 20 + n)) for n in (5, 1, 9)] + [list(range(50, 57))]
EXAMPLES = [{"input_ids": row, "labels": row} for row in ROWS]


def on_meta(name, drop=0.0, **config):
    with torch.device("meta"):
        model = getattr(zoo, name)(dtype=torch.bfloat16)
        if name == "gemma2":
            model.set_attn_implementation("eager")
        config = {"r": 4, "target_modules": "all-linear"} | config
        return slimtune.get_peft_model(model, slimtune.LoraConfig(lora_dropout=drop, **config)).train()


def make_fake(model):
    """Replace what lies on meta by fake tensors, within a fake mode; what was tied stays tied."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor):
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return made[id(tensor)]

    for module in model.modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for name, value in list(table.items()):
                if isinstance(value, torch.Tensor) and value.is_meta:
                    table[name] = fake(value)
    return model


def trace(model, examples=EXAMPLES, **how):
    """Run one step; return its fake loss."""
    with FakeTensorMode():
        make_fake(model)
        batch = Collator(0, **{"layout": True, **how})(examples)
        with packed_attention(model) as can:
            assert can
            loss = step_loss(model, batch)
            loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained
        for p in model.parameters():
            assert isinstance(p, FakeTensor)
            assert (p.grad is not None) == p.requires_grad
            assert p.grad is None or (p.grad.shape, p.grad.dtype) == (p.shape, torch.float32)
    assert isinstance(loss, FakeTensor)
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "cpu")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("drop", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_shared_beginnings(name, drop, checkpointed):
    model = on_meta(name, drop)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trace(model)


@pytest.mark.parametrize("way", [{"share_prefix": False}, {"layout": False}, {"packing": False}], ids=str)
def test_other_ways_to_lay_rows(way):
    trace(on_meta("llama"), **way)


@pytest.mark.parametrize("head", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_that_trains(head):
    trace(on_meta("llama", **head))


def test_no_seed_is_used_up():
    """Dropout draws nothing on fake tensors, so a plan before a run leaves the run what it would be."""
    before = torch.get_rng_state()
    trace(on_meta("llama", 0.1))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_hangs_on_data_would_show():
    """The trace is a proof: a step that looks for its supervised positions in the labels raises."""
    with FakeTensorMode():
        labels = torch.tensor(EXAMPLES[0]["labels"]) + 0
        with pytest.raises(DynamicOutputShapeException):
            (labels != -100).nonzero()
        with pytest.raises(DataDependentOutputException):
            (labels != -100).sum().item()
