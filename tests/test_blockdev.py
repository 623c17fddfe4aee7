"""From a flat dict to typed nodes: every driver, every option, and what is refused by name."""

import pytest

from nbdserve.blockdev import (
    FileOptions,
    ProbedOptions,
    Qcow2Options,
    RawOptions,
    ThrottleOptions,
    image_tree,
    named_tree,
    parse_node,
)
from nbdserve.errors import ConfigError, ImageError
from nbdserve.imageopts import options_of_name, parse_image_opts

FILE = FileOptions(filename="a")


def node(text):
    return parse_node(parse_image_opts(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("driver=file,filename=a", FileOptions(filename="a", driver="file")),
        ("driver=host_device,filename=a", FileOptions(filename="a", driver="host_device")),
        ("driver=qcow2,file.filename=a", Qcow2Options(file=FILE)),
        (
            "driver=qcow2,file.driver=file,file.filename=a",
            Qcow2Options(file=FileOptions(filename="a", driver="file")),
        ),
        ("driver=raw,file.filename=a", RawOptions(file=FILE)),
        (
            "driver=raw,offset=4k,size=1M,file.filename=a",
            RawOptions(file=FILE, offset=4096, size=1 << 20),
        ),
        (
            "driver=raw,file.driver=qcow2,file.file.filename=a",
            RawOptions(file=Qcow2Options(file=FILE)),
        ),
        (
            "driver=throttle,throttle-group=g,file.driver=qcow2,file.file.filename=a",
            ThrottleOptions(group="g", file=Qcow2Options(file=FILE)),
        ),
        (
            "driver=qcow2,file.driver=throttle,file.throttle-group=g,file.file.filename=a",
            Qcow2Options(file=ThrottleOptions(group="g", file=FILE)),
        ),
        # The child of a filter is not probed either.
        (
            "driver=throttle,throttle-group=g,file.filename=a",
            ThrottleOptions(group="g", file=FILE),
        ),
        ("file.filename=a", ProbedOptions(file=FILE, rest={}, path="")),
        # Names in options are taken as they are, whatever they begin with.
        (
            'driver=raw,file.filename=json:{"x":1}',
            RawOptions(file=FileOptions(filename='json:{"x":1}')),
        ),
        (
            "driver=qcow2,file.filename=a,backing=",
            Qcow2Options(file=FILE, backing=None),
        ),
        (
            "driver=qcow2,file.filename=a,data-file.filename=b,data-file.cache.direct=on",
            Qcow2Options(file=FILE, data_file=FileOptions(filename="b", direct=True)),
        ),
        (
            "driver=qcow2,file.filename=a,backing.driver=raw,backing.file.locking=off",
            Qcow2Options(file=FILE, backing={"driver": "raw", "file.locking": "off"}),
        ),
    ],
)
def test_trees(text, expected):
    assert node(text) == expected


@pytest.mark.parametrize(
    ("option", "fields"),
    [
        ("node-name=disk0", {"node_name": "disk0"}),
        ("node-name=" + "a" * 31, {"node_name": "a" * 31}),
        ("read-only=on", {"read_only": True}),
        ("read-only=off", {"read_only": False}),
        ("read-only=yes", {"read_only": True}),
        ("read-only=n", {"read_only": False}),
        ("auto-read-only=true", {"auto_read_only": True}),
        ("force-share=on", {"force_share": True}),
        ("cache.direct=on", {"direct": True}),
        ("cache.direct=off", {"direct": False}),
        ("cache.no-flush=on", {"no_flush": True}),
        ("discard=on", {"discard": "unmap"}),
        ("discard=unmap", {"discard": "unmap"}),
        ("discard=off", {"discard": "ignore"}),
        ("discard=ignore", {"discard": "ignore"}),
        ("detect-zeroes=on", {"detect_zeroes": "on"}),
        ("detect-zeroes=unmap", {"detect_zeroes": "unmap"}),
    ],
)
def test_every_node_has_the_common_options(option, fields):
    assert node(f"driver=raw,{option},file.filename=a") == RawOptions(file=FILE, **fields)
    assert node(f"driver=qcow2,{option},file.filename=a") == Qcow2Options(file=FILE, **fields)
    assert node(f"driver=raw,file.{option},file.filename=a") == RawOptions(
        file=FileOptions(filename="a", **fields)
    )
    probed = node(f"{option},file.filename=a")
    assert {name: getattr(probed, name) for name in fields} == fields
    assert probed.of_format("qcow2") == Qcow2Options(file=FILE, **fields)


