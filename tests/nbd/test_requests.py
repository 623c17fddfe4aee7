"""The batch parser, each case fed whole, byte by byte, in random splits and with what follows it.

test_any_bytes is the fuzz: any bytes give requests or ProtocolError, in bounded memory.
"""

from __future__ import annotations

import random
import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.nbd.budget import CAPACITY
from nbdserve.nbd.requests import (
    PLAIN_READ,
    PLAIN_WRITE,
    ProtocolError,
    RequestBuffer,
    command_name,
    command_of,
    flags_of,
)
from nbdserve.nbd.scratch import Scratch

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS, RESIZE = range(9)
HEADER = 28
MAXIMUM = 64 << 20
MANY = 1000


def message(command, cookie=1, offset=0, length=0, *, flags=0, payload=b""):
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + payload


def write(data, cookie=1, offset=0, flags=0):
    return message(WRITE, cookie, offset, len(data), flags=flags, payload=data)


class Feeder:
    """Receives into a RequestBuffer as a connection does, and keeps copies of what was parsed."""

    def __init__(self, limit=MANY):
        self.buffer = RequestBuffer(Scratch(CAPACITY))
        self.limit = limit
        self.requests = []

    def feed(self, data):
        while data:
            room = self.buffer.room()
            assert len(room), "no room to receive into"
            part = data[: len(room)]
            room[: len(part)] = part
            self.buffer.received(len(part))
            data = data[len(part) :]
            self.parse()
        return self

    def feed_in_pieces(self, data, size):
        for start in range(0, len(data), size):
            self.feed(data[start : start + size])
        return self

    def parse(self):
        while requests := self.buffer.parse(self.limit):
            assert len(requests) <= self.limit
            self.requests += [plain(request) for request in requests]


def plain(request):
    """(flags, command, cookie, offset, length, payload), nothing of it a view."""
    head, cookie, offset, length, payload = request
    assert head >> 32 == 0x25609513
    data = None if payload is None else bytes(payload)
    return flags_of(head), command_of(head), cookie, offset, length, data


CASES = {
    "read": (message(READ, 7, 4096, 512), [(0, READ, 7, 4096, 512, None)]),
    "read with a flag": (message(READ, 7, 0, 1, flags=4), [(4, READ, 7, 0, 1, None)]),
    "write": (write(b"data", 9, 512), [(0, WRITE, 9, 512, 4, b"data")]),
    "write with a flag": (write(b"x" * 100, flags=1), [(1, WRITE, 1, 0, 100, b"x" * 100)]),
    "write of nothing": (write(b""), [(0, WRITE, 1, 0, 0, b"")]),
    "write of what looks like a request": (
        write(message(READ)),
        [(0, WRITE, 1, 0, HEADER, message(READ))],
    ),
    "disc": (message(DISC), [(0, DISC, 1, 0, 0, None)]),
    "a length is no payload": (
        message(ZEROES, 3, 0, 0xFFFFFFFF) + message(FLUSH, 4),
        [(0, ZEROES, 3, 0, 0xFFFFFFFF, None), (0, FLUSH, 4, 0, 0, None)],
    ),
    "the largest numbers": (
        message(0xFFFF, (1 << 64) - 1, (1 << 64) - 1, (1 << 32) - 1, flags=0xFFFF),
        [(0xFFFF, 0xFFFF, (1 << 64) - 1, (1 << 64) - 1, (1 << 32) - 1, None)],
    ),
    "all commands": (
        b"".join(message(c, c, c, c) for c in (READ, DISC, FLUSH, TRIM, CACHE, STATUS, RESIZE)),
        [(0, c, c, c, c, None) for c in (READ, DISC, FLUSH, TRIM, CACHE, STATUS, RESIZE)],
    ),
    "reads and writes in turn": (
        b"".join(message(READ, i, i, 1) + write(bytes([i]) * i, i) for i in range(40)),
        [
            request
            for i in range(40)
            for request in (
                (0, READ, i, i, 1, None),
                (0, WRITE, i, 0, i, bytes([i]) * i),
            )
        ],
    ),
}
each_case = pytest.mark.parametrize(("stream", "expected"), CASES.values(), ids=CASES)


def test_heads():
    assert (flags_of(PLAIN_READ), command_of(PLAIN_READ)) == (0, READ)
    assert (flags_of(PLAIN_WRITE), command_of(PLAIN_WRITE)) == (0, WRITE)
    assert command_name((PLAIN_WRITE, 0, 0, 0, None)) == "WRITE"
    assert command_name((PLAIN_READ | 99, 0, 0, 0, None)) == "command 99"
    assert message(READ)[:8] == PLAIN_READ.to_bytes(8)
    assert message(WRITE)[:8] == PLAIN_WRITE.to_bytes(8)


@each_case
def test_whole(stream, expected):
    assert Feeder().feed(stream).requests == expected


@each_case
def test_byte_by_byte(stream, expected):
    assert Feeder().feed_in_pieces(stream, 1).requests == expected


