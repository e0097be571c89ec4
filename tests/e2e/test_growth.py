"""Nothing grows while a command works; the short form of what `make faults` does at length."""

import dataclasses

import pytest

from tests.footprint import Work, assert_steady

pytestmark = pytest.mark.slow

STEPS, TRAINING = 240, [(110, 140), (210, 240)]  # lines of metrics; what compiling took is given back by then
ROWS, GENERATION = 240, [(60, 120), (180, 240)]
GROWTH = 0.03  # of some 700 MiB, so a third of a MiB a step and a sixth a row


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    return Work(tmp_path_factory.mktemp("work"))


def test_training(work):
    assert_steady(*work.train(STEPS, TRAINING), GROWTH)


def test_generation(work):
    assert_steady(*work.generate(ROWS, GENERATION), GROWTH)


def test_leaks_are_seen(work):
    """A MiB, a thread and a file in every step, a process in every tenth; each of them alone is enough."""
    before, after = work.train(STEPS, TRAINING, "--leak", module="tests.e2e.scripted_training")
    for field in dataclasses.fields(before):
        with pytest.raises(AssertionError, match="MiB"):
            assert_steady(before, dataclasses.replace(before, **{field.name: getattr(after, field.name)}), GROWTH)
