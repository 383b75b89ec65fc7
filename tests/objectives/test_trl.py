"""A step on rows of a pair is that of TRL's trainers, in float64 on the plain padded layout."""

from typing import Any

import pytest
import torch
from objective_steps import add_reference, get_gradients, take_step

from slimtune.core.config.objective_registry import load_objective_class
from slimtune.core.data.collator import Collator
from slimtune.core.training.loss import compute_step_loss

ROWS = [
    {"prompt": "Why is it so?", "chosen": " Because of this.", "rejected": " No."},
    {"prompt": "How?", "chosen": " Well", "rejected": " A longer answer that is worse."},
    {"prompt": "Say a word.", "chosen": " Word", "rejected": " Work"},
]
LOSSES = {
    "sigmoid": {"beta": 0.3},
    "hinge": {"beta": 0.1},
    "ipo": {"beta": 0.2},
    "sigmoid_norm": {"beta": 2.0},
    "robust": {"beta": 0.3, "label_smoothing": 0.1},
}


class WideTorch:
    """torch for TRL's fused head, which accumulates in what it takes for float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def wide(monkeypatch):
    """Let TRL compute in float64."""
    monkeypatch.setattr("trl.kernels.chunked_logprob.torch", WideTorch())
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else t.to(torch.float32))


def assert_step(model, examples, objective, groups, expected_loss, expected_gradients) -> None:
    loss, gradients = take_step(model, examples, objective, Collator(0, packing=False), groups)
    assert loss == pytest.approx(expected_loss.item(), abs=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-9, rtol=1e-7)


def make_examples(ids: list[list[int]], learned: list[list[bool]]) -> list[dict[str, Any]]:
    """Return pairs from TRL's batch, whose first half are the chosen rows."""
    labels = [[t if on else -100 for t, on in zip(*row, strict=True)] for row in zip(ids, learned, strict=True)]
    half = len(ids) // 2
    return [
        {
            "input_ids": ids[i] + ids[half + i],
            "labels": labels[i] + labels[half + i],
            "line": i,
            "row_lengths": [len(ids[i]), len(ids[half + i])],
        }
        for i in range(half)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSSES)
def test_dpo(loss_type, tiny_llama, tiny_tokenizer, tmp_path, wide):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    settings = {"loss_type": loss_type, **LOSSES[loss_type]}
    args = DPOConfig(
        str(tmp_path), per_device_train_batch_size=3, use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to=[], **settings,
    )  # fmt: skip
    trainer = DPOTrainer(
        tiny_llama().double(),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    model = trainer.model.double()
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(model, batch)
    expected.backward()
    expected_gradients = get_gradients(model)

    masks = batch["attention_mask"].bool()
    ids = [row[m].tolist() for row, m in zip(batch["input_ids"], masks, strict=True)]
    learned = [row[m].bool().tolist() for row, m in zip(batch["completion_mask"], masks, strict=True)]
    examples = add_reference(model, make_examples(ids, learned), Collator(0, packing=False))
    objective = load_objective_class("dpo")(**settings)
    for groups in ([[0, 1, 2]], [[0], [1, 2]]):
        assert_step(model, examples, objective, groups, expected, expected_gradients)


@pytest.mark.slow
def test_simpo_and_orpo(tiny_llama, wide):
    """TRL's loss functions on the log-probabilities of the same rows; ORPO's cross-entropy is that of the answers."""
    from types import SimpleNamespace

    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    model, generator = tiny_llama().double(), torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in (9, 12, 14, 8)]
    examples = make_examples(ids, [[t > 3 for t in range(len(row))] for row in ids])
    collator, me = Collator(0, packing=False), SimpleNamespace(accelerator=SimpleNamespace(device="cpu"))
    batch = collator(examples)
    labels = torch.full((4, 14), -100)
    for row, tokens in enumerate(ids):
        labels[row, 4 : len(tokens)] = torch.tensor(tokens[4:])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    logits = model(padded).logits

    def get_logps(average: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return CPOTrainer.get_batch_logps(logits, labels, average_log_prob=average).chunk(2)

    simpo = load_objective_class("simpo")(beta=1.5, simpo_gamma=0.4, label_smoothing=0.2)
    cpo = {"alpha": 0.0, "loss_type": "simpo", "beta": 1.5, "simpo_gamma": 0.4, "label_smoothing": 0.2}
    losses, _, _ = CPOTrainer.cpo_loss(SimpleNamespace(**vars(me), **cpo), *get_logps(True))
    assert compute_step_loss(model, batch, 2, simpo).item() == pytest.approx(losses.mean().item(), abs=1e-9)

    orpo = load_objective_class("orpo")(beta=0.3)
    ratios = ORPOTrainer.odds_ratio_loss(SimpleNamespace(**vars(me), beta=0.3), *get_logps(True))[0]
    nll = -get_logps(False)[0].sum() / sum(len(row) - 4 for row in ids[:2])
    items = orpo.count_items(examples)
    expected = nll - ratios.mean()
    assert compute_step_loss(model, batch, items, orpo).item() == pytest.approx(expected.item(), abs=1e-9)
    (one,) = torch.autograd.grad(expected, model.model.norm.weight)
    (other,) = torch.autograd.grad(
        sum(compute_step_loss(model, collator([e]), items, orpo) for e in examples), model.model.norm.weight
    )
    torch.testing.assert_close(other, one, atol=1e-9, rtol=1e-7)
