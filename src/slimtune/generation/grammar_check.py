"""Compile a grammar from stdin in a process of its own, and print what is wrong with it as JSON.

    python -P -S -E grammar_check.py FOLDER SECONDS BYTES

A grammar comes from a client of the server, and may overflow the stack of a compiler, or take any time and memory. Here
nothing else is lost by it. The process imports llguidance from FOLDER, and nothing of slimtune, so that it starts fast.
"""

import json
import sys
import threading

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

STACK_BYTES = 1 << 20
"""Of the thread that compiles. Threads of the server have several times as much."""
TRIED_BYTES = 32
"""Of an answer that is tried."""


def find_error(lark: str) -> str | None:
    """Return why a grammar cannot bind an answer, None if it can; the tokens here are the bytes."""
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), lark, log_level=0)
    for _ in range(TRIED_BYTES):  # an expression may grow without end only after some characters
        if matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask()[:32], "little")
        if not mask:
            break
        matcher.consume_token(mask.bit_length() - 1)
    return matcher.get_error() or None


def main() -> None:
    """Read the grammar, and print `{"error": null}` or the error."""
    folder, seconds, max_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        if sys.platform == "linux":  # macOS accepts no limit of the address space
            resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    sys.path.insert(0, folder)
    lark = sys.stdin.buffer.read().decode()
    threading.stack_size(STACK_BYTES)
    errors: list[str | None] = []
    thread = threading.Thread(target=lambda: errors.append(find_error(lark)))
    thread.start()
    thread.join()
    print(json.dumps({"error": errors[0]}, allow_nan=False))


if __name__ == "__main__":
    main()
