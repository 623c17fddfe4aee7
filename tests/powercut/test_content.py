"""A content is the bytes that were written, however they came there; its copies are its own."""

import os
import random
import subprocess
import sys

import pytest

from nbdserve.powercut.content import PAGE, Content

SIZE = 3 << 20  # three chunks


def changes(seed, number=30):
    """(method, offset, data or length), of all alignments."""
    chooser = random.Random(seed)
    edges = [0, 1, 511, 512, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE, 1 << 20, (1 << 20) + 7, 2 << 20]
    for _ in range(number):
        offset = chooser.choice(edges) + chooser.choice((0, 0, 100, PAGE))
        length = chooser.choice((1, 512, PAGE, 2 * PAGE, 3 * PAGE + 5, 700_000, 1 << 20))
        kind = chooser.choice(("write", "write", "write_zeroes", "discard"))
        yield kind, offset, chooser.randbytes(length) if kind == "write" else length


def do(content, model, kind, offset, what):
    """A change to a content, and to a bytearray."""
    getattr(content, kind)(offset, what)
    data = what if kind == "write" else bytes(what)
    if kind == "discard":
        data = data[: max(0, len(model) - offset)]
    if data:
        model.extend(bytes(max(0, offset + len(data) - len(model))))
        model[offset : offset + len(data)] = data


@pytest.mark.parametrize("seed", range(30))
def test_it_is_what_was_written(seed):
    content, model = Content(100), bytearray(100)
    kept = []
    for change in changes(seed):
        do(content, model, *change)
        kept.append((content.copy(), bytes(model)))
    for copy, expected in kept:  # what came later changed no copy
        assert len(copy) == len(expected)
        assert bytes(copy) == expected
        assert copy.digest() == Content.of(expected).digest()
        buffer = bytearray(5000)
        copy.read_into(PAGE - 3, memoryview(buffer))
        assert buffer == copy.read(PAGE - 3, 5000) == expected[PAGE - 3 : PAGE + 4997].ljust(
            5000, b"\0")
        found = bytearray(len(expected))
        for offset, data in copy.data():
            assert data[:PAGE].strip(b"\0")
            found[offset : offset + len(data)] = data
        assert found == expected
        walked, at = [], 0
        while at < len(expected):
            is_data, stop = copy.extent(at)
            stop = len(expected) if stop is None else min(stop, len(expected))
            if is_data:
                walked.append((at, stop - at))
            at = stop
        assert walked == list(copy.extents())


def test_a_copy_changes_by_itself_and_so_does_what_it_was_made_of():
    content = Content.of(b"a" * PAGE * 3)
    copy = content.copy()
    copy.write(PAGE, b"b" * 10)
    content.write(2 * PAGE, b"c" * 10)
    assert bytes(content)[::PAGE] == b"aac"
    assert bytes(copy)[::PAGE] == b"aba"


def test_equal_bytes_have_equal_digests_and_pages():
    one = Content.of(b"x" * 5000)
    one.write(1 << 30, b"y")
    one.write_zeroes(1 << 30, 1)
    other = Content((1 << 30) + 1)
    other.write(4000, b"x" * 1000)
    other.write(0, b"x" * 4000)
    assert one == other
    assert one.data_size == other.data_size == 2 * PAGE
    other.size += 1
    assert one != other
    one.size += 1
    one.write(0, b"y")
    assert one != other


def test_a_digest_is_the_same_in_another_process():
    code = "from nbdserve.powercut.content import Content; print(Content.of(b'ab' * 4000).digest())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": "7"})
    assert done.stdout.strip() == str(Content.of(b"ab" * 4000).digest())


def test_what_a_huge_disk_costs_is_its_data():
    content = Content(1 << 50)
    content.write(1 << 49, b"x" * 10_000)
    content.write_zeroes(1 << 40, (1 << 49) - (1 << 40))
    content.discard(0, 1 << 49)
    assert content.data_size == 3 * PAGE
    assert list(content.extents()) == [(1 << 49, 3 * PAGE)]
    assert content.extent(0) == (False, 1 << 49)
    assert content.extent(1 << 49) == (True, (1 << 49) + 3 * PAGE)
    assert content.extent(1 << 50) == (False, None)


def test_taking_a_range_of_another():
    for offset, length in ((0, 100), (100, 5000), (PAGE, PAGE), (3000, 3 * PAGE), (0, 40_000)):
        one, other = Content.of(b"a" * 40_000), Content.of(b"b" * 20_000)
        expected = bytearray(b"a" * 40_000)
        one.take(other, offset, length)
        expected[offset : offset + length] = (b"b" * 20_000).ljust(40_000, b"\0")[
            offset : offset + length]
        assert bytes(one) == expected


@pytest.mark.parametrize("size", [0, 1, PAGE, 5 * PAGE + 3, SIZE])
def test_a_file_has_it_with_its_holes(size, tmp_path):
    content = Content(size)
    if size > PAGE:
        content.write(PAGE, b"x" * 100)
        content.write(size - 2, b"yz")
    path = tmp_path / "content"
    path.write_bytes(b"something longer" * SIZE)
    content.save(path)
    assert path.read_bytes() == bytes(content)
    assert path.stat().st_blocks * 512 <= content.data_size
    assert Content.load(path) == content


def test_a_file_full_of_data_is_loaded(tmp_path):
    data = random.Random(1).randbytes(SIZE + 100)
    path = tmp_path / "content"
    path.write_bytes(data)
    assert bytes(Content.load(path)) == data
