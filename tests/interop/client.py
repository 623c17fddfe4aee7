"""client.py ACTION URI ARGUMENTS...: a client of libnbd, run by the system's Python.

That Python has the module `nbd`, the virtual environment has not; so tests run this file as a
program (interop.tools.client) and never import it.  An action that finds something wrong dies
of its AssertionError, and the test shows it.
"""

# A test's other half: as little annotated as tests are, and seen by no mypy.
# ruff: noqa: ANN001, ANN201, ANN202

import errno
import json
import os
import random
import select
import sys

import nbd

KIB, MIB = 1 << 10, 1 << 20
SECTOR = 512

ZERO_FLAGS = {
    "zero": 0,
    "zero-no-hole": nbd.CMD_FLAG_NO_HOLE,
    "zero-fua": nbd.CMD_FLAG_FUA,
}


def connected(uri, *, structured=True, prepare=None):
    """A handle in transmission, with base:allocation."""
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.set_request_structured_replies(structured)
    if prepare is not None:
        prepare(handle)
    handle.connect_uri(uri)
    assert handle.get_structured_replies_negotiated() == structured
    return handle


def settle(handles):
    """Drive several connections at once until no request of theirs is in flight."""
    while True:
        waiting = {h.aio_get_fd(): h for h in handles if h.aio_in_flight()}
        if not waiting:
            return
        poll = select.poll()
        for fd, handle in waiting.items():
            wanted = handle.aio_get_direction()
            poll.register(fd, (select.POLLIN if wanted & nbd.AIO_DIRECTION_READ else 0)
                          | (select.POLLOUT if wanted & nbd.AIO_DIRECTION_WRITE else 0))
        for fd, events in poll.poll(20_000):
            if events & select.POLLOUT:
                waiting[fd].aio_notify_write()
            else:
                waiting[fd].aio_notify_read()


def error_of(call):
    """The errno a call fails with, 0 if it does not; -1 for a failure without one."""
    try:
        call()
    except nbd.Error as error:
        return error.errnum or -1
    return 0


class Errors(list):
    """Collects the errors of requests in flight; `done` is their completion callback."""

    def done(self, error):
        if error.value:
            self.append(errno.errorcode[error.value])
        return 1


# --- the same disk, here and there ----------------------------------------------------------------


def apply(uri, operations, model):
    """Do a list of operations (JSON: [kind, offset, length, seed]) to an export and to a raw file
    that holds the same disk.

    What a trim leaves is the server's choice, within limits: what was there, or zeroes.
    """
    handle = connected(uri)
    with open(operations) as file:
        todo = json.load(file)
    disk = os.open(model, os.O_RDWR)
    for operation in todo:
        kind, offset, length, seed = operation
        before = os.pread(disk, length, offset)
        after = before
        if kind in ("write", "write-fua"):
            after = random.Random(seed).randbytes(length)
            handle.pwrite(after, offset, nbd.CMD_FLAG_FUA if kind == "write-fua" else 0)
        elif kind in ZERO_FLAGS:
            after = bytes(length)
            handle.zero(length, offset, ZERO_FLAGS[kind])
        elif kind == "trim":
            handle.trim(length, offset)
            after = handle.pread(length, offset)
            assert all(new in (old, 0) for old, new in zip(before, after, strict=True)), operation
        elif kind == "read":
            assert handle.pread(length, offset) == before, operation
        else:
            handle.flush()
        os.pwrite(disk, after, offset)
    handle.shutdown()


def read(uri, model, structured, connections=4):
    """Read of every length, many in flight on each connection, each byte as in the raw file."""
    handles = [connected(uri, structured=structured == "structured")
               for _ in range(int(connections))]
    with open(model, "rb") as file:
        disk = file.read()
    rng = random.Random(structured)
    errors, expected = Errors(), []
    for handle in handles:
        for length in [1, 7, 511, 513, 4 * KIB, 64 * KIB, 256 * KIB, MIB] * 12:
            offset = rng.randrange(len(disk) - length + 1)
            buffer = nbd.Buffer(length)
            handle.aio_pread(buffer, offset, errors.done)
            expected.append((buffer, offset))
    settle(handles)
    assert not errors, errors
    for buffer, offset in expected:
        data = buffer.to_bytearray()
        assert data == disk[offset:offset + len(data)], (offset, len(data))
    for handle in handles:
        handle.shutdown()


