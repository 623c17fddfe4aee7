"""Opening a tree of nodes: which driver opens what, on what, in which role and with which lock.

With graph.py the only module that knows every driver. A tree is asked for by NodeOptions. What they
leave open is found out on the way down, in this order: settings come from the node above
(inherit.py), a file is opened, its format probed unless it was named, its lock taken, a header
read, and the data file and backing file that it names opened in turn, the latter read-only. Then
nodes are made from the leaves up.

Images are untrusted, and so is what a header says of a backing file, which may be a whole tree
(``json:``). The name of a data file is a plain path, relative to the working directory, which is
neither probed nor taken for a protocol's; that is QEMU's reading too. How long a path may be, and
that it does not come back to where it was, is place.py's; the number of nodes is bounded here.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, TypeVar

from nbdserve.block.buffers import BufferPool
from nbdserve.block.epoch import Epochs
from nbdserve.block.filter import FilterNode
from nbdserve.block.node import Leaf
from nbdserve.blockdev import (
    FileOptions,
    FilterOptions,
    MemoryOptions,
    ProbedOptions,
    Qcow2Options,
    RawOptions,
    named_tree,
    parse_node,
)
from nbdserve.drivers.direct import DirectFileNode
from nbdserve.drivers.memory import MemoryNode
from nbdserve.drivers.open import open_file
from nbdserve.errors import ConfigError, ImageError, NbdserveError
from nbdserve.filters.fault import FaultNode
from nbdserve.formats.probe import PROBE_SIZE, RAW_PROBED_WARNING, probe_format
from nbdserve.formats.qcow2.node import CacheSizes, Qcow2Node
from nbdserve.formats.qcow2.open import open_qcow2, read_header
from nbdserve.formats.raw import RawNode
from nbdserve.imageopts import options_of_name, shown
from nbdserve.inherit import ChildRole, child_settings
from nbdserve.openfilters import FILTERS
from nbdserve.place import Place, Use
from nbdserve.powercut.powercut import PowerCut, PowerLost
from nbdserve.wards import Wards

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from nbdserve.block.node import Node
    from nbdserve.blockdev import NodeOptions
    from nbdserve.drivers.file import FileNode
    from nbdserve.engines.engine import Engine
    from nbdserve.engines.start import Engines
    from nbdserve.faults import Fault
    from nbdserve.filters.throttle_group import ThrottleGroups
    from nbdserve.formats.qcow2.header import Header
    from nbdserve.guardian import Guardian
    from nbdserve.imageopts import Options
    from nbdserve.inherit import Effective
    from nbdserve.nodenames import NodeNames
    from nbdserve.references import References

__all__ = ["MAX_NODES", "Opener"]

N = TypeVar("N", bound="Node")
Parent = ProbedOptions | Qcow2Options | RawOptions | FilterOptions
PARENTS = (ProbedOptions, Qcow2Options, RawOptions, FilterOptions)

log = logging.getLogger("nbdserve.graph")

# A chain has two to an image; a header may name a tree that branches.
MAX_NODES = 1024


class Opener:
    """Opens nodes and remembers them in order, so that they can be closed in reverse."""

    def __init__(
        self,
        engines: Engines,
        groups: ThrottleGroups,
        names: NodeNames,
        references: References,
        guardian: Guardian | None = None,
    ) -> None:
        """`references`: what images may name."""
        self.epochs = Epochs()
        self.buffers = BufferPool()
        self.opened: list[Node] = []
        self._engines = engines
        self._groups = groups
        self._names = names
        self._references = references
        self.power_cut = PowerCut()
        self._wards = Wards(guardian)
        self._engine_of: dict[Node, Engine] = {}
        self._overlay_named = False

    @property
    def engines(self) -> list[Engine]:
        """Those of all open files, each once."""
        return list(dict.fromkeys(self._engine_of.values()))

    @property
    def is_direct(self) -> bool:
        """Whether any file is open with O_DIRECT."""
        return any(isinstance(node, DirectFileNode) for node in self.opened)

    async def open_root(self, options: NodeOptions, settings: Effective) -> Node:
        """Open a tree. Raises ImageError, ConfigError; `opened` has what was opened until then."""
        return await self._open(options, settings, Place("", Use.EXPORT, settings.read_only))

    def window(self, root: Node, offset: int) -> Node:
        """The uppermost node seen from `offset` on. Raises ConfigError."""
        if offset > root.size:
            raise ConfigError(
                f"--offset: {offset} is beyond the end of {root.filename} ({root.size} bytes)"
            )
        return self._add(RawNode(root, offset=offset), None)

    def faulty(self, root: Node, faults: Iterable[Fault]) -> Node:
        """The uppermost node behind faults."""
        return self._add(FaultNode(root, faults), None)

    async def _open(self, options: NodeOptions, settings: Effective, place: Place) -> Node:
        if isinstance(options, FileOptions):
            file = self._open_file(options, settings, place)
            await place.lock(file, options, settings)
            return file
        if isinstance(options, MemoryOptions):
            return self._open_memory(options, settings)
        filename = _leaf_name(options)
        place.check_depth(filename)
        if place.depth and settings.discard == "ignore":
            raise ConfigError(f"{place.path}discard=ignore: only for the uppermost node and files")
        try:
            if isinstance(options, ProbedOptions):
                return await self._open_probed(options, settings, place)
            return await DRIVERS[type(options)](self, options, settings, place, None)
        except OSError as error:
            raise ImageError(f"{filename}: {error.strerror}", error.errno) from None

    def _open_file(self, options: FileOptions, settings: Effective, place: Place) -> FileNode:
        """A file, not locked yet."""
        engine = self._engines.get(options.aio or settings.aio, direct=settings.direct)
        file = open_file(
            options.filename,
            engine,
            read_only=settings.read_only,
            no_flush=settings.no_flush,
            discard=settings.discard == "unmap" and not settings.read_only,
            direct=self.buffers if settings.direct else None,
        )
        self._engine_of[file] = engine
        self._add(file, options)
        if options.driver is not None and file.is_device != (options.driver == "host_device"):
            what = "a block device" if file.is_device else "a regular file"
            raise ImageError(f"{options.filename}: the driver {options.driver} is not for {what}")
        place.check_is_new(file)
        return file

    def _open_memory(self, options: MemoryOptions, settings: Effective) -> MemoryNode:
        node = MemoryNode(
            options.content.copy(),
            options.filename,
            read_only=settings.read_only,
            no_flush=settings.no_flush,
        )
        self._engine_of[node] = self._engines.get(settings.aio, direct=False)
        return self._add(node, options)

    async def _open_probed(
        self, options: ProbedOptions, settings: Effective, place: Place
    ) -> Node:
        if not isinstance(options.file, FileOptions):
            raise ConfigError(f"{place.path}driver must be given: only a plain file can be probed")
        below = place.file(Use.FORMAT, settings)
        file_settings = child_settings(options.file, settings, ChildRole.FILE, below.path)
        file = self._open_file(options.file, file_settings, below)
        first = bytearray(min(PROBE_SIZE, file.size))
        await file.read(0, memoryview(first))
        found = options.of_format(probe_format(bytes(first), file.filename))
        return await DRIVERS[type(found)](self, found, settings, place, file)

    async def _file(
        self, options: Parent, settings: Effective, place: Place, probed: FileNode | None
    ) -> Node:
        """The file of a node at `place`, locked; `probed`: it is open already."""
        below = child_settings(options.file, settings, ChildRole.FILE, place.path)
        if probed is None:
            return await self._open(options.file, below, place)
        assert isinstance(options.file, FileOptions)
        await place.lock(probed, options.file, below)
        return probed

    # --- drivers -------------------------------------------------------------------------------

    async def _open_raw(
        self, options: RawOptions, settings: Effective, place: Place, probed: FileNode | None
    ) -> Node:
        file = await self._file(options, settings, place.file(place.use, settings), probed)
        offset, size = options.offset, options.size
        if offset + (size or 0) > file.size:
            what = f"{place.path}offset: {offset}" + (f" and size: {size}" if size else "")
            raise ImageError(f"{file.filename}: {what} is beyond the end ({file.size} bytes)")
        if size is None and _is_disk(file):
            size = file.size - offset
        guarded = probed is not None and not settings.read_only
        if guarded:
            log.warning(RAW_PROBED_WARNING.format(filename=file.filename))
        node = RawNode(file, offset=offset, size=size, guarded=guarded)
        return self._add(node, options, settings)

    async def _open_filter(
        self, options: FilterOptions, settings: Effective, place: Place, probed: FileNode | None
    ) -> Node:
        file = await self._file(options, settings, place.file(place.use, settings), probed)
        node = await FILTERS[type(options)](file, options, place.path, self._groups, self.power_cut)
        return self._add(node, options, settings)

    async def _open_qcow2(
        self, options: Qcow2Options, settings: Effective, place: Place, probed: FileNode | None
    ) -> Node:
        file = await self._file(options, settings, place.file(Use.FORMAT, settings), probed)
        if _is_disk(file):
            file = self._add(RawNode(file, size=file.size), None)
        header = await read_header(file)
        data_file = await self._open_data_file(options, header, settings, place, _leaf(file))
        backing = await self._open_backing(options, header, settings, place, _leaf(file))
        defaults = CacheSizes()
        log = None
        if not settings.read_only:
            log = self._wards.watch(file, data_file, no_flush=settings.no_flush)
        node = await open_qcow2(
            file,
            backing,
            header,
            self._engine_of[_leaf(file)],
            self.epochs,
            data_file=data_file,
            read_only=settings.read_only,
            no_flush=settings.no_flush,
            pass_discard=settings.discard == "unmap",
            cache_sizes=CacheSizes(
                defaults.l2 if options.l2_cache_size is None else options.l2_cache_size,
                defaults.refcount
                if options.refcount_cache_size is None
                else options.refcount_cache_size,
            ),
            log=log,
        )
        return self._add(node, options, settings)

    async def _open_data_file(
        self,
        options: Qcow2Options,
        header: Header,
        settings: Effective,
        place: Place,
        file: Leaf,
    ) -> Node | None:
        """What options or, without them, the header name as the data file (qcow2_do_open)."""
        given = options.data_file
        place = place.data_file(file, settings)
        if given is not None and not header.has_data_file:
            raise ConfigError(f"{place.path[:-1]}: {file.filename} keeps its data itself")
        named = header.data_file if header.has_data_file else None
        if given is None and named is None:
            return None  # if one is missing, open_qcow2 says so
        try:
            if given is None:
                assert named is not None
                self._references.check(named, {"filename": named})
                given = FileOptions(filename=named)
            below = child_settings(given, settings, ChildRole.FILE, place.path)
            node = await self._open(given, below, place)
        except ImageError as error:
            if self._overlay_named:
                raise
            self._overlay_named = True
            raise type(error)(f"{file.filename}: data file {error}", error.errno) from None
        return self._add(RawNode(node, size=node.size), None) if _is_disk(node) else node

    async def _open_backing(
        self,
        options: Qcow2Options,
        header: Header,
        settings: Effective,
        place: Place,
        file: Leaf,
    ) -> Node | None:
        """What options and header name as the backing file (bdrv_open_backing_file)."""
        given, name = options.backing, header.backing_file
        if given is None or (name is None and not given):
            return None
        place = place.backing(file)
        if not given:
            place = place._replace(path="")  # options that the name has are not the user's
        image_format = None if "driver" in given else header.backing_format
        try:
            if name is None or _names_a_file(given):
                found = given if image_format is None else {"driver": image_format, **given}
                tree = parse_node(found, place.path)
            else:
                directory = os.path.dirname(file.filename)
                found = options_of_name(name, directory)
                self._references.check(name, found)
                tree = named_tree(name, found, image_format, given=given, path=place.path)
            below = child_settings(tree, settings, ChildRole.BACKING, place.path)
            return await self._open(tree, below, place)
        except NbdserveError as error:
            # The image that names the bad one is told, and not all those above it too.
            if self._overlay_named:
                raise
            self._overlay_named = True
            kind, what = type(error), str(error)
            if isinstance(error, ConfigError) and not given:
                # Not what the user said, but what the name in the image says.
                kind, label = ImageError, shown(name or "")
                what = what if what.startswith(label) else f"{label}: {what}"
            raise kind(f"{file.filename}: backing file {what}", error.errno) from None

    # --- the nodes that are open ---------------------------------------------------------------

    def _add(
        self, node: N, options: NodeOptions | None, settings: Effective | None = None
    ) -> N:
        """Remember a node, which is closed with all others, whatever happens now."""
        self.opened.append(node)
        if len(self.opened) > MAX_NODES:
            raise ImageError(f"{node.filename}: more than {MAX_NODES} nodes in all")
        node.node_name = self._names.take(None if options is None else options.node_name)
        if settings is not None:
            node.read_only, node.no_flush = settings.read_only, settings.no_flush
        return node

    async def close(self) -> None:
        """Close all, the root first. The first error is raised after everything was closed."""
        first_error: Exception | None = None
        while self.opened:
            node = self.opened.pop()
            try:
                await node.close()
            except PowerLost:
                pass  # that is how it was wanted
            except Exception as error:  # a bug in one node shall not leave the others open
                first_error = first_error or error
            self._names.give_back(node.node_name)
        self._wards.close()
        self.power_cut.log.close()
        self._engine_of.clear()
        if first_error is not None:
            raise first_error


DRIVERS: dict[type[NodeOptions], Callable[..., Awaitable[Node]]] = {
    Qcow2Options: Opener._open_qcow2,
    RawOptions: Opener._open_raw,
    **dict.fromkeys(FILTERS, Opener._open_filter),
}
"""What opens each kind of node but files: (opener, options, settings, place, file that was probed,
and so is open)."""


def _names_a_file(options: Options) -> bool:
    """Whether options say what the data of a node is in, perhaps with filters between."""
    return any(
        name == "filename" and set(path.split(".")) == {"file"}
        for path, _, name in (key.rpartition(".") for key in options)
    )


def _leaf_name(options: NodeOptions) -> str:
    """The name of the file that a node's own data is in."""
    while isinstance(options, PARENTS):
        options = options.file
    assert isinstance(options, (FileOptions, MemoryOptions))
    return options.filename


def _leaf(node: Node) -> Leaf:
    """The file that a node's own data is in."""
    while not isinstance(node, Leaf):
        node = node.children["file"]
    return node


def _is_disk(node: Node) -> bool:
    """Whether it is a guest's disk, which nothing may be written behind, and which does not look
    where a request ends. Files grow, and windows on a disk look."""
    while isinstance(node, FilterNode):
        node = node.children["file"]
    return isinstance(node, Qcow2Node)
