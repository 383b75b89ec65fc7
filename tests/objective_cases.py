"""One line per objective: the rows it learns from in the tests that run over each, and its comparison with a peer."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ObjectiveCase:
    """An objective as the tests run it.

    Args:
        rows: the rows of `ROWS` that it learns from.
        peer: the test that compares its loss and gradients with TRL's, PEFT's or transformers' own: `file::function`.
        exports: whether what it trains is a language model, which every export format takes.
        settings: that it cannot do without; "TEACHER" stands for another base with the same tokenizer.
    """

    rows: str
    peer: str
    exports: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


SAMPLED = {"rewards": ["length:3"], "num_generations": 3, "max_completion_length": 6}
OBJECTIVE_CASES = {
    "sft": ObjectiveCase("chats", "golden/test_trainer.py::test_trl_sft"),
    "classification": ObjectiveCase(
        "texts", "objectives/test_row_heads.py::test_loss_and_gradients_are_those_of_peft", exports=False
    ),
    "context": ObjectiveCase(
        "chats",
        "objectives/test_teachers.py::test_divergence_and_gradient_are_those_of_gkd_and_sdft_in_trl",
        settings={"context": "Answer in capital letters."},
    ),
    "distill": ObjectiveCase(
        "chats",
        "objectives/test_teachers.py::test_divergence_and_gradient_are_those_of_gkd_and_sdft_in_trl",
        settings={"teacher_model_name_or_path": "TEACHER", "lmbda": 0},
    ),
    "dpo": ObjectiveCase("pairs", "objectives/test_trl.py::test_dpo"),
    "grpo": ObjectiveCase(
        "prompts", "objectives/test_policy_trl.py::test_step_is_that_of_trl", settings={**SAMPLED, "temperature": 0.9}
    ),
    "reinforce": ObjectiveCase(
        "prompts", "objectives/test_policy_trl.py::test_reinforce_is_the_plain_formula", settings=SAMPLED
    ),
    "rloo": ObjectiveCase("prompts", "objectives/test_policy_trl.py::test_step_is_that_of_trl", settings=SAMPLED),
    "kto": ObjectiveCase("rated", "objectives/test_kto.py::test_loss_and_gradient_are_those_of_trl"),
    "orpo": ObjectiveCase("pairs", "objectives/test_trl.py::test_simpo_and_orpo"),
    "reward": ObjectiveCase("pairs", "objectives/test_row_heads.py::test_reward_loss_is_that_of_trl", exports=False),
    "sdft": ObjectiveCase(
        "chats",
        "objectives/test_teachers.py::test_divergence_and_gradient_are_those_of_gkd_and_sdft_in_trl",
        settings={"lmbda": 0, "seq_kd": False},
    ),
    "simpo": ObjectiveCase("pairs", "objectives/test_trl.py::test_simpo_and_orpo"),
}


def ask(i):
    return [{"role": "user", "content": f"say the word number {i}"}]


def answer(word, times):
    return [{"role": "assistant", "content": f"{word} " * times}]


ROWS = {
    "pairs": [
        {"prompt": ask(i), "chosen": answer("abc", 1 + i % 3), "rejected": answer("xyz", 1 + i % 4)} for i in range(24)
    ],
    "chats": [{"messages": ask(i) + answer("abc", 1 + i % 3)} for i in range(24)],
    "lists": [
        {
            "prompt": ask(i),
            "completions": [
                {"response": ("abc ", "pqr ", "xyz ")[k] * (1 + (i + k) % 3), "overall_score": 10 - 3 * k}
                for k in ((1, 0, 2) if i % 2 else (2, 0))
            ],
        }
        for i in range(24)
    ],
    "rated": [
        {"prompt": ask(i), "completion": answer("abc" if i % 2 else "xyz", 1 + i % 4), "label": i % 2 == 1}
        for i in range(31)
    ],
    "prompts": [{"prompt": ask(i), "answer": i} for i in range(24)],
    "texts": [{"text": f"{word} {i}", "label": word} for i in range(8) for word in ("wave", "fern", "tram")],
}
