"""IMAGE and the options beside it: what to open, from a file name or from --image-opts.

An option of the command line and one of the uppermost node in --image-opts may say the same thing,
such as --cache=none and cache.direct=on. QEMU lets the node's win without a word; here they must
agree. What the command line leaves open has the command's default, and the node's option wins.

cache.writeback is no option of a node but of the drive, as in QEMU's -drive (qemu-nbd has it not).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbdserve.blockdev import (
    AIO_MODES,
    DETECT_ZEROES_MODES,
    DISCARD_MODES,
    named_tree,
    parse_node,
)
from nbdserve.config import CACHE_AUTO, CACHE_MODES, CacheMode, ImageConfig
from nbdserve.errors import ConfigError, naming
from nbdserve.imageopts import options_of_name, parse_image_opts
from nbdserve.optionreader import BOOLEANS

if TYPE_CHECKING:
    from nbdserve.blockdev import NodeOptions
    from nbdserve.config import ThrottleConfig
    from nbdserve.imageopts import Options

__all__ = ["DEFAULT_CACHE", "drive_config", "image_config"]

DEFAULT_CACHE = "writeback"

WRITEBACK = "cache.writeback"

SPELLED: dict[object, object] = {True: "on", False: "off"}


def image_config(
    image: str, options: dict[str, Any], *, discard: str, throttle: ThrottleConfig | None
) -> ImageConfig:
    """What to open for IMAGE.

    :param options: click's values by parameter name; None where an option was not given.
    :param discard: the command's default.
    :raises ConfigError: as ImageConfig; or options that contradict each other.
    """
    common = _common(options, discard, throttle)
    if not options["image_opts"]:
        return ImageConfig(image, options["format"], **common)
    if options["format"] is not None:
        raise ConfigError("--image-opts and -f are mutually exclusive")
    with naming("--image-opts"):
        given = parse_image_opts(image)
        cache = _with_writeback(common["cache"], options["cache"], given.pop(WRITEBACK, None))
        common["cache"] = cache
        tree = parse_node(given)
        _check_agreement(options, common, tree)
        return ImageConfig(image, options=tree, **common)


def drive_config(
    file: str | None,
    given: Options,
    options: dict[str, Any],
    *,
    discard: str,
    throttle: ThrottleConfig | None,
) -> ImageConfig:
    """As `image_config`, where options of nodes stand beside the image's name and the rest.

    :param file: the name, which options of nodes go before (`named_tree`); None: they have all.
    :param given: those of nodes, by their dotted names.
    :raises ImageError: a format that there is not.
    """
    common = _common(options, discard, throttle)
    image_format = options["format"]
    if file is not None and not given:
        return ImageConfig(file, image_format, **common)
    given = dict(given)
    cache = _with_writeback(common["cache"], options["cache"], given.pop(WRITEBACK, None))
    common["cache"] = cache
    if image_format is not None and "driver" in given:
        raise ConfigError("format and driver are the same: give one of them")
    name = file if file is not None else str(given.get("file.filename", "the image"))
    start = {} if file is None else options_of_name(file)
    tree = named_tree(name, start, image_format, given=given)
    _check_agreement(options, common, tree, spelled="")
    return ImageConfig(name, options=tree, **common)


def _common(
    options: dict[str, Any], discard: str, throttle: ThrottleConfig | None
) -> dict[str, Any]:
    """What is not the tree's, as fields of ImageConfig."""
    return {
        "read_only": options["read_only"],
        "force_share": options["force_share"],
        "cache": {**CACHE_MODES, "auto": CACHE_AUTO}[options["cache"] or DEFAULT_CACHE],
        "discard": DISCARD_MODES[options["discard"] or discard],
        "detect_zeroes": DETECT_ZEROES_MODES[options["detect_zeroes"] or "off"],
        "aio": None if options["aio"] is None else AIO_MODES[options["aio"]],
        "offset": options["offset"],
        "throttle": throttle,
        "references": options["image_refs"],
        "faults": options.get("fault", ()),
    }


def _check_agreement(
    options: dict[str, Any], common: dict[str, Any], tree: NodeOptions, *, spelled: str = "--"
) -> None:
    """Raises ConfigError if an option that was given says other than the uppermost node's own.

    `common`: what the options mean, as fields of ImageConfig. `spelled`: goes before a name.
    """
    cache = common["cache"]
    both = (
        ("cache", cache.direct, "cache.direct", tree.direct),
        ("cache", cache.no_flush, "cache.no-flush", tree.no_flush),
        ("discard", common["discard"], "discard", tree.discard),
        ("detect_zeroes", common["detect_zeroes"], "detect-zeroes", tree.detect_zeroes),
        ("read_only", True, "read-only", tree.read_only),
        ("force_share", True, "force-share", tree.force_share),
    )
    for name, meant, node_option, node_meant in both:
        given = options[name]
        if given and node_meant is not None and node_meant != meant:
            option = f"{spelled}{name.replace('_', '-')}" + ("" if given is True else f"={given}")
            raise ConfigError(
                f"{node_option}={SPELLED.get(node_meant, node_meant)} contradicts {option}"
            )


def _with_writeback(mode: CacheMode, said: str | None, value: object) -> CacheMode:
    """The cache mode, once cache.writeback has been heard."""
    if value is None:
        return mode
    if value not in BOOLEANS:
        raise ConfigError(f"{WRITEBACK}: {value!r} is not on or off")
    writeback = BOOLEANS[str(value)]
    if said is not None and writeback != mode.writeback:
        raise ConfigError(f"{WRITEBACK}={value} contradicts --cache={said}")
    return replace(mode, writeback=writeback)
