"""`serving`: everything that a server for a test can be asked for, in one call."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from nbdserve.errors import ConfigError
from nbdserve.powercut.content import Content
from nbdserve.powercut.powercut import Outcome
from nbdserve.testing.images import InMemory, NewDisk
from nbdserve.testing.inprocess import InProcess
from nbdserve.testing.manner import Manner
from nbdserve.testing.plan import Plan
from nbdserve.testing.power import ServedOutcome
from nbdserve.testing.process import Process

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from nbdserve.blockdev import Aio, DetectZeroes, Discard
    from nbdserve.faults import Fault
    from nbdserve.testing.images import Placed
    from nbdserve.testing.served import Served

    Image = str | os.PathLike[str] | Outcome | Content

__all__ = ["Settings", "serving"]


class Settings(TypedDict, total=False):
    """What `serving` takes by name, `process` left out."""

    # an image that is made: NewDisk
    size: int | str | None
    content: Placed | bytes | None
    backing: str | os.PathLike[str] | None
    backing_format: str
    # the tree: Plan
    format: str
    options: Mapping[str, object]
    faults: Sequence[Fault]
    file_faults: Sequence[Fault]
    seed: int
    room: int | str | None
    file_room: int | str | None
    power_cut: Literal["disk", "file"] | None
    write_log: str | os.PathLike[str] | None
    history: bool
    max_data: int | str | None
    # how it is served: Manner
    cache: str
    aio: Aio | None
    discard: Discard
    detect_zeroes: DetectZeroes
    read_only: bool
    offset: int | str
    throttle: str | None
    export: str
    clients: int
    # where: Served
    folder: str | os.PathLike[str] | None
    socket: str | os.PathLike[str] | None


@overload
def serving(
    image: Image | None = None,
    *,
    process: Literal[False] = False,
    **settings: Unpack[Settings],
) -> InProcess: ...


@overload
def serving(
    image: Image | None = None, *, process: Literal[True], **settings: Unpack[Settings]
) -> Process: ...


@overload
def serving(
    image: Image | None = None, *, process: bool, **settings: Unpack[Settings]
) -> Served: ...


def serving(
    image: Image | None = None, *, process: bool = False, **settings: Unpack[Settings]
) -> Served:
    """A server, not started yet: ``with serving(size="1G") as server: ... server.uri``.

    :param image: a file in `format` (qcow2 if not given), or an outcome of a power cut or any other
        Content, of which a copy is served; without it an image is made, of `size`, with `content`,
        over `backing` (see `make_image`).
    :param process: in a process of its own, else in a thread of this one.
    :param folder: for the socket and the image; a temporary one if not given. `socket`: where that
        shall be, if not in the folder.

    The rest is as in `Plan` and `Manner`. Raises ConfigError for what contradicts itself; starting
    it raises what opening the image raises.
    """
    given: dict[str, Any] = {**settings}
    unknown = given.keys() - Settings.__annotations__.keys()
    if unknown:
        raise TypeError(f"serving() got an unexpected keyword argument {min(unknown)!r}")
    disk = NewDisk(**_taken(given, NewDisk))
    if image is not None and disk != NewDisk():
        raise ConfigError("size, content and backing are of an image that is made, not of a given")
    wanted: str | os.PathLike[str] | NewDisk | InMemory = disk
    if isinstance(image, (Outcome, Content)):
        wanted, given["format"] = _in_memory(image, given.get("format"))
    elif image is not None:
        wanted = image
    plan = Plan(fault_nodes=not process, **_taken(given, Plan))
    manner = Manner(**_taken(given, Manner))
    where = {name: pathlib.Path(path).absolute() for name, path in given.items() if path}
    kind: type[Served] = Process if process else InProcess
    return kind(wanted, plan, manner, **where)


def _taken(given: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Those of the settings that are fields of a kind."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: given.pop(name) for name in names & given.keys()}


def _in_memory(image: Outcome | Content, format: str | None) -> tuple[InMemory, str]:
    """What is served of an outcome or a content, and its format. Raises ConfigError."""
    filename = "memory"
    if isinstance(image, ServedOutcome):
        filename, format = image.filename, format or image.format
    if format is None:
        raise ConfigError("format: is this content a disk (raw) or the file of an image (qcow2)?")
    if isinstance(image, Outcome):
        try:
            image = image.content
        except ValueError as error:
            raise ConfigError(f"an outcome of one file can be served: {error}") from None
    return InMemory(image, filename), format
