"""Rounding of offsets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.block.units import KIB, MIB, align_down, align_up

VALUES = st.integers(0, 1 << 63)
UNITS = st.integers(1, 1 << 22)


@given(VALUES, UNITS)
def test_down_is_the_nearest_multiple_not_above(value, unit):
    down = align_down(value, unit)
    assert down % unit == 0
    assert down <= value < down + unit


@given(VALUES, UNITS)
def test_up_is_the_nearest_multiple_not_below(value, unit):
    up = align_up(value, unit)
    assert up % unit == 0
    assert up - unit < value <= up


@pytest.mark.parametrize(("value", "up"), [(0, 0), (1, 512), (511, 512), (512, 512)])
def test_at_the_edges_of_a_sector(value, up):
    assert align_up(value, 512) == up


def test_units():
    assert (KIB, MIB) == (2**10, 2**20)