@pytest.mark.parametrize(
    ("option", "fields"),
    [
        ("aio=io_uring", {"aio": "io_uring"}),
        ("aio=native", {"aio": "native"}),
        ("locking=off", {"locking": "off"}),
        ("locking=on", {"locking": "on"}),
    ],
)
def test_file(option, fields):
    assert node(f"driver=file,filename=a,{option}") == FileOptions(
        filename="a", driver="file", **fields
    )


MIB = 1 << 20


@pytest.mark.parametrize(
    ("options", "l2", "refcount"),
    [
        ("", None, None),
        ("l2-cache-size=1M", MIB, None),
        ("refcount-cache-size=1M", None, MIB),
        ("cache-size=2M", 2 * MIB - (256 << 10), 256 << 10),
        ("cache-size=100k", 0, 100 << 10),
        ("cache-size=2M,l2-cache-size=1M", MIB, MIB),
        ("cache-size=3M,refcount-cache-size=1M", 2 * MIB, MIB),
        ("l2-cache-size=1M,refcount-cache-size=2M", MIB, 2 * MIB),
    ],
)
def test_cache_sizes(options, l2, refcount):
    expected = Qcow2Options(file=FILE, l2_cache_size=l2, refcount_cache_size=refcount)
    assert node(f"driver=qcow2,file.filename=a,{options}") == expected


