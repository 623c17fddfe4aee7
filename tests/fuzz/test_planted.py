"""The targets find bugs: each of these is one changed line, found within so many inputs.

The inputs are what the long run begins with, the seeds and the kept corpus, and then mutations of
these, always the same. Without the change all of them pass (test_targets.py, and the last test
here).
"""

from __future__ import annotations

import itertools
import random

import pytest

from fuzz.planted import Bug, planted
from fuzz.targets import TARGETS
from fuzz.test_targets import mutation, simple
from nbdserve.formats.qcow2.allocation import Allocation
from nbdserve.formats.qcow2.compressed import compressed_extent
from nbdserve.formats.qcow2.consistency import _check_region, check_l1_covers_disk
from nbdserve.formats.qcow2.extensions import _entries, _feature_names
from nbdserve.formats.qcow2.fields import parse_fields
from nbdserve.formats.qcow2.image import Image
from nbdserve.formats.qcow2.metadata import MetadataMap
from nbdserve.formats.qcow2.refcount import Refcounts
from nbdserve.formats.qcow2.resolve import Mapping
from nbdserve.imageopts import _collect, _value
from nbdserve.nbd import options
from nbdserve.nbd.batch import Executor
from nbdserve.nbd.handshake import Handshake
from nbdserve.nbd.late import LateRequests
from nbdserve.nbd.requests import RequestBuffer
from nbdserve.nbd.validate import Validator
from nbdserve.units import _bytes

BUGS = [
    # Off by one in the request parser.
    (
        "requests",
        300,
        Bug(RequestBuffer.parse, "end - start < needed:", "end - start < needed - 1:"),
    ),
    (
        "requests",
        300,
        Bug(RequestBuffer.parse, "end - start >= HEADER_SIZE", "end - start > HEADER_SIZE"),
    ),
    (
        "requests",
        300,
        Bug(RequestBuffer.parse, "length > MAXIMUM_PAYLOAD", "length >= MAXIMUM_PAYLOAD"),
    ),
    ("requests", 300, Bug(RequestBuffer._let_go, " and not self._pinned", "")),
    (
        "requests",
        300,
        Bug(Validator.validate, "offset + length > end", "offset + length > end + 1"),
    ),
    (
        "transmission",
        300,
        Bug(RequestBuffer.parse, "end - start < needed:", "end - start < needed - 1:"),
    ),
    ("transmission", 300, Bug(LateRequests._run_next, "self._count(-1, -nb_bytes)", "pass")),
    (
        "transmission",
        300,
        Bug(Executor.execute, "except OSError as error:", "except ValueError as error:"),
    ),
    # Off by one in the check of an option's length.
    (
        "handshake",
        300,
        Bug(
            Handshake._option_header,
            "handler_of(self._option).longest:",
            "handler_of(self._option).longest + 1:",
        ),
    ),
    (
        "handshake",
        300,
        Bug(Handshake._option_header, "> MAX_OPTION_LENGTH", ">= MAX_OPTION_LENGTH"),
    ),
    ("handshake", 300, Bug(Handshake._option_header, "> MAX_OPTIONS", ">= MAX_OPTIONS")),
    ("handshake", 300, Bug(options._check_strings, "> MAX_STRING", ">= MAX_STRING")),
    ("handshake", 300, Bug(options._set_meta_context, "haggling.selection = None", "pass")),
    # No bound on the length of a header extension.
    (
        "header",
        300,
        Bug(
            _entries,
            "extension is None or position + 8 + extension.length > end",
            "extension is None",
        ),
    ),
    (
        "header",
        3000,
        Bug(_feature_names, "entry.type in FeatureType.__members__.values() and ", ""),
    ),
    # No bound on the size of L1.
    ("header", 3000, Bug(_check_region, "region.nb_bytes > region.limit", "False")),
    ("header", 3000, Bug(check_l1_covers_disk, "fields.l1_size < needed", "False")),
    ("header", 3000, Bug(parse_fields, "length > cluster_size", "False")),
    # No check that an L2 entry is aligned.
    (
        "image",
        1000,
        Bug(Mapping.check_entry, "entry & self._reserved", "entry & self._reserved & 0x1FF"),
    ),
    ("image", 1000, Bug(compressed_extent, "(1 + additional_sectors)", "additional_sectors")),
    ("image", 1000, Bug(Image.load_l2, "host_offset & self.geometry.in_cluster", "False")),
    ("image", 1000, Bug(MetadataMap.assert_data, "offset in self.offsets", "False")),
    ("image", 1000, Bug(Allocation.link, "self._image.forget(", "bool(")),
    (
        "image",
        1000,
        Bug(Refcounts._take_from, "entries[index + taken] == 0", "entries[index + taken] < 2"),
    ),
    ("option_strings", 1000, Bug(_bytes, "if fraction.strip", "if False and fraction.strip")),
    ("option_strings", 1000, Bug(_value, '.replace(",,", ",")', "")),
    ("option_strings", 1000, Bug(_collect, "range(1, len(names))", "range(2, len(names))")),
]


def inputs(target):
    """Without an end."""
    starts = [*target.module.seeds(), *target.corpus]
    yield from starts
    mutate = mutation(target.module, simple) or (lambda data, longest, _: simple(data, longest))
    chance = random.Random(1)
    while True:
        yield mutate(chance.choice(starts), target.longest, chance.randrange(1 << 32))


def find(target, limit):
    """How many inputs it takes until one fails; None: more than `limit`."""
    for number, data in enumerate(itertools.islice(inputs(target), limit)):
        try:
            target.function(data)
        except BaseException:  # whatever it is, the fuzzer would stop here
            return number + 1
    return None


@pytest.mark.parametrize(
    ("name", "limit", "bug"), BUGS, ids=[f"{n}-{b.function.__name__}-{b.old}" for n, _, b in BUGS]
)
def test_a_planted_bug_is_found(name, limit, bug):
    with planted(bug):
        assert find(TARGETS[name], limit) is not None, f"not in {limit} inputs"


@pytest.mark.parametrize("name", TARGETS)
def test_without_a_bug_nothing_is_found(name):
    assert find(TARGETS[name], 300) is None


def test_a_bug_that_is_not_there_cannot_be_planted():
    with pytest.raises(AssertionError, match="not once"), planted(Bug(find, "no such line", "")):
        pass
