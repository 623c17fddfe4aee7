"""Faults as values: what they parse from, what they are about, and what makes no sense."""

import errno
import pathlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.blockdev import FaultOptions, parse_node
from nbdserve.errors import ConfigError, ImageError
from nbdserve.faults import KINDS, OPS, SUITS, Fault, parse_fault, parse_faults
from nbdserve.imageopts import parse_image_opts, parse_json_name
from nbdserve.references import ANY_FILE

FILE = "file.driver=raw,file.file.filename=a"

# A value of each option, as text and as Python has it.
VALUES = {
    "ops": ("write+flush", frozenset({"write", "flush"})),
    "offset": ("64k", 65536),
    "length": ("0x200", 512),
    "after": ("3", 3),
    "count": ("2", 2),
    "probability": ("0.25", 0.25),
    "if-file": ("/tmp/broken", "/tmp/broken"),
    "error": ("ENOSPC", "ENOSPC"),
    "delay": ("1.5", 1.5),
    "jitter": ("1e-3", 0.001),
    "stuck": ("on", True),
    "short": ("random", "random"),
    "torn": ("yes", True),
    "silent": ("true", True),
    "lost": ("on", True),
    "flip-bits": ("8", 8),
    "bps": ("1M", 1 << 20),
    "disconnect": ("on", True),
}
NEEDED = {
    **dict.fromkeys(("ops", "offset", "length", "after", "count", "probability", "if-file"),
                    "stuck"),
    "silent": "torn",
}  # fmt: skip


def test_there_is_a_value_of_each_option():
    assert VALUES.keys() == KINDS.keys()
    assert SUITS.keys() <= KINDS.keys()


@pytest.mark.parametrize("option", VALUES)
def test_each_option_is_parsed_as_if_written_by_hand(option):
    text, value = VALUES[option]
    said = {option: text}
    by_hand = {option.replace("-", "_"): value}
    if option in NEEDED:
        said[NEEDED[option]] = "on"
        by_hand[NEEDED[option]] = True
    fault = parse_fault(said)
    assert fault == Fault(**by_hand)
    assert getattr(fault, option.replace("-", "_")) == value
    assert dict(fault.options())[option] == value
    assert parse_fault(",".join(f"{name}={word}" for name, word in said.items())) == fault


@pytest.mark.parametrize("option", ["offset", "after", "count", "probability", "delay", "bps"])
def test_numbers_of_json_are_taken_as_they_are(option):
    value = VALUES[option][1]
    assert parse_fault({option: value, "stuck": True}) == Fault(
        stuck=True, **{option: value}  # type: ignore[arg-type]
    )


def test_operations_in_every_spelling():
    both = Fault(ops={"read", "flush"}, error="EIO")
    assert both == Fault(ops="read+flush", error="EIO") == Fault(ops=["flush", "read"], error="EIO")
    assert both == parse_fault("read+flush,error=EIO")
    assert Fault(ops="all", error="EIO") == Fault(error="EIO")
    assert Fault(error="EIO").ops == set(OPS)


@pytest.mark.parametrize(
    ("fault", "ops"),
    [
        (Fault(flip_bits=1), {"read"}),
        (Fault(torn=True), {"write", "write-zeroes"}),
        (Fault(short=1), {"write", "write-zeroes"}),
        (Fault(lost=True), {"write", "write-zeroes", "discard", "flush"}),
        (Fault(bps=1), {"read", "write", "write-zeroes", "discard"}),
        (Fault(bps=1, torn=True), {"write", "write-zeroes"}),
        (Fault(error="EIO", offset=0), set(OPS) - {"flush"}),
        (Fault(lost=True, length=512), {"write", "write-zeroes", "discard"}),
    ],
)
def test_without_operations_it_is_about_all_that_can_have_it(fault, ops):
    assert fault.ops == ops


@pytest.mark.parametrize(
    ("fault", "number"),
    [
        (Fault(error="EROFS"), errno.EROFS),
        (Fault(torn=True), errno.EIO),
        (Fault(short=0), errno.EIO),
        (Fault(short=0, error="ENOSPC"), errno.ENOSPC),
        (Fault(torn=True, silent=True), None),
        (Fault(lost=True), None),
        (Fault(stuck=True), None),
    ],
)
def test_what_a_request_fails_with(fault, number):
    assert fault.errno == number


