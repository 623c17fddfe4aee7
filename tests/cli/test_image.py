"""What IMAGE and the options beside it mean, with --image-opts and without."""

import pytest

from nbdserve.blockdev import FileOptions, ProbedOptions, Qcow2Options, RawOptions
from nbdserve.cli import qemu_nbd, serve
from nbdserve.cli.options import serve_config
from nbdserve.config import (
    CACHE_MODES,
    ExportConfig,
    ImageConfig,
    RateLimit,
    ThrottleConfig,
    ThrottleLimits,
)
from nbdserve.errors import ConfigError
from nbdserve.inherit import root_settings


def serve_argv(*argv):
    params = serve.command.make_context("nbdserve", list(argv)).params
    return serve_config(params, persistent=True)


def qemu_nbd_argv(*argv):
    return qemu_nbd.config_of(qemu_nbd.command.make_context("nbdserve", list(argv)).params)


QCOW2 = "driver=qcow2,file.filename=a"
FILE = FileOptions(filename="a")


@pytest.mark.parametrize("parse", [serve_argv, qemu_nbd_argv])
def test_image_opts(parse):
    image = parse("--image-opts", f"{QCOW2},cache.direct=on").image
    assert image.options == Qcow2Options(file=FILE, direct=True)
    assert image.filename == f"{QCOW2},cache.direct=on"
    assert root_settings(image.tree, image.flags).direct


def test_without_it_image_is_a_name():
    assert serve_argv("-f", "raw", "a").image.tree == RawOptions(file=FILE)
    assert serve_argv("a").image.tree == ProbedOptions(file=FILE, rest={}, path="")
    assert serve_argv("a=b").image.tree.file == FileOptions(filename="a=b")
    assert serve_argv("json:{'driver': 'raw', 'file.filename': 'a'}").image.tree == RawOptions(
        file=FILE
    )


def settings(*argv, parse=serve_argv):
    image = parse("--image-opts", *argv).image
    return root_settings(image.tree, image.flags)


def test_what_options_leave_open_has_the_default_of_the_command():
    assert settings(QCOW2).discard == "unmap"
    assert settings(QCOW2, parse=qemu_nbd_argv).discard == "ignore"
    assert settings(f"{QCOW2},discard=ignore").discard == "ignore"
    assert settings(f"{QCOW2},discard=unmap", parse=qemu_nbd_argv).discard == "unmap"
    assert settings(f"{QCOW2},discard=unmap,detect-zeroes=unmap").detect_zeroes == "unmap"


@pytest.mark.parametrize("mode", CACHE_MODES)
def test_cache_modes_one_by_one(mode):
    mode = CACHE_MODES[mode]
    spelled = {True: "on", False: "off"}
    text = (
        f"{QCOW2},cache.direct={spelled[mode.direct]},cache.no-flush={spelled[mode.no_flush]},"
        f"cache.writeback={spelled[mode.writeback]}"
    )
    for argv in ([text], [f"--cache={mode.name}", text], [f"--cache={mode.name}", QCOW2]):
        image = serve_argv("--image-opts", *argv).image
        effective = root_settings(image.tree, image.flags)
        assert (effective.direct, effective.no_flush) == (mode.direct, mode.no_flush)
        assert image.cache.writeback == mode.writeback