def overlap(uri, connections, rounds):
    """Requests in flight over overlapping ranges, over several connections; every sector of the
    disk is of one byte at first, and stays so.

    A read in flight finds in each sector what was there before the round or what some request
    left.  After the round every sector is what some request left, or, if at most trims touched
    it, what it was before; and nothing else.  That is read over another connection.
    """
    handles = [connected(uri) for _ in range(int(connections))]
    reader = connected(uri)
    rng = random.Random(connections)
    size = 2 * MIB
    before = bytes(reader.pread(size, 0)[::SECTOR])
    for _ in range(int(rounds)):
        allowed = [set() for _ in before]
        replaced, reads = set(), []
        errors = Errors()
        for number in range(1, 1 + 30 * len(handles)):
            handle = handles[number % len(handles)]
            nb_sectors = rng.choice((1, 1, 2, 8, 9, 100, 128, 300))
            first = rng.randrange(len(before) - nb_sectors + 1)
            kind = rng.choices(("write", "zero", "trim", "read"), (8, 2, 2, 3))[0]
            if kind == "read":
                reads.append((first, nbd.Buffer(nb_sectors * SECTOR)))
                handle.aio_pread(reads[-1][1], first * SECTOR, errors.done)
                continue
            _start(handle, kind, first, nb_sectors, number % 251, errors, rng)
            touched = range(first, first + nb_sectors)
            for sector in touched:
                allowed[sector].add(number % 251 if kind == "write" else 0)
            if kind != "trim":
                replaced.update(touched)
        settle(handles)
        assert not errors, errors
        for first, buffer in reads:
            # Of a write in flight the page cache shows what has been copied, byte by byte.
            data = buffer.to_bytearray()
            for sector, start in enumerate(range(0, len(data), SECTOR), first):
                found = set(data[start : start + SECTOR])
                assert found <= allowed[sector] | {before[sector]}, (sector, found)
        rng.choice(handles).flush()
        after = _uniform(reader.pread(size, 0))
        for sector, found in enumerate(after):
            old = set() if sector in replaced else {before[sector]}
            assert found in allowed[sector] | old, (sector, found)
        before = after
    for handle in [reader, *handles]:
        handle.shutdown()


def neighbours(uri, model, connections=4):
    """Writes and zeroes side by side, in flight together in any order: pieces of any length that
    share their first and last sectors and clusters, of the server's file too, with others and lose
    none of them.  The same goes to a raw file that holds the same disk."""
    handles = [connected(uri) for _ in range(int(connections))]
    size = handles[0].get_size()
    rng = random.Random(size)
    ends = sorted(rng.sample(range(1, size), min(size - 1, 600)))
    pieces = list(zip([0, *ends], [*ends, size], strict=True))
    rng.shuffle(pieces)
    errors = Errors()
    with open(model, "r+b") as disk:
        for number, (start, end) in enumerate(pieces):
            kind = rng.choice(("write", "write", *ZERO_FLAGS))
            data = rng.randbytes(end - start) if kind == "write" else bytes(end - start)
            disk.seek(start)
            disk.write(data)
            handle = handles[number % len(handles)]
            if kind == "write":
                buffer = nbd.Buffer.from_bytearray(bytearray(data))
                handle.aio_pwrite(buffer, start, errors.done)
            else:
                handle.aio_zero(end - start, start, errors.done, ZERO_FLAGS[kind])
    settle(handles)
    assert not errors, errors
    for handle in handles:
        handle.shutdown()


