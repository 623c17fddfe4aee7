"""Run only by who wants to see how a failure is reported: it fails."""

from ledger import Device


def test_that_fails(nbd_server):
    server = nbd_server(size="1M")
    with Device(server.socket) as device:
        device.write(0, b"x" * 512)
    raise AssertionError("so that there is a report")
