"""NBD servers for tests: there in milliseconds, out of order on command, without power at will.

* `serving`: a server as a context manager, synchronous or asynchronous, and all it can be;
* `make_image`, `read_image`: images with known content; `offsets`, `random`, ...: patterns;
* the fixtures `nbd_server` and `qcow2_image` for pytest (plugin.py).

docs/testing.md is their manual. Whoever has a trio program of his own has no need of this: there
`nbdserve.server.open_server` is a server.

What is here is imported when it is asked for: pytest imports this package whenever it runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbdserve.testing.images import make_image, read_image
    from nbdserve.testing.inprocess import InProcess
    from nbdserve.testing.patterns import Pattern, fill, offsets, random, zeroes
    from nbdserve.testing.process import Process
    from nbdserve.testing.served import Served
    from nbdserve.testing.start import serving

HOMES = {
    "InProcess": "inprocess",
    "Pattern": "patterns",
    "Process": "process",
    "Served": "served",
    "fill": "patterns",
    "make_image": "images",
    "offsets": "patterns",
    "random": "patterns",
    "read_image": "images",
    "serving": "start",
    "zeroes": "patterns",
}
"""Which module has what."""

__all__ = [
    "InProcess",
    "Pattern",
    "Process",
    "Served",
    "fill",
    "make_image",
    "offsets",
    "random",
    "read_image",
    "serving",
    "zeroes",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - anything
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
