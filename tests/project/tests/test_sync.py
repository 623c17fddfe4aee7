"""Synchronous tests: pytest and nothing else."""

import errno

import pytest
from ledger import Device, DeviceError, Ledger

from nbdserve.testing import Fault, offsets, read_image


def test_entries_are_there_after_a_restart(nbd_server, qcow2_image):
    image = qcow2_image("1M")
    server = nbd_server(image)
    with Device(server.socket) as device:
        Ledger(device).append("one")
    server.stop()
    server = nbd_server(qcow2_image(backing=image), cache="none")
    with Device(server.socket) as device:
        ledger = Ledger(device)
        ledger.append("two")
        assert ledger.entries == ["one", "two"]
    server.stop()
    assert b"LEDG" in read_image(image)


def test_what_is_on_the_disk_is_no_ledger(nbd_server):
    server = nbd_server(content={0: offsets("64k")})
    with Device(server.socket) as device:
        assert Ledger(device).entries == []
        assert device.read(4096, 8) == (4096).to_bytes(8, "big")
    assert server.statistics()["accepted"] == 1


def test_a_full_disk(nbd_server):
    server = nbd_server(size="1M", room="64k")
    with Device(server.socket) as device:
        ledger = Ledger(device)
        for number in range(16):
            ledger.append(f"entry {number}")
        with pytest.raises(DeviceError) as caught:
            ledger.append("one too many")
        assert caught.value.errno == errno.ENOSPC
        server.faults.room = None
        ledger.append("there is room again")
        assert Ledger(device).entries[-1] == "there is room again"


def test_an_error_that_comes_later(nbd_server):
    server = nbd_server(size="1M")
    with Device(server.socket) as device:
        ledger = Ledger(device)
        ledger.append("good")
        rule = server.faults.add(Fault(ops="flush", error="EIO"))
        with pytest.raises(DeviceError):
            ledger.append("bad")
        server.faults.remove(rule)
        ledger.append("better")


@pytest.mark.parametrize("process", [False, True])
def test_no_entry_is_lost_in_a_power_cut(nbd_server, process):
    server = nbd_server(size="1M", power_cut="disk", process=process)
    with Device(server.socket) as device:
        ledger = Ledger(device)
        for entry in ("one", "two", "three"):
            ledger.append(entry)
            server.mark(entry)
    for outcome in [server.cut(), *server.all_cuts(12)]:
        with Device(nbd_server(outcome).socket) as device:
            entries = Ledger(device).entries
            assert entries[: len(outcome.marks)] == list(outcome.marks)


def test_a_ledger_that_does_not_flush_is_found_out(nbd_server):
    server = nbd_server(size="1M", power_cut="file", cache="writeback")
    with Device(server.socket) as device:
        ledger = Ledger(device, durable=False)
        ledger.append("one")
        server.mark("one")
    outcome = server.cut()
    with Device(nbd_server(outcome).socket) as device:
        assert outcome.marks == ("one",)
        assert Ledger(device).entries == []


def test_the_server_is_killed(nbd_server, qcow2_image):
    image = qcow2_image("1M")
    server = nbd_server(image, process=True)
    with Device(server.socket) as device:
        Ledger(device).append("one")
        server.kill()
    with Device(nbd_server(image).socket) as device:
        assert Ledger(device).entries == ["one"]
