"""What a model has read before is used again only where it is what the model would compute."""

import functools

import pytest
import torch

from mla.cache.folder import PrefixFolder
from mla.config import MLAConfig
from mla.integrations import prefixes as module
from mla.integrations.prefixes import Prefixes, fingerprint, read_prompt, switching_length
from mla.integrations.serving import generation
from mla.integrations.serving.generation import Engine
from mla.integrations.transformers import absorb
from tests.cli.conftest import make_tokenizer
from tests.families import ROPE_SCALINGS, build
from tests.integrations.serving.test_generation import complete, make_engine

SWITCH = ROPE_SCALINGS["longrope"]["original_max_position_embeddings"]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 4


def long_model(seed=0):
    """A model whose latents are others for prompts beyond 64 tokens."""
    return build("deepseek_v3", seed, vocab_size=256, rope_parameters=ROPE_SCALINGS["longrope"])


def long_engine(**options):
    model = absorb(long_model())
    config = MLAConfig.from_transformers(model.config)
    return Engine(model, make_tokenizer(), "tiny", Prefixes(model, config, "fp32", **options), limit=512)


@functools.cache
def stock(length, new):
    """What Transformers writes after so many letters of the text, read at once."""
    model, tokenizer = long_model(), make_tokenizer()
    ids = tokenizer(TEXT[:length], return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=new, do_sample=False)[0, length:]
    return tokenizer.decode(written)


def test_the_length_at_which_frequencies_change():
    config = long_model().config
    assert switching_length(config) == SWITCH == 64
    config.rope_parameters["long_factor"] = config.rope_parameters["short_factor"]
    assert switching_length(config) is None
    config = long_model().config
    config.max_position_embeddings = 64
    assert switching_length(config) is None
    assert switching_length(build("deepseek_v3").config) is None


@pytest.mark.parametrize("budget", [None, 10**7])
@pytest.mark.parametrize(
    "lengths",
    # One after another: what is kept of one is there for the next.
    [(60, 64, 65, 66), (66, 65, 64, 60), (100, 101, 90, 40, 120), (50, 70, 55, 130, 129)],
)
def test_longrope_goes_on_as_stock_reads_it(monkeypatch, budget, lengths):
    monkeypatch.setattr(module, "_STEP", 16)
    engine = long_engine(budget=budget)
    for length in lengths:
        got = complete(engine, TEXT[:length], max_tokens=20)
        assert got["choices"][0]["text"] == stock(length, 20), length
    # Something is used again all the same.
    got = complete(engine, TEXT[: lengths[-1]], max_tokens=20)
    cached = got["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == (lengths[-1] - 1 if lengths[-1] != SWITCH + 1 else 0)


def test_an_answer_that_crosses_the_length_is_kept_up_to_it():
    engine = long_engine(budget=10**7)
    complete(engine, TEXT[:60], max_tokens=20)
    engine.thread.submit(lambda: None).result(timeout=60)
    (kept,) = engine.prefixes._kept
    assert kept.cache.get_seq_length() == len(kept.tokens) == SWITCH


@pytest.mark.parametrize("length", [64, 65, 66, 130])
def test_scores_of_a_prompt_are_those_of_all_of_it(monkeypatch, length):
    monkeypatch.setattr(generation, "_SCORED_STEP", 16)
    got = complete(long_engine(), TEXT[:length], max_tokens=0, echo=True, logprobs=0)
    scores = got["choices"][0]["logprobs"]["token_logprobs"][1:]
    ids = make_tokenizer()(TEXT[:length], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = long_model()(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scores), want, atol=1e-4, rtol=1e-4)


def stored(model, folder, *conversations):
    """A folder with the latents of these tokens."""
    shelf = PrefixFolder(folder, fingerprint(model, "fp32"), 10**9)
    writer = Prefixes(model, MLAConfig.from_transformers(model.config), "fp32", budget=10**8)
    for tokens in conversations:
        cache = writer.new(len(tokens))
        read_prompt(model, [*tokens, 0], cache, lambda *_: None)
        with torch.no_grad():
            model(torch.tensor([tokens[cache.get_seq_length() :]]), past_key_values=cache)
        shelf.save(cache, tokens)
    return shelf


@pytest.mark.parametrize(
    ("held", "prompt", "reused"), [(60, 80, 0), (100, 60, 0), (100, 90, 89), (60, 60, 59)]
)
def test_files_of_the_other_side_are_not_used(tmp_path, held, prompt, reused):
    engine = long_engine(budget=10**7)
    tokens = make_tokenizer()(TEXT)["input_ids"]
    engine.prefixes._folder = stored(engine.model, tmp_path, tokens[:held])
    got = complete(engine, TEXT[:prompt], max_tokens=20)
    assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == reused
    assert got["choices"][0]["text"] == stock(prompt, 20)


@pytest.mark.parametrize("lengths", [(60, 130, 60), (130, 60, 130)])
def test_a_beginning_of_the_other_side_is_not_a_part(tmp_path, lengths):
    """Neither in memory nor in files: nothing else serves prompts of its side."""
    engine = long_engine(budget=10**7)
    engine.prefixes._folder = PrefixFolder(tmp_path, fingerprint(engine.model, "fp32"), 10**9)
    cached = []
    for length in lengths:
        got = complete(engine, TEXT[:length], max_tokens=1)
        cached.append(got["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 0, lengths[0] - 1]
    engine.thread.submit(lambda: None).result(timeout=60)
    assert sorted(len(kept.tokens) for kept in engine.prefixes._kept) == [60, 130]
    held = engine.prefixes._folder._known().values()
    assert sorted(len(tokens.ids) for tokens in held) == [60, 130]


def test_a_file_is_read_where_that_is_cheaper_than_to_compute(tmp_path, monkeypatch):
    """All of a file is read, whatever is needed: the shortest of several, and none for a small share."""
    monkeypatch.setattr(module, "_WORTH_READING_SHARE", 4)
    model = (engine := make_engine()).model
    start = list(range(1, 51))
    long, short = [*start, *range(100, 250)], [*start, *range(60, 100)]
    shelf = stored(model, tmp_path, long, short)
    read = []
    monkeypatch.setattr(shelf, "load", lambda file, cache, keep, device: read.append((file, keep)))

    def take(tokens):
        read.clear()
        Prefixes(model, engine.prefixes.config, "fp32", folder=shelf).take(tokens, 300)
        return [(shelf._known()[file.name].ids.tolist(), keep) for file, keep in read]

    assert take([*start, 5, 6]) == [(short, 50)]
    assert take([*long[:60], 5]) == [(long, 60)]
    # 40 tokens of 200 are less than a quarter, of 90 more.
    assert take([*start[:40], 5]) == [(short, 40)]
    shelf.remove(shelf.longest(short)[0])
    assert take([*start[:40], 5]) == []
    assert take([*start, 5]) == [(long, 50)]
