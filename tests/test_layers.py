"""The layers of docs/architecture.md, held by the import statements.

A folder of nbdserve/ (or a module at its top) imports only from what `MAY_IMPORT` lists for it;
in nbd/ only connection.py and poller.py import trio.  Imports inside functions and under
TYPE_CHECKING count too: a lazy import saves start-up time, it does not loosen a layer.

The rules are functions of a tree on disk, so that the tests can show them a tree that breaks
each one.
"""

import ast
import graphlib
import pathlib
from collections.abc import Iterator

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "nbdserve"

# What a layer may import from the project, lowest first.  The package itself (nbdserve, for its
# version) is open to all.  drivers/ is absent from all rows but those of opener and graph, which
# alone know every driver, and of place and guardian, which know the image locks.  cli/ may use
# formats/ for what opens no tree: making an image.  A row may name one module of another layer.
NODE_OPTIONS = {"imageopts", "optionreader", "blockdev", "inherit"}
BLOCK_STACK = {"errors", "config", "block"}
MAY_IMPORT = {
    "errors": set(),
    "units": {"errors"},
    "imageopts": {"errors"},
    "faults": {"errors", "units", "imageopts"},
    "optionreader": {"errors", "units", "imageopts"},
    "blockdev": {"errors", "optionreader", "units", "imageopts", "faults", "block", "powercut"},
    "inherit": {"errors", "blockdev"},
    "references": {"errors", "imageopts"},
    "config": {"errors", "references", "faults"} | NODE_OPTIONS,
    "listeners": {"errors", "config"},
    "statistics": {"block"},
    "pidfile": {"errors"},
    "block": {"errors"},
    "engines": {"errors"},
    "drivers": BLOCK_STACK | {"engines", "powercut"},
    "formats": BLOCK_STACK | {"engines"},
    "filters": BLOCK_STACK | {"powercut", "faults"},
    "nbd": {"errors", "block"},
    "powercut": {"errors"},
    "place": NODE_OPTIONS | {"errors", "drivers", "block"},
    "guardian": {"block", "drivers", "errors"},
    "nodenames": {"errors"},
    "wards": {"block", "drivers", "filters", "formats", "guardian"},
    "openfilters": {"errors", "block", "blockdev", "filters", "powercut"},
    "opener": BLOCK_STACK | NODE_OPTIONS
    | {"engines", "drivers", "formats", "filters", "faults", "place", "references", "guardian"}
    | {"nodenames", "openfilters", "wards"}
    | {"powercut"},
    "graph": BLOCK_STACK
    | NODE_OPTIONS
    | {"engines", "drivers", "formats", "filters", "nodenames", "opener", "guardian"},
    "server": BLOCK_STACK | {"listeners", "nbd", "graph", "pidfile", "statistics", "guardian"},
    "testing": BLOCK_STACK
    | {"cli", "units", "listeners", "formats", "filters", "graph", "server", "powercut", "faults"}
    | {"blockdev", "nbd"},
    "cli": BLOCK_STACK
    | NODE_OPTIONS
    | {"units", "references", "faults", "listeners", "formats", "graph", "server", "guardian"}
    | {"powercut"},
    # A front end of its own. Of cli/ only what makes values of strings, without click.
    "nbdkit": NODE_OPTIONS
    | {"errors", "config", "units", "references", "faults", "block", "graph", "guardian"}
    | {"statistics", "cli.image", "cli.objects", "cli.throttle"},
    "__main__": {"cli"},
}

# The sans-IO front end: bytes in, bytes out, but for the modules that hold the sockets.
NBD_WITH_TRIO = {"connection", "negotiate", "poller"}