@pytest.mark.parametrize(
    ("argv", "agrees"),
    [
        (
            ["--cache=none", f"{QCOW2},cache.direct=off"],
            "cache.direct=off contradicts --cache=none",
        ),
        (["--cache=none", f"{QCOW2},cache.direct=on"], None),
        (
            ["--cache=writeback", f"{QCOW2},cache.direct=on"],
            "cache.direct=on contradicts --cache=writeback",
        ),
        (
            ["--cache=unsafe", f"{QCOW2},cache.no-flush=off"],
            "cache.no-flush=off contradicts --cache=unsafe",
        ),
        (
            ["--cache=writethrough", f"{QCOW2},cache.writeback=on"],
            "cache.writeback=on contradicts --cache=writethrough",
        ),
        (["--cache=writethrough", f"{QCOW2},cache.writeback=off"], None),
        (["-r", f"{QCOW2},read-only=off"], "read-only=off contradicts --read-only"),
        (["-r", f"{QCOW2},read-only=on"], None),
        (["--discard=off", f"{QCOW2},discard=unmap"], "discard=unmap contradicts --discard=off"),
        (["--discard=off", f"{QCOW2},discard=ignore"], None),
        (
            ["--detect-zeroes=on", f"{QCOW2},detect-zeroes=off"],
            "detect-zeroes=off contradicts --detect-zeroes=on",
        ),
        (["--detect-zeroes=on", f"{QCOW2},detect-zeroes=on"], None),
        # What a child is told is its own.
        (["--cache=none", f"{QCOW2},file.cache.direct=off"], None),
    ],
)
@pytest.mark.parametrize("parse", [serve_argv, qemu_nbd_argv])
def test_contradictions_name_both(argv, agrees, parse):
    if agrees is None:
        parse("--image-opts", *argv)
        return
    with pytest.raises(ConfigError) as refused:
        parse("--image-opts", *argv)
    assert str(refused.value) == f"--image-opts: {agrees}"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-f", "qcow2", "--image-opts", QCOW2], "--image-opts and -f are mutually exclusive"),
        (["--image-opts", "a.qcow2"], "--image-opts: file: there is no node 'a.qcow2' to refer to"),
        (["--image-opts", ""], "--image-opts: driver or file.filename must be given"),
        (["--image-opts", f"{QCOW2},x=1"], "--image-opts: x: the driver qcow2 has no such option"),
        (["--image-opts", f"{QCOW2},driver=raw"], "--image-opts: driver is given twice"),
        (
            ["--image-opts", f"{QCOW2},cache.writeback=x"],
            "--image-opts: cache.writeback: 'x' is not on or off",
        ),
        (
            ["--image-opts", f"{QCOW2},file.cache.writeback=on"],
            "--image-opts: file.cache.writeback: the driver file has no such option",
        ),
        (
            ["--image-opts", f"{QCOW2},force-share=on"],
            "--image-opts: force-share=on needs read-only=on",
        ),
        (["json:{", "-f", "raw"], "json:{: not valid JSON"),
        (["nbd://localhost"], "nbd://localhost: unknown protocol 'nbd'"),
    ],
)
def test_refusals(argv, said):
    for parse in (serve_argv, qemu_nbd_argv):
        with pytest.raises(ConfigError) as refused:
            parse(*argv)
        assert str(refused.value).startswith(said)


@pytest.mark.parametrize("option", ["-U", "--force-share"])
def test_force_share(option):
    assert serve_argv(option, "-r", "a").image.flags.force_share
    assert serve_argv(option, "--image-opts", f"{QCOW2},read-only=on").image.flags.force_share
    with pytest.raises(ConfigError, match="force-share=on needs read-only=on"):
        serve_argv(option, "a")
    with pytest.raises(ConfigError, match="force-share=off contradicts --force-share"):
        serve_argv(option, "-r", "--image-opts", f"{QCOW2},force-share=off")
    argv = ["--image-opts", "-r", f"{QCOW2},force-share=on"]
    assert qemu_nbd_argv(*argv).image.tree.force_share


def test_objects_and_groups():
    argv = ["--object", "throttle-group,id=g,x-iops-total=5", "--throttle", "group=g", "a"]
    for parse in (serve_argv, qemu_nbd_argv):
        config = parse(*argv)
        assert config.groups == {"g": ThrottleLimits(iops_total=RateLimit(5))}
        assert config.image.throttle == ThrottleConfig(group="g")


def test_several_exports():
    config = serve_argv("-x", "one", "--export", "two=b", "--cache=none", "-D", "first",
                        "--export", "three=c=d", "a")  # fmt: skip
    assert [(image.filename, export) for image, export in config.served()] == [
        ("a", ExportConfig("one", "first")),
        ("b", ExportConfig("two")),
        ("c=d", ExportConfig("three")),
    ]
    assert all(image.cache is CACHE_MODES["none"] for image, _ in config.served())
    config = serve_argv("--image-opts", QCOW2, "--export", "x=driver=raw,file.filename=b")
    (_, (second, _)) = config.served()
    assert second.tree == RawOptions(file=FileOptions(filename="b"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--export", "b", "a"], "--export: 'b' is not NAME=IMAGE"),
        (["--export", "=b", "a"], "--export: '=b' is not NAME=IMAGE"),
        (["--export", "b=", "a"], "--export: 'b=' is not NAME=IMAGE"),
        (["-x", "b", "--export", "b=c", "a"], "the export name 'b' is given twice"),
        (["--export", "b=c", "--export", "b=d", "a"], "the export name 'b' is given twice"),
    ],
)
def test_exports_that_cannot_be(argv, said):
    with pytest.raises(ConfigError) as refused:
        serve_argv(*argv)
    assert str(refused.value) == said


def test_a_plain_command_line_is_the_plain_configuration():
    assert serve_argv("a").image == ImageConfig("a")
