"""A plan says what --image-opts would; a manner what the command line would."""

import json

import pytest

from nbdserve.blockdev import FaultOptions, MemoryOptions, PowerCutOptions, Qcow2Options, RawOptions
from nbdserve.cli import serve
from nbdserve.cli.options import serve_config
from nbdserve.config import ListenConfig
from nbdserve.errors import ConfigError
from nbdserve.faults import RANDOM, Fault
from nbdserve.powercut.content import Content
from nbdserve.testing.manner import Manner
from nbdserve.testing.plan import Plan

FAULTS = [Fault(ops="write+flush", error="EIO", count=3, after=1), Fault(short=RANDOM, silent=True)]


def chain(options):
    """The drivers from the root to the leaf."""
    found = []
    while options is not None:
        found.append(options)
        options = getattr(options, "file", None)
    return found


def tree(plan):
    return plan.tree(Content(512), "x")


def test_the_order_of_the_nodes():
    for where, kinds in {
        "disk": [FaultOptions, PowerCutOptions, Qcow2Options, FaultOptions, MemoryOptions],
        "file": [FaultOptions, Qcow2Options, FaultOptions, PowerCutOptions, MemoryOptions],
    }.items():
        plan = Plan(faults=FAULTS, file_faults=FAULTS, power_cut=where)
        assert [type(node) for node in chain(tree(plan))] == kinds


def test_nothing_that_nobody_asked_for():
    assert json.loads(Plan().name("a b.img").removeprefix("json:")) == {
        "driver": "qcow2", "file": {"driver": "file", "filename": "a b.img"},
    }  # fmt: skip
    assert [type(node) for node in chain(tree(Plan(format="raw")))] == [RawOptions, MemoryOptions]


def test_faults_come_through_as_they_are():
    upper, _, lower, _ = chain(tree(Plan(faults=FAULTS, seed=7, room="1M", file_room=512)))
    assert upper == FaultOptions(
        file=upper.file, faults=tuple(FAULTS), seed=7, room=1 << 20
    )
    assert (lower.faults, lower.room, lower.seed) == ((), 512, 7)


def test_options_of_the_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = Plan(power_cut="disk", write_log="a.log", history=False, max_data="1M")
    node = chain(tree(plan))[0]
    assert (node.log, node.history, node.max_data) == (str(tmp_path / "a.log"), False, 1 << 20)


def test_options_of_the_format():
    node = tree(Plan(options={"l2-cache-size": "1M"}))
    assert node.l2_cache_size == 1 << 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"power_cut": "cable"}, "'cable' is neither 'disk' nor 'file'"),
        ({"write_log": "x"}, "write_log needs power_cut"),
        ({"history": False}, "history needs power_cut"),
        ({"max_data": 5}, "max_data needs power_cut"),
    ],
)
def test_what_makes_no_sense(arguments, said):
    with pytest.raises(ConfigError, match=said):
        Plan(**arguments)


MANNERS = [
    Manner(),
    Manner(cache="none", aio="threads", discard="ignore", detect_zeroes="on", read_only=True,
           offset="1k", throttle="iops-total=5,iops-total-max=9", export="name", clients=3),
]  # fmt: skip


@pytest.mark.parametrize("manner", MANNERS)
def test_a_manner_means_the_same_on_the_command_line(manner):
    argv = [*manner.words(), "--socket=/socket", "--", "disk"]
    options = serve.command.make_context("serve", argv).params
    found = serve_config(options, persistent=True)
    wanted = manner.config("disk", None, ListenConfig(found.listen.host, unix_path="/socket"))
    assert found == wanted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"cache": "much"}, "cache: 'much' is not one of writeback, .*auto"),
        ({"aio": "posix"}, "aio: 'posix' is not one of threads"),
        ({"discard": "maybe"}, "discard: 'maybe' is not one of"),
        ({"detect_zeroes": "maybe"}, "detect_zeroes: 'maybe' is not one of"),
    ],
)
def test_values_that_there_are_not(arguments, said):
    with pytest.raises(ConfigError, match=said):
        Manner(**arguments)
