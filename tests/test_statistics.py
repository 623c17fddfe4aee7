"""From counters to a tree for json, and to lines that grep finds."""

import json
import logging
from typing import NamedTuple

import pytest

from nbdserve.block.account import Account
from nbdserve.statistics import lines, log_statistics, plain

US = 1000


class Inner(NamedTuple):
    loads: int
    limits: dict


class Outer(NamedTuple):
    inner: Inner
    pair: tuple


def tree(**changes):
    account = Account()
    account.operations["rd"].add(99, 4096, 10 * US)
    account.operations["rd"].add(1, 4096, 700 * US)
    export = {
        "requests": plain(account.statistics()),
        "left": {"connections": 2, "wr_operations": 4},
        "misses": {"NOT_CACHED": 3},
        "nodes": {
            "root": {
                "node_name": "disk0",
                "driver": "qcow2",
                "filename": "/my disk",
                "l2_cache": {"loads": 3, "dirty": 0},
            },
            "root.file": {"node_name": "#block001", "driver": "file", "filename": "/my disk"},
        },
    }
    return {
        "seconds": 1.23456,
        "clients": 1,
        "accepted": 3,
        "exports": {"": export | changes},
        "connections": [{"client": "127.0.0.1:5", "export": "", "structured_replies": True}],
        "engines": [{"name": "threads", "jobs": 5, "in_flight": 0}],
    }


def test_the_tree_is_for_json():
    value = Outer(Inner(1, {"bps": 2}), (3, [4.5, None, True]))
    wanted = {"inner": {"loads": 1, "limits": {"bps": 2}}, "pair": [3, [4.5, None, True]]}
    assert plain(value) == wanted
    assert json.loads(json.dumps(plain({5: value}))) == {"5": wanted}


def test_one_line_for_each_object():
    assert list(lines(tree())) == [
        "statistics server seconds=1.235 clients=1 accepted=3",
        'statistics export export="" rd_operations=100 rd_bytes=8192 rd_total_time_ns=1690000'
        " rd_us=p50:12,p99:16 rd_us_bins=16:99,1024:1 misses.NOT_CACHED=3",
        'statistics left export="" connections=2 wr_operations=4',
        'statistics node export="" node=root node_name=disk0 driver=qcow2 filename="/my disk"'
        " l2_cache.loads=3",
        'statistics node export="" node=root.file driver=file filename="/my disk"',
        'statistics connection client=127.0.0.1:5 export="" structured_replies=true',
        "statistics engine name=threads jobs=5",
    ]


def test_a_throttle_has_a_line():
    throttle = {"group": "g", "seconds_waited": 1.5, "limits": {"bps-total": 7}}
    assert (
        'statistics throttle export="" group=g seconds_waited=1.500 limits.bps-total=7'
        in lines(tree(throttle=throttle))
    )


def test_at_the_end_those_who_left_are_all_there_are():
    last = tree() | {"connections": []}
    assert not [line for line in lines(last) if line.startswith("statistics left")]


@pytest.mark.parametrize(
    ("name", "text"),
    [("disk", "disk"), ("", '""'), ("a b", '"a b"'), ("a\nb", r'"a\nb"'), ("a=b", '"a=b"'),
     ('say "x"', r'"say \"x\""'), ("d\u00efsk", "d\u00efsk"), ("\x1b[1m", r'"\u001b[1m"')],
)  # fmt: skip
def test_no_name_breaks_a_line(name, text):
    found = tree()
    found["exports"] = {name: found["exports"][""]}
    line = list(lines(found))[1]
    assert line.startswith(f"statistics export export={text} rd_operations=100")
    assert "\n" not in line


def test_logged_whatever_the_level(caplog):
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        log_statistics(tree())
    finally:
        root.setLevel(level)
    assert [record.getMessage() for record in caplog.records] == list(lines(tree()))
