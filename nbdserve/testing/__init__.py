"""NBD servers for tests: there in milliseconds, out of order on command, without power at will.

* `serving`: a server as a context manager, synchronous or asynchronous, and all it can be;
* `make_image`, `read_image`: images with known content; `offsets`, `random`, ...: patterns;
* `Fault`: what goes wrong; `Outcome`, `Content`, `WriteLog`: what power cuts are made of;
* the fixtures `nbd_server` and `qcow2_image` for pytest (plugin.py).

docs/testing.md is their manual. Whoever has a trio program of his own has no need of this: there
`nbdserve.server.open_server` is a server.

What is here is imported when it is asked for: pytest imports this package whenever it runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbdserve.faults import Fault
    from nbdserve.powercut.content import Content
    from nbdserve.powercut.powercut import Outcome
    from nbdserve.powercut.writelog import WriteLog
    from nbdserve.testing.factory import ImageFactory, ServerFactory
    from nbdserve.testing.images import make_image, read_image
    from nbdserve.testing.inprocess import InProcess
    from nbdserve.testing.patterns import Pattern, fill, offsets, random, zeroes
    from nbdserve.testing.process import Process
    from nbdserve.testing.served import Served
    from nbdserve.testing.start import serving

HOMES = {
    "Content": "nbdserve.powercut.content",
    "Fault": "nbdserve.faults",
    "ImageFactory": "nbdserve.testing.factory",
    "InProcess": "nbdserve.testing.inprocess",
    "Outcome": "nbdserve.powercut.powercut",
    "Pattern": "nbdserve.testing.patterns",
    "Process": "nbdserve.testing.process",
    "Served": "nbdserve.testing.served",
    "ServerFactory": "nbdserve.testing.factory",
    "WriteLog": "nbdserve.powercut.writelog",
    "fill": "nbdserve.testing.patterns",
    "make_image": "nbdserve.testing.images",
    "offsets": "nbdserve.testing.patterns",
    "random": "nbdserve.testing.patterns",
    "read_image": "nbdserve.testing.images",
    "serving": "nbdserve.testing.start",
    "zeroes": "nbdserve.testing.patterns",
}
"""Which module has what."""

__all__ = [
    "Content",
    "Fault",
    "ImageFactory",
    "InProcess",
    "Outcome",
    "Pattern",
    "Process",
    "Served",
    "ServerFactory",
    "WriteLog",
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
    return getattr(import_module(HOMES[name]), name)