def test_a_range_is_what_a_request_overlaps():
    fault = Fault(error="EIO", offset=1000, length=100)
    hits = [start for start in range(800, 1200, 10) if fault.concerns("read", start, 100)]
    assert (hits[0], hits[-1]) == (910, 1090)
    assert fault.overlap(950, 100) == (1000, 1050)
    assert Fault(error="EIO", offset=1000).concerns("read", 10**12, 1)
    assert not Fault(error="EIO", offset=1000).concerns("read", 0, 1000)
    assert not Fault(error="EIO", length=1000).concerns("read", 1000, 1)
    assert not Fault(ops="write", error="EIO").concerns("read", 0, 1)


REFUSED = [
    ({}, "a fault needs an effect, one of error, delay"),
    ({"ops": "write"}, "a fault needs an effect"),
    ({"delay": 0}, "a fault needs an effect"),
    ({"error": "EFOO"}, "error: 'EFOO' is not the name of an error"),
    ({"error": 5}, "error: 5 is not the name of an error"),
    ({"error": "EIO", "ops": "write+erase"}, "ops: 'erase' is not one; known are all or some of"),
    ({"error": "EIO", "ops": "write+"}, "ops: '' is not one"),
    ({"error": "EIO", "ops": 3}, "ops: 3 is not names of operations"),
    ({"error": "EIO", "offset": -1}, "offset: -1 is not an offset"),
    ({"error": "EIO", "length": 0}, "length: 0 is not a length in bytes, at least 1"),
    ({"error": "EIO", "count": 0}, "count: 0 is not a number of requests, at least 1"),
    ({"error": "EIO", "count": True}, "count: True is not a number"),
    ({"error": "EIO", "after": -1}, "after: -1 is not a number of requests"),
    ({"error": "EIO", "after": 1.5}, "after: 1.5 is not a number of requests"),
    ({"error": "EIO", "probability": 1.1}, "probability: 1.1 is not between 0 and 1"),
    ({"error": "EIO", "probability": float("nan")}, "probability: nan is not between"),
    ({"error": "EIO", "if_file": ""}, "if-file: '' is not a path"),
    ({"delay": -1.0}, "delay: -1.0 is not a number of seconds"),
    ({"delay": float("inf")}, "delay: inf is not a number of seconds"),
    ({"jitter": "much"}, "jitter: 'much' is not a number of seconds"),
    ({"stuck": "on"}, "stuck: 'on' is not on or off"),
    ({"short": -1}, "short: -1 is not a number of sectors, or random"),
    ({"short": "some"}, "short: 'some' is not a number of sectors"),
    ({"short": True}, "short: True is not a number of sectors"),
    ({"flip_bits": True}, "flip-bits: True is not a number of bits"),
    ({"bps": 0.5}, "bps: 0.5 is not a number of bytes a second"),
    ({"flip_bits": 1, "ops": "write"}, "flip-bits: write cannot have it, only read"),
    ({"flip_bits": 1, "ops": "all"}, "flip-bits: write cannot have it, only read"),
    ({"torn": True, "ops": "write+read"}, "torn: read cannot have it, only write+write-zeroes"),
    ({"short": 1, "ops": "discard"}, "short: discard cannot have it"),
    ({"lost": True, "ops": "read"}, "lost: read cannot have it"),
    ({"bps": 1, "ops": "flush"}, "bps: flush cannot have it"),
    ({"error": "EIO", "ops": "flush", "offset": 0}, "offset: flush cannot have it"),
    ({"error": "EIO", "ops": "all", "length": 5}, "length: flush cannot have it"),
    ({"lost": True, "disconnect": True}, "lost and disconnect cannot both be set"),
    ({"torn": True, "short": 1}, "short and torn cannot both be set"),
    ({"lost": True, "error": "EIO"}, "error and lost cannot both be set"),
    ({"disconnect": True, "error": "EIO"}, "error and disconnect cannot both be set"),
    ({"silent": True, "error": "EIO"}, "silent needs short or torn"),
    ({"silent": True, "lost": True}, "silent needs short or torn"),
    ({"silent": True, "torn": True, "error": "EIO"}, "silent and error cannot both be set"),
    ({"flip_bits": 1, "error": "EIO"}, "flip-bits is for reads that succeed"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_makes_no_sense_is_refused_in_one_line(options, said):
    with pytest.raises(ConfigError) as refused:
        Fault(**options)
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("faults.0.error=EFOO", "faults.0.error: 'EFOO' is not the name"),
        ("faults.0.eror=EIO", "faults.0.eror: a fault has no such option"),
        ("faults.0.error=EIO,faults.0.count=many", "faults.0.count: 'many' is not a number"),
        ("faults.0.error=EIO,faults.1.ops=read", "faults.1: a fault needs an effect"),
        ("faults.1.error=EIO", "faults.0 is missing: faults are numbered from 0"),
        ("faults.0=EIO", "faults.0: a fault has options, as "),
        ("faults=EIO", "faults: it is a list, as "),
        ("seed=x", "seed: 'x' is not a number"),
        ("seed=-1", "seed: '-1' is not a number"),
        ("seed=" + "9" * 5000, "seed: '9"),
        ("room=-1", "room: '-1' is not a size"),
        ("rooms=1", "rooms: the driver fault has no such option"),
        ("faults.0.silent=maybe,faults.0.torn=on", "faults.0.silent: 'maybe' is not on or off"),
    ],
)
def test_an_error_names_the_option_with_its_path(text, said):
    for prefix in ("", "file."):
        options = ",".join(prefix + word for word in f"driver=fault,{text},{FILE}".split(","))
        with pytest.raises(ConfigError) as refused:
            parse_node(parse_image_opts(f"driver=qcow2,{options}" if prefix else options))
        assert str(refused.value).startswith(prefix + said)


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from([text for text, _ in VALUES.values()])
)  # fmt: skip


