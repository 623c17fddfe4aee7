"""Sizes mean what they mean to qemu-img."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import peers
from nbdserve.errors import ConfigError
from nbdserve.units import MAX_SIZE, parse_size

SIZES = {
    "0": 0,
    "512": 512,
    "512b": 512,
    "512B": 512,
    "1k": 1 << 10,
    "1K": 1 << 10,
    "1m": 1 << 20,
    "3G": 3 << 30,
    "2t": 2 << 40,
    "1P": 1 << 50,
    "7E": 7 << 60,
    "1.5k": 1536,
    "1.5G": 3 << 29,
    "1.k": 1024,
    "1.0": 1,
    "0.3k": 307,
    "+4096": 4096,
    " 1k": 1024,
    "0x200": 512,
    "0X1e": 30,
    "0x1b": 27,
    "9223372036854775807": MAX_SIZE,
}
NO_SIZES = [
    "", " ", "k", "1kb", "1KiB", "1kk", "1 k", "1k ", "1.5", "1.5b", ".5G", "1..5k", "-1", "1e3",
    "0x", "0x1k", "0x1.8", "1_000", "\u0661", "½k", "1\n", "inf", "nan",
    "9" * 30, "0." + "1" * 5000 + "k", "9" * 5000,
]  # fmt: skip
TOO_LARGE = ["8E", "9223372036854775808", "16E", "0xffffffffffffffff", "99999999999999999999E"]


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", NO_SIZES)
def test_what_is_no_size_is_refused_by_the_name_of_the_option(text):
    with pytest.raises(ConfigError, match=r"^--offset: .* is not a size"):
        parse_size(text, "--offset")


@pytest.mark.parametrize("text", TOO_LARGE)
def test_sizes_beyond_63_bits_are_refused(text):
    with pytest.raises(ConfigError, match="is more than 9223372036854775807 bytes"):
        parse_size(text)


@given(st.text(max_size=40))
def test_any_text_is_a_size_or_a_config_error(text):
    with contextlib.suppress(ConfigError):
        assert 0 <= parse_size(text) <= MAX_SIZE


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("text", [text for text, size in SIZES.items() if size <= 2 << 40])
def test_qemu_img_reads_the_same_number(text, tmp_path):
    # A raw image rounds up to a sector, and so does the comparison.
    peers.qemu_img("create", "-q", "-f", "raw", tmp_path / "a", text)
    said = json.loads(peers.qemu_img("info", "-f", "raw", "--output=json", tmp_path / "a"))
    assert said["virtual-size"] == -(-parse_size(text) // 512) * 512
