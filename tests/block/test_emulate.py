"""Finding zeroes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.block.emulate import STEP, is_zero

LENGTHS = (0, 1, 2, 511, STEP - 1, STEP, STEP + 1, 3 * STEP, 3 * STEP + 7)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", [bytes, bytearray, lambda data: memoryview(bytes(data))])
def test_zeroes_of_any_length_and_kind(length, kind):
    assert is_zero(kind(length))


@pytest.mark.parametrize("length", [length for length in LENGTHS if length])
def test_one_other_byte_anywhere_is_found(length):
    for position in {0, 1, length // 2, STEP - 1, STEP, length - 2, length - 1}:
        if 0 <= position < length:
            data = bytearray(length)
            data[position] = 1
            assert not is_zero(data), position


@given(st.binary(max_size=300), st.integers(0, 300), st.integers(0, 300))
def test_a_window_is_judged_by_its_own_bytes(data, start, length):
    window = memoryview(data)[start : start + length]
    assert is_zero(window) is not any(window)
