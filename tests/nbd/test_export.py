"""What an export tells its clients; the numbers were read off qemu-nbd 7.2."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from nbdserve.errors import ConfigError
from nbdserve.nbd.export import MAXIMUM_PAYLOAD, Export
from nbdserve.nbd.metacontext import BASE_ALLOCATION
from nbdserve.nbd.proto import TransmissionFlag


@dataclass
class FakeBackend:
    size: int = 10 << 20
    read_only: bool = False


@pytest.mark.parametrize(
    ("read_only", "multi_conn", "expected"),
    [
        (False, True, 0x0D6D),  # qemu-nbd -e 8
        (False, False, 0x0C6D),  # qemu-nbd
        (True, True, 0x050F),  # qemu-nbd -r -e 8
        (True, False, 0x040F),  # qemu-nbd -r
    ],
)
def test_transmission_flags(read_only, multi_conn, expected):
    export = Export("", FakeBackend(read_only=read_only), multi_conn=multi_conn)
    assert export.transmission_flags == expected
    assert export.flags_for(structured_replies=False) == expected
    assert export.flags_for(structured_replies=True) == expected | TransmissionFlag.SEND_DF


def test_flags_follow_the_backend():
    backend = FakeBackend()
    export = Export("", backend)
    backend.read_only = True
    assert TransmissionFlag.READ_ONLY in export.transmission_flags
    assert TransmissionFlag.SEND_TRIM not in export.transmission_flags


@pytest.mark.parametrize("size", [512, 4096, 65536, MAXIMUM_PAYLOAD])
def test_preferred_block_size(size):
    assert Export("", FakeBackend(), preferred_block_size=size).preferred_block_size == size


@pytest.mark.parametrize("size", [-4096, 0, 1, 256, 513, 4095, MAXIMUM_PAYLOAD * 2])
def test_preferred_block_size_refused(size):
    with pytest.raises(ConfigError, match=rf"'vol'.* block size {size} is not"):
        Export("vol", FakeBackend(), preferred_block_size=size)


def test_defaults_and_identity():
    backend = FakeBackend()
    export = Export("vol", backend)
    assert (export.description, export.preferred_block_size) == ("", 4096)
    assert export.contexts == (BASE_ALLOCATION,)
    assert export != Export("vol", backend)
