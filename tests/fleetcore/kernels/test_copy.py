"""copy_out is memcpy, wherever the bytes begin and end."""
import numpy as np
import pytest
from fleetcore.kernels.copy import copy_array

from fleetcore.errors import ShapeError


@pytest.mark.parametrize("size", (0, 1, 63, 64, 65, 127, 128, 129, 1000, 100_003))
def test_copies_everything_and_nothing_else(size):
    source = np.random.default_rng(size).integers(0, 256, size + 64, np.uint8)
    for start in (0, 1, 15, 16, 63):
        for skew in (0, 7):
            room = np.full(size + 256, 0xAB, np.uint8)
            copy_array(room[start:start + size], source[skew:skew + size])
            assert np.array_equal(room[start:start + size], source[skew:skew + size])
            assert (room[:start] == 0xAB).all() and (room[start + size:] == 0xAB).all()


def test_sizes_must_agree():
    with pytest.raises(ShapeError):
        copy_array(bytearray(3), b"four")
