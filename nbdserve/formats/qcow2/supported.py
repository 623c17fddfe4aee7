"""Which well-formed images we open, and which only for reading.

A table of refusals. A header that `parse_header` has let through says what the image is; here is
what we cannot do with it, or could do only to the harm of what somebody else keeps in it. As a
feature is implemented, its row goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.spec import IncompatibleFeature

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdserve.formats.qcow2.header import Header

__all__ = ["check_supported"]


class _Refusal(NamedTuple):
    applies: Callable[[Header], object]
    may_read: bool
    """The reason concerns writing only."""
    reason: str


def _has(feature: IncompatibleFeature) -> Callable[[Header], object]:
    return lambda header: header.incompatible_features & feature


_REFUSALS = (
    _Refusal(
        lambda header: header.crypt_method,
        may_read=False,
        reason="is encrypted, which is not supported",
    ),
    _Refusal(
        _has(IncompatibleFeature.EXTENDED_L2),
        may_read=False,
        reason="has extended L2 entries (subclusters), which are not supported",
    ),
    _Refusal(
        _has(IncompatibleFeature.CORRUPT),
        may_read=True,
        reason="is marked corrupt; open it read-only or repair it with qemu-img check -r all",
    ),
    # The mapping is right and can be read, but a refcount that is too low hands out a cluster
    # that is in use.
    _Refusal(
        _has(IncompatibleFeature.DIRTY),
        may_read=True,
        reason="was not closed cleanly, so its refcounts may be wrong;"
        " open it read-only or repair it with qemu-img check -r all",
    ),
    _Refusal(
        lambda header: header.nb_snapshots,
        may_read=True,
        reason="has internal snapshots; open it read-only or delete them with qemu-img snapshot -d",
    ),
    # Their clusters would survive, but they would no longer say what was written.
    _Refusal(
        lambda header: header.bitmaps,
        may_read=True,
        reason="has persistent bitmaps, which writing would leave stale;"
        " open it read-only or remove them with qemu-img bitmap --remove",
    ),
)


def check_supported(header: Header, filename: str, *, read_only: bool) -> None:
    """Refuse an image that has what we cannot do.

    Bitmaps that the image itself declares inconsistent (`header.bitmaps` is None) are no reason:
    nothing about them can be made worse. Nor is compression, of either type.

    :raises ImageError: names the feature and what the user can do about it.
    """
    for refusal in _REFUSALS:
        if refusal.applies(header) and not (read_only and refusal.may_read):
            raise ImageError(f"{filename}: {refusal.reason}")
