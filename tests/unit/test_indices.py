"""Components by number, against numpy's own."""

import numpy as np
import pytest

from interp.hooks.errors import ArgumentError
from interp.hooks.indices import flat_index

SHAPE = (2, 3, 4)


@pytest.mark.parametrize("index", [(0, 0, 0), (1, 2, 3), (-1, -3, 1), (0, 2, -4)])
def test_a_tuple_is_numpys_flat_index(index):
    assert flat_index("row", index, SHAPE) == np.arange(24).reshape(SHAPE)[index]


@pytest.mark.parametrize("index", [0, 23, -1, -24])
def test_an_int_counts_through_all(index):
    assert flat_index("row", index, SHAPE) == np.arange(24)[index]


@pytest.mark.parametrize(("index", "text"), [
    (24, "row 24; needed: an index below 24"), (-25, "below 24"), ((0, 3, 0), r"into \[2, 3, 4\]"), ((0, 0), "into"),
])  # fmt: skip
def test_what_lies_outside_is_refused(index, text):
    with pytest.raises(ArgumentError, match=text):
        flat_index("row", index, SHAPE)


def test_what_is_no_number_is_refused():
    with pytest.raises(ArgumentError, match="True"):
        flat_index("row", (True, 0, 0), SHAPE)
