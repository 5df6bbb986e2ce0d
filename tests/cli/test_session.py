"""A model opened for writing, in this process: what answers cost, and what is refused before they begin."""

import io
import json
import shutil

import pytest
from transformers import AutoTokenizer

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


@pytest.fixture
def own_stops(own_way):
    """``own_stops(["a"])``: the model with stop strings of its own, and a letter of ASCII in every token."""
    return lambda stops: own_way(stop_strings=stops, suppress_tokens=list(range(94, 256)))


def test_stop_strings_of_the_models_own_end_an_answer(own_stops):
    text = answer(own_stops([])).text
    stopped = answer(own_stops(text[5:7]))
    assert text.index(text[5:7]) == 5
    assert (stopped.text, stopped.new_tokens) == (text[:5], 7)


def test_a_stop_string_is_no_text_of_generate(mla, own_stops):
    """Of two tokens here; what only looks like the beginning of one comes out in the end."""
    options = ("Hello", "--max-new-tokens", 12)
    text = mla("generate", own_stops([]), *options).out.removesuffix("\n")
    assert text.index(text[5:7]) == 5
    for stop, want in ((text[5:7], text[:5]), (text[5:7] + "?" * 20, text)):
        folder = own_stops(["never written", stop])
        assert mla("generate", folder, *options).out == want + "\n"
        assert json.loads(mla("generate", folder, *options, "--json").out)["text"] == want


def test_a_stop_string_is_no_part_of_a_chat(mla, own_stops, monkeypatch):
    """Neither printed, nor told to the model in the next turn."""

    def talk(folder, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nMore\n"))
        return mla("chat", folder, "--max-new-tokens", 12, "--temperature", 0, *options).out.splitlines()

    text = json.loads(talk(own_stops([]), "--json")[0])["text"]
    assert text.index(text[5:7]) == 5
    folder = own_stops([text[5:7]])
    first, second = map(json.loads, talk(folder, "--json"))
    assert (first["text"], first["new_tokens"]) == (text[:5], 7)
    said = f"user: Hello\nassistant: {text[:5]}"
    assert second["prompt_tokens"] == len(said + "\nuser: More\nassistant: ")
    assert second["reused_tokens"] == len(said)
    assert talk(folder) == [first["text"], second["text"]]


@pytest.mark.parametrize("after", ["", "\n"])
def test_a_special_token_among_the_stop_strings_ends_an_answer(own_stops, after):
    """It is no text, in which it could be found."""
    text = answer(own_stops([])).text
    assert text.index(text[5]) == 5
    folder = own_stops([text[5] + after])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [text[5]]})
    tokenizer.save_pretrained(folder)
    stopped = answer(folder)
    assert (stopped.text, stopped.new_tokens) == (text[:5], 6)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_the_coldest_temperature_is_greedy(mla, mla_folder, seed):
    options = ("Hello", "--max-new-tokens", 6)
    want = mla("generate", mla_folder, *options).out
    assert mla("generate", mla_folder, *options, "--temperature", 1e-40, "--seed", seed).out == want


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-5, 1.0), (1e300, 1.0), (1.0, 1e-300)])
def test_the_ends_of_the_scales_are_drawn_from(mla, mla_folder, temperature, top_p):
    options = ("--max-new-tokens", 6, "--temperature", temperature, "--top-p", top_p)
    assert mla("generate", mla_folder, "Hello", *options).status == 0


def test_bytes_per_token_are_those_of_a_token(mla_folder):
    """Whatever room the cache has: for an earlier, longer answer here."""
    session = Session(str(mla_folder), dtype="auto", device="cpu")
    ids = session.encode([{"role": "user", "content": "Hello"}], raw=True)
    for new in (200, 3):
        answer = session.answer(ids, Sampling(new, 0.0, 1.0, 0))
        assert answer.cache_bytes_per_token == 3 * (32 + 8) * 4


@pytest.fixture
def bare_folder(mla_folder, tmp_path):
    """The model without its chat template."""
    folder = shutil.copytree(mla_folder, tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    return folder


def test_without_a_template_a_chat_is_one_text(mla, bare_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd then?\n/reset\nHello\n"))
    run = mla("chat", bare_folder, "--max-new-tokens", 4, "--temperature", 0, "--json")
    first, second, again = map(json.loads, run.out.splitlines())
    assert run.err.count("has no chat template: what you type and what it writes is one text") == 1
    session = Session(str(bare_folder), dtype="auto", device="cpu")
    ids = session.tokenizer(f"Hello{first['text']}\nAnd then?", return_tensors="pt")["input_ids"]
    want = session.answer(ids, Sampling(4, 0.0, 1.0, 0))
    assert (second["prompt_tokens"], second["text"]) == (ids.shape[1], want.text)
    assert again["text"] == first["text"]


def test_without_a_template_there_is_no_system(mla, bare_folder):
    run = mla("chat", bare_folder, "--system", "Be kind")
    assert run.status == 2
    assert "--system: expected a model with a chat template, got none with" in run.err
