"""The rules that tie a configuration's fields together."""

import errno

import pytest

from nbdserve.blockdev import image_tree
from nbdserve.config import CACHE_MODES, ExportConfig, ImageConfig, ListenConfig, ServeConfig
from nbdserve.errors import (
    ConfigError,
    CorruptImage,
    ImageError,
    LockedError,
    NbdserveError,
    naming,
)


@pytest.mark.parametrize(
    ("name", "direct", "writeback", "no_flush"),
    [
        ("writeback", False, True, False),
        ("none", True, True, False),
        ("writethrough", False, False, False),
        ("directsync", True, False, False),
        ("unsafe", False, True, True),
    ],
)
def test_cache_modes_are_the_table_of_the_manual(name, direct, writeback, no_flush):
    mode = CACHE_MODES[name]
    found = (mode.name, mode.direct, mode.writeback, mode.no_flush)
    assert found == (name, direct, writeback, no_flush)


def test_there_are_five_cache_modes():
    assert len(CACHE_MODES) == 5


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ImageConfig(""), "file name is empty"),
        (lambda: ImageConfig("a\0b"), "NUL"),
        (lambda: ImageConfig("a", offset=-1), "--offset"),
        (lambda: ImageConfig("a", discard="ignore", detect_zeroes="unmap"), "discard=unmap"),
        (lambda: ExportConfig("x" * 4097), "--export-name"),
        (lambda: ExportConfig("é" * 2049), "4098 bytes"),
        (lambda: ExportConfig("a\0b"), "--export-name"),
        (lambda: ExportConfig("\udcff"), "UTF-8"),
        (lambda: ExportConfig("", "x" * 4097), "--description"),
        (lambda: ListenConfig(port=65536), "--port"),
        (lambda: ListenConfig(port=-1), "--port"),
        (lambda: ListenConfig(unix_path=""), "--socket"),
        (lambda: ServeConfig(ImageConfig("a"), max_clients=-1), "--shared"),
        (lambda: ServeConfig(ImageConfig("a"), pid_file=""), "--pid-file"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_the_limits_themselves_are_allowed():
    ExportConfig("é" * 2048, "x" * 4096)
    ListenConfig(port=0)
    ListenConfig(port=65535)
    ImageConfig("a", discard="unmap", detect_zeroes="unmap")


@pytest.mark.parametrize(
    ("kind", "default"),
    [
        (NbdserveError, errno.EIO),
        (ConfigError, errno.EINVAL),
        (ImageError, errno.EINVAL),
        (CorruptImage, errno.EIO),
        (LockedError, errno.EAGAIN),
    ],
)
def test_every_error_has_an_errno(kind, default):
    assert kind("words").errno == default
    assert kind("words", errno.ENOENT).errno == errno.ENOENT
    assert str(kind("words")) == "words"


def test_an_error_is_told_with_what_it_is_about():
    with pytest.raises(LockedError) as caught, naming("--option"):
        raise LockedError("words", errno.ENOENT)
    assert (str(caught.value), caught.value.errno) == ("--option: words", errno.ENOENT)
    with pytest.raises(OSError, match=r"^words$"), naming("--option"):
        raise OSError("words")


def test_a_server_may_have_several_exports():
    one, two = (ImageConfig("a"), ExportConfig()), (ImageConfig("b"), ExportConfig("two"))
    assert list(ServeConfig(*one).served()) == [one]
    assert list(ServeConfig(*one, others=(two,)).served()) == [one, two]
    with pytest.raises(ConfigError, match="the export name 'two' is given twice"):
        ServeConfig(*one, others=(two, two))


def test_options_and_a_format_exclude_each_other():
    options = image_tree("a", "raw")
    assert ImageConfig("a", options=options).tree is options
    with pytest.raises(ConfigError, match="a format cannot be given beside"):
        ImageConfig("a", "raw", options=options)


def test_corrupt_and_locked_images_are_image_errors():
    assert issubclass(CorruptImage, ImageError)
    assert issubclass(LockedError, ImageError)
