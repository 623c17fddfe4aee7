"""What is called for each request in each cache mode: as qemu-nbd does, and as the page says."""

import pytest

from interop import cache_modes
from interop.cache_modes import DIFFERENCES, DIRECT, FORMATS, MODES, QEMU, THREADS, Server

pytestmark = pytest.mark.peer("strace", "qemu-img", "qemu-io", "qemu-nbd")

NAMES = [step.name for step in cache_modes.STEPS if step.name]
SAFE = [mode for mode in MODES if mode != "unsafe"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache-modes")


@pytest.fixture(scope="module")
def observe(folder):
    """observe(server, format, mode): a Record of each step, by its name; done once."""
    images = cache_modes.make_images(folder)
    known = {}

    def observed(server, format, mode):
        key = server, format, mode
        if key not in known:
            place = folder / f"{len(known)}"
            known[key] = cache_modes.observe(server, mode, images[format], place)
        return known[key]

    return observed


def differs(ours, theirs, format, mode, step):
    """The differences that have to be discounted for the two records to be the same."""
    discounted = []
    for difference in DIFFERENCES:
        if ours == theirs:
            return discounted
        if difference.applies(format, mode, step):
            ours, theirs = map(difference.discounted, (ours, theirs))
            discounted.append(difference)
    assert ours == theirs, f"{format} {mode} {step}: ours {ours}; theirs {theirs}"
    return discounted


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_the_same_as_qemu_nbd(observe, format, mode):
    ours, theirs = observe(THREADS, format, mode), observe(QEMU, format, mode)
    assert list(ours) == list(theirs) == NAMES
    for step in NAMES:
        differs(ours[step], theirs[step], format, mode, step)
    assert cache_modes.is_direct(ours) == cache_modes.is_direct(theirs) == (mode in DIRECT)


@pytest.mark.parametrize(
    ("engine", "mode"),
    [("io_uring", mode) for mode in MODES] + [("native", mode) for mode in DIRECT],
)
@pytest.mark.parametrize("format", FORMATS)
def test_the_same_with_each_engine(observe, engine, format, mode):
    assert observe(Server(engine), format, mode) == observe(THREADS, format, mode)


@pytest.mark.parametrize("mode", SAFE)
@pytest.mark.parametrize("format", FORMATS)
def test_what_was_promised_is_durable(observe, format, mode):
    """After a flush, with FUA and without a write cache nothing of the request is left unsynced;
    only the punch of what is free already may be lost, and a trim. And nobody syncs for nothing."""
    for step, record in observe(THREADS, format, mode).items():
        promised = "flush" in step or "FUA" in step
        promised |= mode in cache_modes.WRITE_CACHE_OFF and step != "trim"
        durable = {word for word in record.parts[-1] if word.endswith(cache_modes.WITH_DSYNC)}
        lost = record.parts[-1] - durable
        if format == "qcow2" and step in cache_modes.UNLINKING:
            lost -= {"punch data"}
        assert not (promised and lost), step
        if not promised or step == "flush again":
            assert len(record.parts) == 1, step
            assert not durable, step


@pytest.mark.parametrize("mode", SAFE)
def test_a_table_follows_what_it_points_to(observe, mode):
    """Data and refcounts are durable before the L2 entry is written, unlinking before the room is
    given up."""
    for step, record in observe(THREADS, "qcow2", mode).items():
        if any("L2" in part for part in record.parts):
            before = frozenset().union(*record.parts[: _index(record, "L2") + 1])
            together = record.parts[_index(record, "L2")]
            assert together == {"L2"}, step
            assert "punch data" not in before, step
            if "new space" in step or step == "flush after that":
                assert "refcounts" in before, step


def _index(record, word):
    [index] = [index for index, part in enumerate(record.parts) if word in part]
    return index


@pytest.mark.parametrize("format", FORMATS)
def test_unsafe_hands_everything_to_the_kernel_and_syncs_nothing(observe, format):
    unsafe, safe = observe(THREADS, format, "unsafe"), observe(THREADS, format, "writeback")
    for step, record in unsafe.items():
        words = frozenset().union(*safe[step].parts)
        expected = {word.removesuffix(cache_modes.WITH_DSYNC) for word in words}
        assert record.parts == (expected,), step


def test_each_difference_is_one(observe):
    """None is listed that this qemu-nbd does not show; but whether FUA is one call depends on its
    version, and on what we write to."""
    found = set()
    for format in FORMATS:
        for mode in MODES:
            ours, theirs = observe(THREADS, format, mode), observe(QEMU, format, mode)
            for step in NAMES:
                for difference in differs(ours[step], theirs[step], format, mode, step):
                    found.add(difference.reason)
    optional = {difference.reason for difference in DIFFERENCES if "RWF_DSYNC" in difference.reason}
    assert found | optional == {difference.reason for difference in DIFFERENCES}


def test_the_page_says_what_was_observed(observe):
    observed = {
        (format, mode): observe(THREADS, format, mode) for format in FORMATS for mode in MODES
    }
    assert cache_modes.documented(cache_modes.PAGE) == cache_modes.render(observed), (
        "docs/caching.md is not what was observed: make cache-table"
    )
