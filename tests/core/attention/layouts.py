"""Random packed layouts for hypothesis, and one by hand."""

from hypothesis import strategies as st

from slimtune.core.attention.packed_layout import PackedLayout

TREE = PackedLayout((5, 3, 2, 4, 1, 6), (-1, 0, 1, 0, -1, 4))
"""A prefix of 5, below it segments of 3 and 4, below the 3 another 2; a prefix of 1, below it 6."""


@st.composite
def layouts(draw, most_segments=7, most_tokens=6, prefix_keys=(0, 0, 1, 4)):
    lengths = tuple(draw(st.lists(st.integers(1, most_tokens), min_size=1, max_size=most_segments)))
    parents = tuple(draw(st.integers(-1, i - 1)) for i in range(len(lengths)))
    return PackedLayout(lengths, parents, draw(st.sampled_from(prefix_keys)))


windows = st.none() | st.integers(1, 12)
