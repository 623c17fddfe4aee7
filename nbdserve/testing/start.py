"""`serving`: everything that a server for a test can be asked for, in one call."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any, Literal

from nbdserve.cli.throttle import parse_throttle
from nbdserve.config import CACHE_AUTO, CACHE_MODES
from nbdserve.errors import ConfigError
from nbdserve.testing.images import NewDisk
from nbdserve.testing.inprocess import InProcess
from nbdserve.testing.plan import Plan
from nbdserve.testing.process import Process

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from nbdserve.faults import Fault
    from nbdserve.testing.images import Content
    from nbdserve.testing.served import Served

__all__ = ["serving"]


def serving(
    image: str | os.PathLike[str] | None = None,
    *,
    size: int | str | None = None,
    content: Content | bytes | None = None,
    backing: str | os.PathLike[str] | None = None,
    format: str = "qcow2",
    options: Mapping[str, object] | None = None,
    cache: str = "writeback",
    faults: Sequence[Fault] | None = None,
    file_faults: Sequence[Fault] | None = None,
    room: int | str | None = None,
    file_room: int | str | None = None,
    seed: int = 0,
    power_cut: Literal["disk", "file"] | None = None,
    write_log: str | os.PathLike[str] | None = None,
    throttle: str | None = None,
    process: bool = False,
    folder: str | os.PathLike[str] | None = None,
    export: str = "",
    clients: int = 0,
    **settings: Any,  # noqa: ANN401 - named below
) -> Served:
    """A server, not started yet: ``with serving(size="1G") as server: ... server.uri``.

    :param image: a file in `format`; without it one is made, of `size`, with `content`, over
        `backing` (see `make_image`).
    :param process: in a process of its own, else in a thread of this one.
    :param folder: for the socket and the image; a temporary one if not given.
    :param throttle: as --throttle. export: the export's name. clients: so many at a time, 0: any
        number.
    :param settings: read_only, discard, detect_zeroes, offset, aio, as the options of those names.

    The rest is as in `Plan`. Raises ConfigError for what contradicts itself; starting it raises
    what opening the image raises.
    """
    made = (size, content, backing)
    if image is not None and any(value is not None for value in made):
        raise ConfigError("size, content and backing are of an image that is made, not of a given")
    for name in settings.keys() - {"read_only", "discard", "detect_zeroes", "offset", "aio"}:
        raise TypeError(f"serving() got an unexpected keyword argument {name!r}")
    plan = Plan(
        format=format,
        options=options or {},
        faults=faults,
        file_faults=file_faults,
        seed=seed,
        room=room,
        file_room=file_room,
        power_cut=power_cut,
        write_log=write_log,
    )
    disk = NewDisk(*made) if image is None else image
    place = None if folder is None else pathlib.Path(folder)
    if process:
        return Process(
            disk, plan, folder=place, cache=cache, export_name=export, shared=clients,
            throttle=throttle, **settings,
        )  # fmt: skip
    modes = {**CACHE_MODES, "auto": CACHE_AUTO}
    if cache not in modes:
        raise ConfigError(f"cache: {cache!r} is not one of {', '.join(modes)}")
    return InProcess(
        disk, plan, folder=place, clients=clients, export=export, cache=modes[cache],
        throttle=parse_throttle([throttle] if throttle else []), **settings,
    )  # fmt: skip
