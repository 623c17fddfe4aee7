"""Patterns: a byte is what its offset says, from wherever it is looked at."""

import struct

import pytest

from nbdserve.errors import ConfigError
from nbdserve.testing import fill, offsets, random, zeroes
from nbdserve.testing.patterns import size_of

ALL = [offsets("1M"), random("1M"), random("1M", seed=7), fill("1M", 0xAB), zeroes("1M")]


@pytest.mark.parametrize("pattern", ALL)
@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 12345])
@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 20000])
def test_a_piece_is_a_piece_of_the_whole(pattern, start, length):
    whole = pattern.at(0, 40960)
    assert pattern.at(start, length) == whole[start : start + length]


def test_offsets_are_those_of_eight_bytes():
    assert offsets(0).at(4088, 16) == struct.pack(">QQ", 4088, 4096)


def test_random_bytes_depend_on_the_seed_and_the_place():
    one = random("8k")
    assert one.at(0, 8192) == random("8k").at(0, 8192)
    assert one.at(0, 4096) != one.at(4096, 4096)
    assert one.at(0, 4096) != random("8k", seed=1).at(0, 4096)


def test_the_others():
    assert fill(0, 0xAB).at(5, 3) == b"\xab" * 3
    assert zeroes(0).at(5, 3) == bytes(3)
    assert zeroes(0).is_zero
    assert not fill(1, 0).is_zero


def test_sizes():
    assert size_of("1M") == offsets("1M").length == 1 << 20
    assert size_of(5) == 5
    with pytest.raises(ConfigError):
        offsets("much")
    with pytest.raises(ValueError, match="256"):
        fill(1, 256)
