"""A backend to test, in the test's nursery."""

import pytest

from nbdserve.block.backend import BlockBackend
from nbdserve.block.epoch import Epochs


@pytest.fixture
def epochs():
    return Epochs()


@pytest.fixture
def make(nursery, epochs):
    """Makes backends: of a root, with a write cache unless their options say otherwise."""

    def make(root, **options):
        return BlockBackend(root, epochs, nursery, **{"write_cache": True, **options})

    return make
