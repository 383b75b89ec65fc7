"""A conversation with one model, which remembers its own answers."""

from collections.abc import Generator

from ..core.data.messages import Message
from .answer_queue import GeneratedAnswer, SamplingParams
from .generation_models import GenerationModel
from .text_generator import TextGenerator


class Conversation:
    """The messages of a user and one model: the base must not continue what the tuned model said.

    Args:
        generator: generates the answers.
        model: what answers, the base or an adapter.
        system: a system message, the first of the conversation.
    """

    def __init__(self, generator: TextGenerator, model: GenerationModel, system: str | None = None) -> None:
        self.generator, self.model = generator, model
        self.finish_reason: str | None = None  # of the last answer; None: it was stopped
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, params: SamplingParams) -> GeneratedAnswer:
        """Return the answer to a text of the user, not generated yet; errors as for `tokenize_prompt`."""
        asked = [*self.messages, {"role": "user", "content": text}]
        return GeneratedAnswer(self.model, self.model.tokenize_prompt(asked, params.max_new_tokens), params)

    def remember(self, text: str, answer: GeneratedAnswer) -> None:
        """Add a text of the user and its answer, as far as it was generated; without any text nothing is added."""
        if answer.text:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]

    def stream(self, text: str, params: SamplingParams) -> Generator[str, None, None]:
        """Yield the pieces of the answer to a text of the user, and remember both; closing it ends the answer."""
        answer = self.ask(text, params)
        try:
            for _, piece in self.generator.stream([answer]):
                yield piece.text
        finally:
            self.finish_reason = answer.finish_reason
            self.remember(text, answer)
