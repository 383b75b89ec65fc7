"""Generate answers with the tuned model or with its base, as a stream of text pieces or as a whole.

The next token is drawn from softmax(logits / temperature) over the whole vocabulary; temperature 0 means greedy
decoding. The checkpoint's other generation settings (top-p, penalties) are not used, so that base and tuned model
follow one rule. An answer ends at any token that ends a turn for the checkpoint, the tokenizer or the chat template.
"""

import contextlib
import logging
import threading
from collections.abc import Generator as Pieces
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ..core.data.chat_template import Tools, encode_chat, end_of_turn_ids, get_chat_template, render_prompt
from ..core.kernels.dropout import preserve_rng_state
from ..core.models.base_config import max_positions
from ..core.training.trained_model import TrainedModel, load_run, require_causal_lm_run
from ..errors import AdapterError, DataError, ModelError, UsageError

log = logging.getLogger(__name__)

Message = dict[str, Any]


class Answer(NamedTuple):
    """A whole answer."""

    text: str  # without the tokens that end it
    tokens: int  # including the one that ends it
    ended: bool  # by itself, not by the length limit


class RequireFiniteLogits(LogitsProcessor):
    """Raises if logits are NaN or Inf; the most likely token would be any, often the one that ends the answer."""

    def __init__(self, tuned: bool) -> None:
        self.tuned = tuned

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The maximum is NaN if any logit is; single logits may be -Inf, which means that the token cannot come.
        if not torch.isfinite(scores.max()):
            who, error = ("tuned model", AdapterError) if self.tuned else ("base", ModelError)
            hint = "take an older checkpoint, or train again with a lower learning rate" if self.tuned else ""
            raise error(f"the {who} computes NaN or Inf, and has no answer", "finite logits", hint)
        return scores


