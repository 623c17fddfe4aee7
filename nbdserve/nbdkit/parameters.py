"""nbdkit's key=value parameters -> what to open. The words are those of `nbdserve serve`.

A key that is none of `PARAMETERS` is an option of a node, by its dotted name, as in --image-opts;
`file` and `format` may stand beside those. Values are parsed by what parses them for the command
line, so that they mean the same and are refused with the same words. Errors are ConfigError.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nbdserve.blockdev import AIO_MODES, DETECT_ZEROES_MODES, DISCARD_MODES
from nbdserve.cli.image import drive_config
from nbdserve.cli.objects import parse_objects
from nbdserve.cli.throttle import parse_throttle
from nbdserve.config import CACHE_MODES, ExportConfig, ImageConfig
from nbdserve.errors import ConfigError, naming
from nbdserve.faults import parse_fault
from nbdserve.optionreader import BOOLEANS
from nbdserve.references import parse_references
from nbdserve.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from nbdserve.config import ThrottleLimits
    from nbdserve.imageopts import Options

__all__ = ["PARAMETERS", "Parameters", "for_reading"]


def _one_of(words: Iterable[str]) -> Callable[[str], str]:
    known = list(words)

    def parse(value: str) -> str:
        if value not in known:
            raise ConfigError(f"{value!r} is none of {', '.join(known)}")
        return value

    return parse


def _switch(value: str) -> bool:
    if value not in BOOLEANS:
        raise ConfigError(f"{value!r} is not on or off")
    return BOOLEANS[value]


@dataclass(frozen=True, slots=True)
class Parameter:
    """`repeated`: it may be given several times; else that is an error."""

    help: str
    parse: Callable[[str], Any] = str
    repeated: bool = False


PARAMETERS = {
    "file": Parameter("The image."),
    "format": Parameter("Image format (raw, qcow2); probed if not given."),
    "cache": Parameter("Cache mode.", _one_of([*CACHE_MODES, "auto"])),
    "aio": Parameter("I/O engine.", _one_of(AIO_MODES)),
    "discard": Parameter("Whether a trim frees space in the image.", _one_of(DISCARD_MODES)),
    "detect-zeroes": Parameter(
        "Turn writes of zeroes into write-zeroes requests.", _one_of(DETECT_ZEROES_MODES)),
    "offset": Parameter("Serve the disk from this byte on."),
    "image-refs": Parameter("The files that an image may name: any, none or a folder.",
                            parse_references),
    "read-only": Parameter("Open the image for reading only, or (off) refuse to start if it cannot"
                           " be written; by default as nbdkit -r says.", _switch),
    "force-share": Parameter("Let others write to the image meanwhile; needs read-only=on.",
                             _switch),
    "throttle": Parameter("Limit bytes and requests a second.", repeated=True),
    "object": Parameter("A throttle group.", repeated=True),
    "fault": Parameter("Have the disk go wrong (docs/faults.md).", repeated=True),
    "export-name": Parameter("Name of the export; empty by default."),
    "description": Parameter("Description shown to clients that list exports."),
}  # fmt: skip
"""What there is beside the options of nodes; each as the option of that name in `serve`."""


@dataclass(slots=True)
class Parameters:
    """Those that were given so far."""

    _given: dict[str, list[Any]] = field(default_factory=dict)
    _node_options: Options = field(default_factory=dict)

    def add(self, key: str, value: str) -> None:
        """One more."""
        parameter = PARAMETERS.get(key)
        if parameter is None:
            if key in self._node_options:
                raise ConfigError(f"{key}: is given twice")
            self._node_options[key] = value
            return
        with naming(key):
            if key in self._given and not parameter.repeated:
                raise ConfigError("is given twice")
            self._given.setdefault(key, []).append(parameter.parse(value))

    def _one(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - as it was parsed
        return self._given.get(key, [default])[0]

    @property
    def read_only(self) -> bool | None:
        """None: it was not said."""
        read_only: bool | None = self._one("read-only")
        return read_only

    def export(self) -> ExportConfig:
        return ExportConfig(self._one("export-name", ""), self._one("description", ""))

    def groups(self) -> dict[str, ThrottleLimits]:
        """The throttle groups."""
        return parse_objects(self._given.get("object", ()))

    def image(self) -> ImageConfig:
        """Raises ImageError too: there is no such format."""
        if "file" not in self._given and not self._node_options:
            raise ConfigError("file must be given: the image to serve, as file=disk.qcow2")
        with naming("fault"):
            faults = tuple(parse_fault(text) for text in self._given.get("fault", ()))
        options = {
            "format": self._one("format"),
            "read_only": bool(self.read_only),
            "force_share": self._one("force-share", False),
            "cache": self._one("cache"),
            "discard": self._one("discard"),
            "detect_zeroes": self._one("detect-zeroes"),
            "aio": self._one("aio"),
            "offset": parse_size(self._one("offset", "0"), "offset"),
            "image_refs": self._one("image-refs") or parse_references("any"),
            "fault": faults,
        }
        return drive_config(
            self._one("file"),
            self._node_options,
            options,
            discard="unmap",
            throttle=parse_throttle(self._given.get("throttle", ())),
        )


def for_reading(config: ImageConfig) -> ImageConfig:
    """The same, read-only."""
    return replace(config, read_only=True)
