"""The lengths of examples (core/data/example_lengths.py) as a plan counts, unshares and resizes them."""

from collections.abc import Callable, Sequence

from ..core.data.example_lengths import ExampleLength, count_tokens_per_row


def count_tokens_with_shared_prompt(example_length: ExampleLength) -> int:
    """Return the tokens of an example in a packed sequence, those of a prompt once."""
    return example_length if isinstance(example_length, int) else sum(example_length)


def limit_shared_prefix(example_lengths: Sequence[ExampleLength], shared_prefix_tokens: int) -> int:
    """Return how many tokens all examples begin with, so that each row has more than these, and a prompt no fewer."""
    return max(0, min([shared_prefix_tokens, *(n - 1 if isinstance(n, int) else n[0] for n in example_lengths)]))


def count_packed_tokens(example_lengths: Sequence[ExampleLength], shared_prefix_tokens: int) -> int:
    """Return the tokens of examples in one packed sequence: those of a prompt, and those that all begin with, once."""
    saved = max(0, len(example_lengths) - 1) * limit_shared_prefix(example_lengths, shared_prefix_tokens)
    return sum(map(count_tokens_with_shared_prompt, example_lengths)) - saved


def remove_prefix_sharing(example_length: ExampleLength) -> ExampleLength:
    """Return the length of an example with rows as long that share nothing."""
    return example_length if isinstance(example_length, int) else (0, *count_tokens_per_row(example_length))


def resize_example_rows(example_length: ExampleLength, resize_row: Callable[[int], int]) -> ExampleLength:
    """Return the length of an example with `resize_row(tokens)` tokens per row, and its prompt or what fits of it."""
    if isinstance(example_length, int):
        return resize_row(example_length)
    tokens = [*map(resize_row, count_tokens_per_row(example_length))]
    prefix = max(0, min(example_length[0], *(n - 1 for n in tokens)))
    return (prefix, *(n - prefix for n in tokens))
