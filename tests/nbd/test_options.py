"""Every option, every answer: what a client sent, and all that came back.

Messages are packed by hand, so that nothing here rests on proto.py. The answers were
compared with qemu-nbd 7.2's over a socket (three servers: -x vol -D 'my disk' -e 8; the
same with -r; with -A -B bm0 -B bm1); only the words of errors are our own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.nbd.export import Export
from nbdserve.nbd.metacontext import BASE_ALLOCATION, MetaContext
from nbdserve.nbd.options import (
    LONGEST_META_CONTEXT_REQUEST,
    OPTION_HANDLERS,
    Closed,
    Haggling,
    Transmission,
    answer,
    answer_excess,
    handler_of,
    option_name,
)
from nbdserve.nbd.proto import MAX_QUERIES, MAX_STRING, Option

ACK, SERVER, INFO, META_CONTEXT = 1, 2, 3, 4
ERROR = 1 << 31
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = ERROR + 1, ERROR + 3, ERROR + 6, ERROR + 9

NAME, ABORT, LIST, PEEK, STARTTLS, INFO_, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = range(
    1, 12
)

BASE = b"base:allocation"


@dataclass
class FakeBackend:
    size: int = 10 << 20
    read_only: bool = False


VOL = Export("vol", FakeBackend(), description="my disk")
PLAIN = Export("plain", FakeBackend(size=1 << 40, read_only=True), preferred_block_size=65536)
RICH = Export(
    "жук",
    FakeBackend(),
    contexts=(
        BASE_ALLOCATION,
        MetaContext("qemu:allocation-depth", ("qemu:",)),
        MetaContext("qemu:dirty-bitmap:bm0", ("qemu:", "qemu:dirty-bitmap:")),
    ),
)


@pytest.fixture
def haggling():
    return Haggling({e.name.encode(): e for e in (VOL, PLAIN, RICH)})


@pytest.fixture
def structured(haggling):
    assert replies(haggling, STRUCTURED, b"") == [(ACK, b"")]
    return haggling


def string(text):
    return struct.pack(">I", len(text)) + text


def info_request(name, *kinds):
    return string(name) + struct.pack(f">H{len(kinds)}H", len(kinds), *kinds)


def meta_request(name, *queries):
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def parse_replies(option, data):
    """[(type, data)] of option replies, all of them to ``option``."""
    found = []
    while data:
        magic, replied_to, reply, length = struct.unpack_from(">QIII", data)
        assert (magic, replied_to) == (0x0003E889045565A9, option)
        assert len(data) >= 20 + length
        found.append((reply, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def replies(haggling, option, data):
    """The answer to an option that does not end haggling."""
    answered = answer(haggling, option, data)
    assert answered.outcome is None
    return parse_replies(option, answered.replies)


def refusal(haggling, option, data):
    """The one error an option is answered with, as (type, text)."""
    ((reply, text),) = replies(haggling, option, data)
    assert reply >= ERROR
    return reply, text.decode()


# EXPORT_NAME


@pytest.mark.parametrize("no_zeroes", [False, True])
@pytest.mark.parametrize(
    ("name", "export", "expected"),
    [
        (b"vol", VOL, "0000000000a00000 0d6d"),
        (b"plain", PLAIN, "0000010000000000 050f"),
        ("жук".encode(), RICH, "0000000000a00000 0d6d"),
    ],
)
def test_export_name(haggling, no_zeroes, name, export, expected):
    haggling.no_zeroes = no_zeroes
    answered = answer(haggling, NAME, name)
    assert answered.replies == bytes.fromhex(expected) + (b"" if no_zeroes else bytes(124))
    assert answered.outcome == Transmission(
        export, export.backend.size, export.transmission_flags, False, ()
    )


def test_export_name_with_structured_replies(structured):
    structured.no_zeroes = True
    answered = answer(structured, NAME, b"vol")
    assert answered.replies == bytes.fromhex("0000000000a00000 0ded")
    assert answered.outcome == Transmission(VOL, 10 << 20, 0x0DED, True, ())


@pytest.mark.parametrize("name", [b"", b"nope", b"vol\0", b"VOL", b"\xff\xfe", b"x" * 4096])
def test_export_name_unknown(haggling, name):
    answered = answer(haggling, NAME, name)
    assert answered.replies == b""
    assert isinstance(answered.outcome, Closed)
    assert "no export is named" in answered.outcome.reason


def test_default_export():
    export = Export("", FakeBackend())
    haggling = Haggling({b"": export})
    assert answer(haggling, NAME, b"").outcome == Transmission(export, 10 << 20, 0x0D6D, False, ())
    assert answer(haggling, GO, info_request(b"")).outcome is not None


def test_export_name_too_long(haggling):
    assert handler_of(NAME).longest == 4096
    answered = answer_excess(haggling, NAME, 4097)
    assert answered == (b"", Closed("EXPORT_NAME: a name of 4097 bytes, 4096 are allowed"))


# ABORT


def test_abort(haggling):
    for answered in (answer(haggling, ABORT, b""), answer_excess(haggling, ABORT, 5)):
        assert parse_replies(ABORT, answered.replies) == [(ACK, b"")]
        assert answered.outcome == Closed("the client ended the negotiation")


# LIST


def test_list(haggling):
    assert replies(haggling, LIST, b"") == [
        (SERVER, b"\0\0\0\x03volmy disk"),
        (SERVER, b"\0\0\0\x05plain"),
        (SERVER, b"\0\0\0\x06" + "жук".encode()),
        (ACK, b""),
    ]


def test_list_of_nothing():
    assert replies(Haggling({}), LIST, b"") == [(ACK, b"")]


# INFO and GO

DESCRIPTION = (INFO, b"\0\x02my disk")
BLOCK_SIZE = (INFO, bytes.fromhex("0003 00000001 00001000 04000000"))
EXPORT = (INFO, bytes.fromhex("0000 0000000000a00000 0d6d"))
DONE = (ACK, b"")


@pytest.mark.parametrize("option", [INFO_, GO])
@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([], [DESCRIPTION, BLOCK_SIZE, EXPORT, DONE]),
        ([0], [DESCRIPTION, BLOCK_SIZE, EXPORT, DONE]),
        ([1], [(INFO, b"\0\x01vol"), DESCRIPTION, BLOCK_SIZE, EXPORT, DONE]),
        ([2, 3], [DESCRIPTION, BLOCK_SIZE, EXPORT, DONE]),
        ([0, 1, 2, 3, 99], [(INFO, b"\0\x01vol"), DESCRIPTION, BLOCK_SIZE, EXPORT, DONE]),
        ([1, 1, 0xFFFF], [(INFO, b"\0\x01vol"), DESCRIPTION, BLOCK_SIZE, EXPORT, DONE]),
    ],
)
def test_info_and_go(haggling, option, kinds, expected):
    answered = answer(haggling, option, info_request(b"vol", *kinds))
    assert parse_replies(option, answered.replies) == expected
    if option == GO:
        assert answered.outcome == Transmission(VOL, 10 << 20, 0x0D6D, False, ())
    else:
        assert answered.outcome is None


@pytest.mark.parametrize("option", [INFO_, GO])
def test_info_of_a_read_only_export(structured, option):
    """No description, another preferred block size, and DF for who has structured replies."""
    answered = answer(structured, option, info_request(b"plain", 2))
    assert parse_replies(option, answered.replies) == [
        (INFO, bytes.fromhex("0003 00000001 00010000 04000000")),
        (INFO, bytes.fromhex("0000 0000010000000000 058f")),
        DONE,
    ]


@pytest.mark.parametrize("option", [INFO_, GO])
@pytest.mark.parametrize(
    ("data", "reply", "words"),
    [
        (info_request(b"no"), ERR_UNKNOWN, "no export is named 'no'"),
        (info_request(b""), ERR_UNKNOWN, "no export is named ''"),
        (info_request(b"v\xff\n"), ERR_UNKNOWN, r"no export is named 'v\\xff\n'"),
        (info_request(b"v" * 100), ERR_UNKNOWN, f"no export is named '{'v' * 80}...'"),
        (info_request(b"v" * 4096), ERR_UNKNOWN, f"no export is named '{'v' * 80}...'"),
        (info_request(b"v" * 4097), ERR_INVALID, "a string of 4097 bytes, 4096 are allowed"),
        (info_request(b"vol\0"), ERR_INVALID, "NUL"),
        (b"", ERR_INVALID, "do not match its 0 bytes"),
        (string(b"vol"), ERR_INVALID, "do not match its 7 bytes"),
        (string(b"vol") + b"\0", ERR_INVALID, "do not match"),
        (info_request(b"vol")[:-1] + b"\x01", ERR_INVALID, "do not match"),
        (info_request(b"vol") + b"xx", ERR_INVALID, "do not match"),
        (b"\xff\xff\xff\xff" + b"vol\0\0", ERR_INVALID, "do not match"),
    ],
)
def test_info_refused(haggling, option, data, reply, words):
    got, text = refusal(haggling, option, data)
    assert got == reply
    assert words in text


def test_info_row_fits_the_longest_name():
    assert handler_of(INFO_) == handler_of(GO)
    assert len(info_request(b"v" * MAX_STRING, *range(128))) == handler_of(GO).longest


# STRUCTURED_REPLY


def test_structured_reply_once(haggling):
    assert replies(haggling, STRUCTURED, b"") == [(ACK, b"")]
    assert haggling.structured_replies
    assert refusal(haggling, STRUCTURED, b"") == (
        ERR_INVALID,
        "STRUCTURED_REPLY: already negotiated",
    )
    assert haggling.structured_replies


# LIST_META_CONTEXT and SET_META_CONTEXT


@pytest.mark.parametrize("needs_structured", [False, True])
@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], [BASE]),
        ([b"base:"], [BASE]),
        ([BASE], [BASE]),
        ([BASE, b"base:", BASE], [BASE]),
        ([b"qemu:", b"nonsense", b"", b"base:x"], []),
    ],
)
def test_list_meta_context(haggling, needs_structured, queries, expected):
    haggling.structured_replies = needs_structured
    assert replies(haggling, LIST_META, meta_request(b"vol", *queries)) == [
        *((META_CONTEXT, b"\0\0\0\0" + name) for name in expected),
        (ACK, b""),
    ]
    assert haggling.selection is None


def test_list_meta_context_ids_are_zero(haggling):
    assert replies(haggling, LIST_META, meta_request("жук".encode(), b"qemu:")) == [
        (META_CONTEXT, b"\0\0\0\0qemu:allocation-depth"),
        (META_CONTEXT, b"\0\0\0\0qemu:dirty-bitmap:bm0"),
        (ACK, b""),
    ]


def test_list_meta_context_keeps_the_selection(structured):
    replies(structured, SET_META, meta_request(b"vol", BASE))
    replies(structured, LIST_META, meta_request(b"plain"))
    replies(structured, LIST_META, b"garbage")
    outcome = answer(structured, GO, info_request(b"vol")).outcome
    assert isinstance(outcome, Transmission)
    assert outcome.contexts == ((0, "base:allocation"),)


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], []),
        ([b"base:"], []),
        ([BASE], [(0, BASE)]),
        ([b"qemu:dirty-bitmap:bm0", BASE, BASE], [(0, BASE), (2, b"qemu:dirty-bitmap:bm0")]),
        ([b"qemu:", b"x-unknown:thing", b"no colon", b"base:x"], []),
    ],
)
def test_set_meta_context(structured, queries, expected):
    name = "жук".encode()
    assert replies(structured, SET_META, meta_request(name, *queries)) == [
        *((META_CONTEXT, struct.pack(">I", i) + context) for i, context in expected),
        (ACK, b""),
    ]
    outcome = answer(structured, GO, info_request(name)).outcome
    assert outcome == Transmission(
        RICH, 10 << 20, 0x0DED, True, tuple((i, context.decode()) for i, context in expected)
    )


def test_selection_is_for_one_export(structured):
    replies(structured, SET_META, meta_request(b"vol", BASE))
    for option, data in ((GO, info_request(b"plain")), (NAME, b"plain")):
        outcome = answer(structured, option, data).outcome
        assert isinstance(outcome, Transmission)
        assert outcome.contexts == ()
    outcome = answer(structured, NAME, b"vol").outcome
    assert isinstance(outcome, Transmission)
    assert outcome.contexts == ((0, "base:allocation"),)


def test_selection_is_replaced(structured):
    replies(structured, SET_META, meta_request(b"vol", BASE))
    replies(structured, SET_META, meta_request(b"vol"))
    outcome = answer(structured, GO, info_request(b"vol")).outcome
    assert isinstance(outcome, Transmission)
    assert outcome.contexts == ()


MALFORMED_META = [
    (meta_request(b"no", BASE), ERR_UNKNOWN, "no export is named 'no'"),
    (meta_request(b"v" * 4097, BASE), ERR_INVALID, "a string of 4097 bytes"),
    (meta_request(b"vol", b"base:" + b"a" * 4092), ERR_INVALID, "a string of 4097 bytes"),
    (meta_request(b"vol", b"base:\0"), ERR_INVALID, "NUL"),
    (meta_request(b"vol\0", BASE), ERR_INVALID, "NUL"),
    (b"", ERR_INVALID, "do not match its 0 bytes"),
    (b"\0\0", ERR_INVALID, "do not match its 2 bytes"),
    (string(b"vol"), ERR_INVALID, "do not match"),
    (b"\0\0\0\x09abc", ERR_INVALID, "do not match"),
    (meta_request(b"vol", BASE)[:-1], ERR_INVALID, "do not match"),
    (meta_request(b"vol", BASE) + b"t", ERR_INVALID, "do not match"),
    (string(b"vol") + b"\0\0\0\x02" + string(BASE), ERR_INVALID, "do not match"),
    (string(b"vol") + b"\xff\xff\xff\xff" + string(BASE), ERR_TOO_BIG, "more than 256 queries"),
    (meta_request(b"vol", *[b""] * (MAX_QUERIES + 1)), ERR_TOO_BIG, "more than 256 queries"),
]


@pytest.mark.parametrize(("data", "reply", "words"), MALFORMED_META)
def test_malformed_set_clears_the_selection(structured, data, reply, words):
    replies(structured, SET_META, meta_request(b"vol", BASE))
    got, text = refusal(structured, SET_META, data)
    assert got == reply
    assert words in text
    outcome = answer(structured, GO, info_request(b"vol")).outcome
    assert isinstance(outcome, Transmission)
    assert outcome.contexts == ()


@pytest.mark.parametrize(("data", "reply", "words"), MALFORMED_META)
def test_malformed_list(structured, data, reply, words):
    got, text = refusal(structured, LIST_META, data)
    assert got == reply
    assert words in text


def test_too_long_a_set_clears_the_selection(structured):
    replies(structured, SET_META, meta_request(b"vol", BASE))
    answered = answer_excess(structured, SET_META, LONGEST_META_CONTEXT_REQUEST + 1)
    ((reply, text),) = parse_replies(SET_META, answered.replies)
    assert (reply, text) == (
        ERR_TOO_BIG,
        b"SET_META_CONTEXT: 65537 bytes of data are more than this server takes",
    )
    assert structured.selection is None


def test_set_needs_structured_replies(haggling):
    assert refusal(haggling, SET_META, meta_request(b"vol", BASE)) == (
        ERR_INVALID,
        "SET_META_CONTEXT: needs STRUCTURED_REPLY first",
    )
    assert haggling.selection is None


def test_as_many_queries_as_allowed(structured):
    request = meta_request(b"vol", *[b"q" * 200] * (MAX_QUERIES - 1), BASE)
    assert len(request) <= LONGEST_META_CONTEXT_REQUEST
    assert replies(structured, SET_META, request) == [(META_CONTEXT, b"\0\0\0\0" + BASE), DONE]


# Too much data, and options we do not have


@pytest.mark.parametrize(
    ("option", "reply", "words"),
    [
        (LIST, ERR_INVALID, "LIST takes no data, but 70000 bytes came with it"),
        (STRUCTURED, ERR_INVALID, "STRUCTURED_REPLY takes no data, but 70000"),
        (INFO_, ERR_TOO_BIG, "INFO: 70000 bytes of data"),
        (GO, ERR_TOO_BIG, "GO: 70000 bytes of data"),
        (LIST_META, ERR_TOO_BIG, "LIST_META_CONTEXT: 70000 bytes"),
        (SET_META, ERR_TOO_BIG, "SET_META_CONTEXT: 70000 bytes"),
        (STARTTLS, ERR_UNSUP, "STARTTLS is not supported"),
        (PEEK, ERR_UNSUP, "PEEK_EXPORT is not supported"),
        (EXTENDED, ERR_UNSUP, "EXTENDED_HEADERS is not supported"),
        (77, ERR_UNSUP, "option 77 is not supported"),
        (0xFFFFFFFF, ERR_UNSUP, "option 4294967295 is not supported"),
    ],
)
def test_excess(haggling, option, reply, words):
    assert handler_of(option).longest < 70000
    answered = answer_excess(haggling, option, 70000)
    assert answered.outcome is None
    ((got, text),) = parse_replies(option, answered.replies)
    assert got == reply
    assert words in text.decode()
    assert not haggling.structured_replies


@pytest.mark.parametrize("option", [0, PEEK, STARTTLS, EXTENDED, 77])
def test_unknown_without_data(haggling, option):
    assert refusal(haggling, option, b"") == (
        ERR_UNSUP,
        f"{option_name(option)} is not supported",
    )


def test_option_names():
    assert [option_name(option) for option in (0, 1, 11, 12)] == [
        "option 0",
        "EXPORT_NAME",
        "EXTENDED_HEADERS",
        "option 12",
    ]


@given(option=st.sampled_from(sorted(OPTION_HANDLERS)), data=st.data(), structured=st.booleans())
def test_any_data_is_answered(option, data, structured):
    """Any data gives whole replies of which exactly the last one is final, or an outcome."""
    haggling = Haggling({b"vol": VOL, b"": PLAIN}, structured_replies=structured)
    text = st.sampled_from([b"vol", b"", b"base:allocation", b"base:"]) | st.binary(max_size=40)
    payload = data.draw(
        st.one_of(
            st.binary(max_size=200),
            st.builds(info_request, text, *[st.integers(0, 5)] * 2),
            st.builds(meta_request, text, text, text),
            st.builds(
                lambda request, cut: request[:cut],
                st.builds(meta_request, text, text),
                st.integers(0, 60),
            ),
        )
    )
    answered = answer(haggling, option, payload)
    if option == Option.EXPORT_NAME:
        assert answered.outcome is not None
        return
    *before, last = parse_replies(option, answered.replies)
    assert all(reply in (SERVER, INFO, META_CONTEXT) for reply, _ in before)
    assert last[0] == ACK or last[0] >= ERROR
    assert last[1].decode().isprintable()
    assert (answered.outcome is None) == (option not in (GO, ABORT) or last[0] >= ERROR)
