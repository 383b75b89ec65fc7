"""Answers of a run's base and tuned model, as `slimtune generate` makes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimtune.core.training.trained_model import TrainedModel, load_run
from slimtune.generation.answer_queue import GeneratedAnswer, SamplingParams
from slimtune.generation.generation_models import Message, make_base_and_tuned_models
from slimtune.generation.run_requirements import require_causal_lm_run
from slimtune.generation.text_generator import TextGenerator


class RunAnswers:
    """A run that is loaded; `tuned=False` asks its base."""

    def __init__(self, trained: TrainedModel) -> None:
        self.model: Any = trained.model
        self.tokenizer, self.models = trained.base.tokenizer, make_base_and_tuned_models(trained)
        self.generator = TextGenerator(trained.model)

    @classmethod
    def open(cls, run: Path) -> "RunAnswers":
        require_causal_lm_run(run)
        return cls(load_run(run))

    def ask(self, messages: Sequence[Message], *, tuned: bool = True, **sampling: Any) -> GeneratedAnswer:
        model, params = self.models["tuned" if tuned else "base"], SamplingParams(**sampling)
        return GeneratedAnswer(model, model.tokenize_prompt(messages, params.max_new_tokens), params)

    def stream(self, messages: Sequence[Message], **how: Any) -> Any:
        return self.generator.stream([self.ask(messages, **how)])

    def answer(self, messages: Sequence[Message], **how: Any) -> GeneratedAnswer:
        answer = self.ask(messages, **how)
        self.generator.generate([answer])
        return answer

    def generate(self, messages: Sequence[Message], **how: Any) -> str:
        return self.answer(messages, **how).text
