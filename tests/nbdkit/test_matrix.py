"""What our server passes, nbdkit with our plugin passes: the same tests, another `served`."""

# ruff: noqa: F401 - pytest finds them here
from interop.test_clients import (
    empty,
    filled,
    source,
    test_an_image_inside_an_export,
    test_fio_verifies_what_it_wrote_over_four_connections,
    test_flags_and_block_status,
    test_nbdcopy_from_one_server_to_another,
    test_nbdcopy_in_and_out,
    test_one_read_over_thousands_of_pieces,
    test_overlapping_requests_over_compressed_clusters,
    test_qemu_img_converts_into_our_export,
    test_qemu_io_through_our_server,
    test_reads_of_every_length_on_four_connections,
    test_requests_in_flight_over_overlapping_ranges,
    test_requests_of_one_byte_and_of_64_mib,
)
from interop.test_engines import (
    test_changes_without_a_write_cache,
    test_raw_disks_of_any_length,
    test_unaligned_neighbours_lose_nothing,
)
from interop.test_images import (
    test_changes_arrive_and_leave_a_clean_image,
    test_it_reads_as_qemu_reads_it,
)
from interop.test_trim import (
    image,
    test_a_flush_gives_the_room_back,
    test_over_a_backing_file_zeroes_take_its_place,
    test_what_was_freed_is_used_again,
    test_without_a_flush_it_comes_back_a_little_later,
    test_write_zeroes_frees_unless_the_client_wants_the_room,
)
