"""Index arithmetic of a qcow2 image; the only place where guest offsets become indices.

All values are derived from the header's `cluster_bits`, `refcount_order` and `size`
(qcow2 specification, "Cluster mapping" and "Refcounts").
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Geometry"]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes that an image's index arithmetic is made of."""

    cluster_bits: int
    refcount_order: int
    size: int

    cluster_size: int = field(init=False)
    in_cluster: int = field(init=False)  # mask: offset within a cluster
    l2_bits: int = field(init=False)
    l2_entries: int = field(init=False)
    l1_bits: int = field(init=False)  # guest bytes per L2 table, as a shift
    l1_entries: int = field(init=False)
    refcount_bits: int = field(init=False)
    block_bits: int = field(init=False)
    block_entries: int = field(init=False)  # refcounts in one refcount block

    def __post_init__(self) -> None:
        bits = self.cluster_bits
        derived = {
            "cluster_size": 1 << bits,
            "in_cluster": (1 << bits) - 1,
            "l2_bits": bits - 3,
            "l2_entries": 1 << (bits - 3),
            "l1_bits": bits + bits - 3,
            "l1_entries": -(-self.size // (1 << (bits + bits - 3))),
            "refcount_bits": 1 << self.refcount_order,
            "block_bits": bits + 3 - self.refcount_order,
            "block_entries": 1 << (bits + 3 - self.refcount_order),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def clusters(self, nb_bytes: int) -> int:
        """How many clusters it takes to hold `nb_bytes`."""
        return -(-nb_bytes // self.cluster_size)
