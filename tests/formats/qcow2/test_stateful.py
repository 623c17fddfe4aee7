"""Random programs against the qcow2 node, held against a plain bytearray.

A program is a list of batches; the requests of a batch are in flight together. After each batch
the whole disk is compared, byte for byte; after each program the image is closed, audited by
`qemu-img check` (no error, no leak) and compared with the model by `qemu-img compare`.

Two kinds of programs: on real files through graph.py, as a server opens them; and on a file in
memory that keeps requests waiting, where the order of everything follows from hypothesis' choices,
so that what fails shrinks. NBDSERVE_SOAK=1 runs far more of both.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import tempfile
from unittest import mock

import pytest
import trio
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

import peers
from nbdserve.config import ImageConfig
from nbdserve.formats.qcow2 import open as open_module
from nbdserve.formats.qcow2.create import create_image
from nbdserve.formats.qcow2.node import CacheSizes
from nbdserve.graph import open_backend
from qcow2_model import (
    Disk,
    MemoryFile,
    Request,
    assert_sound,
    guest_bytes,
    new_image,
    open_memory,
    pattern,
    run_batch,
)

SOAK = os.environ.get("NBDSERVE_SOAK") == "1"
K = 1024
M = 1024 * K

pytestmark = pytest.mark.peer("qemu-img")

# In memory if that can be: what is tested is not the disk.
FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

DEFAULT_CACHE = CacheSizes()


def profile(examples: int):
    """Settings for `examples` programs, fifty times as many in a soak."""
    return settings(
        max_examples=examples * 50 if SOAK else examples,
        deadline=None,
        derandomize=not SOAK,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        print_blob=True,
    )


@dataclasses.dataclass(frozen=True)
class Kind:
    """An image to be made."""

    version: int
    cluster_size: int
    refcount_bits: int
    size: int
    backing: str  # none, raw, qcow2
    backing_size: int
    compressed: bool
    tables: int | None  # how many metadata tables each cache holds; None: the default
    data_file: str = ""  # external, raw

    @property
    def cache_sizes(self) -> CacheSizes:
        if self.tables is None:
            return DEFAULT_CACHE
        return CacheSizes(*(2 * [self.tables * (self.cluster_size + 512)]))

    @property
    def discards(self) -> bool:
        return self.version == 3 or self.backing == "none"


@st.composite
def kinds(
    draw,
    cluster_sizes,
    backings=("none", "raw", "qcow2"),
    compressed=(False, True),
    data_files=("",),
):
    data_file = draw(st.sampled_from(data_files))
    version = 3 if data_file else draw(st.sampled_from((3, 3, 2)))
    cluster_size = draw(st.sampled_from(cluster_sizes))
    refcount_bits = draw(st.sampled_from((16, 64, 1, 2, 4, 8, 32))) if version == 3 else 16
    most = {512: 200 * K, 4 * K: 600 * K, 64 * K: M, 2 * M: 5 * M}[cluster_size]
    size = draw(st.integers(1, most // 512)) * 512
    backing = draw(st.sampled_from(("none",) if data_file == "raw" else backings))
    backing_size = draw(st.integers(1, most // 512)) * 512 if backing != "none" else 0
    return Kind(
        version,
        cluster_size,
        refcount_bits,
        size,
        backing,
        backing_size,
        compressed=backing != "raw" and not data_file and draw(st.sampled_from(compressed)),
        tables=draw(st.sampled_from((1, 3, None))),
        data_file=data_file,
    )


@st.composite
def requests(draw, kind: Kind):
    cluster = kind.cluster_size
    what = draw(
        st.sampled_from(
            ("write", "write", "write", "discard", "zero", "read", "status", "flush")
        )
    )
    if what == "flush":
        return Request("flush")
    last = (kind.size - 1) // cluster
    number = draw(st.integers(0, min(last, 3)) | st.integers(0, last))
    within = draw(st.sampled_from((0, 0, 1, 511, 512, cluster - 1)) | st.integers(0, cluster - 1))
    offset = min(number * cluster + within, kind.size - 1)
    length = draw(
        st.sampled_from((cluster, 1, 512, cluster - 1, cluster + 1, 2 * cluster, 3 * cluster, M))
        | st.integers(1, 6 * cluster)
    )
    return Request(
        what,
        offset,
        min(length, kind.size - offset),
        draw(st.integers(0, 2**16)) if what == "write" else 0,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from((0, 0, 1, 4, 20))),
    )


@st.composite
def programs(draw, kind: Kind, most: int = 14):
    """Batches; an empty one means: close the image and open it again."""
    size = st.sampled_from((1, 1, 2, 3, 5))
    batch = size.flatmap(lambda n: st.lists(requests(kind), min_size=n, max_size=n))
    return draw(st.lists(batch | st.just([]), min_size=1, max_size=most))


def old_content(kind: Kind, size: int) -> bytes:
    """What lies in a backing file or compressed image: data and zeroes, a third of each cluster
    compressible."""
    chooser = random.Random(kind.size)
    content = bytearray(size)
    for start in range(0, size, kind.cluster_size):
        if chooser.random() < 0.7:
            end = min(start + kind.cluster_size, size)
            content[start:end] = pattern(start, (end - start) // 3).ljust(end - start, b"\x5a")
    return bytes(content)


def make(kind: Kind, folder: pathlib.Path) -> tuple[pathlib.Path, bytes]:
    """The image file, and what it reads as."""
    path = folder / "disk.qcow2"
    options = {"version": kind.version, "cluster_size": kind.cluster_size}
    compat = f"compat={'1.1' if kind.version == 3 else '0.10'},cluster_size={kind.cluster_size}"
    if kind.data_file:
        return path, make_with_data_file(kind, path, compat)
    if kind.backing == "none":
        if not kind.compressed:
            create_image(str(path), kind.size, refcount_bits=kind.refcount_bits, **options)
            return path, bytes(kind.size)
        content = old_content(kind, kind.size)
        raw = folder / "old.raw"
        raw.write_bytes(content)
        options = f"{compat},refcount_bits={kind.refcount_bits}"
        peers.qemu_img(
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path
        )
        return path, content
    content = old_content(kind, kind.backing_size)
    base = folder / "base"
    if kind.backing == "raw":
        base.write_bytes(content)
    else:
        raw = folder / "base.raw"
        raw.write_bytes(content)
        flags = ["-c"] if kind.compressed else []
        peers.qemu_img("convert", *flags, "-f", "raw", "-O", "qcow2", "-o", compat, raw, base)
    create_image(
        str(path),
        kind.size,
        refcount_bits=kind.refcount_bits,
        backing_file="base",
        backing_format=kind.backing,
        **options,
    )
    return path, content[: kind.size].ljust(kind.size, b"\0")


def make_with_data_file(kind: Kind, path: pathlib.Path, options: str) -> bytes:
    """By QEMU, as are the first writes; returns what it reads as."""
    content = old_content(kind, kind.backing_size) if kind.backing != "none" else b""
    raw_file, base = path.with_name("raw"), path.with_name("base")
    backing = [] if kind.backing == "none" else ["-b", base, "-F", kind.backing]
    if backing:
        raw_file.write_bytes(content)
        peers.qemu_img("convert", "-f", "raw", "-O", kind.backing, raw_file, base)
    is_raw = "on" if kind.data_file == "raw" else "off"
    options += f",refcount_bits={kind.refcount_bits},data_file={path}.data,data_file_raw={is_raw}"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", options, *backing, path, str(kind.size))
    disk = bytearray(content[: kind.size].ljust(kind.size, b"\0"))
    commands = []
    for number, (what, zeroes) in enumerate(PREPARED):
        start, length = number * kind.cluster_size, min(kind.cluster_size, 64 * K)
        if start + length <= kind.size:
            commands += [f"write -P 7 {start} {length}", what.format(start=start, length=length)]
            disk[start : start + length] = bytes(length) if zeroes else b"\7" * length
    if commands:
        peers.qemu_io(path, *commands, options=("-f", "qcow2", "-d", "unmap"))
    return bytes(disk)


# What QEMU does to the first clusters after writing to them, and whether they are zeroes then.
PREPARED = [
    ("flush", False),
    ("write -z {start} {length}", True),
    ("write -z -u {start} {length}", True),
    ("flush", False),
]


def sessions(program):
    """The program cut at its empty batches."""
    session = []
    for batch in program:
        if batch:
            session.append(batch)
        else:
            yield session
            session = []
    yield session


def judge(path: pathlib.Path, disk: Disk) -> None:
    """What QEMU says of a closed image."""
    peers.qemu_img_check(path)
    raw = path.with_name("wanted.raw")
    raw.write_bytes(disk.content)
    done = peers.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, raw)
    assert done.stdout == "Images are identical.\n"


async def run_on_file(path: pathlib.Path, kind: Kind, disk: Disk, session) -> None:
    async with open_backend(ImageConfig(str(path), format="qcow2")) as backend:
        for batch in session:
            await run_batch(backend, disk, batch)


def run_program(kind: Kind, program) -> None:
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir=FOLDER)))
        stack.enter_context(
            mock.patch.object(open_module, "CacheSizes", return_value=kind.cache_sizes)
        )
        path, content = make(kind, folder)
        disk = Disk(content, kind.cluster_size, discards=kind.discards)
        for session in sessions(program):
            trio.run(run_on_file, path, kind, disk, session)
            assert_sound(path.read_bytes())
            if kind.data_file == "raw":
                assert (folder / "disk.qcow2.data").read_bytes()[: kind.size] == disk.content
        judge(path, disk)


@profile(120)
@given(st.data())
def test_programs_on_small_clusters(data):
    kind = data.draw(kinds((512, 4 * K)), label="image")
    run_program(kind, data.draw(programs(kind), label="program"))


@profile(15)
@given(st.data())
def test_programs_on_large_clusters(data):
    kind = data.draw(kinds((64 * K, 2 * M)), label="image")
    run_program(kind, data.draw(programs(kind, 6), label="program"))


@profile(100)
@given(st.data())
def test_programs_on_images_with_a_data_file(data):
    kind = data.draw(
        kinds((512, 4 * K, 64 * K), data_files=("external", "raw")), label="image"
    )
    run_program(kind, data.draw(programs(kind), label="program"))


async def run_in_memory(kind: Kind, content: bytes, program, patience: int) -> bytearray:
    disk = Disk(bytes(kind.size), kind.cluster_size, discards=True)
    image: bytes | bytearray = content
    # Only a raw data file is the empty disk; in others what is not mapped is anything.
    beside: bytes | bytearray = (b"\0" if kind.data_file == "raw" else b"\x5a") * kind.size
    for number, session in enumerate(sessions(program)):
        file = MemoryFile(image, patience=patience, seed=number)
        data_file = MemoryFile(beside, patience=patience, seed=~number) if kind.data_file else None
        async with open_memory(
            file, data_file=data_file, cache_sizes=kind.cache_sizes, settle=True
        ) as (backend, _):
            for batch in session:
                await run_batch(backend, disk, batch)
        image = file.content
        assert_sound(image)
        if data_file is not None:
            beside = data_file.content
            assert len(beside) == kind.size
            assert kind.data_file != "raw" or beside == disk.content
        assert guest_bytes(image, data_file=beside if data_file else None) == disk.content
    return file.content


@profile(250)
@given(st.data(), st.integers(1, 6))
def test_programs_whose_requests_are_kept_waiting(data, patience):
    data_files = ("", "", "external", "raw")
    kind = data.draw(
        kinds((512,), backings=("none",), compressed=(False,), data_files=data_files),
        label="image",
    )
    program = data.draw(programs(kind), label="program")
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        options = {"cluster_size": kind.cluster_size, "refcount_bits": kind.refcount_bits}
        features = {"": (0, 0), "external": (4, 0), "raw": (4, 2)}[kind.data_file]
        content = new_image(
            folder, kind.size, version=kind.version, features=features, **options
        )
    trio.run(run_in_memory, kind, content, program, patience)
    event(f"version {kind.version}, {kind.tables} tables in a cache")


@profile(12)
@given(st.data())
def test_programs_around_the_end_of_the_refcount_table(data):
    """64-bit refcounts and clusters of 512 bytes: the first table reaches to 2 MiB of the file."""
    kind = Kind(3, 512, 64, 4 * M, "none", 0, False, data.draw(st.sampled_from((1, 20, None))))
    before = data.draw(st.integers(1700 * K, 1960 * K), label="bytes written before")
    program = data.draw(programs(kind, 5), label="program")
    more = Request("write", 2 * M, data.draw(st.sampled_from((90 * K, 400 * K, 2 * M))), 5, False)
    run_program(
        kind, [[Request("write", 0, before, 4)], *program, [more], *program, [more]]
    )
