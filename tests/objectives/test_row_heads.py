"""Classification and rewards against transformers, HF PEFT and TRL, on tiny models: logits, losses, gradients."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
import trl
from tiny_families import Float64, build

from slimtune import get_peft_model_state_dict, set_peft_model_state_dict
from slimtune.core.adapters.peft_model import get_peft_model
from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.data.collator import Collator
from slimtune.core.training.loss import compute_row_logits, forward_backward, make_collator, score_examples_by_objective
from slimtune.errors import DataError
from slimtune.methods.lora import LoraConfig
from slimtune.objectives.classification import Classification
from slimtune.objectives.reward import Reward

FAMILIES = ["llama", "qwen2", "gemma3_text"]
PREFIX = [(5 * i * i + 1) % 125 + 3 for i in range(12)]
ROWS = [[*(PREFIX if r else []), *((7 * i * i + 3 + 11 * r) % 125 + 3 for i in range(1 + 2 * r))] for r in range(4)]
ROWS[3].append(0)  # the padding token: transformers reads the token before it
LABELS = [2, 0, 1, 0]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def classifier(family="llama", labels=3, dtype=torch.float32):
    auto = tf.AutoModelForSequenceClassification
    return build(family, auto, num_hidden_layers=2, num_labels=labels).to(dtype)


def padded(rows=ROWS):
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def examples(rows=ROWS, labels=LABELS, weights=None):
    weights = weights or [1.0] * len(labels)
    return [
        {"input_ids": row, "labels": [-100] * len(row), "line": i + 1, "label": label, "label_weight": weight}
        for i, (row, label, weight) in enumerate(zip(rows, labels, weights, strict=True))
    ]


def pairs(rows=ROWS):
    return [
        {"input_ids": a + b, "labels": [-100] * len(a + b), "line": 1, "row_lengths": [len(a), len(b)]}
        for a, b in zip(rows[::2], rows[1::2], strict=True)
    ]


def lora(model):
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=TARGETS, init_lora_weights=False))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packing", [True, False])
def test_logits_are_those_of_padded_rows(family, packing):
    model = classifier(family)
    collator = make_collator(model, 5, packing=packing)
    with torch.no_grad(), using_packed_attention(model):
        ours = compute_row_logits(model, collator(examples()))
        theirs = model(**padded()).logits
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_peft(family):
    theirs = peft.get_peft_model(
        classifier(family, dtype=torch.float64),
        peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=TARGETS, init_lora_weights=False),
        autocast_adapter_dtype=False,
    )
    ours = lora(classifier(family, dtype=torch.float64))
    set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    objective, collator = Classification(), make_collator(ours, 0)
    batches = [collator(examples()[:3]), collator(examples()[3:])]
    with Float64(), using_packed_attention(ours):
        mine = forward_backward(ours, batches, objective=objective, num_items=objective.count_items(examples()))
    with Float64():
        loss = theirs(**padded(), labels=torch.tensor(LABELS)).loss
        loss.backward()
    assert abs(mine - loss) < 1e-6  # summed in fp32
    for model in (ours, theirs):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    expected, found = peft.get_peft_model_state_dict(theirs), get_peft_model_state_dict(ours)
    assert expected.keys() == found.keys()
    assert max((found[k] - expected[k]).abs().max() for k in expected) < 1e-12


def loss_of(objective, values, **batch):
    """The loss of one batch, and of the same rows in two micro-batches."""
    batch = {k: torch.tensor(v) for k, v in batch.items()}
    rows = len(next(iter(batch.values()), values[::2]))
    kinds = [{k: v[i].tolist() for k, v in batch.items()} for i in range(rows)]
    items = objective.count_items(kinds)
    each = len(values) // rows
    parts = [objective.loss(values[: 2 * each], {k: v[:2] for k, v in batch.items()}, items),
             objective.loss(values[2 * each :], {k: v[2:] for k, v in batch.items()}, items)]  # fmt: skip
    whole = objective.loss(values, batch, items)
    assert abs(whole - sum(parts)) < 1e-12
    return whole


def test_class_weights_are_those_of_torch():
    values, weight = torch.randn(4, 3, dtype=torch.float64), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    found = loss_of(Classification(), values, label=LABELS, label_weight=weight[LABELS].tolist())
    assert abs(found - F.cross_entropy(values, torch.tensor(LABELS), weight)) < 1e-7


def test_loss_of_several_labels_is_that_of_torch():
    values, labels = torch.randn(4, 3, dtype=torch.float64), torch.randint(0, 2, (4, 3))
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    found = loss_of(Classification(), values, label=labels.tolist(), label_weight=[weight.tolist()] * 4)
    assert abs(found - F.binary_cross_entropy_with_logits(values, labels.double(), pos_weight=weight)) < 1e-7


@pytest.mark.parametrize("center", [None, 0.01])
def test_reward_loss_is_that_of_trl(center):
    values = torch.randn(8, 1, dtype=torch.float64)
    model = lambda **_: SimpleNamespace(logits=torch.cat([values[::2], values[1::2]]))  # noqa: E731
    model.training = True
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=center), _tp_size=1,
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x), _total_train_tokens=0,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    inputs = {"attention_mask": torch.ones(1)}
    expected = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    assert abs(Reward(center_rewards_coefficient=center).loss(values, {}, 4) - expected) < 1e-12


def test_rewards_of_pairs_are_those_of_padded_rows():
    model, objective = classifier(labels=1), Reward()
    scores = score_examples_by_objective(model, pairs(), make_collator(model, 0), objective)
    with torch.no_grad():
        rewards = model(**padded()).logits[:, 0]
    found = torch.tensor([scores[i][1:] for i in range(2)]).flatten()
    assert (found - rewards).abs().max() < 1e-5
    measures = objective.summarize(np.array([scores[i] for i in range(2)]))
    chosen, rejected = rewards.view(2, 2).unbind(1)
    assert measures["accuracy"] == (chosen > rejected).float().mean()
    assert abs(measures["loss"] + F.logsigmoid(chosen - rejected).mean()) < 1e-5


@pytest.mark.parametrize(
    ("multi_label", "expected"), [(False, {"a": 10 / 16, "b": 10 / 4}), (True, {"a": 2 / 8, "b": 8 / 2})]
)
def test_balanced_class_weights(multi_label, expected):
    assert Classification("balanced").compute_class_weights({"a": 8, "b": 2}, 10, multi_label) == expected


def test_class_weights_by_name():
    assert Classification({"b": 3.0}).compute_class_weights({"a": 8, "b": 2}, 10, False) == {"a": 1.0, "b": 3.0}


def test_batch_of_a_language_model_still_needs_a_supervised_token():
    with pytest.raises(DataError, match="supervised"):
        Collator(0)(examples())
