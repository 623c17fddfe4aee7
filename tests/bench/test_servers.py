"""Who takes part in what."""

from bench.cases import CASES, Disk, Fio
from bench.images import Copy
from bench.servers import SERVERS


def entrants(name: str) -> set[str]:
    return {server for server, contestant in SERVERS.items() if name in contestant.cases}


def test_without_the_page_cache_all_engines_of_qemu_are_opponents() -> None:
    for name, case in CASES.items():
        assert ("qemu-native" in entrants(name)) == (case.cache == "none"), name
        assert {"qemu-threads", "qemu-io_uring"} <= entrants(name)


def test_the_device_is_the_reference_where_the_disk_sets_the_pace() -> None:
    assert {name for name in CASES if "device" in entrants(name)} == {
        "none-read-32", "none-write-32", "fsync-1", "fsync-16"}


def test_the_device_has_a_file_that_no_server_opens() -> None:
    """The client writes to it; an image would be destroyed."""
    assert [name for name, s in SERVERS.items() if s.copy is Copy.DEVICE] == ["device"]


def test_whoever_gets_the_raw_copy_only_reads() -> None:
    """nbdcopy copies it in, and zeroes or other bytes there would change its work."""
    for contestant in SERVERS.values():
        if contestant.copy is Copy.RAW:
            jobs = [CASES[name].client for name in contestant.cases]
            assert all(isinstance(job, Fio) and "read" in job.pattern for job in jobs)


def test_direct_modes_run_on_the_disk_kept_out_of_the_page_cache() -> None:
    for name, case in CASES.items():
        assert (case.cache == "none") == (case.disk is Disk.UNCACHED), name
