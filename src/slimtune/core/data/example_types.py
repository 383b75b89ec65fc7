"""What a tokenized example and a micro-batch are; without torch, which the declarations of objectives do not import."""

from typing import Any

Example = dict[str, Any]
"""`{"input_ids": [L], "labels": [L], "line": int}`; a label is its token, or `IGNORE_INDEX` if it is not learned.

An example of several rows, such as a preference pair, has their tokens one after another and `row_lengths`, the tokens
of each. Its rows lie in one micro-batch. A ranked list has `row_scores`, too, the best first. Other keys are numbers,
or lists of numbers, that an objective needs.
"""
Batch = dict[str, Any]
"""A micro-batch of examples, as `Collator` makes it; each key that an objective adds to examples is a tensor in it."""
