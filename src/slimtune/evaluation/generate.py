"""Answers, piece by piece, by the tuned model or by the base inside it.

The next token is drawn from softmax(logits / temperature) over the whole vocabulary; at temperature 0 it is the
likeliest. Nothing else of the checkpoint's generation settings (top-p, penalties) is taken over, so that base and tuned
speak by one rule and a temperature means what it says. An answer ends at any token that the checkpoint, the tokenizer
or the chat template ends a turn with.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from ..data.chat_template import encode_chat, get_chat_template, is_end_of_turn
from ..errors import DataError, ModelError, UsageError
from ..setup import TrainedModel, load_run

log = logging.getLogger(__name__)

Message = dict[str, str]


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Args:
        text: without the tokens that end it.
        tokens: how many it has, the one that ends it included.
        ended: it came to its end by itself.
    """

    text: str
    tokens: int
    ended: bool


class Generator:
    """A loaded run that answers.

    Args:
        loaded: adapter and base.

    Raises:
        ModelError: the base has no chat template.
    """

    def __init__(self, loaded: TrainedModel) -> None:
        self.model, self.tokenizer = loaded.model, loaded.base.tokenizer
        self.device = loaded.base.device
        get_chat_template(self.tokenizer)
        own: Any = self.model
        self.ends = ends_of(own.generation_config, self.tokenizer)
        self.context: int | None = getattr(own.config.get_text_config(), "max_position_embeddings", None)
        own.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=list(self.ends) or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        # Base and tuned are one model: two answers at once would switch the adapter under each other.
        self._turn = threading.Lock()

    @classmethod
    def open(cls, run: Path) -> Generator:
        """Load a run folder or an adapter folder.

        Raises:
            UsageError: there is neither.
            AdapterError: the adapter does not fit its base.
            ModelError: the base cannot be loaded, or has no chat template.
        """
        return cls(load_run(run))

    def stream(
        self,
        messages: Sequence[Message],
        *,
        tuned: bool = True,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Return the answer's pieces as they come; leaving the iterator early stops the work.

        Args:
            messages: the conversation so far, `{"role", "content"}` each.
            tuned: with the adapter, or the base alone.
            max_new_tokens: most tokens of the answer (≥ 1).
            temperature: 0: the likeliest token; above 0: drawn at random.
            seed: of the random draws; the process's own random state is left as it was.

        Raises:
            UsageError: nothing is asked, the template refuses the messages, a setting is out of its range, or prompt
                and answer do not fit into the model's context.
        """
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}", "1 or more", "leave it out for 128")
        if not 0 <= temperature < float("inf"):
            raise UsageError(f"temperature is {temperature}", "0 (the likeliest token) or a number above it")
        ids = self.prompt(messages, max_new_tokens)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        return self._pieces(ids, tuned, seed, {"max_new_tokens": max_new_tokens, **sampling})

    def say(self, messages: Sequence[Message], **settings: Any) -> str:
        """Return the whole answer; settings and errors as for `stream`."""
        return "".join(self.stream(messages, **settings))

    def answer(self, messages: Sequence[Message], *, tuned: bool = True, max_new_tokens: int = 128) -> Answer:
        """Return the answer of likeliest tokens, and how it ended; arguments and errors as for `stream`."""
        ids = self.prompt(messages, max_new_tokens)
        model: Any = self.model
        with self._turn, contextlib.nullcontext() if tuned else model.disable_adapter():
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), use_cache=True, max_new_tokens=max_new_tokens, do_sample=False
            )
        said = whole[0, ids.shape[1] :].tolist()
        text = str(self.tokenizer.decode(said, skip_special_tokens=True))
        return Answer(text, len(said), bool(said) and said[-1] in self.ends)

    def prompt(self, messages: Sequence[Message], max_new_tokens: int) -> Tensor:
        """Return the rendered conversation as ids `(1, L)`, ending where the assistant's turn begins.

        Raises:
            UsageError: nothing is asked, the template refuses the messages, or there is no room for the answer.
        """
        if not messages or not messages[-1]["content"].strip():
            raise UsageError("the prompt is empty", "a text that says something")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as e:
            roles = ", ".join(m["role"] for m in messages)
            raise UsageError(
                f"the chat template of the base refuses these messages ({roles}): {e}",
                "roles that the template knows, in its order",
                "leave the system message out" if messages[0]["role"] == "system" else "",
            ) from e
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        self._require_room(ids.shape[1], max_new_tokens)
        return torch.as_tensor(ids, dtype=torch.int64).to(self.device)

    def _require_room(self, prompt: int, answer: int) -> None:
        if self.context is None or prompt + answer <= self.context:
            return
        left = self.context - prompt
        raise UsageError(
            f"the prompt has {prompt} tokens, the answer may have {answer}, the model's context holds {self.context}",
            f"at most {self.context} tokens together",
            f"--max-new-tokens {left}" if left > 0 else "a shorter prompt (in a chat: /new)",
        )

    def _pieces(self, ids: Tensor, tuned: bool, seed: int, settings: dict[str, Any]) -> Iterator[str]:
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        left, faults = threading.Event(), []

        def work() -> None:
            try:
                with (
                    self._turn,
                    contextlib.nullcontext() if tuned else self.model.disable_adapter(),
                    _seeded(ids, seed),
                ):
                    model: Any = self.model
                    model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        streamer=streamer,
                        use_cache=True,
                        stopping_criteria=StoppingCriteriaList([_Left(left)]),
                        **settings,
                    )
            except BaseException as e:
                faults.append(e)
                streamer.text_queue.put(streamer.stop_signal)

        thread = threading.Thread(target=work, name="slimtune-answer", daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            left.set()
            thread.join()
        if faults:
            raise faults[0]


def ends_of(generation: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end an answer: the checkpoint's, the tokenizer's and the chat template's, sorted."""
    stated = getattr(generation, "eos_token_id", None)
    ends = set(stated if isinstance(stated, list | tuple) else [stated]) | {tokenizer.eos_token_id}
    try:
        turn = encode_chat(tokenizer, [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}])
    except (DataError, ModelError) as e:
        log.debug("the chat template does not show how a turn ends: %s", e)
    else:
        last = [token for token, said in zip(turn.input_ids, turn.supervised, strict=True) if said][-1:]
        ends |= {token for token in last if is_end_of_turn(tokenizer, token)}
    return tuple(sorted(end for end in ends if end is not None))


class _Left(StoppingCriteria):
    """Stops when whoever listened has gone."""

    def __init__(self, left: threading.Event) -> None:
        self.left = left

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.left.is_set(), dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def _seeded(ids: Tensor, seed: int) -> Iterator[None]:
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
