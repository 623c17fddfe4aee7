"""Each planted bug is found within the number of schedules that is stated for it, and nothing is
found where none is planted."""

import pytest

from races.planted import PLANTED


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.bug.__name__)
def test_a_planted_bug_is_found(plant):
    assert plant.hunt().failed is None
    with plant.bug():
        result = plant.hunt()
    assert result.failed, f"not found by {result.schedules} schedules"
    assert result.schedules <= plant.most
