"""The matrix: images as qemu-img makes them, over the features of qcow2 that we serve.

Not the product of all features but a covering choice: every cluster size, every refcount width,
both versions, both compression types, each kind of backing.  Small enough that tables of several
clusters, odd ends and shared edges all occur within a few MiB.  The bytes are random from a fixed
seed, with runs of zeroes in between, so that a wrong offset is never a right answer.
"""

import dataclasses
import os
import pathlib
import random

import peers

KIB = 1 << 10
MIB = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How an image is made.

    `fill`: the share of its 4 KiB pieces that hold data (without a backing file).  `backing`:
    is made first, in the folder below, and named relatively.  `commands`: for qemu-io, at last.
    `data_file`: "external" or "raw", in a file of the image's name with ".data".
    """

    size: int
    options: str = "compat=v3"
    format: str = "qcow2"
    fill: float = 0.5
    data_file: str = ""
    compressed: bool = False
    backing: "Recipe | None" = None
    commands: tuple[str, ...] = ()


# A cluster each way: data, zeroes with and without room kept, a hole, and edges inside clusters.
PATCHES = (
    "write -P 17 0 70k", "write -P 18 300k 1k", "write -z 128k 64k", "write -z -u 256k 64k",
    "write -P 19 1234k 100k", "discard 1280k 64k",
)
RAW_BASE = Recipe(3 * MIB, format="raw")
BASE = Recipe(3 * MIB)

RECIPES = {
    # version, cluster size, refcount width
    "v2": Recipe(9 * MIB, "compat=0.10"),
    "v2-512": Recipe(1 * MIB, "compat=0.10,cluster_size=512"),
    "v3-512-refcount16": Recipe(2 * MIB + 512, "cluster_size=512"),
    "v3-1k-refcount1": Recipe(3 * MIB, "cluster_size=1k,refcount_bits=1"),
    "v3-2k-refcount2": Recipe(3 * MIB + 1536, "cluster_size=2k,refcount_bits=2"),
    "v3-4k-refcount4": Recipe(5 * MIB, "cluster_size=4k,refcount_bits=4"),
    "v3-8k-refcount8": Recipe(5 * MIB, "cluster_size=8k,refcount_bits=8"),
    "v3-32k-refcount32": Recipe(7 * MIB + 512, "cluster_size=32k,refcount_bits=32"),
    "v3-64k-refcount64": Recipe(9 * MIB, "cluster_size=64k,refcount_bits=64"),
    "v3-128k-refcount1": Recipe(9 * MIB, "cluster_size=128k,refcount_bits=1"),
    "v3-1M": Recipe(9 * MIB + 4608, "cluster_size=1M"),
    "v3-2M-refcount64": Recipe(17 * MIB, "cluster_size=2M,refcount_bits=64"),
    # how much of it is there
    "empty": Recipe(8 * MIB, fill=0),
    "empty-512": Recipe(4 * MIB, "cluster_size=512", fill=0),
    # The refcount table starts with one cluster, for 2 MiB of image, and has to grow.
    "empty-512-refcount64": Recipe(12 * MIB, "cluster_size=512,refcount_bits=64", fill=0),
    "one-sector": Recipe(512, fill=1),
    "sparse-1T": Recipe(1 << 40, fill=0, commands=(
        "write -P 5 700G 1k", "write -P 6 1023G 64k")),
    "full": Recipe(6 * MIB, fill=1),
    "metadata-preallocated": Recipe(6 * MIB, "preallocation=metadata", fill=0,
                                    commands=("write -P 9 1M 100k",)),
    "falloc-preallocated": Recipe(6 * MIB, "preallocation=falloc", fill=0,
                                  commands=("write -P 9 1M 100k",)),
    "full-preallocated": Recipe(6 * MIB, "preallocation=full", fill=0),
    "lazy-refcounts": Recipe(6 * MIB, "lazy_refcounts=on"),
    "zero-clusters": Recipe(6 * MIB, commands=PATCHES),
    "zero-clusters-4k": Recipe(3 * MIB, "cluster_size=4k", commands=PATCHES),
    # compressed
    "zlib": Recipe(6 * MIB + 512, compressed=True),
    "zlib-v2-4k": Recipe(3 * MIB, "compat=0.10,cluster_size=4k", compressed=True),
    "zlib-512": Recipe(1 * MIB, "cluster_size=512", compressed=True),
    "zlib-2M-refcount8": Recipe(9 * MIB, "cluster_size=2M,refcount_bits=8", compressed=True),
    "zstd": Recipe(6 * MIB, "compression_type=zstd", compressed=True, commands=PATCHES),
    "zstd-4k": Recipe(3 * MIB, "compression_type=zstd,cluster_size=4k", compressed=True),
    # data in another file
    "data-file": Recipe(6 * MIB + 512, data_file="external", commands=PATCHES),
    "data-file-512": Recipe(1 * MIB, "cluster_size=512", data_file="external"),
    "data-file-empty": Recipe(6 * MIB, data_file="external", fill=0),
    "data-file-preallocated": Recipe(6 * MIB, "preallocation=metadata", data_file="external",
                                     fill=0, commands=PATCHES),
    "data-file-raw": Recipe(6 * MIB, data_file="raw", commands=PATCHES),
    "data-file-raw-4k": Recipe(3 * MIB, "cluster_size=4k", data_file="raw"),
    "data-file-raw-empty": Recipe(6 * MIB, data_file="raw", fill=0),
    "data-file-on-qcow2": Recipe(6 * MIB, data_file="external", backing=BASE, commands=PATCHES),
    "on-data-file": Recipe(6 * MIB, commands=PATCHES, backing=Recipe(
        5 * MIB, data_file="external", commands=PATCHES)),
    # backing files
    "on-raw": Recipe(3 * MIB, backing=RAW_BASE, commands=PATCHES),
    "on-raw-v2": Recipe(3 * MIB, "compat=0.10", backing=RAW_BASE,
                        commands=("write -P 17 0 70k", "write -P 18 300k 1k")),
    "on-longer-raw": Recipe(2 * MIB + 512, "cluster_size=4k",
                            backing=Recipe(3 * MIB + 123, format="raw"), commands=PATCHES),
    "on-shorter-raw": Recipe(6 * MIB, backing=Recipe(2 * MIB + 789, format="raw"),
                             commands=PATCHES),
    "on-qcow2": Recipe(3 * MIB, backing=BASE, commands=PATCHES),
    "on-shorter-qcow2": Recipe(6 * MIB, "cluster_size=2M",
                               backing=Recipe(1 * MIB + 512), commands=PATCHES),
    "on-compressed": Recipe(3 * MIB, "cluster_size=512",
                            backing=Recipe(3 * MIB, compressed=True), commands=PATCHES),
    "chain-of-3": Recipe(
        4 * MIB, "cluster_size=8k", commands=("write -P 31 100k 3k", "write -z -u 512k 512k"),
        backing=Recipe(3 * MIB, commands=PATCHES, backing=Recipe(
            5 * MIB, "compat=0.10,cluster_size=128k"))),
    "chain-of-4": Recipe(
        3 * MIB, fill=0, backing=Recipe(
            3 * MIB, "cluster_size=4k", commands=PATCHES, backing=Recipe(
                2 * MIB, "compat=0.10", commands=("write -P 40 1M 1k",), backing=RAW_BASE))),
}


def make(recipe: Recipe, path: pathlib.Path) -> pathlib.Path:
    """Make the image, and its backing files below it.  Returns `path`."""
    words = recipe.options
    if recipe.data_file:
        is_raw = "on" if recipe.data_file == "raw" else "off"
        words += f",data_file={path}.data,data_file_raw={is_raw}"
    options = ("-o", words)
    if recipe.backing is not None:
        base = make(recipe.backing, path.parent / "below" / f"base.{recipe.backing.format}")
        peers.qemu_img(
            "create", "-q", "-f", "qcow2", *options, "-b", base.relative_to(path.parent),
            "-F", recipe.backing.format, path, str(recipe.size))
    elif not recipe.fill:
        path.parent.mkdir(parents=True, exist_ok=True)
        peers.qemu_img("create", "-q", "-f", "qcow2", *options, path, str(recipe.size))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        source = path if recipe.format == "raw" else path.with_suffix(".source")
        write_disk(source, recipe.size, recipe.fill)
        if recipe.format != "raw":
            compress = ("-c",) if recipe.compressed else ()
            peers.qemu_img(
                "convert", "-f", "raw", "-O", "qcow2", *compress, *options, source, path)
            source.unlink()
    if recipe.commands:
        peers.qemu_io(path, *recipe.commands, options=("-f", "qcow2", "-d", "unmap"))
    return path


def write_disk(path: pathlib.Path, size: int, fill: float = 0.5) -> None:
    """A raw disk: pieces of 4 KiB, random or halfway compressible or a hole."""
    rng = random.Random(f"{size} {fill}")
    with open(path, "wb") as file:
        for offset in range(0, size, 4 * KIB):
            if rng.random() < fill:
                half = rng.randbytes(2 * KIB)
                piece = half + (half if rng.random() < 0.5 else rng.randbytes(2 * KIB))
                file.seek(offset)
                file.write(piece[:size - offset])
        os.truncate(file.fileno(), size)
