"""Leaving a step of the conversion out changes the result, and only while it is left out."""

import pytest
import torch

from benchmarks.ablation import STEPS, left_out
from mla.convert import convert
from tests.convert.tiny import teacher, tokens


def converted(step):
    with left_out(step):
        return convert(teacher(), calibration=tokens(48, 40), rank=6, rope=6).state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole():
    return converted("nothing")


@pytest.mark.parametrize("step", [step for step in STEPS if step != "nothing"])
def test_every_step_matters(step, whole):
    assert not same(whole, converted(step))


def test_steps_come_back(whole):
    for step in STEPS:
        with left_out(step):
            pass
    assert same(whole, converted("nothing"))
