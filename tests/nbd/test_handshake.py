"""The handshake, each case fed whole, byte by byte and with what follows it.

test_any_bytes is the fuzz: any bytes give replies and an outcome, never an exception.
"""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.nbd.export import Export
from nbdserve.nbd.handshake import (
    MAX_OPTION_LENGTH,
    MAX_OPTIONS,
    TRANSITIONS,
    Closed,
    Event,
    Handshake,
    State,
    Transmission,
)

NAME, ABORT, LIST, PEEK, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META = range(1, 11)
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = (0x80000000 + n for n in (1, 3, 6, 9))


@dataclass
class FakeBackend:
    size: int = 10 << 20
    read_only: bool = False


VOL = Export("vol", FakeBackend())
OTHER = Export("other", FakeBackend(size=512, read_only=True))

# What a client sends.


def client_flags(flags):
    return struct.pack(">I", flags)


def option(number, data=b""):
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def string(text):
    return struct.pack(">I", len(text)) + text


FIXED = client_flags(3)
GO_VOL = option(GO, string(b"vol") + b"\0\0")
GO_NO = option(GO, string(b"no") + b"\0\0")
SET_BASE = option(SET_META, string(b"vol") + b"\0\0\0\x01" + string(b"base:allocation"))

# What the server sends.


def reply(number, kind, data=b""):
    return struct.pack(">QIII", 0x0003E889045565A9, number, kind, len(data)) + data


def error(number, kind, text):
    return reply(number, kind, text.encode())


def info(flags):
    return (
        reply(GO, 3, bytes.fromhex("0003 00000001 00001000 04000000"))
        + reply(GO, 3, bytes.fromhex("0000 0000000000a00000") + struct.pack(">H", flags))
        + reply(GO, 1)
    )


LISTED = reply(LIST, 2, string(b"vol")) + reply(LIST, 2, string(b"other")) + reply(LIST, 1)
SELECTED = reply(SET_META, 4, b"\0\0\0\0base:allocation") + reply(SET_META, 1)
PLAIN = Transmission(VOL, 10 << 20, 0x0D6D, False, ())
STRUCTURED_PLAIN = Transmission(VOL, 10 << 20, 0x0DED, True, ())
WITH_CONTEXT = Transmission(VOL, 10 << 20, 0x0DED, True, ((0, "base:allocation"),))
EXPORT_INFO = bytes.fromhex("0000000000a00000 0d6d")

