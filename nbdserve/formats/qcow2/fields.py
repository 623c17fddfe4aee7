"""The plain fields of a header, of version 2 or 3, as one value.

Bytes to `Fields`, or `Malformed`. What is asked here must hold before any other part of the
first cluster can be found: the magic, the version, the sizes of a cluster and of the header, and
that all of it is there. Whether the fields agree with each other is for consistency.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from construct import StreamError

from nbdserve.formats.qcow2 import spec
from nbdserve.formats.qcow2.extensions import Malformed

__all__ = ["Fields", "parse_fields"]


@dataclass(slots=True)
class Fields:
    """The header's plain fields, of either version; names and order are the spec's."""

    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = spec.V2_REFCOUNT_ORDER
    header_length: int = spec.V2_HEADER_LENGTH
    compression_type: int = spec.COMPRESSION_ZLIB


def parse_fields(data: bytes) -> Fields:
    """Everything up to header_length, and that the first cluster is there whole."""
    if not data.startswith(spec.MAGIC):
        raise Malformed("not a qcow2 image")
    try:
        parsed = spec.HEADER_V2.parse(data)
        if parsed.version == 3:
            parsed = spec.HEADER_V3.parse(data)
    except StreamError:
        raise Malformed(f"cut short: the header ends after {len(data)} bytes") from None
    fields = Fields(
        **{name: parsed[name] for name in Fields.__slots__ if parsed.get(name) is not None}
    )
    if fields.version not in (2, 3):
        raise Malformed(f"qcow2 version {fields.version} is not supported, only 2 and 3 are")
    if not spec.MIN_CLUSTER_BITS <= fields.cluster_bits <= spec.MAX_CLUSTER_BITS:
        raise Malformed(
            f"cluster_bits is {fields.cluster_bits},"
            f" not {spec.MIN_CLUSTER_BITS} to {spec.MAX_CLUSTER_BITS}"
        )
    length, cluster_size = fields.header_length, 1 << fields.cluster_bits
    if fields.version == 3 and (length < spec.V3_MIN_HEADER_LENGTH or length % 8):
        raise Malformed(
            f"the header says it is {length} bytes long,"
            f" not a multiple of 8 from {spec.V3_MIN_HEADER_LENGTH}"
        )
    if length > cluster_size:
        raise Malformed(
            f"the header says it is {length} bytes long, more than a cluster of {cluster_size}"
        )
    if len(data) < cluster_size:
        raise Malformed(
            f"cut short: the file has {len(data)} of the first cluster's {cluster_size} bytes"
        )
    if fields.backing_file_offset and not length <= fields.backing_file_offset <= cluster_size:
        raise Malformed(
            f"the backing file name is said to be at offset {fields.backing_file_offset},"
            f" not between the header ({length} bytes) and the end of the first cluster"
        )
    if fields.refcount_order > spec.MAX_REFCOUNT_ORDER:
        raise Malformed(
            f"refcount_order is {fields.refcount_order}, not 0 to {spec.MAX_REFCOUNT_ORDER}"
        )
    return fields
