"""The process that holds the model of a chat: `python -m slimtune.ui.chat_worker RUN`.

It reads requests on stdin and writes events on stdout, one JSON object a line. It is a process of its own, so that
unloading it gives its memory back, and the page outlives it when memory runs out.

    request  {"text", "models", "settings"}      or {"system"}, which begins a new conversation
    events   {"ready": description}, {"model", "piece"}, {"model", "problem"}, {"end": true}, {"error": {…}}
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..core.foundation.files import to_json
from ..errors import SlimtuneError
from ..generation.generator import Conversation, Generator


def main() -> None:
    """Answer requests until stdin ends; SIGINT stops the answer that is being generated."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no event

    def send(**event: Any) -> None:
        events.write(to_json(event) + "\n")
        events.flush()

    try:
        generator = Generator.open(Path(sys.argv[1]))
    except SlimtuneError as e:
        send(error={"message": e.message, "expected": e.expected, "hint": e.hint})
        sys.exit(e.exit_code)
    conversation = Conversation(generator)
    send(ready=generator.description)
    while True:
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:  # the answer had ended before it was stopped
            continue
        if not line:
            return
        request = json.loads(line)
        if "system" in request:
            conversation = Conversation(generator, request["system"])
            continue
        for model in request["models"]:
            try:
                with contextlib.closing(conversation.stream(request["text"], model, **request["settings"])) as pieces:
                    for piece in pieces:
                        send(model=model, piece=piece)
            except KeyboardInterrupt:
                send(model=model, problem="stopped")
                break
            except SlimtuneError as e:
                send(model=model, problem=str(e))
                break
        send(end=True)


if __name__ == "__main__":
    main()
