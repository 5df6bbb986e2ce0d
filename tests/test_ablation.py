"""Leaving a step of the conversion out changes the result, and only while it is left out."""

import json

import pytest
import torch

from benchmarks import ablation
from benchmarks.ablation import STEPS, left_out
from mla.convert import convert
from tests.cli.conftest import make_tokenizer
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


def test_every_row_is_measured_by_itself(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ablation, "WINDOW", 40)
    monkeypatch.setattr(ablation, "load_teacher", lambda _: (teacher(vocab_size=256), make_tokenizer()))
    text = tmp_path / "text.txt"
    text.write_text("The cache holds one latent vector per token. " * 60)
    texts = ["--text", str(text), "--calibration", str(text)]
    ablation.main([*texts, "--budgets", "24", "12", "--without", "nothing", "refit", "--json"])
    report = json.loads(capsys.readouterr().out)
    rows = report["rows"]
    assert [(row["budget"], row["without"]) for row in rows] == [
        (budget, without) for budget in (24, 12) for without in ("nothing", "refit")
    ]
    assert len({row["kl"] for row in rows}) == 4
    assert report["calibration"] == [8, 40]
    assert all(row["kl"] > 0 for row in rows)
