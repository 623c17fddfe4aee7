"""Option strings: each is a value within the documented bounds, or a ConfigError or ImageError that
makes one line; what is accepted means the same when it is spelt in another way.

The first byte of an input says what the rest is: see KINDS. The rest is taken as a command line's
bytes are, so it need not be UTF-8.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from fractions import Fraction
from typing import TYPE_CHECKING

from nbdserve.blockdev import NodeOptions, image_tree, parse_node
from nbdserve.cli.main import _CONTROL, describe
from nbdserve.cli.objects import parse_objects
from nbdserve.cli.throttle import parse_throttle
from nbdserve.config import CACHE_MODES, MAX_LIMIT, ImageConfig, ThrottleLimits
from nbdserve.errors import ConfigError, ImageError
from nbdserve.imageopts import Options, parse_image_opts, parse_json_name
from nbdserve.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DICTIONARY", "KINDS", "option_strings", "seeds"]

MAX_DEPTH = 32
MAX_TEXT = 1 << 16

_SIZE = re.compile(r"[ \t\n\r\f\v]*\+?(?:(0x[0-9a-f]+)|([0-9]+)(?:(\.[0-9]*))?([bkmgtpe]?))", re.I)
_DIGITS = 20  # more of them are refused whatever they say


def option_strings(data: bytes) -> None:
    """The target."""
    if not data:
        return
    text = data[1:].decode("utf-8", "surrogateescape")
    kind = KINDS[data[0] % len(KINDS)]
    try:
        kind(text)
    except (ConfigError, ImageError) as error:
        check_line(describe(error).translate(_CONTROL), text)


def check_line(line: str, text: str) -> None:
    """What the user sees."""
    assert line.strip(), "an error that says nothing"
    assert not any(unicodedata.category(c) == "Cc" for c in line), f"not one line: {line!r}"
    assert len(line) <= 12 * len(text) + 1000, f"{len(line)} characters about {len(text)}"


def same(options: Options, spelt: str, parse: Callable[[str], Options]) -> None:
    """Spelt in another way it means the same."""
    try:
        again = parse(spelt)
    except ConfigError as error:
        raise AssertionError(f"{spelt!r} is refused: {error}") from error
    assert again == options, f"{spelt!r} means {again}, not {options}"


def image_opts(text: str) -> None:
    """--image-opts"""
    options = parse_image_opts(text)
    check_options(options)
    same(options, respelt(options), parse_image_opts)
    same(options, f"json:{json.dumps(options, ensure_ascii=False)}", parse_json_name)
    check_tree(parse_node(options))


def json_name(text: str) -> None:
    """json:"""
    options = parse_json_name(text)
    check_options(options)
    if not any(isinstance(value, float) and math.isinf(value) for value in options.values()):
        same(options, f"json:{json.dumps(options, ensure_ascii=False)}", parse_json_name)
    check_tree(parse_node(options))


def image_name(text: str) -> None:
    """The name of an image on a command line."""
    config = ImageConfig(text)
    assert config.flags.read_only is False
    check_tree(config.tree)


def backing_name(text: str) -> None:
    """The name of a backing file with its format, as an image has them."""
    name, _, backing_format = text.partition("|")
    check_tree(image_tree(name, backing_format or None, directory="/images"))


def image_name_with_cache(text: str) -> None:
    """An image with a cache mode for all its nodes."""
    mode, _, opts = text.partition("|")
    tree = parse_node(parse_image_opts(opts))
    if mode in CACHE_MODES:
        ImageConfig("given by its options", cache=CACHE_MODES[mode], options=tree)


def size(text: str) -> None:
    """A size as people type it."""
    wanted = exact_size(text)
    try:
        found = parse_size(text)
    except ConfigError:
        assert wanted is None or not 0 <= wanted < 1 << 63, f"{text!r} is {wanted} bytes"
        raise
    assert found == wanted, f"{text!r} is {found}, not {wanted}"


def exact_size(text: str) -> int | None:
    """By fractions; None for what is no size."""
    match = _SIZE.fullmatch(text)
    if match is None or not text.isascii():
        return None
    digits, whole, fraction, suffix = match.groups()
    if digits:
        return int(digits, 16) if len(digits) <= 18 else None
    if len(whole) > _DIGITS or len(fraction or "") > _DIGITS + 1:
        return None
    unit = 1024 ** "bkmgtpe".index(suffix.lower() or "b")
    part = Fraction(f"0{fraction}0") if fraction else Fraction(0)
    if part and unit == 1:
        return None
    return int((int(whole) + part) * unit)


def throttle(text: str) -> None:
    """--throttle"""
    config = parse_throttle(text.split("|"))
    assert config is not None, "no throttle"
    check_limits(config.limits)
    values = ",".join(f"{name}={value}" for name, value in config.limits.options().items())
    if values:
        again = parse_throttle([values])
        assert again is not None
        assert again.limits == config.limits, "limits that spell themselves otherwise"


def objects(text: str) -> None:
    """--object"""
    for name, limits in parse_objects(text.split("|")).items():
        assert name
        check_limits(limits)


def check_options(options: Options) -> None:
    """The bounds that imageopts.py promises."""
    for key, value in options.items():
        names = key.split(".")
        assert all(names), f"{key!r} has an empty name"
        assert len(names) <= MAX_DEPTH, f"{key!r} is too deep"
        assert isinstance(value, (str, int, float, bool, type(None))), repr(value)
        assert "\0" not in key + str(value)
        for length in range(1, len(names)):
            assert ".".join(names[:length]) not in options, f"{key!r} and what is above it"


def check_tree(node: NodeOptions) -> None:
    """All nodes of a tree can be shown and compared, so they are values to the last."""
    assert isinstance(node, NodeOptions)
    assert hash(repr(node)) is not None
    assert node == node  # reaches every field


def check_limits(limits: ThrottleLimits) -> None:
    """The bounds that config.py promises."""
    for name, limit in limits.rates():
        assert 0 <= limit.average <= MAX_LIMIT, name
        assert 0 <= limit.maximum * limit.length <= MAX_LIMIT, name
        assert limit.length >= 1, name


def respelt(options: Options) -> str:
    """The same options as key=value."""
    return ",".join(f"{key}={str(value).replace(',', ',,')}" for key, value in options.items())


KINDS: list[Callable[[str], None]] = [
    image_opts,
    json_name,
    image_name,
    backing_name,
    image_name_with_cache,
    size,
    throttle,
    objects,
]


# --- what fuzzing starts from --------------------------------------------------------------------

TEXTS: dict[Callable[[str], None], tuple[str, ...]] = {
    image_opts: (
        "driver=qcow2,file.filename=disk.qcow2,cache.direct=on",
        "disk.qcow2",
        "driver=qcow2,file.driver=file,file.filename=a,,b,backing.driver=raw,backing.file.filename=c",
        "driver=raw,size=1M,offset=512,file.filename=x,read-only,nodiscard",
        "driver=throttle,throttle-group=g0,file.driver=qcow2,file.file.filename=d",
        "driver=qcow2,l2-cache-size=1M,cache-size=2M,refcount-cache-size=256k,file.filename=x",
        "driver=qcow2,data-file.filename=raw,file.filename=x,backing=",
        "a=1,a=2",
        "a\x9b31m=1,a\x9b31m=2",
        "a=1,a.b=2",
        "a..b=1",
        ".=1",
        ",",
        "=",
        "file.filename=x,node-name=1",
        ",".join(["x" * 9] * 3),
        ".".join("a" * 33) + "=1",
    ),
    json_name: (
        'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "d"}, "backing": null}',
        "json:{'driver': 'raw', 'size': 512, 'offset': 0x10, 'file.filename': 'it\\'s'}",
        'json:{"a": [1, 2.5, {"b": true}], "c": []}',
        'json:{"a": 1, "a": 2}',
        "json:[1]",
        "json:",
        'json:{"a": NaN}',
        'json:{"a": 1e999}',
        "json:" + "[" * 40,
        'json:{"a": "\\u0000\\ud800"}',
        'json:{"size": ' + "9" * 300 + "}",
        "json:{'",
        'json:{"a\\nb": 1}',
    ),
    image_name: (
        "disk.qcow2",
        "file:disk",
        "nbd://x/y",
        'json:{"file.filename": "x"}',
        "",
        "a\0b",
        "./a:b",
    ),
    backing_name: (
        "base.qcow2|qcow2",
        "base|vmdk",
        "/abs/base",
        "json:{'driver':'raw'}|raw",
        "../x|raw",
    ),
    image_name_with_cache: ("none|file.filename=x,aio=native", "unsafe|driver=raw,file.filename=x"),
    size: (
        "512",
        "64k",
        "1.5G",
        "0x1F",
        "9223372036854775807",
        "9223372036854775808",
        "8E",
        "7.9E",
        " +1.0b",
        "1.5",
        "1.",
        "-1",
        "1e3",
        "1kk",
        "99999999999999999999",
        "٣",
    ),
    throttle: (
        "bps-total=1M,iops-read=100,iops-read-max=500,iops-read-max-length=3,iops-size=4k",
        "group=g|throttling.bps-write=1",
        "bps-total=1|bps-read=1",
        "iops-total=-1",
        "x=1",
        "bps-read-max=1",
        "bps-read=1000000000000001",
        "iops-write=5,iops-write-max=4",
    ),
    objects: (
        "throttle-group,id=g0,x-iops-total=100",
        "throttle-group,id=g,limits.bps-total=1k",
        '{"qom-type": "throttle-group", "id": "g", "limits": {"iops-read": 5}}',
        "throttle-group",
        "iothread,id=a",
        "throttle-group,id=g|throttle-group,id=g",
    ),
}


def seeds() -> list[bytes]:
    """Good and bad ones of each kind."""
    return [
        bytes([KINDS.index(kind)]) + text.encode()
        for kind, texts in TEXTS.items()
        for text in texts
    ]


DICTIONARY = [
    word.encode()
    for word in [
        "driver=",
        "qcow2",
        "raw",
        "throttle",
        "file.",
        "filename=",
        "backing.",
        "data-file.",
        "json:",
        "node-name=",
        "read-only=",
        "cache.direct=",
        "cache.no-flush=",
        "cache.writeback=",
        "aio=",
        "io_uring",
        "native",
        "threads",
        "discard=",
        "unmap",
        "detect-zeroes=",
        "l2-cache-size=",
        "refcount-cache-size=",
        "cache-size=",
        "size=",
        "offset=",
        "locking=",
        "force-share=",
        "throttle-group=",
        "auto-read-only=",
        "on",
        "off",
        "null",
        "true",
        '{"',
        '":',
        '"}',
        "\\u00e9",
        "bps-total=",
        "iops-read=",
        "-max=",
        "-max-length=",
        "iops-size=",
        "group=",
        "limits.",
        "x-",
        "qom-type",
        "id=",
        ",,",
        "0x",
        "E",
        "|",
    ]
]
