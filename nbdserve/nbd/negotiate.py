"""The handshake over a socket: an ordinary coroutine around the sans-IO state machine.

Law: whatever the client says or does not say, it ends within HANDSHAKE_TIMEOUT, and nothing more is
received before what was answered has been sent. So a client in the handshake holds what one small
receive can make us answer, and for that long at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from nbdserve.nbd.handshake import Handshake, Transmission

if TYPE_CHECKING:
    import logging
    import socket
    from collections.abc import Sequence

    from nbdserve.nbd.export import Export

__all__ = ["negotiate"]

# Seconds a client may take to negotiate; as QEMU since 9.1 (NBD_DEFAULT_HANDSHAKE_MAX_SECS).
HANDSHAKE_TIMEOUT = 10.0

# Bytes received at a time: some 60 empty options, each of which may be answered by a description of
# 4 KiB for each export.
HANDSHAKE_RECEIVE = 1024


async def negotiate(
    sock: socket.socket, exports: Sequence[Export], log: logging.Logger
) -> tuple[Transmission | None, bytes]:
    """What was agreed on, None if nothing; and what came behind the last option.

    :raises OSError: the socket is dead.
    """
    handshake = Handshake(exports)
    with trio.move_on_after(HANDSHAKE_TIMEOUT):
        await _send_all(sock, handshake.greeting())
        while handshake.outcome is None:
            await trio.lowlevel.wait_readable(sock)
            try:
                data = sock.recv(HANDSHAKE_RECEIVE)
            except BlockingIOError:
                continue
            if not data:
                return None, b""
            await _send_all(sock, handshake.receive(data))
        if isinstance(handshake.outcome, Transmission):
            return handshake.outcome, handshake.trailing
        log.info("handshake: %s", handshake.outcome.reason)
        return None, b""
    log.info("handshake: not finished after %g s", HANDSHAKE_TIMEOUT)
    return None, b""


async def _send_all(sock: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
