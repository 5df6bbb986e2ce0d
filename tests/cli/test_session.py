"""A model opened for writing, in this process: what answers cost, and what is refused before they begin."""

import json
import shutil

import pytest

from mla.cli.session import Sampling, Session


@pytest.fixture
def own_way(mla_folder, tmp_path):
    """``own_way(do_sample=False)``: the model with a generation config of its own."""

    def make(**values):
        folder = tmp_path / "model"
        shutil.copytree(mla_folder, folder, dirs_exist_ok=True)
        place = folder / "generation_config.json"
        config = json.loads(place.read_text()) if place.exists() else {}
        place.write_text(json.dumps({**config, **values}))
        return folder

    return make


def answer(folder, text="Hello Hello Hello", new=12):
    session = Session(str(folder), dtype="auto", device="cpu")
    ids = session.encode([{"role": "user", "content": text}], raw=True)
    return session.answer(ids, Sampling(new, 0.0, 1.0, 0))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_beams", 3), ("prompt_lookup_num_tokens", 4), ("cache_implementation", "static")],
)
def test_a_model_with_other_ways_writes_in_order(mla_folder, own_way, capsys, field, value):
    want = answer(mla_folder)
    got = answer(own_way(**{field: value}))
    assert (got.text, got.new_tokens) == (want.text, 12)
    assert f"left out of the model's generation config: {field}" in capsys.readouterr().err


def test_stop_strings_of_the_models_own_end_an_answer(mla_folder, own_way):
    text = answer(mla_folder).text
    assert text[2:4].isascii()
    assert answer(own_way(stop_strings=[text[2:4]])).text == text[:4]
