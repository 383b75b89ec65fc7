"""The process that holds the model of a chat: `python -m slimtune.generation.chat_worker RUN`.

It reads requests on stdin and writes events on stdout, one JSON object a line. It is a process of its own, so that
unloading it gives its memory back, and the page outlives it when memory runs out. Base and tuned model answer a text at
the same time, as two rows of a batch.

    request  {"text", "models", "settings"}      or {"system"}, which begins a new conversation
    events   {"ready": description}, {"model", "piece"}, {"model", "cut": true} (it has `max_new_tokens`),
             {"model", "problem"}, {"end": true}, {"error": {…}}
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.foundation.files import to_json
from ..core.training.trained_model import load_run
from ..errors import SlimtuneError
from .answer_queue import SamplingParams
from .conversation import Conversation
from .generation_models import describe_trained_model, make_base_and_tuned_models
from .run_requirements import require_causal_lm_run
from .text_generator import TextGenerator


def main() -> None:
    """Answer requests until stdin ends; SIGINT stops the answers that are being generated."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no event

    def send(**event: Any) -> None:
        events.write(to_json(event) + "\n")
        events.flush()

    try:
        require_causal_lm_run(run := Path(sys.argv[1]))
        trained = load_run(run)
        models = make_base_and_tuned_models(trained)
    except SlimtuneError as e:
        send(error={"message": e.message, "expected": e.expected, "hint": e.hint})
        sys.exit(e.exit_code)
    generator = TextGenerator(trained.model)

    def begin(system: str | None) -> dict[str, Conversation]:
        return {name: Conversation(generator, model, system) for name, model in models.items()}

    conversations = begin(None)
    send(ready=describe_trained_model(trained))
    while True:
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:  # the answer had ended before it was stopped
            continue
        if not line:
            return
        request = json.loads(line)
        if "system" in request:
            conversations = begin(request["system"])
            continue
        _answer(generator, {name: conversations[name] for name in request["models"]}, request, send)
        send(end=True)


def _answer(
    generator: TextGenerator,
    conversations: Mapping[str, Conversation],
    request: Mapping[str, Any],
    send: Callable[..., None],
) -> None:
    """Let each model answer the text of a request, and remember what it said."""
    text, answers = request["text"], {}
    try:
        params = SamplingParams(**request["settings"])
        for name, conversation in conversations.items():
            answers[conversation.ask(text, params)] = name
        for answer, piece in generator.stream([*answers]):
            if piece.text:
                send(model=answers[answer], piece=piece.text)
            if piece.finish_reason == "length":
                send(model=answers[answer], cut=True)
    except KeyboardInterrupt:
        send(model=next(iter(conversations)), problem="stopped")
    except SlimtuneError as e:
        send(model=next(iter(conversations)), problem=str(e))
    for answer, name in answers.items():
        conversations[name].remember(text, answer)


if __name__ == "__main__":
    main()
