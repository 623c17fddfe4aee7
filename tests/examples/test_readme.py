"""examples/README.md: every folder is in it, and what it names is there."""

import re

from installed import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
TEXT = (EXAMPLES / "README.md").read_text()


def test_every_folder_is_in_it_once():
    rows = re.findall(r"^\| \[([\w-]+)\]\(([\w-]+)\) \| \S", TEXT, re.MULTILINE)
    folders = {path.name for path in EXAMPLES.iterdir()
               if path.is_dir() and any(file.is_file() for file in path.iterdir())}
    assert [name for name, target in rows if name != target] == []
    assert sorted(name for name, _ in rows) == sorted(folders)


def test_every_command_in_it_exists():
    named = re.findall(r"`([\w/-]+\.(?:py|sh))`", TEXT)
    assert named
    assert [name for name in named if not (EXAMPLES / name).is_file()] == []
    program = (EXAMPLES / named[0]).read_text()
    options = re.findall(r"`(--[a-z]+)=(\w+)`", TEXT)
    assert {option for option, _ in options} == {"--synchronous", "--journal", "--cache", "--cuts"}
    for option, value in options:
        assert f'"{option}"' in program
        assert option in ("--cache", "--cuts") or f'"{value}"' in program
