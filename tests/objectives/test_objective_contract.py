"""What every objective promises, run over each of them: a new file in `objectives/` is tested as it is."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from objective_cases import OBJECTIVE_CASES
from objective_steps import add_reference, take_step
from tiny_families import build_family

from slimtune import LoraConfig, get_peft_model
from slimtune.core.config.objective_registry import list_objectives, load_objective_class
from slimtune.core.data.collator import Collator
from slimtune.core.data.rows import ROW_FORMATS
from slimtune.core.training.loss import make_collator, score_examples_by_objective


def teaches_preferences(task: str) -> bool:
    cls = load_objective_class(task)
    return cls.task_type == "CAUSAL_LM" and not {"preference", "unpaired-preference"}.isdisjoint(cls.formats)


PREFERENCE_TASKS = [task for task in list_objectives() if teaches_preferences(task)]


def test_every_objective_has_a_case_and_is_compared_with_a_peer():
    assert {*OBJECTIVE_CASES} == {*list_objectives()}, "one line per objective in tests/objective_cases.py"
    for case in OBJECTIVE_CASES.values():
        file, _, function = case.peer.partition("::")
        assert f"def {function}(" in (Path(__file__).parents[1] / file).read_text(), case.peer


@pytest.mark.parametrize("task", list_objectives())
def test_objective_says_what_it_learns_from_which_rows(task):
    cls = load_objective_class(task)
    assert cls.name == task == cls.__module__.rpartition(".")[2]
    assert cls.summary
    assert {*cls.formats, *cls.named_formats} <= {*ROW_FORMATS.names()}
    assert cls.measures


def test_settings_of_objectives_are_checked_without_torch():
    code = [
        "import sys",
        "from slimtune.core.config.objective_registry import list_objectives, load_objective_class",
        "[load_objective_class(task)() for task in list_objectives()]",
        "sys.exit('torch' in sys.modules)",
    ]
    assert subprocess.run([sys.executable, "-c", "\n".join(code)]).returncode == 0


@pytest.mark.parametrize("task", PREFERENCE_TASKS)
def test_step_does_not_depend_on_its_micro_batches(task):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(build_family("llama").double(), config).double()
    objective, collator = load_objective_class(task)(), Collator(0, packing=False)
    pairs = add_reference(model, make_pairs(), collator)
    whole_loss, whole = take_step(model, pairs, objective, collator, [[0, 1, 2]])
    loss, gradients = take_step(model, pairs, objective, collator, [[2], [0, 1]])
    assert loss == pytest.approx(whole_loss, abs=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-9, rtol=1e-7)


def make_pairs() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    pairs = []
    for i, (prompt, *answers) in enumerate([(12, 5, 9), (9, 7, 3), (15, 2, 11)]):
        shared = rng.integers(3, 96, prompt).tolist()
        rows = [shared + rng.integers(3, 96, n).tolist() for n in answers]
        labels = [t for row in rows for t in [-100] * prompt + row[prompt:]]
        ids = [t for row in rows for t in row]
        lengths = [*map(len, rows)]
        pairs.append({"input_ids": ids, "labels": labels, "line": i, "row_lengths": lengths, "label": i != 1})
    return pairs


@pytest.mark.parametrize("task", PREFERENCE_TASKS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_packed_and_shared_equal_padded(family, task):
    model = get_peft_model(
        build_family(family).float(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    objective, pairs = load_objective_class(task)(), make_pairs()
    packed, padded = make_collator(model, 0, max_tokens=48), Collator(0, packing=False)
    assert packed.share_prefix
    assert packed(pairs[:1])["input_ids"].shape[1] == 12 + 5 + 9
    found = []
    for collator in (packed, padded):
        examples = add_reference(model, pairs, collator)
        loss, gradients = take_step(model.train(), examples, objective, collator)
        scores = score_examples_by_objective(model, examples, collator, objective)
        scores = np.array([scores[i] for i in range(len(pairs))])
        if isinstance(objective.count_items(examples), int):
            # Else the parts of the loss are means over different items: a pair's measure has its own tokens' mean.
            assert objective.summarize(scores)["loss"] == pytest.approx(loss, abs=1e-5)
        found.append((np.array([e["reference"] for e in examples]), scores, loss, gradients))
    (reference, scores, loss, gradients), (other_reference, other_scores, other_loss, other_gradients) = found
    assert reference == pytest.approx(other_reference, rel=1e-5)
    assert scores == pytest.approx(other_scores, rel=1e-4, abs=1e-5)
    assert loss == pytest.approx(other_loss, abs=1e-5)
    assert gradients
    for name, gradient in gradients.items():
        scale = other_gradients[name].abs().max()
        torch.testing.assert_close(gradient, other_gradients[name], atol=1e-5 * float(scale) + 1e-7, rtol=1e-4)