# name: (from the client, to the client, outcome)
CASES = {
    "go": (FIXED + GO_VOL, info(0x0D6D), PLAIN),
    "go without no-zeroes": (client_flags(1) + GO_VOL, info(0x0D6D), PLAIN),
    "export name": (FIXED + option(NAME, b"vol"), EXPORT_INFO, PLAIN),
    "export name with zeroes": (
        client_flags(1) + option(NAME, b"vol"),
        EXPORT_INFO + bytes(124),
        PLAIN,
    ),
    "newstyle": (client_flags(0) + option(NAME, b"vol"), EXPORT_INFO + bytes(124), PLAIN),
    "newstyle without zeroes": (client_flags(2) + option(NAME, b"vol"), EXPORT_INFO, PLAIN),
    "export name unknown": (
        FIXED + option(NAME, b"no"),
        b"",
        Closed("EXPORT_NAME: no export is named 'no'"),
    ),
    "export name too long": (
        FIXED + option(NAME, b"v" * 4097),
        b"",
        Closed("EXPORT_NAME: a name of 4097 bytes, 4096 are allowed"),
    ),
    "list, then another try": (
        FIXED + option(LIST) + GO_NO + GO_VOL,
        LISTED + error(GO, ERR_UNKNOWN, "no export is named 'no'") + info(0x0D6D),
        PLAIN,
    ),
    "all a client of ours would do": (
        FIXED + option(STARTTLS) + option(STRUCTURED) + SET_BASE + GO_VOL,
        error(STARTTLS, ERR_UNSUP, "STARTTLS is not supported")
        + reply(STRUCTURED, 1)
        + SELECTED
        + info(0x0DED),
        WITH_CONTEXT,
    ),
    "meta contexts, then export name": (
        FIXED + option(STRUCTURED) + SET_BASE + option(NAME, b"vol"),
        reply(STRUCTURED, 1) + SELECTED + bytes.fromhex("0000000000a00000 0ded"),
        WITH_CONTEXT,
    ),
    "a second set too long": (
        FIXED + option(STRUCTURED) + SET_BASE + option(SET_META, bytes(65537)) + GO_VOL,
        reply(STRUCTURED, 1)
        + SELECTED
        + error(
            SET_META,
            ERR_TOO_BIG,
            "SET_META_CONTEXT: 65537 bytes of data are more than this server takes",
        )
        + info(0x0DED),
        STRUCTURED_PLAIN,
    ),
    "abort": (
        FIXED + option(ABORT),
        reply(ABORT, 1),
        Closed("the client ended the negotiation"),
    ),
    "abort with data": (
        FIXED + option(ABORT, b"bye"),
        reply(ABORT, 1),
        Closed("the client ended the negotiation"),
    ),
    "list with data": (
        FIXED + option(LIST, b"x") + GO_VOL,
        error(LIST, ERR_INVALID, "LIST takes no data, but 1 bytes came with it") + info(0x0D6D),
        PLAIN,
    ),
    "unknown with data that looks like an option": (
        FIXED + option(77, GO_VOL) + GO_VOL,
        error(77, ERR_UNSUP, "option 77 is not supported") + info(0x0D6D),
        PLAIN,
    ),
    "unknown client flags": (client_flags(7), b"", Closed("unknown client flags 0x4")),
    "no client flag we know": (
        client_flags(0x80000000),
        b"",
        Closed("unknown client flags 0x80000000"),
    ),
    "an option without fixed newstyle": (
        client_flags(2) + option(LIST),
        b"",
        Closed("LIST from a client that did not agree on fixed newstyle"),
    ),
    "abort without fixed newstyle": (
        client_flags(0) + option(ABORT),
        b"",
        Closed("ABORT from a client that did not agree on fixed newstyle"),
    ),
    "wrong magic": (
        FIXED + b"IHAVEOPS" + bytes(8),
        b"",
        Closed("b'IHAVEOPS' where an option should begin"),
    ),
    "wrong magic later": (
        FIXED + option(LIST) + b"GET / HTTP/1.1\r\n",
        LISTED,
        Closed("b'GET / HT' where an option should begin"),
    ),
    "absurd length": (
        FIXED + b"IHAVEOPT" + struct.pack(">II", LIST, MAX_OPTION_LENGTH + 1),
        b"",
        Closed("LIST with 33554433 bytes of data"),
    ),
    "flood": (
        FIXED + option(77) * (MAX_OPTIONS + 1),
        error(77, ERR_UNSUP, "option 77 is not supported") * MAX_OPTIONS,
        Closed("more than 128 options"),
    ),
    "not quite a flood": (
        FIXED + option(77) * (MAX_OPTIONS - 1) + GO_VOL,
        error(77, ERR_UNSUP, "option 77 is not supported") * (MAX_OPTIONS - 1) + info(0x0D6D),
        PLAIN,
    ),
}
REQUEST = bytes.fromhex("25609513") + bytes(24)


@pytest.fixture
def handshake():
    return Handshake([VOL, OTHER])


def test_greeting(handshake):
    assert handshake.greeting() == b"NBDMAGICIHAVEOPT\x00\x03"
    assert handshake.outcome is None