@each_case
def test_random_splits(stream, expected):
    for seed in range(20):
        dice = random.Random(seed)
        feeder, rest = Feeder(), stream
        while rest:
            size = dice.randint(1, 60)
            feeder.feed(rest[:size])
            rest = rest[size:]
        assert feeder.requests == expected


@each_case
@pytest.mark.parametrize("trailing", [message(READ)[:27], write(bytes(100))[:-1], b"\x25"])
def test_an_incomplete_request_behind_is_kept(stream, expected, trailing):
    feeder = Feeder().feed(stream + trailing)
    assert feeder.requests == expected
    with_rest = {27: message(READ), 127: write(bytes(100)), 1: message(READ)}[len(trailing)]
    feeder.feed(with_rest[len(trailing) :] + message(FLUSH, 99))
    assert len(feeder.requests) == len(expected) + 2
    assert feeder.requests[-1] == (0, FLUSH, 99, 0, 0, None)


@pytest.mark.parametrize("limit", [1, 2, 3, 79, 80, 81])
def test_at_most_limit_at_a_time(limit):
    stream, expected = CASES["reads and writes in turn"]
    buffer = RequestBuffer(Scratch(CAPACITY))
    buffer.room()[: len(stream)] = stream
    buffer.received(len(stream))
    found = [plain(request) for request in buffer.parse(limit)]
    assert found == expected[:limit]
    while requests := buffer.parse(limit):
        found += [plain(request) for request in requests]
    assert found == expected


def test_nothing_yet():
    assert RequestBuffer(Scratch(CAPACITY)).parse(1) == []


# Where the buffer ends


def test_a_stream_much_longer_than_the_buffer():
    requests = [write(bytes([i % 256]) * 60_000, i) for i in range(60)]
    feeder = Feeder()
    feeder.feed_in_pieces(b"".join(requests), 100_000)
    assert [(r[2], len(r[5]), r[5][:1], r[5][-1:]) for r in feeder.requests] == [
        (i, 60_000, bytes([i % 256]), bytes([i % 256])) for i in range(60)
    ]
    assert len(feeder.buffer.room()) <= CAPACITY


