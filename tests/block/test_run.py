"""The words of the hot path."""

from nbdserve.block.run import READ, WRITE, WRITE_FUA, Miss, Op


def test_the_operations_are_the_members_of_op():
    assert set(Op) == {READ, WRITE, WRITE_FUA}


def test_every_miss_says_why_in_words_of_its_own():
    assert len({miss.value for miss in Miss}) == len(Miss)
    assert all(isinstance(miss.value, str) and miss.value for miss in Miss)


def test_a_miss_is_never_taken_for_runs():
    # The hot path tells them apart by `type(...) is list`.
    assert not any(isinstance(miss, list) for miss in Miss)
