"""The outbox over a socket that takes as much as a test says."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.block.buffers import BufferPool
from nbdserve.nbd.budget import Budget
from nbdserve.nbd.outbox import MAX_IOV, Outbox


class Socket:
    """Takes the given numbers of bytes, one after the other; None and the end would block."""

    def __init__(self, takes=()):
        self.takes = iter(takes)
        self.taken = b""
        self.most_buffers = 0

    def send(self, buffer):
        return self.sendmsg([buffer])

    def sendmsg(self, buffers):
        self.most_buffers = max(self.most_buffers, len(buffers))
        size = next(self.takes, None)
        if size is None:
            raise BlockingIOError
        data = b"".join(buffers)[:size]
        self.taken += data
        return len(data)


def outbox_on(sock):
    budget = Budget()
    share = budget.open(lambda: None, lambda: None, lambda reason: None)
    return Outbox(sock, budget.sending, BufferPool(), share)


@pytest.mark.parametrize("takes", [[6], [100]])
def test_what_the_socket_takes_is_gone(takes):
    sock = Socket(takes)
    outbox = outbox_on(sock)
    outbox.send(memoryview(b"abcdef"))
    assert (sock.taken, outbox.pending) == (b"abcdef", False)


@pytest.mark.parametrize(("takes", "taken"), [([], b""), ([2], b"ab"), ([5], b"abcde")])
def test_what_it_does_not_take_is_kept(takes, taken):
    sock = Socket(takes)
    outbox = outbox_on(sock)
    outbox.send(memoryview(b"abcdef"))
    assert (sock.taken, outbox.pending) == (taken, True)
    outbox.resume()
    assert (sock.taken, outbox.pending) == (taken, True)
    sock.takes = iter([100])
    outbox.resume()
    assert (sock.taken, outbox.pending) == (b"abcdef", False)


def test_nothing_is_sent_past_what_is_kept():
    sock = Socket()
    outbox = outbox_on(sock)
    outbox.send(memoryview(b"a"))
    sock.takes = iter([100, 100])
    outbox.send(memoryview(b"b"))
    outbox.send_all([b"c", bytearray(b"d")])
    assert sock.taken == b""
    outbox.resume()
    assert sock.taken == b"abcd"


def test_no_more_buffers_at_once_than_the_kernel_takes():
    """Over a real socket: sendmsg fails with EMSGSIZE from 1025 on."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        outbox_on(ours).send_all([b"x"] * 1500)
        assert theirs.recv(2000) == b"x" * 1500
    sock = Socket([1 << 20] * 100)
    outbox_on(sock).send_all([b"x"] * 1500)
    assert sock.most_buffers == MAX_IOV
    assert len(sock.taken) == 1500


def test_the_errors_of_a_dead_socket_are_raised():
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        outbox = outbox_on(ours)
        for send in (
            lambda: outbox.send(memoryview(b"x")),
            lambda: outbox.send_all([b"x"]),
        ):
            with pytest.raises(BrokenPipeError):
                send()


def test_what_was_kept_for_a_socket_that_died_raises_too():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours:
        outbox = outbox_on(ours)
        outbox.send_all([bytes(1 << 20)] * 8)
        assert outbox.pending
        theirs.close()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            outbox.resume()
        outbox.drop()
        assert not outbox.pending
        outbox.resume()


@given(
    sends=st.lists(
        st.one_of(st.binary(min_size=1, max_size=20), st.lists(st.binary(max_size=9), max_size=90))
    ),
    takes=st.lists(st.one_of(st.none(), st.integers(1, 60))),
)
def test_the_stream_stays_in_order(sends, takes):
    sock = Socket(takes)
    outbox = outbox_on(sock)
    expected = b""
    for what in sends:
        if isinstance(what, bytes):
            outbox.send(memoryview(what))
            expected += what
        else:
            outbox.send_all(what)
            expected += b"".join(what)
        assert expected.startswith(sock.taken)
        assert outbox.pending == (len(sock.taken) < len(expected))
    while outbox.pending:
        sock.takes = iter([7])
        outbox.resume()
    assert sock.taken == expected
