"""Serve an image from a program of one's own, until so many clients have been here.

usage: serve_some.py IMAGE SOCKET CLIENTS

Prints the URI, then a line of statistics a second, and ends by itself when so many clients have
come and all have gone, or in order by Ctrl-C or SIGTERM. Everything runs in the trio nursery of
`main`: whatever goes wrong in one task ends the others, the server finishes what is in flight,
flushes and closes the image, and the error comes out of `main`.
"""

import signal
import sys

import trio

from nbdserve.config import ImageConfig, ListenConfig, ServeConfig
from nbdserve.errors import NbdserveError
from nbdserve.server import Server, open_server


async def main(image: str, socket: str, clients: int) -> None:
    config = ServeConfig(ImageConfig(image), listen=ListenConfig(unix_path=socket))
    async with open_server(config) as server, trio.open_nursery() as nursery:
        await nursery.start(stop_by_signal, nursery.cancel_scope)
        print(server.ready.uri, flush=True)
        nursery.start_soon(report, server)
        await all_gone(server, clients)
        nursery.cancel_scope.cancel()
    # Here the image is closed, and whoever waits for the socket to go may open it.


async def report(server: Server) -> None:
    while True:
        await trio.sleep(1)
        requests = server.statistics()["exports"][""]["requests"]
        print(f"{requests['rd_operations']} reads, {requests['wr_operations']} writes", flush=True)


async def all_gone(server: Server, clients: int) -> None:
    while True:
        numbers = server.statistics()
        if numbers["accepted"] >= clients and not numbers["clients"]:
            return
        await trio.sleep(0.05)


async def stop_by_signal(
    scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()  # from here on nobody is killed by one
        async for _ in signals:
            scope.cancel()


if __name__ == "__main__":
    try:
        trio.run(main, sys.argv[1], sys.argv[2], int(sys.argv[3]))
    except* (NbdserveError, OSError) as group:
        for error in group.exceptions:
            print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(1)
