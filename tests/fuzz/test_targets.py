"""Every target: over what it starts from, over the kept corpus, and over what hypothesis makes of
both.

The mutations are those of the long run, so what is found here could have been found there and the
other way round; hypothesis chooses among them and makes what fails small.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.mutate import mutation
from fuzz.targets import CORPUS, TARGETS

EXAMPLES = {
    "handshake": 500,
    "requests": 1500,
    "transmission": 150,
    "header": 800,
    "image": 400,
    "option_strings": 1500,
}


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_target_starts_from(name):
    target = TARGETS[name]
    for data in target.module.seeds():
        target.function(data)


@pytest.mark.parametrize("name", TARGETS)
def test_the_kept_corpus(name):
    target = TARGETS[name]
    assert target.corpus, "nothing is kept"
    for data in target.corpus:
        target.function(data)


def test_the_kept_corpus_is_small():
    files = [file for file in CORPUS.rglob("*") if file.is_file()]
    assert len(files) <= 1000
    assert sum(file.stat().st_size for file in files) < 1 << 20
    assert {file.parent.name for file in files} == set(TARGETS)


def test_the_shares_make_a_whole():
    assert sum(target.share for target in TARGETS.values()) == 100


def simple(data, longest):
    """In place of libFuzzer's own mutation: a byte or two, a piece less, a piece twice."""
    chance = random.Random(data)
    changed = bytearray(data or b"\0")
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(changed))
        action = chance.randrange(4)
        if action == 0:
            changed[at] = chance.choice((0, 1, 127, 128, 255, changed[at] ^ 1 << at % 8))
        elif action == 1 and len(changed) > 1:
            del changed[at : at + chance.randrange(1, 9)]
        elif action == 2:
            changed[at:at] = changed[at : at + chance.randrange(1, 40)]
        else:
            changed[at : at + 1] = chance.randbytes(1)
        changed = changed or bytearray(1)
    return bytes(changed[:longest])


def inputs(target):
    """Mutated once to four times from a seed or a kept input; or any bytes."""
    starts = [*target.module.seeds(), *target.corpus]
    mutate = mutation(target.module, simple) or (lambda data, longest, _: simple(data, longest))

    def mutated(start, seeds):
        for seed in seeds:
            start = mutate(start, target.longest, seed)
        return start

    seeds = st.lists(st.integers(0, 1 << 32), min_size=1, max_size=4)
    return st.builds(mutated, st.sampled_from(starts), seeds) | st.binary(max_size=300)


@pytest.mark.parametrize("name", TARGETS)
def test_what_hypothesis_makes_of_them(name):
    target = TARGETS[name]

    @settings(
        max_examples=EXAMPLES[name],
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(inputs(target))
    def run(data):
        target.function(data)

    run()
