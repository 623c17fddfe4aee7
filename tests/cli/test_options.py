"""Every spelling of every option, as the configuration it stands for."""

import click
import pytest

from nbdserve.cli import create, qemu_nbd, serve
from nbdserve.cli.options import serve_config
from nbdserve.config import (
    CACHE_AUTO,
    CACHE_MODES,
    ExportConfig,
    ImageConfig,
    ListenConfig,
    ServeConfig,
)
from nbdserve.errors import ConfigError
from nbdserve.references import References


def parse(command, *argv):
    return command.make_context("nbdserve", list(argv)).params


def serve_argv(*argv):
    return serve_config(parse(serve.command, *argv, "disk"), persistent=True)


def qemu_nbd_argv(*argv):
    return qemu_nbd.config_of(parse(qemu_nbd.command, *argv, "disk"))


def test_the_defaults_of_serve():
    assert serve_argv() == ServeConfig(
        image=ImageConfig("disk", discard="unmap"),
        export=ExportConfig("", ""),
        listen=ListenConfig("127.0.0.1", 10809, None),
        max_clients=0,
        persistent=True,
        pid_file=None,
        verbose=False,
    )


def test_the_defaults_of_qemu_nbd():
    assert qemu_nbd_argv() == ServeConfig(
        image=ImageConfig("disk", discard="ignore"),
        export=ExportConfig("", ""),
        listen=ListenConfig("0.0.0.0", 10809, None),
        max_clients=1,
        persistent=False,
        pid_file=None,
        verbose=False,
    )


# Option spellings, and the attribute of the configuration that they set to what.
SPELLINGS = [
    (["-p", "1"], "listen.port", 1),
    (["-p1"], "listen.port", 1),
    (["--port=1"], "listen.port", 1),
    (["--port", "0"], "listen.port", 0),
    (["-b", "::1"], "listen.host", "::1"),
    (["--bind="], "listen.host", ""),
    (["--bind", "h"], "listen.host", "h"),
    (["-k", "/run/s"], "listen.unix_path", "/run/s"),
    (["--socket=s"], "listen.unix_path", "s"),
    (["-f", "raw"], "image.format", "raw"),
    (["--format=qcow2"], "image.format", "qcow2"),
    (["--image-refs=any"], "image.references", References(allowed=True)),
    (["--image-refs=none"], "image.references", References(allowed=False)),
    (["--image-refs", "/"], "image.references", References(allowed=True, folder="/")),
    (["-r"], "image.read_only", True),
    (["--read-only"], "image.read_only", True),
    (["-x", ""], "export.name", ""),
    (["-x", "a b"], "export.name", "a b"),
    (["--export-name=n"], "export.name", "n"),
    (["-D", "words"], "export.description", "words"),
    (["--description="], "export.description", ""),
    (["-e", "0"], "max_clients", 0),
    (["-e5"], "max_clients", 5),
    (["--shared=2"], "max_clients", 2),
    (["-o", "512"], "image.offset", 512),
    (["-o", "0x200"], "image.offset", 512),
    (["--offset=1M"], "image.offset", 1 << 20),
    (["--cache=writeback"], "image.cache", CACHE_MODES["writeback"]),
    (["--cache", "writethrough"], "image.cache", CACHE_MODES["writethrough"]),
    (["--cache=unsafe"], "image.cache", CACHE_MODES["unsafe"]),
    (["--cache=auto"], "image.cache", CACHE_AUTO),
    (["--discard=ignore"], "image.discard", "ignore"),
    (["--discard=off"], "image.discard", "ignore"),
    (["--discard=unmap"], "image.discard", "unmap"),
    (["--discard", "on"], "image.discard", "unmap"),
    (["--detect-zeroes=off"], "image.detect_zeroes", "off"),
    (["--detect-zeroes=on"], "image.detect_zeroes", "on"),
    (["--detect-zeroes=unmap", "--discard=on"], "image.detect_zeroes", "unmap"),
    (["--pid-file=/run/p"], "pid_file", "/run/p"),
    (["-v"], "verbose", True),
    (["--verbose"], "verbose", True),
]


@pytest.mark.parametrize("read", [serve_argv, qemu_nbd_argv])
@pytest.mark.parametrize(("argv", "attribute", "value"), SPELLINGS)
def test_every_spelling(read, argv, attribute, value):
    found = read(*argv)
    for name in attribute.split("."):
        found = getattr(found, name)
    assert found == value


def test_what_images_may_name_holds_for_every_export():
    first = serve_argv("--image-refs=none", "--export", "other=b")
    assert [image.references.allowed for image, _ in first.served()] == [False, False]


@pytest.mark.parametrize("word", ["", "nonne", "setup.cfg/"])
def test_what_images_may_name_is_a_word_or_a_folder(word):
    with pytest.raises(ConfigError, match=f"--image-refs: '{word}' is neither any nor none nor a"):
        serve_argv(f"--image-refs={word}")


