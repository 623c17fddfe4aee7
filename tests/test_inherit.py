"""Who inherits what: a table of QEMU's rules, each seen from both sides."""

from dataclasses import replace

import pytest

from nbdserve.blockdev import NodeOptions
from nbdserve.errors import ConfigError
from nbdserve.inherit import ChildRole, Effective, child_settings, root_settings

FILE, BACKING = ChildRole.FILE, ChildRole.BACKING

ALL_ON = Effective(
    read_only=True,
    auto_read_only=True,
    force_share=True,
    direct=True,
    no_flush=True,
    discard="unmap",
    detect_zeroes="unmap",
    aio="native",
)


@pytest.mark.parametrize(
    ("name", "parent", "as_file", "as_backing"),
    [
        ("direct", True, True, True),
        ("direct", False, False, False),
        ("no_flush", True, True, True),
        ("no_flush", False, False, False),
        ("force_share", True, True, True),
        ("force_share", False, False, False),
        ("read_only", True, True, True),
        ("read_only", False, False, True),
        ("auto_read_only", True, True, False),
        ("auto_read_only", False, False, False),
        ("discard", "ignore", "unmap", "unmap"),
        ("discard", "unmap", "unmap", "unmap"),
        ("detect_zeroes", "on", "off", "off"),
        ("aio", "native", "native", "native"),
        ("aio", None, None, None),
    ],
)
def test_what_was_not_given_is_inherited(name, parent, as_file, as_backing):
    above = replace(Effective(read_only=name == "force_share"), **{name: parent})
    assert getattr(child_settings(NodeOptions(), above, FILE, ""), name) == as_file
    assert getattr(child_settings(NodeOptions(), above, BACKING, ""), name) == as_backing


@pytest.mark.parametrize("role", ChildRole)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auto_read_only", False),
        ("force_share", False),
        ("direct", False),
        ("no_flush", False),
        ("discard", "ignore"),
    ],
)
def test_what_was_given_wins(name, value, role):
    options = NodeOptions(**{name: value})
    assert getattr(child_settings(options, ALL_ON, role, ""), name) == value
    above = replace(ALL_ON, detect_zeroes="off")
    assert getattr(root_settings(options, above), name) == value


def test_a_root_takes_the_rest_from_the_command_line():
    assert root_settings(NodeOptions(), ALL_ON) == ALL_ON
    assert root_settings(NodeOptions(direct=False), ALL_ON) == replace(ALL_ON, direct=False)
    assert root_settings(NodeOptions(read_only=True), Effective()) == Effective(read_only=True)
    options = NodeOptions(detect_zeroes="on")
    assert root_settings(options, ALL_ON) == replace(ALL_ON, detect_zeroes="on")


def test_a_file_may_be_writable_below_what_is_not_unless_that_is_left_to_it():
    options, above = NodeOptions(read_only=False), Effective(read_only=True)
    assert not child_settings(options, above, FILE, "").read_only
    options = NodeOptions(read_only=False, auto_read_only=True)
    assert child_settings(options, above, FILE, "").read_only
    assert not child_settings(options, Effective(), FILE, "").read_only


@pytest.mark.parametrize(
    ("options", "parent", "role", "said"),
    [
        (
            NodeOptions(read_only=True), Effective(), FILE,
            "file.read-only=on: the node above is not read-only and writes to it",
        ),
        (
            NodeOptions(read_only=False), Effective(), BACKING,
            "file.read-only=off: nothing here writes to a backing file",
        ),
        (
            NodeOptions(force_share=True), Effective(), FILE,
            "file.force-share=on needs read-only=on",
        ),
        (
            NodeOptions(detect_zeroes="on"), Effective(), FILE,
            "file.detect-zeroes: only the uppermost node looks for zeroes",
        ),
        (
            NodeOptions(detect_zeroes="unmap", discard="ignore"), Effective(), FILE,
            "file.detect-zeroes=unmap needs file.discard=unmap",
        ),
    ],
)  # fmt: skip
def test_a_child_its_parent_cannot_work_with(options, parent, role, said):
    with pytest.raises(ConfigError) as refused:
        child_settings(options, parent, role, "file.")
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("options", "flags", "said"),
    [
        (NodeOptions(force_share=True), Effective(), "force-share=on needs read-only=on"),
        (NodeOptions(read_only=False), ALL_ON, "force-share=on needs read-only=on"),
        (
            NodeOptions(detect_zeroes="unmap"), Effective(),
            "detect-zeroes=unmap needs discard=unmap",
        ),
        (NodeOptions(discard="ignore"), ALL_ON, "detect-zeroes=unmap needs discard=unmap"),
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other(options, flags, said):
    with pytest.raises(ConfigError) as refused:
        root_settings(options, flags)
    assert str(refused.value) == said
