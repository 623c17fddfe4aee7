"""Throttles of images that are opened together: what is shared, and by whom."""

import pytest
import trio

from fakes import no_descriptor_left
from nbdserve.block.backend import BlockBackend
from nbdserve.config import ImageConfig, RateLimit, ThrottleConfig, ThrottleLimits
from nbdserve.formats.qcow2.create import create_image
from nbdserve.graph import open_backend, shared_by_drives


def config(path, **options):
    # With threads the calls for the image can be watched, and it may be closed outside of trio.
    return ImageConfig(str(path), **{"aio": "threads", **options})


@pytest.fixture(autouse=True)
def nothing_left_open():
    with no_descriptor_left():
        yield


@pytest.fixture
def shared():
    with shared_by_drives() as shared:
        yield shared


@pytest.fixture
def make(tmp_path):
    def make(name):
        create_image(str(tmp_path / name), 1 << 20)
        return tmp_path / name

    return make


async def read(backend, offset, length):
    await backend.read(offset, memoryview(bytearray(length)))


def limited(average, group=None):
    return ThrottleConfig(ThrottleLimits(iops_total=RateLimit(average)), group)


async def seconds_of(backends, number):
    """How long each backend takes for so many reads, all of them at once."""
    start, took = trio.current_time(), {}

    async def run(backend):
        for _ in range(number):
            await read(backend, 0, 512)
        took[backend] = trio.current_time() - start

    async with trio.open_nursery() as nursery:
        for backend in backends:
            nursery.start_soon(run, backend)
    return [took[backend] for backend in backends]


@pytest.fixture
def quick(autojump_clock):
    """The file's answers come from the page cache or another thread: let them come."""
    autojump_clock.autojump_threshold = 0.01
    return autojump_clock


async def test_without_a_throttle_there_is_none_on_the_way(make):
    async with open_backend(config(make("image"))) as backend:
        assert type(backend) is BlockBackend


async def test_a_throttle_limits_its_backend_and_no_other(make, quick):
    one, other = config(make("one"), throttle=limited(10)), config(make("other"))
    async with open_backend(one) as slow, open_backend(other) as fast:
        took = await seconds_of([slow, fast], 22)
        assert took == [pytest.approx(2.0, abs=0.1), pytest.approx(0, abs=0.1)]
        assert slow.statistics()["throttle"].group == str(one.filename)


async def test_a_group_is_shared_by_all_that_name_it(make, quick, shared):
    one = config(make("one"), throttle=limited(1000, "g"))
    other = config(make("other"), throttle=limited(10, "g"))  # the last one wins
    third = config(make("third"), throttle=ThrottleConfig(group="g"))
    async with open_backend(one, shared) as a, open_backend(other, shared) as b:
        async with open_backend(third, shared) as c:
            took = await seconds_of([a, b, c], 10)
            # 28 after the first burst, which may all be one's.
            assert max(took) == pytest.approx(2.8, abs=0.1)
            assert min(took) > 2.1
        assert await seconds_of([a], 11) == [pytest.approx(1.1, abs=0.2)]


async def test_without_a_name_nothing_is_shared(make, quick, shared):
    path = make("image")
    one = config(path, read_only=True, throttle=limited(10))
    async with open_backend(one, shared) as a, open_backend(one, shared) as b:
        assert await seconds_of([a, b], 12) == pytest.approx([1.0, 1.0], abs=0.1)


async def test_what_waits_when_the_image_is_closed_is_cut_off(make, quick, shared):
    one = config(make("one"), throttle=limited(1, "g"))
    other = config(make("other"), throttle=limited(1, "g"))
    async with open_backend(other, shared) as stays:
        async with open_backend(one, shared) as backend:
            for _ in range(20):
                backend.nursery.start_soon(read, backend, 0, 512)
            await trio.sleep(0.5)
        assert await seconds_of([stays], 1) == [pytest.approx(0.4, abs=0.1)]