@pytest.mark.parametrize("length", [CAPACITY - 29, CAPACITY - 28, CAPACITY - 27])
@pytest.mark.parametrize("before", [0, 1, 100])
def test_a_write_about_as_large_as_the_buffer(length, before):
    data = bytes(range(1, 252)) * (length // 251 + 1)
    stream = message(READ) * before + write(data[:length]) + message(FLUSH, 5)
    feeder = Feeder().feed(stream)
    assert len(feeder.requests) == before + 2
    assert feeder.requests[before][5] == data[:length]
    assert feeder.requests[-1] == (0, FLUSH, 5, 0, 0, None)
    feeder.feed(message(READ))
    assert len(feeder.buffer.room()) <= CAPACITY


@pytest.mark.parametrize("size", [2 << 20, 5_000_000, MAXIMUM])
@pytest.mark.parametrize("step", [65_536, 300_001])
def test_an_oversized_write_grows_the_buffer_and_it_shrinks_back(size, step):
    data = random.Random(size).randbytes(1 << 20) * (size >> 20) + bytes(size & 0xFFFFF)
    data = data[:size]
    buffer = RequestBuffer(Scratch(CAPACITY))
    stream = message(READ, 1) + write(data, 2) + write(b"small", 3)
    position = largest = 0
    found = []
    while position < len(stream):
        room = buffer.room()
        largest = max(largest, len(room.obj))
        part = stream[position : position + min(step, len(room))]
        room[: len(part)] = part
        buffer.received(len(part))
        position += len(part)
        for request in buffer.parse(MANY):
            assert request[4] is None or request[4] == {2: data, 3: b"small"}[request[1]]
            found.append(request[1])
    assert found == [1, 2, 3]
    assert largest == HEADER + size
    assert len(buffer.room().obj) == CAPACITY


def test_oversized_writes_one_after_the_other():
    feeder = Feeder()
    for size in (3 << 20, 2 << 20, 4 << 20, 10):
        feeder.requests.clear()
        feeder.feed(write(bytes([size % 255 + 1]) * size))
        [request] = feeder.requests
        assert request[5] == bytes([size % 255 + 1]) * size
    assert len(feeder.buffer.room().obj) == CAPACITY


def test_an_empty_buffer_is_used_from_its_front_again():
    feeder = Feeder()
    for _ in range(100):
        feeder.feed(write(bytes(30_000)))
        assert len(feeder.buffer.room()) == CAPACITY


# Payloads that are kept


def receive(buffer, data):
    buffer.room()[: len(data)] = data
    buffer.received(len(data))


def test_a_pinned_payload_stays_while_receiving_goes_on():
    buffer = RequestBuffer(Scratch(CAPACITY))
    receive(buffer, write(b"first" * 20, 1) + write(b"2nd, incomplete", 2)[:-4])
    [(_, _, _, _, kept)] = buffer.parse(MANY)
    buffer.pin()
    receive(buffer, b"lete" + message(READ, 3))
    second, third = buffer.parse(MANY)
    assert bytes(second[4]) == b"2nd, incomplete"
    assert third[1] == 3
    for _ in range(30):
        receive(buffer, write(b"\xff" * 100_000))
        [request] = buffer.parse(MANY)
        assert bytes(request[4]) == b"\xff" * 100_000
    assert bytes(kept) == b"first" * 20


def test_a_pin_holds_for_one_batch_only():
    buffer = RequestBuffer(Scratch(CAPACITY))
    receive(buffer, write(b"x"))
    pinned = buffer.room().obj
    buffer.parse(MANY)
    buffer.pin()
    after = buffer.room().obj
    assert after is not pinned
    receive(buffer, write(b"y"))
    buffer.parse(MANY)
    assert buffer.room().obj is after


def test_a_pinned_oversized_payload():
    big = b"big" * 1_000_000
    feeder = Feeder()
    feeder.feed(write(big)[:-1])
    receive(feeder.buffer, b"g")
    [(_, _, _, _, kept)] = feeder.buffer.parse(MANY)
    feeder.buffer.pin()
    feeder.feed(write(b"next", 2))
    assert feeder.requests == [(0, WRITE, 2, 0, 4, b"next")]
    assert len(feeder.buffer.room().obj) == CAPACITY
    assert kept == big


# What is no request


GARBAGE = {
    "magic": b"\x25\x60\x95\x14" + message(READ)[4:],
    "zeroes": bytes(HEADER),
    "a reply": struct.pack(">IIQ", 0x67446698, 0, 1) + bytes(12),
    "write too long": message(WRITE, length=MAXIMUM + 1),
    "longest write": message(WRITE, length=0xFFFFFFFF),
    "write too long, with flags": message(WRITE, length=MAXIMUM + 1, flags=1),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("step", [1, HEADER, 10_000])
def test_no_request(garbage, before, step):
    """What came before it is returned, however the bytes were split, and nothing after it."""
    stream = write(b"abc", 8) * before + garbage + message(READ) * 3
    feeder = Feeder()
    with pytest.raises(ProtocolError, match=r"bad request magic 0x|WRITE of \d+ bytes"):
        feeder.feed_in_pieces(stream, step)
    assert feeder.requests == [(0, WRITE, 8, 0, 3, b"abc")] * before
    for _ in range(2):
        with pytest.raises(ProtocolError):
            feeder.parse()
    assert len(feeder.buffer.room().obj) == CAPACITY


def test_a_header_is_judged_when_it_is_complete():
    feeder = Feeder().feed(GARBAGE["magic"][:-1])
    with pytest.raises(ProtocolError):
        feeder.feed(GARBAGE["magic"][-1:])


# Hypothesis

U16 = st.integers(0, (1 << 16) - 1)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)

valid_requests = st.one_of(
    st.tuples(U16, U16.filter(lambda c: c != WRITE), U64, U64, U32, st.none()),
    st.binary(max_size=300).flatmap(
        lambda data: st.tuples(
            U16, st.just(WRITE), U64, U64, st.just(len(data)), st.just(data)
        )
    ),
)


def packed(request):
    flags, command, cookie, offset, length, payload = request
    return message(command, cookie, offset, length, flags=flags, payload=payload or b"")


@given(
    requests=st.lists(valid_requests, max_size=20),
    sizes=st.lists(st.integers(1, 400)),
    limit=st.integers(1, 5),
    pins=st.lists(st.booleans()),
)
def test_any_split_gives_the_same_requests(requests, sizes, limit, pins):
    stream = b"".join(map(packed, requests))
    feeder = Feeder(limit)
    sizes, pins = iter(sizes), iter(pins)
    while stream:
        size = next(sizes, len(stream))
        feeder.feed(stream[:size])
        stream = stream[size:]
        if next(pins, False):
            feeder.buffer.pin()
    assert feeder.requests == requests


@given(
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=100),
            valid_requests.map(packed),
            st.tuples(valid_requests.map(packed), st.integers(0, 40)).map(lambda p: p[0][: p[1]]),
        ),
        max_size=10,
    ),
    split=st.integers(1, 100),
)
def test_any_bytes(pieces, split):
    stream = b"".join(pieces)
    feeder = Feeder()
    with suppress(ProtocolError):
        feeder.feed_in_pieces(stream, split)
    taken = b"".join(map(packed, feeder.requests))
    assert stream.startswith(taken)
    assert len(feeder.buffer.room().obj) <= HEADER + MAXIMUM


@given(length=st.integers(CAPACITY, MAXIMUM))
def test_an_announced_payload_costs_what_was_announced(length):
    feeder = Feeder().feed(message(WRITE, length=length))
    assert len(feeder.buffer.room().obj) == max(CAPACITY, HEADER + length)