def test_json_values_have_types():
    options = {"driver": "raw", "file.filename": "a", "read-only": True, "size": 1024}
    assert parse_node(options) == RawOptions(file=FILE, read_only=True, size=1024)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "driver or file.filename must be given"),
        ("read-only=on", "driver or file.filename must be given"),
        ("filename=a", "driver or file.filename must be given"),
        ("driver=qcow2", "file.filename must be given"),
        ("driver=qcow2,filename=a", "file.filename must be given"),
        ("driver=qcow2,file.driver=file", "file.filename must be given"),
        ("driver=raw,file.driver=qcow2", "file.file.filename must be given"),
        ("driver=file,filename=", "filename must be given"),
        (
            "driver=",
            "driver: unknown driver ''; known are qcow2, raw, throttle, fault, power-cut,"
            " file, host_device",
        ),
        ("driver=vmdk,file.filename=a", "driver: unknown driver 'vmdk'"),
        ("driver=qcow2,file.driver=nbd", "file.driver: unknown driver 'nbd'"),
        ("a.qcow2", "file: there is no node 'a.qcow2' to refer to; a file is named by file.filen"),
        ("driver=qcow2,file.filename=a,backing=b", "backing: there is no node 'b'"),
        ("driver=qcow2,file.filename=a,data-file=b", "data-file: there is no node 'b'"),
        ("driver=qcow2,file.filename=a,data-file.aio=native", "data-file.filename must be given"),
        ("driver=raw,file.filename=a,data-file.filename=b", "data-file.filename: the driver raw"),
        ("driver=qcow2,file.filename=a,bogus=1", "bogus: the driver qcow2 has no such option"),
        ("driver=qcow2,file.filename=a,lazy-refcounts=on", "lazy-refcounts: the driver qcow2 has"),
        ("driver=qcow2,file.filename=a,cache=none", "cache: the driver qcow2 has no such option"),
        ("driver=qcow2,file.filename=a,cache.writeback=on", "cache.writeback: the driver qcow2"),
        ("driver=qcow2,file.filename=a,offset=1", "offset: the driver qcow2 has no such option"),
        ("driver=qcow2,file.filename=a,file.size=1", "file.size: the driver file has no such"),
        ("driver=qcow2,file.filename=a,id=x", "id: the driver qcow2 has no such option"),
        ("driver=raw,file.filename=a,backing=", "backing: the driver raw has no such option"),
        ("driver=file,filename=a,file.filename=b", "file.filename: the driver file has no such"),
        ("driver=raw,file.filename=a,size=1000", "size: 1000 is not a multiple of 512"),
        ("driver=raw,file.filename=a,offset=x", "offset: 'x' is not a size"),
        ("driver=raw,file.filename=a,offset=-1", "offset: '-1' is not a size"),
        ("driver=raw,file.filename=a,read-only=maybe", "read-only: 'maybe' is not on or off"),
        ("driver=raw,file.filename=a,cache.direct=", "cache.direct: '' is not on or off"),
        ("driver=raw,file.filename=a,discard=x", "discard: 'x' is not one of ignore, off, unmap"),
        ("driver=raw,file.filename=a,detect-zeroes=x", "detect-zeroes: 'x' is not one of off, on"),
        ("driver=raw,file.filename=a,file.aio=x", "file.aio: 'x' is not one of threads, io_uring"),
        ("driver=raw,file.filename=a,file.locking=x", "file.locking: 'x' is not one of auto, on"),
        ("driver=raw,file.filename=a,node-name=1ab", "node-name: '1ab' is not a name: letters"),
        ("driver=raw,file.filename=a,node-name=", "node-name: '' is not a name"),
        ("driver=raw,file.filename=a,node-name=a b", "node-name: 'a b' is not a name"),
        ("driver=raw,file.filename=a,node-name=" + "a" * 32, "is longer than 31 characters"),
        ("driver=throttle,file.filename=a", "throttle-group must be given"),
        ("driver=throttle,throttle-group=,file.filename=a", "throttle-group must be given"),
        (
            "driver=qcow2,file.filename=a,cache-size=2M,l2-cache-size=1M,refcount-cache-size=1M",
            "cache-size, l2-cache-size, refcount-cache-size cannot all be set",
        ),
        (
            "driver=qcow2,file.filename=a,cache-size=1k,l2-cache-size=2k",
            "l2-cache-size: 2048 is more than cache-size, 1024",
        ),
        (
            "driver=qcow2,file.filename=a,cache-size=1k,refcount-cache-size=2k",
            "refcount-cache-size: 2048 is more than cache-size, 1024",
        ),
    ],
)
def test_refusals(text, said):
    with pytest.raises(ConfigError) as refused:
        node(text)
    assert str(refused.value).startswith(said) or said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("read-only", 1, "read-only: 1 is not on or off"),
        ("read-only", None, "read-only: null is not on or off"),
        ("size", True, "size: true is not a size in bytes"),
        ("size", 1.5, "size: 1.5 is not a size in bytes"),
        ("size", -1, "size: '-1' is not a size"),
        ("node-name", 5, "node-name: 5 is not a string"),
        ("driver", None, "driver: null is not a string"),
        ("file.filename", False, "file.filename: false is not a string"),
        ("discard", True, "discard: true is not one of"),
    ],
)
def test_json_values_of_the_wrong_type(option, value, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        parse_node({"driver": "raw", "file.filename": "a"} | {option: value})


def test_what_a_probed_format_does_not_have_is_refused_then():
    probed = parse_node({"file.filename": "a", "l2-cache-size": "1M"}, "backing.")
    assert probed.of_format("qcow2") == Qcow2Options(file=FILE, l2_cache_size=1 << 20)
    with pytest.raises(ConfigError, match=r"backing\.l2-cache-size: the driver raw has no such"):
        probed.of_format("raw")


def test_a_path_goes_before_every_name():
    with pytest.raises(ConfigError, match=r"^backing\.file\.aio: 'x'"):
        parse_node({"driver": "raw", "file.filename": "a", "file.aio": "x"}, "backing.")


def test_a_plain_name_and_a_format_are_the_same_tree():
    assert image_tree("a", "qcow2") == node("driver=qcow2,file.filename=a")
    assert image_tree("a", None) == node("file.filename=a")
    with pytest.raises(ImageError, match=r"^a: unknown format 'vmdk'; known are qcow2, raw"):
        image_tree("a", "vmdk")
    with pytest.raises(ImageError, match=r"^/d/a: unknown format"):
        image_tree("a", "file", directory="/d")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("a", None), ProbedOptions(file=FILE, rest={}, path="")),
        (("file:a", "raw"), RawOptions(file=FILE)),
        (("./x:a", "raw"), RawOptions(file=FileOptions(filename="./x:a"))),
        (("json:{'driver': 'raw', 'file.filename': 'a'}", None), RawOptions(file=FILE)),
        (("json:{'driver': 'qcow2', 'file.filename': 'a'}", "raw"), RawOptions(file=FILE)),
    ],
)
def test_names(arguments, expected):
    assert image_tree(*arguments) == expected


@pytest.mark.parametrize(
    ("name", "opened"),
    [
        ("a", "/d/a"),
        ("../a", "/d/../a"),
        ("/a", "/a"),
        ("file:a", "a"),
        ("json:{'file.filename': 'a'}", "a"),
        ("", "/d/"),
    ],
)
def test_only_a_plain_name_is_relative_to_the_overlay(name, opened):
    expected = RawOptions(file=FileOptions(filename=opened))
    assert image_tree(name, "raw", directory="/d") == expected


def test_what_was_given_goes_before_the_name_and_the_format():
    name = "json:{'driver': 'qcow2', 'file.filename': 'a', 'file.aio': 'threads', 'size': 512}"
    given = {"driver": "raw", "file.aio": "native"}
    assert named_tree(name, options_of_name(name), "qcow2", given=given) == RawOptions(
        file=FileOptions(filename="a", aio="native"), size=512
    )