def _uniform(data):
    """The one byte that each sector consists of."""
    values = bytes(data[::SECTOR])
    assert data == b"".join(bytes([value]) * SECTOR for value in values), "torn sectors"
    return values


def _start(handle, kind, first, nb_sectors, number, errors, rng):
    offset, length = first * SECTOR, nb_sectors * SECTOR
    fua = nbd.CMD_FLAG_FUA if rng.random() < 0.03 else 0
    if kind == "write":
        buffer = nbd.Buffer.from_bytearray(bytearray([number]) * length)
        handle.aio_pwrite(buffer, offset, errors.done, fua)
    elif kind == "zero":
        no_hole = nbd.CMD_FLAG_NO_HOLE if rng.random() < 0.5 else 0
        handle.aio_zero(length, offset, errors.done, fua | no_hole)
    else:
        handle.aio_trim(length, offset, errors.done, fua)


# --- single requests ------------------------------------------------------------------------------


def sizes(uri, structured):
    """The largest request and the smallest, written and read back."""
    handle = connected(uri, structured=structured == "structured")
    for offset, length in ((3 * MIB + 17, 64 * MIB), (0, 64 * MIB), (12345, 1)):
        data = random.Random(length).randbytes(length)
        handle.pwrite(data, offset)
        assert handle.pread(length, offset) == data
    assert handle.pread(64 * MIB, handle.get_size() - 64 * MIB)
    handle.shutdown()


def pieces_of(handle, offset, length, flags=0):
    """The chunks of a read, as (offset, data) in the order of their offsets."""
    pieces = []

    def note(data, offset, kind, error):
        assert not error.value
        pieces.append((offset, bytes(data)))  # libnbd makes zeroes of a hole

    handle.pread_structured(length, offset, note, flags)
    return sorted(pieces)


def checkered(uri, model):
    """One long read over very many pieces of data and zeroes, before its tables are in memory
    and after; with DF it comes in one chunk."""
    handle = connected(uri)
    with open(model, "rb") as file:
        disk = file.read()
    assert handle.pread(len(disk), 0) == disk
    assert handle.pread(len(disk), 0) == disk
    assert b"".join(data for _, data in pieces_of(handle, 0, len(disk))) == disk
    assert pieces_of(handle, 0, len(disk), nbd.CMD_FLAG_DF) == [(0, disk)]
    handle.shutdown()


def single(uri, kind, offset, length, then=""):
    """One request, and a flush if `then` says so."""
    handle = connected(uri)
    offset, length = int(offset), int(length)
    if kind == "trim":
        handle.trim(length, offset)
    elif kind == "write-zeroes":
        handle.pwrite(bytes(length), offset)
    else:
        handle.zero(length, offset, ZERO_FLAGS[kind])
    if then == "flush":
        handle.flush()
    # No disconnect: neither side is to take the end for a flush.
    print(flush=True)
    sys.stdin.read()


