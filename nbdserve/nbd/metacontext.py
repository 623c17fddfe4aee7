"""Metadata contexts: what BLOCK_STATUS can tell about an export, and who asked for which.

A context is a row: its name and the queries that list it without naming it. An export
holds its rows in order, and the place in that order is the context's id on the wire.
Further kinds (``qemu:allocation-depth``, ``qemu:dirty-bitmap:NAME``) are further rows of
an export that has them; nothing in this file or in options.py changes for them. How
the extents of a context are found is not known here.

Names and queries are compared as bytes and whole. A wildcard lists contexts and never
selects one ("Metadata querying"); a query nobody knows is ignored, which also covers
unknown namespaces and the missing colon. This follows QEMU (nbd_meta_base_query,
nbd_meta_qemu_query).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class MetaContext:
    """One context of an export.

    ``name`` is namespace, colon and leaf name. ``wildcards`` are the queries that list it
    among others, such as ``base:``.
    """

    name: str
    wildcards: tuple[str, ...]


BASE_ALLOCATION = MetaContext("base:allocation", ("base:",))
"""Allocated or not, zero or not, as proto.StateFlag: the one context the document defines."""


def select(contexts: Sequence[MetaContext], queries: Iterable[bytes]) -> list[tuple[int, str]]:
    """The (context id, name) of every context one of ``queries`` names, each once, in order."""
    wanted = set(queries)
    return [(i, c.name) for i, c in enumerate(contexts) if c.name.encode() in wanted]


def listing(contexts: Sequence[MetaContext], queries: Iterable[bytes]) -> list[str]:
    """The names of the contexts ``queries`` name or match as wildcards; of all, without queries."""
    wanted = set(queries)
    return [
        context.name
        for context in contexts
        if not wanted
        or any(query.encode() in wanted for query in (context.name, *context.wildcards))
    ]
