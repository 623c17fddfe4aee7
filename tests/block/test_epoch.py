"""Epochs: a tag is passed exactly when nobody of its time or earlier is left."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nbdserve.block.epoch import Epochs


def test_nobody_in_flight_means_everything_is_past():
    epochs = Epochs()
    tag = epochs.advance()
    assert epochs.oldest() > tag


def test_a_request_holds_the_tag_of_its_own_epoch_back():
    epochs = Epochs()
    token = epochs.enter()
    tag = epochs.advance()
    assert epochs.oldest() <= tag
    epochs.leave(token)
    assert epochs.oldest() > tag


def test_a_request_that_came_after_does_not():
    epochs = Epochs()
    tag = epochs.advance()
    epochs.enter()
    assert epochs.oldest() > tag


def test_one_of_two_of_an_epoch_is_enough_to_hold_it():
    epochs = Epochs()
    first, second = epochs.enter(), epochs.enter()
    tag = epochs.advance()
    epochs.leave(first)
    assert epochs.oldest() <= tag
    epochs.leave(second)
    assert epochs.oldest() > tag


class EpochMachine(RuleBasedStateMachine):
    """Against the definition: for each tag, the set of requests that were there."""

    def __init__(self):
        super().__init__()
        self.epochs = Epochs()
        self.active = []  # (request number, token)
        self.number = 0
        self.tags = {}  # tag -> requests in flight when it was handed out

    @rule()
    def enter(self):
        self.active.append((self.number, self.epochs.enter()))
        self.number += 1

    @precondition(lambda self: self.active)
    @rule(choice=st.integers(0))
    def leave(self, choice):
        _, token = self.active.pop(choice % len(self.active))
        self.epochs.leave(token)

    @rule()
    def advance(self):
        self.tags[self.epochs.advance()] = {number for number, _ in self.active}

    @invariant()
    def a_tag_is_passed_when_all_who_were_there_have_left(self):
        here = {number for number, _ in self.active}
        for tag, were_there in self.tags.items():
            assert (self.epochs.oldest() > tag) is not bool(were_there & here)


TestEpochs = EpochMachine.TestCase
