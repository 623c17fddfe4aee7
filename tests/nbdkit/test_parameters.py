"""key=value means what the same option of `serve` means."""

import pytest

from nbdserve.config import CACHE_MODES
from nbdserve.errors import ConfigError
from nbdserve.nbdkit.parameters import PARAMETERS, Parameters, for_reading


def parsed(*words):
    parameters = Parameters()
    for word in words:
        parameters.add(*word.split("=", 1))
    return parameters


def test_a_file_alone_has_the_defaults_of_serve():
    image = parsed("file=disk.qcow2").image()
    assert image.filename == "disk.qcow2"
    assert image.cache is CACHE_MODES["writeback"]
    assert (image.discard, image.detect_zeroes, image.options) == ("unmap", "off", None)


def test_options_of_nodes_stand_beside_the_file():
    image = parsed("file=disk.qcow2", "format=qcow2", "l2-cache-size=1M",
                   "backing.file.filename=base", "cache=none", "read-only=on").image()
    assert image.tree.l2_cache_size == 1 << 20
    assert image.tree.file.filename == "disk.qcow2"
    assert image.cache.direct
    assert image.read_only


def test_without_a_file_they_are_the_whole_tree():
    image = parsed("driver=raw", "file.filename=disk.raw", "size=1M").image()
    assert image.tree.size == 1 << 20
    assert image.filename == "disk.raw"


def test_what_may_be_given_several_times():
    parameters = parsed(
        "file=x", "fault=ops=read,error=EIO", "fault=ops=write,error=EIO",
        "throttle=iops-total=10", "throttle=bps-total=1M",
        "object=throttle-group,id=g,x-iops-total=5")
    image = parameters.image()
    assert len(image.faults) == 2
    assert image.throttle.limits.bps_total.average == 1 << 20
    assert list(parameters.groups()) == ["g"]


def test_the_export():
    export = parsed("file=x", "export-name=e", "description=d").export()
    assert (export.name, export.description) == ("e", "d")


def test_for_reading_changes_nothing_else():
    image = parsed("file=x", "cache=none").image()
    assert for_reading(image).read_only
    assert for_reading(image).cache is image.cache


@pytest.mark.parametrize(("words", "said"), [
    ((), "file must be given"),
    (("file=x", "file=y"), "file: is given twice"),
    (("file=x", "l2-cache-size=1", "l2-cache-size=1"), "l2-cache-size: is given twice"),
    (("file=x", "format=raw", "driver=raw"), "give one of them"),
    (("file=x", "discard=perhaps"), "discard: 'perhaps' is none of"),
    (("file=x", "image-refs=/no/such"), "neither any nor none nor a folder"),
    (("file=x", "offset=1Q"), "offset"),
    (("file=x", "fault=ops=read"), "fault"),
    (("file=x", "driver=qcow2", "discard=ignore", "file.zork=1"), "zork"),
])
def test_what_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        parsed(*words).image()


def test_every_parameter_says_what_it_is():
    assert all(parameter.help.endswith(".") for parameter in PARAMETERS.values())
