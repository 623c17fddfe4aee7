"""Whole transfers by calls that do a part."""

import errno
import os

import pytest

from nbdserve.engines.transfer import rest_of, write_all


def test_a_write_that_gets_nowhere_fails(monkeypatch):
    monkeypatch.setattr(os, "pwritev", lambda fd, data, offset: 0)
    with pytest.raises(OSError, match=r".") as caught:
        write_all(-1, (b"data",), 0)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("done", range(9))
def test_what_is_left_of_several_buffers(done):
    data = [b"ab", b"", b"cde", b"fgh"]
    assert b"".join(rest_of(data, done)) == b"abcdefgh"[done:]
    assert all(len(piece) for piece in rest_of(data, done))
