"""Which files an image may name: what is judged, and that every name that images give is."""

import errno
import json
import os

import pytest

from fakes import no_descriptor_left
from nbdserve.blockdev import parse_node
from nbdserve.config import ImageConfig
from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.create import create_image
from nbdserve.graph import open_backend
from nbdserve.imageopts import parse_image_opts
from nbdserve.references import ANY_FILE, NO_FILE, References

MIB = 1 << 20


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """In a folder with a folder "in" that has a file, beside a secret."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("in/deep")
    for name in ("secret", "in/base", "in/deep/base", "in-other"):
        with open(name, "wb") as file:
            file.write(b"%-16s" % name.encode() * (MIB // 16))
    return tmp_path


INSIDE = References(allowed=True, folder="in")


@pytest.mark.parametrize("name", ["in/base", "in/deep/base", "in/deep/../base", "in/gone", "in"])
def test_what_is_in_the_folder(here, name):
    INSIDE.check("name", {"file.filename": name})
    References(allowed=True, folder=str(here / "in")).check("name", {"file.filename": name})
    References(allowed=True, folder="in/deep/..").check("name", {"file.filename": str(here / name)})


@pytest.mark.parametrize(
    "name", ["secret", "in/../secret", "/etc/passwd", "in-other", ".", "", "/"]
)
def test_what_is_not(here, name):
    with pytest.raises(ImageError, match=f"^{name}: is not in in, where --image-refs") as caught:
        INSIDE.check("name", {"file.filename": name})
    assert caught.value.errno == errno.EPERM


def test_links_count_by_where_they_lead(here):
    os.symlink("../secret", "in/out")
    os.symlink(here, "in/up")
    os.symlink("in/base", "into")
    os.symlink("in", "folder")
    for name in ("in/out", "in/up/secret"):
        with pytest.raises(ImageError, match="is not in"):
            INSIDE.check("name", {"file.filename": name})
    INSIDE.check("name", {"file.filename": "into"})
    References(allowed=True, folder="folder").check("name", {"file.filename": "in/base"})


@pytest.mark.parametrize(
    "key", ["filename", "file.filename", "data-file.filename", "backing.file.file.filename"]
)
def test_every_file_of_a_tree_counts(key):
    options = {"driver": "raw", "file.filename": "in/base"} | {key: "secret"}
    for references in (INSIDE, NO_FILE):
        with pytest.raises(ImageError, match=r"^secret: "):
            references.check("name", {key: "secret"})
        with pytest.raises(ImageError):
            references.check("name", options)
    ANY_FILE.check("name", options)


# --- the names that images give ------------------------------------------------------------------


def spelled(tree):
    return f"json:{json.dumps(tree)}"


def inside(tree):
    """A name whose own file is allowed, and which says more."""
    return spelled({"driver": "qcow2", "file.filename": "in/plain.qcow2", **tree})


def make(name, backing=None, data=None):
    """An image in the folder; `data`: what its header says, whatever data file was made for it."""
    options = {} if backing is None else {"backing_file": backing, "backing_format": "raw"}
    if isinstance(backing, str) and "qcow2" in backing:
        options["backing_format"] = "qcow2"
    create_image(f"in/{name}", MIB, **options, **({} if data is None else {"data_file": data}))


async def opened(options, references):
    tree = parse_node(parse_image_opts(options))
    async with open_backend(ImageConfig("top", options=tree, references=references)) as backend:
        data = memoryview(bytearray(16))
        await backend.read(0, data)
        return bytes(data).rstrip()


async def refused(options, references):
    with no_descriptor_left(), pytest.raises(ImageError) as caught:
        await opened(options, references)
    assert "--image-refs" in str(caught.value)
    assert caught.value.errno == errno.EPERM
    return str(caught.value)


TOP = "driver=qcow2,file.filename=in/top.qcow2"


@pytest.mark.parametrize(
    "backing",
    [
        "../secret",
        "deep/../../secret",
        "file:secret",
        spelled({"driver": "raw", "file": {"driver": "file", "filename": "secret"}}),
        spelled({"file.driver": "raw", "file.file.filename": "secret"}),
        inside({"backing": {"driver": "raw", "file.filename": "secret"}}),
        inside({"backing.file.filename": "secret"}),
    ],
)
async def test_a_backing_file_out_of_the_folder(backing):
    make("plain.qcow2")
    make("top.qcow2", backing)
    await opened(TOP, ANY_FILE)
    message = await refused(TOP, INSIDE)
    assert message.startswith("in/top.qcow2: backing file ")
    assert "secret: is not in in, where --image-refs wants it" in message
    assert "images may name no other file" in await refused(TOP, NO_FILE)


@pytest.mark.parametrize("backing", ["base", "../in/base", "deep/base", "file:in/base"])
async def test_a_backing_file_in_the_folder(backing):
    make("top.qcow2", backing)
    assert (await opened(TOP, INSIDE)).endswith(b"base")
    message = await refused(TOP, NO_FILE)
    assert message.endswith("base: images may name no other file (--image-refs=none)")


async def test_a_data_file():
    """Its name counts from where we are."""
    make("top.qcow2", data="outside")
    make("other.qcow2", data="in/data")
    other = "driver=qcow2,file.filename=in/other.qcow2"
    await opened(TOP, ANY_FILE)
    assert await refused(TOP, INSIDE) == (
        "in/top.qcow2: data file outside: is not in in, where --image-refs wants it"
    )
    await opened(other, INSIDE)
    assert await refused(other, NO_FILE) == (
        "in/other.qcow2: data file in/data: images may name no other file (--image-refs=none)"
    )


async def test_a_data_file_that_a_backing_files_name_gives():
    make("split.qcow2", data="in/data")
    tree = {"driver": "qcow2", "file.filename": "in/split.qcow2", "data-file.filename": "secret"}
    make("top.qcow2", spelled(tree))
    await opened(TOP, ANY_FILE)
    assert "secret: is not in in" in await refused(TOP, INSIDE)


async def test_images_further_down_are_not_trusted_more():
    make("middle.qcow2", "../secret")
    make("top.qcow2", "middle.qcow2")
    await opened(TOP, ANY_FILE)
    assert (await refused(TOP, INSIDE)).startswith("in/middle.qcow2: backing file ")
    # Nor is what a file that the user has named says.
    named = f"{TOP},backing.driver=qcow2,backing.file.filename=in/middle.qcow2"
    assert (await refused(named, NO_FILE)).startswith("in/middle.qcow2: backing file ")


async def test_what_a_probed_image_says():
    make("top.qcow2", "../secret")
    await refused("file.filename=in/top.qcow2", NO_FILE)


@pytest.mark.parametrize("references", [NO_FILE, INSIDE])
async def test_what_the_user_names_is_his_to_name(references):
    make("top.qcow2", "../in-other")
    assert await opened(f"{TOP},backing.driver=raw,backing.file.filename=secret", references) == (
        b"secret"
    )
    assert await opened(f"{TOP},backing=", references) == bytes(16)
    create_image("split.qcow2", MIB, data_file="elsewhere")
    os.rename("elsewhere", "outside")
    split = "driver=qcow2,file.filename=split.qcow2,data-file.filename=outside"
    assert await opened(split, references) == bytes(16)


@pytest.mark.parametrize("driver", ["fault", "power-cut", "memory", "hot-blocks", "nbd"])
@pytest.mark.parametrize("key", ["driver", "file.driver", "backing.file.driver"])
def test_no_image_asks_for_more_than_what_qemu_puts_into_a_tree(driver, key):
    """A power-cut node writes to a file of any name, a fault holds up who reads."""
    with pytest.raises(ImageError, match=f"^the name: {key}: no image may ask .* '{driver}'$"):
        ANY_FILE.check("the name", {key: driver, "file.filename": "a"})


async def test_an_overlay_with_a_filter_in_its_backing_files_name(tmp_path):
    base, log = tmp_path / "base", tmp_path / "log"
    base.write_bytes(bytes(65536))
    name = f'json:{{"driver":"power-cut","log":"{log}","file":{{"driver":"raw","file":"{base}"}}}}'
    create_image(str(tmp_path / "top"), 65536, backing_file=name, backing_format="raw")
    with pytest.raises(ImageError, match="no image may ask for the driver 'power-cut'"):
        async with open_backend(ImageConfig(str(tmp_path / "top"), "qcow2")):
            pass
    assert not log.exists()
