"""Opening a qcow2 image: what is read before the first request, and how the parts are put together.

Law: an image that is refused has not been written to. Read-write, the only thing written here is
that autoclear feature bits are cleared, and that comes after everything that may refuse.

After qcow2_do_open of QEMU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.datafile import DataFileMapping
from nbdserve.formats.qcow2.durability import Durability
from nbdserve.formats.qcow2.geometry import Geometry
from nbdserve.formats.qcow2.header import (
    Header,
    autoclear_update,
    header_bytes_wanted,
    parse_header,
)
from nbdserve.formats.qcow2.image import Image
from nbdserve.formats.qcow2.metadata import MetadataMap
from nbdserve.formats.qcow2.node import CacheSizes, Qcow2Node
from nbdserve.formats.qcow2.ordering import L1_TABLE
from nbdserve.formats.qcow2.quarantine import Quarantine
from nbdserve.formats.qcow2.redo import Redo
from nbdserve.formats.qcow2.refcount import Refcounts
from nbdserve.formats.qcow2.resolve import Mapping
from nbdserve.formats.qcow2.spec import REFCOUNT_BLOCK_OFFSET_MASK
from nbdserve.formats.qcow2.supported import check_supported
from nbdserve.formats.qcow2.tables import Table, decode_table

if TYPE_CHECKING:
    from nbdserve.block.epoch import Epochs
    from nbdserve.block.node import Node
    from nbdserve.block.redo import RedoLog
    from nbdserve.engines.engine import Engine

__all__ = ["open_qcow2", "read_header"]


async def read_header(file: Node) -> Header:
    """Read and parse the header of an image. Raises ImageError, OSError."""
    first = bytearray(min(file.size, 112))
    await file.read(0, memoryview(first))
    data = bytearray(min(file.size, header_bytes_wanted(bytes(first))))
    await file.read(0, memoryview(data))
    return parse_header(bytes(data), file.filename, file.size)


async def open_qcow2(
    file: Node,
    backing: Node | None,
    header: Header,
    engine: Engine,
    epochs: Epochs,
    *,
    data_file: Node | None = None,
    read_only: bool,
    no_flush: bool = False,
    pass_discard: bool = True,
    cache_sizes: CacheSizes | None = None,
    log: RedoLog | None = None,
) -> Qcow2Node:
    """Open an image whose header was read and whose backing file and data file are open.

    `pass_discard`: clusters that are freed are discarded in the file too. `log`: where a guardian
    finds the changes of metadata that are not written back.

    Read-write, the only thing written is that autoclear feature bits are cleared. Raises
    ImageError (unsupported, damaged), OSError.
    """
    check_supported(header, file.filename, read_only=read_only)
    _check_data_file(header, file.filename, given=data_file is not None)
    geometry = Geometry(header.cluster_bits, header.refcount_order, header.size)
    l1 = await _read_table(file, header.l1_table_offset, geometry.l1_entries)
    metadata = MetadataMap(file.filename, geometry, file.size)
    quarantine = Quarantine(epochs)
    durability = Durability()
    new_mapping = Mapping if data_file is None else DataFileMapping
    mapping = new_mapping(
        data_file or file,
        backing,
        geometry,
        l1,
        filename=file.filename,
        has_zero_flag=header.version >= 3,
        metadata=metadata.offsets if data_file is None else frozenset(),
        durability=durability,
    )
    table_bytes = header.refcount_table_clusters << header.cluster_bits
    nb_entries = 0 if read_only else table_bytes // 8
    refcount_table = await _read_table(file, header.refcount_table_offset, nb_entries)
    if not read_only:
        _note_metadata(metadata, header, refcount_table, l1)
        update = autoclear_update(header)
        if update is not None:
            await file.write(update.offset, update.data)
            await file.flush()
    redo = Redo(log)
    redo.watch(l1, L1_TABLE)
    refcounts = Refcounts(
        file,
        geometry,
        refcount_table,
        metadata,
        quarantine,
        redo,
        end=geometry.clusters(file.size),
        end_is_zero=not getattr(file, "is_device", True),
        pass_discard=pass_discard,
    )
    node = Qcow2Node(file, header, geometry, engine, read_only=read_only, no_flush=no_flush)
    node.image = Image(
        header,
        geometry,
        file,
        backing,
        data_file,
        mapping,
        refcounts,
        metadata,
        quarantine,
        durability,
        redo,
        wake=node.wanted.set,
        relieve=node.relieve,
    )
    node.wire(cache_sizes or CacheSizes())
    return node


def _note_metadata(
    metadata: MetadataMap, header: Header, refcount_table: Table, l1: Table
) -> None:
    """Enter all tables of the image. Raises CorruptImage where two overlap."""
    metadata.add_table("header", 0, 1 << header.cluster_bits)
    metadata.add_table("L1 table", header.l1_table_offset, header.l1_size * 8)
    metadata.add_table("refcount table", refcount_table.host_offset, refcount_table.nb_bytes)
    metadata.add_entries("refcount block", refcount_table.entries, REFCOUNT_BLOCK_OFFSET_MASK)
    metadata.add_entries("L2 table", l1.entries)


def _check_data_file(header: Header, filename: str, *, given: bool) -> None:
    if header.has_data_file and not given:
        raise ImageError(
            f"{filename}: keeps its data in an external data file but names none;"
            " data-file.filename= names it"
        )
    if given and not header.has_data_file:
        raise ImageError(f"{filename}: keeps its data itself, so there can be no data file")


async def _read_table(file: Node, host_offset: int, nb_entries: int) -> Table:
    data = bytearray(nb_entries * 8)
    await file.read(host_offset, memoryview(data))
    return Table(decode_table(data), host_offset)
