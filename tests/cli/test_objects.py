"""What --object may say."""

import pytest

from nbdserve.cli.objects import parse_objects
from nbdserve.config import RateLimit, ThrottleLimits
from nbdserve.errors import ConfigError

LIMITS = ThrottleLimits(iops_total=RateLimit(100, 200, 3), bps_read=RateLimit(4096), iops_size=512)


@pytest.mark.parametrize(
    "text",
    [
        "throttle-group,id=g0,x-iops-total=100,x-iops-total-max=200,x-iops-total-max-length=3,"
        "x-bps-read=4096,x-iops-size=512",
        "qom-type=throttle-group,id=g0,limits.iops-total=100,limits.iops-total-max=200,"
        "limits.iops-total-max-length=3,limits.bps-read=4k,limits.iops-size=512",
        '{"qom-type": "throttle-group", "id": "g0", "limits": {"iops-total": 100, "bps-read": 4096,'
        ' "iops-total-max": 200, "iops-total-max-length": 3, "iops-size": 512}}',
    ],
)
def test_every_spelling_of_a_group(text):
    assert parse_objects([text]) == {"g0": LIMITS}


def test_several_and_none():
    assert parse_objects([]) == {}
    texts = ["throttle-group,id=a", "throttle-group,id=b.1-_,x-iops-read=5"]
    expected = {"a": ThrottleLimits(), "b.1-_": ThrottleLimits(iops_read=RateLimit(5))}
    assert parse_objects(texts) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("secret,id=s,data=x", "'secret' is not supported, only throttle-group"),
        ("id=g", "None is not supported"),
        ("throttle-group", "id: None is not a name"),
        ("throttle-group,id=1g", "id: '1g' is not a name"),
        ("throttle-group,id=", "id: '' is not a name"),
        ("throttle-group,id=g,iops-total=1", "iops-total: throttle-group has no such property"),
        ("throttle-group,id=g,x-foo=1", "unknown key 'foo'"),
        ("throttle-group,id=g,x-iops-total", "'x-iops-total' is not KEY=VALUE"),
        ("throttle-group,id=g,x-iops-total=fast", "iops-total: 'fast' is not a number"),
        ("throttle-group,id=g,x-iops-total=1,x-iops-total=1", "x-iops-total is given twice"),
        ("throttle-group,id=g,x-iops-total=1,limits.iops-total=1", "iops-total is given twice"),
        ("throttle-group,id=g,x-iops-total-max=1", "iops-total-max needs iops-total"),
        ('{"qom-type": "throttle-group", "id": 5}', "id: 5 is not a name"),
        ('{"qom-type": "throttle-group", "id": "g", "x-bps-read": true}', "'True' is not a size"),
        ("{", "not valid JSON"),
    ],
)
def test_refusals(text, said):
    with pytest.raises(ConfigError, match=said) as refused:
        parse_objects([text])
    assert str(refused.value).startswith("--object: ")


def test_an_id_names_one_object():
    with pytest.raises(ConfigError, match="--object: id: 'g' is given twice"):
        parse_objects(["throttle-group,id=g", "throttle-group,id=g"])