def modules(package: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """Each module below `package` but its own __init__: (layer, path)."""
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        if inside != pathlib.Path("__init__.py"):
            yield inside.parts[0].removesuffix(".py"), path


def imported(path: pathlib.Path, package: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a module imports; relative names are made absolute."""
    here = [package.name, *path.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from nbdserve import graph` imports a layer by its last name.
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def layer_violations(package: pathlib.Path) -> list[str]:
    found = []
    layers = {layer for layer, _ in modules(package)}
    found += [f"{layer}: no row in MAY_IMPORT" for layer in sorted(layers - MAY_IMPORT.keys())]
    for layer, path in modules(package):
        allowed = MAY_IMPORT.get(layer, set()) | {layer}
        for line, name in imported(path, package):
            parts = name.split(".")
            if parts[0] != package.name or len(parts) == 1:
                continue
            # A name that is no layer is an attribute of the package itself: its version.
            named = {parts[1], ".".join(parts[1:3])}
            if parts[1] in MAY_IMPORT.keys() | layers and not named & allowed:
                place = path.relative_to(package.parent)
                found.append(f"{place}:{line}: {layer} may not import {name}")
    return found


def trio_violations(package: pathlib.Path) -> list[str]:
    return [
        f"{path.relative_to(package.parent)}:{line}: sans-IO, may not import {name}"
        for layer, path in modules(package)
        if layer == "nbd" and path.stem not in NBD_WITH_TRIO
        for line, name in imported(path, package)
        if name.split(".")[0] == "trio"
    ]


def test_each_layer_imports_only_from_below() -> None:
    assert layer_violations(PACKAGE) == []


def test_only_the_connection_does_io_in_the_front_end() -> None:
    assert trio_violations(PACKAGE) == []


def test_the_table_has_no_cycle() -> None:
    whole = {layer: {name.partition(".")[0] for name in row} for layer, row in MAY_IMPORT.items()}
    order = list(graphlib.TopologicalSorter(whole).static_order())
    assert order.index("block") < order.index("nbd") < order.index("cli")


def test_the_tree_under_test_is_the_project() -> None:
    assert {"nbd", "block"} <= {layer for layer, _ in modules(PACKAGE)}


def make_tree(folder: pathlib.Path, name: str, source: str) -> pathlib.Path:
    package = folder / "nbdserve"
    module = package / name
    module.parent.mkdir(parents=True)
    (package / "__init__.py").touch()
    module.write_text(source)
    return package


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("block/node.py", "import nbdserve.nbd.proto"),
        ("block/node.py", "from nbdserve.config import CacheMode"),
        ("block/node.py", "from nbdserve import graph"),
        ("block/node.py", "from ..nbd import proto"),
        ("block/node.py", "from .. import graph"),
        ("formats/qcow2/node.py", "from ...drivers.file import FileNode"),
        ("nbd/export.py", "if TYPE_CHECKING:\n    from nbdserve.formats.raw import RawNode"),
        ("server.py", "def open():\n    from nbdserve.drivers import file"),
        ("cli/serve.py", "import nbdserve.drivers.file as file"),
        ("utils/strings.py", "import os"),
    ],
)
def test_a_broken_layer_is_found(tmp_path, name, source) -> None:
    assert len(layer_violations(make_tree(tmp_path, name, source))) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("block/node.py", "from nbdserve.errors import ImageError\nfrom . import run"),
        ("formats/qcow2/node.py", "from ...block.node import Node\nfrom .spec import MAGIC"),
        ("graph.py", "from .drivers.file import FileNode"),
        ("cli/main.py", "from nbdserve import __version__\nimport nbdserve\nimport os, trio"),
    ],
)
def test_an_allowed_import_is_let_be(tmp_path, name, source) -> None:
    assert layer_violations(make_tree(tmp_path, name, source)) == []


@pytest.mark.parametrize("source", ["import trio", "from trio.abc import Stream"])
@pytest.mark.parametrize(
    ("name", "expected"), [("requests", 1), ("connection", 0)], ids=["sans-IO", "connection"]
)
def test_trio_in_the_front_end_is_found(tmp_path, name, expected, source) -> None:
    assert len(trio_violations(make_tree(tmp_path, f"nbd/{name}.py", source))) == expected
