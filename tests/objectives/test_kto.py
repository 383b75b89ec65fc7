"""KTO: equal to TRL, and the mismatched rows of its steps."""

import numpy as np
import pytest
import torch
from test_trl import add_reference, assert_step, get_gradients, wide  # noqa: F401 a fixture

from slimtune.core.data.collator import Collator
from slimtune.core.data.tokenized_dataset import TemporaryTokenizedDatasetWriter
from slimtune.core.training.loss import score_examples_by_objective
from slimtune.objectives.kto import KTO, RowsWithMismatchedAnswers

ROWS = [
    {"prompt": "Why is it so?", "completion": " Because of this.", "label": True},
    {"prompt": "How?", "completion": " A longer answer that is worse.", "label": False},
    {"prompt": "Say a word.", "completion": " Word", "label": True},
    {"prompt": "Say two words.", "completion": " No.", "label": False},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        {"beta": 0.2, "loss_type": "apo_zero_unpaired", "undesirable_weight": 0.5},
    ],
    ids=["kto", "apo_zero_unpaired"],
)
def test_loss_and_gradient_are_those_of_trl(settings, tiny_llama, tiny_tokenizer, tmp_path, wide):  # noqa: F811
    import peft
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    trainer = KTOTrainer(
        tiny_llama().double(),
        args=KTOConfig(
            str(tmp_path), per_device_train_batch_size=4, use_cpu=True, bf16=False, gradient_checkpointing=False,
            report_to=[], **settings,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )  # fmt: skip
    model, objective = trainer.model.double(), KTO(**settings)
    batch = next(iter(trainer.get_train_dataloader()))
    if objective.needs_mismatched_rows:  # learn the mismatched rows, so that the KL estimate is above 0
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(10):
            model(input_ids=batch["KL_input_ids"], labels=batch["KL_input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = trainer.compute_loss(model, batch)
    expected.backward()
    gradients = get_gradients(model)

    def read(prefix, i):
        mask = batch[f"{prefix}attention_mask"][i].bool()
        ids, learned = batch[f"{prefix}input_ids"][i][mask], batch[f"{prefix}completion_mask"][i][mask].bool()
        return ids.tolist(), torch.where(learned, ids, -100).tolist()

    examples = []
    for i in range(4):
        rows = [read(prefix, i) for prefix in (("", "KL_") if objective.needs_mismatched_rows else ("",))]
        tokens = {k: [t for row in rows for t in row[part]] for part, k in enumerate(("input_ids", "labels"))}
        lengths = {"row_lengths": [len(ids) for ids, _ in rows]}
        examples.append({**tokens, **lengths, "line": i, "label": bool(batch["label"][i])})
    collator = Collator(0, packing=False)
    examples = add_reference(model, examples, collator)
    for groups in ([[0, 1, 2, 3]], [[0], [2, 3], [1]]):
        assert_step(model, examples, objective, groups, expected, gradients)
    scores = score_examples_by_objective(model.get_base_model(), examples, collator, objective)
    measures = objective.summarize(np.array([scores[i] for i in range(4)]))
    assert measures["loss"] == pytest.approx(expected.item(), abs=1e-9)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert measures[name] == pytest.approx(logged[name], abs=1e-9)
    assert objective.loss_type != "kto" or measures["kl"] > 0.01


def make_dataset(rows: list[tuple[list[int], list[int]]]):
    """A dataset of prompts and answers."""
    with TemporaryTokenizedDatasetWriter() as writer:
        ids = [np.array(prompt + answer, np.int32) for prompt, answer in rows]
        learned = [np.arange(len(p) + len(a)) >= len(p) for p, a in rows]
        lengths, lines = np.array([*map(len, ids)]), np.arange(len(rows)) + 1
        writer.write(np.concatenate(ids), np.concatenate(learned), lengths, lines)
        return writer.finish()


def make_mismatched(count=5, rows_per_step=3, max_seq_len=100):
    rows = [([100 + i, 1, 2], [200 + i, *range(3, 4 + i)]) for i in range(count)]
    dataset = make_dataset(rows).with_columns(label=np.arange(count) % 2 == 0)
    return RowsWithMismatchedAnswers(dataset, rows_per_step, max_seq_len, seed=0)


def split(example):
    end = example["row_lengths"][0]
    return example["input_ids"][:end], example["input_ids"][end:]


def test_mismatched_rows_rotate_the_answers_of_a_step():
    dataset = make_mismatched(count=6)
    assert sorted(dataset.lines) == [1, 2, 3, 4, 5, 6]
    for start in (0, 3):
        own, mismatched = zip(*map(split, dataset[start : start + 3]), strict=True)
        assert [row[:3] for row in own] == [row[:3] for row in mismatched]
        assert [row[3:] for row in mismatched] == [own[i][3:] for i in (2, 0, 1)]
    example = dataset[0]
    assert example["labels"][example["row_lengths"][0] :][:3] == [-100] * 3
    assert example["label"] == (example["line"] % 2 == 1)


def test_steps_of_an_epoch_keep_their_rows():
    dataset = make_mismatched(count=7)
    order = dataset.shuffle(lambda n: np.arange(n)[::-1])
    assert order == [3, 4, 5, 0, 1, 2, 6]
    own, mismatched = split(dataset[6])  # alone in its step: it gets another answer all the same
    assert mismatched[3:] == split(dataset[5])[0][3:] != own[3:]


@pytest.mark.parametrize("rows_per_step", [1, 4])
def test_no_row_gets_an_answer_to_its_own_prompt(rows_per_step):
    rows = [([100 + i // 2, 1, 2], [200 + i]) for i in range(16)]
    dataset = RowsWithMismatchedAnswers(make_dataset(rows), rows_per_step, 100, seed=1)
    assert all((split(e)[1][3] - 200) // 2 != e["input_ids"][0] - 100 for e in dataset)


def test_longer_mismatched_rows_are_truncated():
    assert max(e["row_lengths"][1] for e in make_mismatched(count=12, rows_per_step=12, max_seq_len=11)) == 11