@pytest.mark.parametrize("argv", [["-t"], ["--persistent"]])
def test_qemu_nbd_can_persist(argv):
    assert qemu_nbd_argv(*argv).persistent


@pytest.mark.parametrize("command", [serve.command, qemu_nbd.command])
@pytest.mark.parametrize(("argv", "fork"), [([], False), (["--fork"], True)])
def test_fork(command, argv, fork):
    assert parse(command, *argv, "disk")["fork"] is fork


def test_options_may_follow_the_image():
    assert parse(serve.command, "disk", "-r")["read_only"]


@pytest.mark.parametrize("mode", ["none", "directsync"])
def test_o_direct_is_a_cache_mode(mode):
    assert serve_argv(f"--cache={mode}").image.cache.direct


@pytest.mark.parametrize("aio", ["threads", "io_uring", "native"])
def test_the_engine_is_named_by_aio(aio):
    assert serve_argv(f"--aio={aio}").image.aio == aio
    assert qemu_nbd_argv(f"--aio={aio}").image.aio == aio


def test_without_aio_the_engine_is_chosen_later():
    assert serve_argv().image.aio is None


@pytest.mark.parametrize("flag", ["-n", "--nocache"])
def test_nocache_means_cache_none(flag):
    assert qemu_nbd_argv(flag).image.cache.name == "none"


# qemu-nbd 7.2 refuses the same.
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--cache=unsafe", "--cache=unsafe"], "--cache can only be specified once"),
        (["--discard=on", "--discard=off"], "--discard can only be specified once"),
        (["-n", "--cache=writeback"], "-n and --cache can only be specified once"),
        (["--cache=writeback", "--nocache"], "-n and --cache can only be specified once"),
    ],
)
def test_what_is_taken_once_only(argv, said):
    with pytest.raises(ConfigError, match=f"^{said}$"):
        qemu_nbd_argv(*argv)


@pytest.mark.parametrize(
    ("names", "takes_value"), qemu_nbd.UNSUPPORTED, ids=lambda value: str(value)
)
def test_what_qemu_nbd_has_and_we_have_not_is_refused_by_name(names, takes_value):
    for name in names:
        argv = [name, "value"] if takes_value else [name]
        with pytest.raises(ConfigError, match=f"{names[-1]} is not supported yet"):
            qemu_nbd_argv(*argv)
        with pytest.raises(ConfigError, match=f"{names[-1]} is not supported yet"):
            parse(qemu_nbd.command, *argv)


def test_every_option_of_qemu_nbd_is_known():
    # From the usage text of qemu-nbd 7.2.
    words = """-h --help -V --version -p --port -b --bind -k --socket -e --shared -t --persistent
        -v --verbose -x --export-name -D --description -o --offset -A --allocation-depth
        -B --bitmap -L --list --object --tls-creds --tls-authz -T --trace --fork --pid-file
        --selinux-label -c --connect -d --disconnect -f --format -r --read-only -s --snapshot
        -l --load-snapshot -n --nocache --cache --aio --discard --detect-zeroes --image-opts"""
    context = click.Context(qemu_nbd.command)
    known = {name for param in qemu_nbd.command.get_params(context) for name in param.opts}
    assert set(words.split()) - known - {"-h", "--help"} == set()


@pytest.mark.parametrize(
    ("lists", "parameters"),
    [
        ((), {}),
        (("cluster_size=64k",), {"cluster_size": 65536}),
        (("cluster_size=512", "cluster_size=2M"), {"cluster_size": 2 << 20}),
        (("compat=0.10",), {"version": 2}),
        (("compat=1.1,refcount_bits=1",), {"version": 3, "refcount_bits": 1}),
        (("compat=v2",), {"version": 2}),
        (("lazy_refcounts",), {"lazy_refcounts": True}),
        (("lazy_refcounts=off",), {"lazy_refcounts": False}),
        (("data_file=a,,b,data_file_raw=on",), {"data_file": "a,b", "data_file_raw": True}),
        (("lazy_refcounts=yes", "compression_type=zstd"),
         {"lazy_refcounts": True, "compression_type": "zstd"}),
    ],
)  # fmt: skip
def test_format_options(lists, parameters):
    assert create.format_options(lists) == parameters


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("foo=1", "'foo' is not a supported option"),
        ("extended_l2=on", "'extended_l2' is not a supported option"),
        ("", "'' is not a supported option"),
        ("cluster_size=64k,", "'' is not a supported option"),
        ("cluster_size=big", "-o cluster_size: 'big' is not a valid value"),
        ("cluster_size", "-o cluster_size: 'on' is not a valid value"),
        ("compat=1.0", "-o compat: '1.0' is not a valid value"),
        ("refcount_bits=x", "-o refcount_bits: 'x' is not a valid value"),
        ("lazy_refcounts=2", "-o lazy_refcounts: '2' is not a valid value"),
        ("compat=1,,1", "-o compat: '1,1' is not a valid value"),
    ],
)
def test_bad_format_options_are_named(text, said):
    with pytest.raises(ConfigError, match=said):
        create.format_options((text,))