def requests(uri):
    """What the flags promise, on an empty disk of 8 MiB."""
    handle = connected(uri)
    handle.pwrite(b"a" * MIB, 0, nbd.CMD_FLAG_FUA)
    handle.pwrite(b"b" * 1000, 2 * MIB + 100)
    handle.flush()
    handle.cache(2 * MIB, 512 * KIB)
    handle.zero(512 * KIB, 512 * KIB, nbd.CMD_FLAG_FAST_ZERO)
    assert handle.pread(MIB, 0) == b"a" * (512 * KIB) + bytes(512 * KIB)
    # Only a part of a cluster of data: zeroes would have to be written, and fast means not.
    unsupported = error_of(lambda: handle.zero(100, 100, nbd.CMD_FLAG_FAST_ZERO))
    assert unsupported == errno.EOPNOTSUPP, unsupported
    assert handle.pread(512, 0) == b"a" * 512
    handle.trim(512 * KIB, 0, nbd.CMD_FLAG_FUA)
    handle.pwrite(b"c" * 4096, MIB)
    handle.zero(4096, MIB, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    assert handle.pread(4096, MIB) == bytes(4096)
    start = 2 * MIB - 1000
    expected = bytes(1100) + b"b" * 1000
    assert pieces_of(handle, start, 2100, nbd.CMD_FLAG_DF) == [(start, expected)]
    handle.shutdown()


def status(uri):
    """BLOCK_STATUS, and with REQ_ONE one extent that does not reach past the request."""
    handle = connected(uri)
    handle.pwrite(b"a" * MIB, 0)
    handle.pwrite(b"b" * MIB, 2 * MIB)
    handle.flush()

    def extents(length, offset, flags=0):
        found = []

        def note(context, start, entries, error):
            assert (context, start, error.value) == (nbd.CONTEXT_BASE_ALLOCATION, offset, 0)
            found.extend(zip(entries[::2], entries[1::2], strict=True))

        handle.block_status(length, offset, note, flags)
        return found

    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    assert extents(8 * MIB, 0) == [(MIB, 0), (MIB, hole), (MIB, 0), (5 * MIB, hole)]
    assert extents(8 * MIB, 0, nbd.CMD_FLAG_REQ_ONE) == [(MIB, 0)]
    assert extents(4 * KIB, MIB - KIB, nbd.CMD_FLAG_REQ_ONE) == [(KIB, 0)]
    assert extents(4 * KIB, MIB + 7, nbd.CMD_FLAG_REQ_ONE) == [(4 * KIB, hole)]
    assert extents(1, 2 * MIB) == [(1, 0)]
    handle.shutdown()


def refused(uri, read_only):
    """Requests that the protocol document wants refused, sent although libnbd knows better; each
    costs the client its request and nothing else."""
    handle = connected(uri, prepare=lambda handle: handle.set_strict_mode(0))
    size = handle.get_size()
    past_end = {
        "read": (lambda: handle.pread(512, size), errno.EINVAL),
        "read over the end": (lambda: handle.pread(512, size - 511), errno.EINVAL),
        "read far away": (lambda: handle.pread(512, (1 << 63) - 512), errno.EINVAL),
        "trim": (lambda: handle.trim(512, size), errno.EINVAL),
        "cache": (lambda: handle.cache(512, size), errno.EINVAL),
        "status": (lambda: handle.block_status(512, size, lambda *_: 0), errno.EINVAL),
        "write": (lambda: handle.pwrite(b"x" * 512, size), errno.ENOSPC),
        "write over the end": (lambda: handle.pwrite(b"x" * 512, size - 1), errno.ENOSPC),
        "zero": (lambda: handle.zero(512, size), errno.ENOSPC),
    }
    writes = {
        "write": (lambda: handle.pwrite(b"x" * 512, 0), errno.EPERM),
        "zero": (lambda: handle.zero(512, 0), errno.EPERM),
        "trim": (lambda: handle.trim(512, 0), errno.EPERM),
    }
    for name, (call, expected) in (writes if read_only == "read-only" else past_end).items():
        found = error_of(call)
        assert found == expected, (name, errno.errorcode.get(found), errno.errorcode[expected])
        handle.pread(512, 0)
    handle.shutdown()


# --- ways to connect ------------------------------------------------------------------------------


def export_name(uri, size):
    """NBD_OPT_EXPORT_NAME: clients that do not speak fixed newstyle."""
    for flags in (0, nbd.HANDSHAKE_FLAG_NO_ZEROES):
        handle = nbd.NBD()
        handle.set_handshake_flags(flags)
        handle.connect_uri(uri)
        assert handle.get_protocol() == "newstyle", handle.get_protocol()
        assert handle.get_size() == int(size)
        handle.pwrite(b"old" * 1000, 1)
        assert handle.pread(3000, 1) == b"old" * 1000
        handle.shutdown()


def options(uri, name, description, size):
    """Negotiation step by step; every answer leaves the client free to ask on."""
    def ask(handle):
        handle.set_opt_mode(True)

    handle = nbd.NBD()
    ask(handle)
    handle.connect_uri(uri)
    listed = []
    assert handle.opt_list(lambda *export: listed.append(export) or 0) == 1
    assert listed == [(name, description)], listed
    handle.set_export_name("no such export")
    assert error_of(handle.opt_info) == errno.ENOENT
    assert error_of(handle.opt_go) == errno.ENOENT
    handle.set_export_name(name)
    contexts = []
    handle.add_meta_context("base:")
    handle.opt_list_meta_context(lambda context: contexts.append(context) or 0)
    assert contexts == [nbd.CONTEXT_BASE_ALLOCATION], contexts
    handle.clear_meta_contexts()
    handle.add_meta_context("no:such-context")
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.opt_info()
    assert handle.get_size() == int(size)
    handle.opt_go()
    assert handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    assert not handle.can_meta_context("no:such-context")
    assert len(handle.pread(512, 0)) == 512
    handle.shutdown()

    leaving = nbd.NBD()
    ask(leaving)
    leaving.connect_uri(uri)
    leaving.opt_abort()


def unknown_export(uri):
    """Both ways to ask for an export that is not there."""
    fixed = nbd.NBD()
    assert error_of(lambda: fixed.connect_uri(uri)) == errno.ENOENT
    old = nbd.NBD()
    old.set_handshake_flags(0)
    assert error_of(lambda: old.connect_uri(uri))  # the answer is a closed connection


def many(uri, connections):
    """Many clients at once, each with requests in flight."""
    handles = [connected(uri) for _ in range(int(connections))]
    errors = Errors()
    for number, handle in enumerate(handles):
        data = bytearray([number + 1]) * (16 * KIB)
        for part in range(4):
            handle.aio_pwrite(nbd.Buffer.from_bytearray(data),
                              number * 64 * KIB + part * 16 * KIB, errors.done)
    settle(handles)
    found = []
    for number in range(len(handles)):
        found.append(nbd.Buffer(64 * KIB))
        handles[number - 1].aio_pread(found[-1], number * 64 * KIB, errors.done)
    settle(handles)
    assert not errors, errors
    for number, buffer in enumerate(found):
        assert buffer.to_bytearray() == bytes([number + 1]) * (64 * KIB), number
    for handle in handles:
        handle.shutdown()


def every(uri):
    """Requests of every kind, in flight together and one by one; test_statistics.py knows their
    numbers."""
    handle = connected(uri)
    errors = Errors()
    small = nbd.Buffer.from_bytearray(bytearray(b"s" * 4096))
    for number in range(3):
        handle.aio_pwrite(small, number * 4096, errors.done)
    settle([handle])
    handle.flush()
    for number in range(3):
        handle.pwrite(b"m" * 64 * KIB, MIB + number * 64 * KIB, nbd.CMD_FLAG_FUA)
    handle.pwrite(b"l" * 2 * MIB, 8 * MIB)
    for number in range(4):
        handle.aio_pread(nbd.Buffer(10_000), number * 5000, errors.done)
    settle([handle])
    assert not errors, errors
    handle.pread(MIB, 7 * MIB + 512 * KIB)  # data and a hole
    handle.zero(128 * KIB, 16 * MIB)
    handle.zero(128 * KIB, MIB, nbd.CMD_FLAG_NO_HOLE)
    handle.trim(MIB, 8 * MIB)
    handle.block_status(8 * MIB, 4 * MIB, lambda *_: 0)
    handle.cache(64 * KIB, 0)
    handle.set_strict_mode(0)
    assert error_of(lambda: handle.pread(2, handle.get_size() - 1)) == errno.EINVAL
    handle.flush()
    handle.flush()
    handle.shutdown()


ACTIONS = {
    action.__name__: action
    for action in (apply, read, overlap, neighbours, sizes, checkered, single, requests, status,
                   refused, export_name, options, unknown_export, many, every)
}

if __name__ == "__main__":
    ACTIONS[sys.argv[1]](*sys.argv[2:])
