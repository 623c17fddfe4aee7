"""Both spellings of block device options, and that no text does more than raise ConfigError."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import ConfigError
from nbdserve.imageopts import (
    MAX_DEPTH,
    MAX_TEXT,
    children_of,
    parse_image_opts,
    parse_json_name,
    parse_keyval,
)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("driver=qcow2", {"driver": "qcow2"}),
        ("driver=qcow2,", {"driver": "qcow2"}),
        ("file.filename=a.img,driver=raw", {"file.filename": "a.img", "driver": "raw"}),
        ("file.filename=a,,b.img,driver=raw", {"file.filename": "a,b.img", "driver": "raw"}),
        ("file.filename=,,,driver=raw", {"file.filename": ",", "driver": "raw"}),
        ("file.filename=a,,", {"file.filename": "a,"}),
        ("x=1,,,,y", {"x": "1,,y"}),
        ("file.filename=a=b", {"file.filename": "a=b"}),
        ("file.filename=", {"file.filename": ""}),
        ("driver=raw,read-only", {"driver": "raw", "read-only": "on"}),
        ("driver=raw,noread-only,x=1", {"driver": "raw", "read-only": "off", "x": "1"}),
        # As in QEMU, where no name of a flag begins with "no".
        ("driver=raw,node-name", {"driver": "raw", "de-name": "off"}),
        ("disk.qcow2", {"file": "disk.qcow2"}),
        ("a,,b,driver=raw", {"file": "a,b", "driver": "raw"}),
    ],
)
def test_image_opts(text, options):
    assert parse_image_opts(text) == options


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("driver=raw,driver=raw", "driver is given twice"),
        ("read-only=on,noread-only", "read-only is given twice"),
        ("file=x,file.driver=file", "file cannot have a value of its own beside file.driver"),
        ("file.driver=file,file=x", "file cannot have a value of its own beside file.driver"),
        ("a.b=x,a.b.c.d=y", "a.b cannot have a value of its own beside a.b.c.d"),
        ("disk.qcow2,file.driver=file", "file cannot have a value"),
        ("file..filename=x", "'file..filename': an option's name is empty"),
        ("x=1,=2", "'': an option's name is empty"),
        (".x=1", "name is empty"),
        ("x.=1", "name is empty"),
        ("x=1,no", "name is empty"),
        ("x=\0", "'x': contains a NUL byte"),
        ("x\0=1", "NUL byte"),
        ("x=\ud800", "is not valid Unicode"),
        (".".join("x" * (MAX_DEPTH + 1)) + "=1", r"x\.x\.x\.\.\.: more than 32 names in an option"),
        ("x=" + "1" * MAX_TEXT, "longer than 65536 characters"),
    ],
)
def test_image_opts_that_mean_nothing(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_image_opts(text)


def test_keys_may_be_as_deep_as_allowed():
    key = ".".join("x" * MAX_DEPTH)
    assert parse_image_opts(f"{key}=1") == {key: "1"}


def test_a_file_name_that_is_not_utf_8_stays_what_it_is():
    assert parse_image_opts("x=\udcff") == {"x": "\udcff"}


def test_keyval_has_no_short_form():
    assert parse_keyval("throttle-group,id=g", "kind") == {"kind": "throttle-group", "id": "g"}
    with pytest.raises(ConfigError, match="'fast' is not KEY=VALUE"):
        parse_keyval("throttle-group,fast", "kind")


keys = st.text("abcno-", min_size=1, max_size=4).filter(lambda key: not key.startswith("no"))
paths = st.lists(keys, min_size=1, max_size=4).map(".".join)
values = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@given(st.dictionaries(paths, values))
def test_what_is_spelt_out_comes_back(options):
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())
    inside = any(
        other != key and other.startswith(f"{key}.") for key in options for other in options
    )
    if inside:
        with pytest.raises(ConfigError, match="cannot have a value of its own"):
            parse_image_opts(text)
    else:
        assert parse_image_opts(text) == options
        assert parse_json_name("json:" + json.dumps(options)) == options


@given(st.text("ab.=,no\0\ud800", max_size=20))
def test_any_string_is_options_or_one_line(text):
    options = said = None
    try:
        options = parse_image_opts(text)
    except ConfigError as error:
        said = str(error)
    assert options is None or all(all(key.split(".")) for key in options)
    assert said is None or "\n" not in said


# --- json: ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("{}", {}),
        ('{"driver": "raw", "offset": 512}', {"driver": "raw", "offset": 512}),
        ('{"file": {"filename": "a", "x": {"y": true}}}', {"file.filename": "a", "file.x.y": True}),
        ('{"file.driver": "file", "file": {"filename": "a"}}',
         {"file.driver": "file", "file.filename": "a"}),
        ('{"backing": null}', {"backing": None}),
        ('{"x": [1, {"y": 2}]}', {"x.0": 1, "x.1.y": 2}),
        ('{"x": 1.5}', {"x": 1.5}),
        # QEMU's JSON has strings in single quotes too.
        ("{'driver': 'raw'}", {"driver": "raw"}),
        ("""{'a': 'say "hi"', "b": "it's"}""", {"a": 'say "hi"', "b": "it's"}),
        (r"""{'a': 'it\'s', "b": "\'", 'c': '\"'}""", {"a": "it's", "b": "'", "c": '"'}),
        (r"""{'a': '\\', 'b': '\u0041'}""", {"a": "\\", "b": "A"}),
        ("""{'a': '[[{{', "b": "}}"}""", {"a": "[[{{", "b": "}}"}),
    ],
)  # fmt: skip
def test_json(text, options):
    assert parse_json_name(f"json:{text}") == options


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("{'a': 1,}", "not valid JSON"),
        ("{} x", "not valid JSON"),
        ('{"a": "b', "not valid JSON"),
        ('{"a": "b\\', "not valid JSON"),
        ("'", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('"{}"', "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"a": 1, "a": 1}', "'a' is given twice"),
        ('{"a": {"b": 1}, "a.b": 1}', "a.b is given twice"),
        ('{"a": "x", "a.b": 1}', "a cannot have a value of its own beside a.b"),
        ('{"a": {}}', "a: no options in it"),
        ('{"a": {"b": []}}', "a.b: no options in it"),
        ('{"a": NaN}', "NaN is not a value"),
        ('{"a": -Infinity}', "-Infinity is not a value"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit"),
        ('{"": 1}', "name is empty"),
        ('{"a": "\\u0000"}', "contains a NUL byte"),
        ('{"a": "\\ud800"}', "not valid Unicode"),
        ("[" * 60000, "more than 32 brackets within each other"),
        ('{"a":' * 60 + "1" + "}" * 60, "more than 32 brackets within each other"),
        ("[" + "[]," * 20000, "not valid JSON"),
        (" " * MAX_TEXT + "{}", "longer than 65536 characters"),
        ('"' + '\\"' * 30000, "not valid JSON"),
        ("{}" + "'" * 40001, "not valid JSON"),
    ],
)
def test_json_that_means_nothing(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_json_name(f"json:{text}")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("a.'\"\\\0\ud800"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("a."), inner),
)


@given(st.text("{}[]'\"\\:,a1. ") | json_values.map(json.dumps))
def test_any_text_is_an_object_or_one_line(text):
    options, said = {}, ""
    try:
        options = parse_json_name(f"json:{text}")
    except ConfigError as error:
        said = str(error)
    assert all(isinstance(value, str | int | float | None) for value in options.values())
    assert "\n" not in said


def test_a_long_name_is_not_shown_in_full():
    with pytest.raises(ConfigError) as refused:
        parse_json_name("json:" + "[" * 5000)
    assert len(str(refused.value)) < 300


def test_the_options_of_a_child():
    options = {"file": None, "file.a": 1, "file.b.c": 2, "files": 3, "x.file.a": 4}
    assert children_of(options, "file") == {"a": 1, "b.c": 2}
