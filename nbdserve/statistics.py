"""The statistics of a server, as one tree for programs and as lines for people.

Counters live where things happen: each class that has some gives them by its own `statistics()`,
which is where their meaning stands (docs/statistics.md has them all in one place). Here they are
only brought into form. `plain` makes dicts and lists of them, for json. `lines` makes one line for
each object, `statistics KIND key=value ...`, so that grep finds an object and a counter in a log:

* what is inside has its name before it: `l2_cache.loads=3`;
* what is zero, false or empty is left out, but for the values that name the object;
* a latency histogram becomes an estimate of its median and 99th percentile in microseconds, and
  the bins that are not empty as `below:count`: `rd_us=p50:5,p99:14 rd_us_bins=4:9,8:70,16:21`;
* a value with a space, or one that could be misread, is a JSON string.
"""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING, Any

from nbdserve.block.histogram import Histogram

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Tree = dict[str, Any]

__all__ = ["lines", "log_statistics", "plain"]

log = logging.getLogger("nbdserve.statistics")
# Whoever asks for statistics wants to see them, with --verbose or without.
log.setLevel(logging.INFO)

HISTOGRAM = "_latency_histogram"

# A word that can stand without quotes.
WORD = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f]+")


def plain(value: object) -> Any:  # noqa: ANN401 - whatever json takes
    """Named tuples and mappings become dicts, other sequences lists; keys become strings."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def log_statistics(tree: Tree) -> None:
    """Log a server's tree (Server.statistics)."""
    for line in lines(tree):
        log.info("%s", line)


def lines(tree: Tree) -> Iterator[str]:
    """A server's tree as lines."""
    inner = ("exports", "connections", "engines")
    yield _line("server", {}, {key: value for key, value in tree.items() if key not in inner})
    for name, export in tree["exports"].items():
        yield from _export_lines({"export": name}, export, bool(tree["connections"]))
    for connection in tree["connections"]:
        yield _line("connection", *_split(connection, "client", "export"))
    for engine in tree["engines"]:
        yield _line("engine", *_split(engine, "name"))


def _export_lines(name: Tree, export: Tree, some_are_left: bool) -> Iterator[str]:
    parts = ("requests", "left", "nodes", "throttle")
    rest = {key: value for key, value in export.items() if key not in parts}
    yield _line("export", name, export["requests"] | rest)
    if some_are_left and export["left"]["connections"]:  # else it says the same again
        yield _line("left", name, export["left"])
    if "throttle" in export:
        yield _line("throttle", name, export["throttle"])
    for role, node in export["nodes"].items():
        given, rest = _split(node, "node_name")
        head, rest = _split(rest, "driver", "filename")
        if given["node_name"].startswith("#"):  # ours, which tells nobody anything
            given = {}
        yield _line("node", name | {"node": role} | given | head, rest)


def _split(tree: Tree, *names: str) -> tuple[Tree, Tree]:
    """What names an object, and its counters."""
    return (
        {name: tree[name] for name in names if name in tree},
        {key: value for key, value in tree.items() if key not in names},
    )


def _line(kind: str, names: Mapping[str, object], counters: Mapping[str, object]) -> str:
    words = [f"{key}={_text(value)}" for key, value in names.items()]
    words += [f"{key}={_text(value)}" for key, value in _flat("", counters) if value]
    return " ".join(["statistics", kind, *words])


def _flat(prefix: str, tree: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if key.endswith(HISTOGRAM) and isinstance(value, dict):
            yield from _latency(prefix + key.removesuffix(HISTOGRAM), value["bins"])
        elif isinstance(value, dict):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield prefix + key, value


def _latency(kind: str, bins: list[int]) -> Iterator[tuple[str, object]]:
    histogram = Histogram()
    histogram.bins[: len(bins)] = bins
    if histogram.count:
        median, most = histogram.percentile(50), histogram.percentile(99)
        yield f"{kind}_us", f"p50:{median:.0f},p99:{most:.0f}"
        found = [f"{1 << number}:{count}" for number, count in enumerate(bins) if count]
        yield f"{kind}_us_bins", ",".join(found)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return text if WORD.fullmatch(text) else json.dumps(text)
