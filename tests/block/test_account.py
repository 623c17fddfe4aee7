"""Accounts: what is credited, and that nothing is counted twice or lost."""

import pytest

from nbdserve.block.account import KINDS, Account, Accounts, Operations

US = 1000


def test_a_batch_counts_as_its_requests():
    batch, single = Operations(), Operations()
    batch.add(4, 4 * 512, 7 * US)
    for _ in range(4):
        single.add(1, 512, 7 * US)
    for operations in (batch, single):
        assert (operations.succeeded, operations.nb_bytes) == (4, 2048)
        assert operations.total_ns == 28 * US
    assert batch.latency.bins == single.latency.bins


def test_what_failed_took_time_but_moved_nothing():
    operations = Operations()
    operations.add(2, 1000, US)
    operations.fail(5 * US)
    assert (operations.succeeded, operations.failed, operations.nb_bytes) == (2, 1, 1000)
    assert operations.latency.count == 3
    assert operations.total_ns == 7 * US


def test_the_names_are_qemus():
    account = Account()
    account.operations["rd"].add(2, 1024, 3 * US)
    account.operations["wr"].fail(US)
    account.operations["unmap"].invalid += 1
    account.unknown += 5
    found = account.statistics()
    assert {key: value for key, value in found.items() if isinstance(value, int) and value} == {
        "rd_operations": 2,
        "rd_bytes": 1024,
        "rd_total_time_ns": 6 * US,
        "failed_wr_operations": 1,
        "wr_total_time_ns": US,
        "invalid_unmap_operations": 1,
        "invalid_unknown_operations": 5,
    }
    assert found["rd_latency_histogram"].bins == [0, 0, 2]
    assert "flush_bytes" not in found
    for kind in KINDS:
        assert f"{kind}_operations" in found


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_has_everything(kind):
    accounts = []
    for number in (1, 2):
        account = Account()
        operations = account.operations[kind]
        operations.add(number, 10 * number, 100 * US * number)
        operations.fail(US)
        operations.invalid = number
        account.unknown = number
        accounts.append(account)
    total = Account(accounts)
    found = total.operations[kind]
    assert (found.succeeded, found.nb_bytes, found.failed, found.invalid) == (3, 30, 2, 3)
    assert found.total_ns == 502 * US
    assert found.latency.count == 5
    assert total.unknown == 3
    assert accounts[0].operations[kind].succeeded == 1


def test_the_total_does_not_change_when_a_client_leaves():
    accounts = Accounts()
    one, other = accounts.open(), accounts.open()
    one.operations["rd"].add(3, 30, US)
    other.operations["rd"].add(4, 40, US)
    before = accounts.total().statistics()
    accounts.close(one)
    assert accounts.total().statistics() == before
    assert accounts.statistics()["rd_bytes"] == 30
    assert accounts.statistics()["connections"] == 1


def test_what_is_credited_after_leaving_counts_too():
    accounts = Accounts()
    late = accounts.close(accounts.open())
    late.operations["wr"].add(1, 512, US)
    accounts.close(accounts.open())
    assert accounts.total().operations["wr"].nb_bytes == 512
    assert accounts.statistics()["wr_operations"] == 1
    assert accounts.statistics()["connections"] == 2
