"""The page as text: self-contained, safe to open, with the numbers of the plan."""

import errno
import json
import re
from pathlib import Path

import pytest

from mla.errors import MLAError
from mla.plan import Question, get_hardware, make_plan, read_shape
from mla.plan.known import known_models
from mla.plan.page import page, write_page
from mla.plan.picture import write_picture
from tests.plan.cases import plan


def test_nothing_is_loaded_from_anywhere():
    text = page(plan("deepseek-v3"))
    assert not re.search(r"""(src|href|action)\s*=|url\(|@import|fetch\(|XMLHttpRequest|import\(""", text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert len(text) < 250_000
    assert "@" not in "".join(re.findall(r"@[A-Z]+@", text))


def test_a_name_cannot_become_markup():
    raw = {**known_models()["llama-3.1-8b"]["config"]}
    shape = read_shape(raw, name="</script><b>x", source="</script><b>x")
    text = page(make_plan(shape, get_hardware("h100"), Question(context=16)))
    assert "<b>x" not in text.replace("<\\/script><b>x", "")
    assert "&lt;/script&gt;&lt;b&gt;x" in text


def test_every_figure_the_page_shows_exists():
    text = page(plan("deepseek-v3"))
    values = plan("deepseek-v3")
    for name in set(re.findall(r'data-v="(\w+)"', text)):
        assert values.values.value(name, 0) is not None


@pytest.mark.parametrize("write", [write_page, write_picture])
def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch, write):
    def fill(self, file, *args, **kwargs):
        Path(self if write is write_page else file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "plan"
    path.write_text("old")
    monkeypatch.setattr("pathlib.Path.write_text", fill)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fill)
    with pytest.raises(MLAError, match="plan cannot be written: No space left on device"):
        write(plan("youtu"), path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("plan", b"old")]


def test_times_are_not_said_to_be_bounds():
    # A step that moves weights while it computes attention is faster than the sum of the two.
    v3 = plan("deepseek-v3", "ryzen 7950x", context=65536)
    moved = v3["weights_memory_time_mla"] + v3["attention_memory_time_mla"]
    computed = v3["weights_arithmetic_time_mla"] + v3["attention_arithmetic_time_mla"]
    assert v3["step_time_mla"] > 1.05 * max(moved, computed)
    assert "without overlap" in v3.figure("step_time_mla").meaning
    assert "sooner" not in page(v3)


def test_rotary_keys_of_every_rank_are_those_of_the_command():
    keys = dict(json.loads(re.search(r'"rotaryKeys": (\[.*?\]\])', page(plan("llama-3.1-8b")))[1]))
    assert [keys[from_] for from_ in sorted(keys)] == list(range(2, 130, 2))
    for rank in (1, 20, 128, 700, 1856):
        shown = keys[max(from_ for from_ in keys if from_ <= rank)]
        assert shown == plan("llama-3.1-8b", rank=rank).shape.groups[0]["p"]
    assert '"rotaryKeys": []' in page(plan("deepseek-v3"))
