"""The gap code: round trip, literal vectors, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from selectune.delta.file.codec import decode_gaps, encode_gaps
from selectune.errors import DeltaFormatError

VECTORS = [
    ([], []),
    ([0], [0]),
    ([5], [5]),
    ([0, 1, 2], [0, 0, 0]),
    ([65534], [65534]),
    ([65535], [65535, 0]),
    ([65536], [65535, 1]),
    ([0, 65535], [0, 65534]),
    ([0, 65536], [0, 65535, 0]),
    ([131070], [65535, 65535, 0]),
    ([2**31 + 15], [65535] * 32768 + [32783]),
]


@pytest.mark.parametrize(("indices", "words"), VECTORS, ids=lambda v: str(v[-1:]))
def test_literal_vectors(indices, words):
    coded = encode_gaps(np.array(indices, dtype=np.int64))
    assert coded.dtype == np.dtype("<u2")
    assert coded.tolist() == words
    assert decode_gaps(coded, len(indices), 2**31 + 16, "w").tolist() == indices


gaps = some.one_of(
    some.integers(0, 3),
    some.integers(65_530, 65_540),
    some.integers(131_060, 131_080),
    some.integers(0, 10**7),
)


@settings(max_examples=300, deadline=None)
@given(some.lists(gaps, max_size=40))
def test_round_trip(lengths):
    indices = np.cumsum(np.array([gap + 1 for gap in lengths], dtype=np.int64)) - 1
    words = encode_gaps(indices)
    numel = int(indices[-1]) + 1 if len(indices) else 0
    assert decode_gaps(words, len(indices), numel, "w").tolist() == indices.tolist()
    if numel:
        with pytest.raises(DeltaFormatError, match="leave the tensor"):
            decode_gaps(words, len(indices), numel - 1, "w")


@settings(max_examples=300, deadline=None)
@given(some.lists(some.sampled_from([0, 1, 2, 65533, 65534, 65535]), max_size=20), some.integers(0, 20))
def test_any_words_decode_to_rising_indices_or_are_refused(words, count):
    array = np.array(words, dtype=np.uint16)
    try:
        indices = decode_gaps(array, count, 2**40, "w")
    except DeltaFormatError:
        ends = sum(word != 65535 for word in words)
        assert ends != count or words[-1] == 65535
    else:
        assert len(indices) == count
        assert (np.diff(indices) > 0).all()
        assert (indices >= 0).all()
        assert encode_gaps(indices).tolist() == words  # one code for one set


@pytest.mark.parametrize(
    ("words", "count"), [([65535], 0), ([65535], 1), ([1, 65535], 1), ([1, 2], 1), ([1], 2), ([], 1)]
)
def test_words_that_do_not_hold_the_count_are_refused(words, count):
    with pytest.raises(DeltaFormatError, match="cannot be read"):
        decode_gaps(np.array(words, dtype=np.uint16), count, 10**6, "w")
