"""Opening filter nodes: what makes each of them, over a child that is open.

A table by the kind of options, for opener.py. What it is called with beside these is what filters
of a process or a tree share.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nbdserve.blockdev import (
    CustomOptions,
    FaultOptions,
    FilterOptions,
    PowerCutOptions,
    ThrottleOptions,
)
from nbdserve.errors import ConfigError
from nbdserve.filters.fault import FaultNode
from nbdserve.filters.power_cut import log_writes
from nbdserve.filters.throttle import ThrottleNode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nbdserve.block.filter import FilterNode
    from nbdserve.block.node import Node
    from nbdserve.filters.throttle_group import ThrottleGroups
    from nbdserve.powercut.powercut import PowerCut

__all__ = ["FILTERS"]


async def _throttle(
    file: Node, options: ThrottleOptions, path: str, groups: ThrottleGroups, power_cut: PowerCut
) -> FilterNode:
    member = groups.join_existing(options.group)
    if member is None:
        raise ConfigError(f"{path}throttle-group: there is no group {options.group!r}")
    return ThrottleNode(file, member)


async def _fault(
    file: Node, options: FaultOptions, path: str, groups: ThrottleGroups, power_cut: PowerCut
) -> FilterNode:
    return FaultNode(file, options.faults, seed=options.seed, room=options.room)


async def _power_cut(
    file: Node, options: PowerCutOptions, path: str, groups: ThrottleGroups, power_cut: PowerCut
) -> FilterNode:
    try:
        power_cut.agree(options.history, options.max_data, options.log)
    except ValueError as error:
        raise ConfigError(f"{path}{error}") from None
    except OSError as error:
        raise ConfigError(f"{path}log: {options.log}: {error.strerror}") from None
    name = options.node_name or os.path.basename(file.filename)
    return await log_writes(file, power_cut, name)


async def _custom(
    file: Node, options: CustomOptions, path: str, groups: ThrottleGroups, power_cut: PowerCut
) -> FilterNode:
    try:
        return options.kind(file, **options.arguments)
    except ValueError as error:
        raise ConfigError(f"{path}driver={options.kind.driver}: {error}") from None


FILTERS: dict[type[FilterOptions], Callable[..., Awaitable[FilterNode]]] = {
    ThrottleOptions: _throttle,
    FaultOptions: _fault,
    PowerCutOptions: _power_cut,
    CustomOptions: _custom,
}
"""(the child, the options, what stands before their names, throttle groups, the tree's power)."""
