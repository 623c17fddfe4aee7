"""What --throttle may say, and what is wrong with what it may not."""

import pytest

from nbdserve.cli import qemu_nbd, serve
from nbdserve.cli.options import serve_config
from nbdserve.cli.throttle import parse_throttle
from nbdserve.config import MAX_LIMIT, RateLimit, ThrottleConfig, ThrottleLimits
from nbdserve.errors import ConfigError

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("bps-total=1M", {"bps_total": RateLimit(MIB)}),
        ("bps-read=1.5k,bps-write=0x10", {"bps_read": RateLimit(1536), "bps_write": RateLimit(16)}),
        ("iops-total=200", {"iops_total": RateLimit(200)}),
        ("iops-read=1,iops-read-max=5", {"iops_read": RateLimit(1, 5)}),
        (
            "iops-write-max-length=7,iops-write-max=6,iops-write=5",
            {"iops_write": RateLimit(5, 6, 7)},
        ),
        (
            "bps-total=1M,bps-total-max=2M,bps-total-max-length=60",
            {"bps_total": RateLimit(MIB, 2 * MIB, 60)},
        ),
        ("iops-total=1,iops-size=4k", {"iops_total": RateLimit(1), "iops_size": 4096}),
        ("bps-total=1,iops-read=2", {"bps_total": RateLimit(1), "iops_read": RateLimit(2)}),
        ("iops-total=0,iops-read=3", {"iops_read": RateLimit(3)}),
        (f"bps-total={MAX_LIMIT}", {"bps_total": RateLimit(MAX_LIMIT)}),
    ],
)
def test_every_key_with_and_without_qemus_prefix(text, limits):
    expected = ThrottleConfig(ThrottleLimits(**limits))
    assert parse_throttle([text]) == expected
    keys = [f"throttling.{pair}" for pair in text.split(",")]
    assert parse_throttle([",".join(keys)]) == expected
    assert parse_throttle(keys) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("group=slow", ThrottleConfig(group="slow")),
        (
            "throttling.group=g,iops-total=5",
            ThrottleConfig(ThrottleLimits(iops_total=RateLimit(5)), "g"),
        ),
    ],
)
def test_a_group_to_share_limits_in(text, expected):
    assert parse_throttle([text]) == expected


def test_without_the_option_there_is_no_throttle():
    assert parse_throttle([]) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("group=", "the group's name is empty"),
        ("bps-total", "'bps-total' is not KEY=VALUE"),
        ("", "'' is not KEY=VALUE"),
        ("iops-total=1,", "'' is not KEY=VALUE"),
        ("bps=1", "unknown key 'bps'; known are bps-total, bps-read, .* and iops-size"),
        ("iops-total-min=1", "unknown key 'iops-total-min'"),
        ("iops-size-max=1", "unknown key 'iops-size-max'"),
        ("iops-total=1,throttling.iops-total=2", "iops-total is given twice"),
        ("bps-total=fast", "bps-total: 'fast' is not a size"),
        ("iops-total=1k", "iops-total: '1k' is not a number"),
        ("iops-total=1.5", "iops-total: '1.5' is not a number"),
        ("bps-read=1,bps-read-max=1,bps-read-max-length=1s", "max-length: '1s' is not a number"),
        ("bps-total=-1", "bps-total: -1 is negative"),
        ("iops-read=-5", "iops-read: -5 is negative"),
        (f"iops-total={MAX_LIMIT + 1}", f"iops-total: {MAX_LIMIT + 1} is more than {MAX_LIMIT}"),
        (f"bps-read=1,bps-read-max={MAX_LIMIT + 1}", "bps-read-max: .* is more than"),
        ("iops-total=1,iops-size=1E", "iops-size: .* is more than"),
        ("bps-total=1,bps-read=1", "bps-total and bps-read cannot both be set"),
        ("iops-write=1,iops-total=1", "iops-total and iops-write cannot both be set"),
        ("iops-total=10,iops-total-max=9", "iops-total-max: 9 is below iops-total, 10"),
        ("iops-total-max=9", "iops-total-max needs iops-total"),
        ("iops-total=1,iops-total-max-length=2", "iops-total-max-length needs iops-total-max"),
        ("iops-read=1,iops-read-max=1,iops-read-max-length=0", "0 is less than 1 second"),
        (
            f"bps-total=1,bps-total-max={MAX_LIMIT},bps-total-max-length=2",
            "bps-total-max-length: 2 seconds of 1000000000000000 are more than",
        ),
        ("iops-size=4k", "iops-size needs iops-total, iops-read or iops-write"),
        ("bps-total=1,iops-size=4k", "iops-size needs"),
        ("iops-total=0", "no limit is given"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(text, said):
    with pytest.raises(ConfigError, match=said) as refused:
        parse_throttle([text])
    assert str(refused.value).startswith("--throttle: ")
    assert "\n" not in str(refused.value)


def test_the_largest_burst_is_allowed():
    parse_throttle([f"bps-total=1,bps-total-max={MAX_LIMIT // 4},bps-total-max-length=4"])


def test_limits_and_their_options_say_the_same():
    text = "bps-read=5,bps-read-max=6,bps-read-max-length=7,iops-total=8,iops-size=9"
    limits = parse_throttle([text]).limits
    said = limits.options()
    assert said == {
        "bps-read": 5, "bps-read-max": 6, "bps-read-max-length": 7, "iops-total": 8, "iops-size": 9
    }
    again = parse_throttle([",".join(f"{key}={value}" for key, value in said.items())])
    assert again.limits == limits


@pytest.mark.parametrize("argv", [["--throttle", "iops-total=5,bps-read=1M"],
                                  ["--throttle=bps-read=1M", "--throttle=throttling.iops-total=5"]])
def test_both_commands_take_it(argv):
    limits = ThrottleLimits(iops_total=RateLimit(5), bps_read=RateLimit(1 << 20))
    expected = ThrottleConfig(limits)
    params = serve.command.make_context("nbdserve", [*argv, "disk"]).params
    assert serve_config(params, persistent=True).image.throttle == expected
    params = qemu_nbd.command.make_context("nbdserve", [*argv, "disk"]).params
    assert qemu_nbd.config_of(params).image.throttle == expected