class Generator:
    """Generates answers with a loaded run.

    Raises:
        ModelError: the base has no chat template.
    """

    def __init__(self, trained: TrainedModel) -> None:
        model: Any = trained.model
        self.model: Any = model
        self.tokenizer, self.device = trained.base.tokenizer, trained.base.device
        get_chat_template(self.tokenizer)
        self.end_tokens = find_end_tokens(model.generation_config, self.tokenizer)
        self.context = max_positions(model.config)
        model.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=list(self.end_tokens) or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        method = model.active_peft_config.name
        self.description = f"{trained.base.source.name} with the {method} adapter in {trained.adapter}"
        # Base and tuned model are one model: two answers at a time would switch each other's adapter.
        self._lock = threading.Lock()

    @classmethod
    def open(cls, run: Path, device: str | None = None) -> Self:
        """Load a run folder or an adapter folder; device and errors as for `load_run`."""
        require_causal_lm_run(run)
        return cls(load_run(run, device=device))

    def stream(
        self,
        messages: Sequence[Message],
        *,
        tuned: bool = True,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Return the pieces of the answer as they are generated; closing the iterator stops the generation.

        Args:
            messages: the conversation so far, `{"role", "content"}` each.
            tuned: with the adapter, or the base alone.
            max_new_tokens: most tokens of the answer, 1 or more.
            temperature: 0: greedy; above 0: sampled.
            seed: of the sampling; the process's own random state is preserved.

        Raises:
            UsageError: a setting is out of range, or as for `tokenize_prompt`.
        """
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}", "1 or more", "leave it out for 128")
        if not 0 <= temperature < float("inf"):
            raise UsageError(f"temperature is {temperature}", "0 (greedy) or a number above it")
        ids = self.tokenize_prompt(messages, max_new_tokens)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        return self._stream_pieces(ids, tuned, seed, {"max_new_tokens": max_new_tokens, **sampling})

    def generate(self, messages: Sequence[Message], **settings: Any) -> str:
        """Return the whole answer as text; settings and errors as for `stream`."""
        return "".join(self.stream(messages, **settings))

    def answer(self, messages: Sequence[Message], *, tuned: bool = True, max_new_tokens: int = 128) -> Answer:
        """Return the greedy answer and how it ended; arguments and errors as for `stream`."""
        ids = self.tokenize_prompt(messages, max_new_tokens)
        output = self._generate_ids(ids, tuned, max_new_tokens=max_new_tokens, do_sample=False)
        tokens = output[0, ids.shape[1] :].tolist()
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return Answer(text, len(tokens), bool(tokens) and tokens[-1] in self.end_tokens)

    def tokenize_prompt(self, messages: Sequence[Message], max_new_tokens: int) -> Tensor:
        """Return the rendered conversation as ids `(1, L)`, up to where the assistant's turn begins.

        Raises:
            UsageError: the prompt is empty, the template rejects the messages, or there is no room for the answer.
        """
        if not messages or not messages[-1]["content"].strip():
            raise UsageError("the prompt is empty", "a text")
        ids = tokenize_prompt(self.tokenizer, messages)
        length = ids.shape[1]
        if self.context is not None and length + max_new_tokens > self.context:
            room = self.context - length
            raise UsageError(
                f"the prompt has {length} tokens, the answer may have {max_new_tokens}, "
                f"the model's context holds {self.context}",
                f"at most {self.context} tokens together",
                f"--max-new-tokens {room}" if room > 0 else "a shorter prompt (in a chat: /new)",
            )
        return ids.to(self.device, torch.int64)

    def _generate_ids(self, ids: Tensor, tuned: bool, **settings: Any) -> Tensor:
        settings["logits_processor"] = LogitsProcessorList([RequireFiniteLogits(tuned)])
        with self._lock, contextlib.nullcontext() if tuned else self.model.disable_adapter():
            return self.model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings)

    def _stream_pieces(self, ids: Tensor, tuned: bool, seed: int, settings: dict[str, Any]) -> Iterator[str]:
        """Yield pieces while a thread generates.

        transformers' streamer hands text over through a queue, so the generation needs a thread of its own. An
        exception in the thread is raised here after the last piece; closing the iterator sets `cancelled`.
        """
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        cancelled, errors = threading.Event(), []

        def is_cancelled(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(input_ids),), cancelled.is_set(), dtype=torch.bool, device=input_ids.device)

        def generate() -> None:
            criteria = StoppingCriteriaList([is_cancelled])
            try:
                with preserve_rng_state(self.device):
                    torch.manual_seed(seed)
                    self._generate_ids(ids, tuned, streamer=streamer, stopping_criteria=criteria, **settings)
            except BaseException as e:
                errors.append(e)
                streamer.text_queue.put(streamer.stop_signal)

        thread = threading.Thread(target=generate, name="slimtune-generate", daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            cancelled.set()
            thread.join()
        if errors:
            raise errors[0]


def tokenize_prompt(tokenizer: Any, messages: Sequence[Message], tools: Tools = None) -> Tensor:
    """Return the rendered conversation as ids `(1, L)`, up to where the assistant's turn begins.

    Raises:
        UsageError: the template rejects the messages.
        DataError: it leaves out a call or a tool.
    """
    try:
        text = render_prompt(tokenizer, list(messages), tools)
    except TemplateError as e:
        roles = ", ".join(m["role"] for m in messages)
        raise UsageError(
            f"the chat template of the base rejects these messages ({roles}): {e}",
            "roles that the template supports, in its order",
            "leave the system message out" if messages[0]["role"] == "system" else "",
        ) from e
    return torch.as_tensor(tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"])


def find_end_tokens(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end an answer for the checkpoint, the tokenizer or the chat template, sorted."""
    stated = getattr(generation_config, "eos_token_id", None)
    ends = {*(stated if isinstance(stated, list | tuple) else [stated]), tokenizer.eos_token_id}
    try:
        chat = encode_chat(tokenizer, [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}])
    except (DataError, ModelError) as e:
        log.debug("the chat template does not show how a turn ends: %s", e)
    else:
        learned = [token for token, learn in zip(chat.input_ids, chat.supervised, strict=True) if learn]
        ends |= {token for token in learned[-1:] if token in end_of_turn_ids(tokenizer)}
    return tuple(sorted(end for end in ends if end is not None))


class Conversation:
    """A conversation with base and tuned model, each of which remembers its own answers.

    The base must not continue what the tuned model said.
    """

    def __init__(self, generator: Generator, system: str | None = None) -> None:
        self.generator = generator
        start = [{"role": "system", "content": system}] if system else []
        self.messages: dict[str, list[Message]] = {"base": [*start], "tuned": [*start]}

    def stream(self, text: str, model: str, **settings: Any) -> Pieces[str, None, None]:
        """Yield the pieces of the answer of the model "base" or "tuned" to a text of the user, and remember both.

        Settings and errors are those of `Generator.stream`.
        """
        history = self.messages[model]
        history.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in self.generator.stream(history, tuned=model == "tuned", **settings):
                answer += piece
                yield piece
        finally:
            if answer:
                history.append({"role": "assistant", "content": answer})
            else:
                history.pop()
