"""Every reply against its declaration in proto.py, and every errno against the document."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.block.node import Extent
from nbdserve.nbd import proto, replies
from nbdserve.nbd.proto import NbdError, ReplyFlag, ReplyType, StateFlag

U64 = st.integers(0, (1 << 64) - 1)
U32 = st.integers(0, (1 << 32) - 1)


@given(cookie=U64)
def test_done(cookie):
    assert replies.done(cookie, structured=False) == proto.SIMPLE_REPLY.build(
        {"error": 0, "cookie": cookie}
    )
    assert replies.done(cookie, structured=True) == proto.CHUNK.build(
        {"flags": ReplyFlag.DONE, "type": ReplyType.NONE, "cookie": cookie, "length": 0}
    )


@given(cookie=U64, error=st.sampled_from(NbdError))
def test_a_simple_error_has_no_words(cookie, error):
    assert replies.error_reply(cookie, error, "why", structured=False) == proto.SIMPLE_REPLY.build(
        {"error": error, "cookie": cookie}
    )


@given(cookie=U64, error=st.sampled_from(NbdError), message=st.text(max_size=100))
def test_a_structured_error_tells_why(cookie, error, message):
    text = message.encode()
    assert replies.error_reply(cookie, error, message, structured=True) == proto.ERROR_CHUNK.build(
        {
            "flags": ReplyFlag.DONE,
            "type": ReplyType.ERROR,
            "cookie": cookie,
            "length": 6 + len(text),
            "error": error,
            "message": text,
        }
    )


@pytest.mark.parametrize("character", ["x", "ü", "漢", "𝄞"])
@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("length", [replies.MAX_MESSAGE, 1 << 16, 1 << 18])
def test_a_long_message_is_cut_between_characters(character, shift, length):
    message = "-" * shift + character * length
    reply = replies.error_reply(1, NbdError.EIO, message, structured=True)
    chunk = proto.ERROR_CHUNK.parse(reply)
    assert len(reply) == proto.CHUNK.sizeof() + chunk.length
    assert chunk.length == 6 + len(chunk.message)
    assert replies.MAX_MESSAGE - 3 <= len(chunk.message) <= replies.MAX_MESSAGE
    assert message.startswith(chunk.message.decode())


def test_a_message_that_cannot_be_encoded():
    """File names that are not UTF-8 come as lone surrogates."""
    reply = replies.error_reply(1, NbdError.EIO, "disk\udcff.img", structured=True)
    assert proto.ERROR_CHUNK.parse(reply).message == b"disk?.img"


FLAGS = {
    (True, False): 0,
    (True, True): StateFlag.ZERO,
    (False, True): StateFlag.HOLE | StateFlag.ZERO,
    (False, False): StateFlag.HOLE,
}


@given(
    cookie=U64,
    context_id=U32,
    last=st.booleans(),
    extents=st.lists(st.builds(Extent, U32, st.booleans(), st.booleans()), max_size=10),
)
def test_block_status(cookie, context_id, last, extents):
    assert replies.block_status(
        cookie, context_id, iter(extents), last=last
    ) == proto.BLOCK_STATUS_CHUNK.build(
        {
            "flags": ReplyFlag.DONE if last else 0,
            "type": ReplyType.BLOCK_STATUS,
            "cookie": cookie,
            "length": 4 + 8 * len(extents),
            "context_id": context_id,
            "extents": [
                {"length": extent.length, "status": FLAGS[extent.data, extent.zero]}
                for extent in extents
            ],
        }
    )


# What the document lists under "Error values", and what nbd-server and qemu-nbd fold into it.
EXPECTED = {
    "EPERM": 1, "EROFS": 1, "EACCES": 1, "EIO": 5, "ENOMEM": 12, "EINVAL": 22,
    "ENOSPC": 28, "EDQUOT": 28, "EFBIG": 28, "EOVERFLOW": 75, "EOPNOTSUPP": 95,
    "ENOTSUP": 95, "ESHUTDOWN": 108,
}  # fmt: skip


@pytest.mark.parametrize("name", errno.errorcode.values())
def test_every_errno(name):
    """What the table does not know is our fault and not the client's: EIO, never EINVAL."""
    assert replies.nbd_error(getattr(errno, name)) == EXPECTED.get(name, 5)


@pytest.mark.parametrize("number", [None, 0, -1, 4711])
def test_an_error_without_errno_is_an_error(number):
    assert replies.nbd_error(number) == NbdError.EIO


def test_every_error_value_can_be_reached():
    assert set(replies.ERRNO_TO_NBD.values()) == set(NbdError)