@pytest.mark.parametrize(("client", "server", "outcome"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_whole(handshake, client, server, outcome, kind):
    assert handshake.receive(kind(client)) == server
    assert handshake.outcome == outcome
    assert handshake.trailing == b""


@pytest.mark.parametrize(("client", "server", "outcome"), CASES.values(), ids=CASES)
def test_byte_by_byte(handshake, client, server, outcome):
    sent = b""
    for i in range(len(client)):
        assert handshake.outcome is None, "decided before the last byte"
        sent += handshake.receive(client[i : i + 1])
    assert sent == server
    assert handshake.outcome == outcome
    assert handshake.trailing == b""


@pytest.mark.parametrize(("client", "server", "outcome"), CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "trailing", [b"\x25", REQUEST * 2, GO_VOL], ids=["a byte", "requests", "an option"]
)
def test_with_trailing_data(handshake, client, server, outcome, trailing):
    assert handshake.receive(client + trailing) == server
    assert handshake.outcome == outcome
    expected = trailing if isinstance(outcome, Transmission) else b""
    assert handshake.trailing == expected


@pytest.mark.parametrize(("client", "server", "outcome"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("size", [3, 16, 4096])
def test_in_pieces(handshake, client, server, outcome, size):
    data = client + REQUEST
    sent = b""
    position = 0
    while handshake.outcome is None:
        sent += handshake.receive(data[position : position + size])
        position += size
    assert sent == server
    assert handshake.outcome == outcome
    if isinstance(outcome, Transmission):
        assert handshake.trailing + data[position:] == REQUEST


@pytest.mark.parametrize("ending", [GO_VOL, option(ABORT)], ids=["go", "abort"])
def test_nothing_is_taken_after_the_end(handshake, ending):
    handshake.receive(FIXED + ending)
    with pytest.raises(RuntimeError, match="over"):
        handshake.receive(b"")


def test_empty_pieces_change_nothing(handshake):
    assert handshake.receive(b"") == b""
    assert handshake.receive(FIXED) == b""
    assert handshake.receive(b"") == b""
    assert handshake.receive(option(LIST)) == LISTED
    assert handshake.state is State.OPTION_HEADER


def test_only_what_can_be_used_is_kept(handshake):
    """32 MiB for an option that takes none, and for one that takes 64 KiB."""
    handshake.receive(FIXED)
    piece = memoryview(bytes(1 << 16))
    tracemalloc.start()
    for number in (LIST, SET_META):
        handshake.receive(b"IHAVEOPT" + struct.pack(">II", number, MAX_OPTION_LENGTH))
        assert handshake.state is State.EXCESS_DATA
        for _ in range(MAX_OPTION_LENGTH // len(piece) - 1):
            assert handshake.receive(piece) == b""
        assert handshake.receive(piece) != b""
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 256 << 10
    assert handshake.receive(GO_VOL) == info(0x0D6D)


def test_table_is_whole():
    """Every state is reachable, only the last two are final, and every event has a use."""
    assert set(TRANSITIONS) == set(State)
    reachable = {s for events in TRANSITIONS.values() for s in events.values()}
    assert reachable == set(State) - {State.CLIENT_FLAGS}
    final = {state for state, events in TRANSITIONS.items() if not events}
    assert final == {State.TRANSMISSION, State.CLOSED}
    assert {event for events in TRANSITIONS.values() for event in events} == set(Event)


# Fuzz.

NUMBERS = st.integers(0, 12) | st.integers(0, (1 << 32) - 1)
WORDS = st.sampled_from([b"", b"vol", b"other", b"base:allocation", b"base:"])
PAYLOADS = st.one_of(
    st.just(b""),
    st.binary(max_size=64),
    st.builds(lambda name: string(name) + b"\0\0", WORDS),
    st.builds(lambda name, query: string(name) + b"\0\0\0\x01" + string(query), WORDS, WORDS),
)
OPTIONS = st.builds(option, NUMBERS, PAYLOADS)
STREAMS = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda flags, options, rest: client_flags(flags) + b"".join(options) + rest,
        st.integers(0, 3),
        st.lists(OPTIONS, max_size=12),
        st.binary(max_size=40),
    ),
)


@given(stream=STREAMS, cuts=st.lists(st.integers(0, 400), max_size=6))
def test_any_bytes(stream, cuts):
    """Cut anywhere, any bytes give the same replies, the same outcome and the same rest."""
    whole = Handshake([VOL, OTHER])
    sent_whole = whole.receive(stream)

    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[a:b] for a, b in pairwise(edges)]
    cut_up = Handshake([VOL, OTHER])
    sent = b""
    taken = 0
    for piece in pieces:
        if cut_up.outcome is not None:
            break
        sent += cut_up.receive(piece)
        taken += len(piece)

    assert sent == sent_whole
    assert cut_up.outcome == whole.outcome
    assert cut_up.state is whole.state
    if isinstance(whole.outcome, Transmission):
        assert cut_up.trailing + stream[taken:] == whole.trailing
        assert stream.endswith(whole.trailing)