@given(st.dictionaries(st.sampled_from([*KINDS, "file", ""]), SCALARS, max_size=6))
def test_any_options_are_a_fault_or_refused_in_one_line(options):
    said = "faults.0"
    try:
        fault = parse_fault(options, "faults.0.")
    except ConfigError as error:
        said = str(error)
    else:
        assert Fault(**{key.replace("-", "_"): value for key, value in fault.options()}) == fault
        assert fault.ops
    assert said.startswith("faults.0")
    assert "\n" not in said


def test_a_node_has_faults_in_their_order_a_seed_and_room():
    text = "".join(f",faults.{number}.after={number},faults.{number}.stuck=on"
                   for number in reversed(range(11)))  # fmt: skip
    tree = parse_node(parse_image_opts(f"driver=fault,seed=7,room=1M{text},{FILE}"))
    assert isinstance(tree, FaultOptions)
    assert (tree.seed, tree.room) == (7, 1 << 20)
    assert [fault.after for fault in tree.faults] == [*range(11)]


def test_json_is_as_good():
    tree = parse_node(parse_json_name(
        'json:{"driver": "fault", "seed": 7, "room": 0, "faults":'
        ' [{"ops": "write", "error": "EIO"}, {"torn": true, "short": null, "probability": 0.5}],'
        ' "file": {"driver": "raw", "file.filename": "a"}}'
    ))  # fmt: skip
    assert isinstance(tree, FaultOptions)
    assert (tree.seed, tree.room) == (7, 0)
    assert tree.faults == (Fault(ops="write", error="EIO"), Fault(torn=True, probability=0.5))


def test_no_faults_are_an_empty_list():
    assert parse_faults({}, "faults.") == ()


def test_the_examples_of_the_manual():
    """Each option has one for the command line and one in Python, and they say the same."""
    manual = (pathlib.Path(__file__).parent.parent / "docs" / "faults.md").read_text()
    manual = manual[manual.index("## Triggers") : manual.index("## On command")]
    rows = [line.split(" | ") for line in manual.splitlines() if line.startswith("| `")]
    documented = set()
    for option, _, *examples in rows:
        text, python = (re.search("`(.+?)`", example)[1] for example in examples)
        documented |= set(re.findall("`(.+?)`", option))
        try:
            fault = parse_fault(text)
        except ConfigError:  # a trigger alone
            text, python = f"{text},stuck=on", f"{python}, stuck=True"
            fault = parse_fault(text)
        assert fault == eval(f"Fault({python})"), text
    assert documented == KINDS.keys()


def test_no_image_may_ask_for_faults():
    for name in ("{'driver':'fault','file.filename':'a'}",
                 "{'driver':'raw','file':{'driver':'fault','file':{'filename':'a'}}}"):
        with pytest.raises(ImageError, match="no image may ask for the driver 'fault'"):
            ANY_FILE.check(name, parse_json_name(f"json:{name}"))
