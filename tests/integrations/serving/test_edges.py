"""Requests that are odd, tokenizers that are, and memory and files that give way: an answer or a refusal."""

import asyncio
import gc
import json
import weakref

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mla.cache.folder import PrefixFolder
from mla.errors import MLAError
from mla.integrations.prefixes import Prefixes, fingerprint
from mla.integrations.serving.answers import ChatEndpoint
from mla.integrations.serving.generation import Engine
from mla.integrations.serving.requests import ApiError, read_chat, read_completion, read_messages
from tests.cli.conftest import make_tokenizer
from tests.integrations.serving.test_generation import complete, make_engine

HELLO = [{"role": "user", "content": "Hi"}]


def chat(engine, messages, **body):
    body = {"messages": messages, "temperature": 0, "max_tokens": 4, **body}
    return json.loads(asyncio.run(ChatEndpoint(engine).handle_request(body, "id")).body)


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.mark.parametrize("none", [None, []])
def test_tool_calls_that_are_none(engine, none):
    answer = {"role": "assistant", "content": "Hello"}
    want = chat(engine, [*HELLO, answer, *HELLO])
    got = chat(engine, [*HELLO, {**answer, "tool_calls": none}, *HELLO])
    assert got["choices"] == want["choices"]
    assert got["usage"]["prompt_tokens"] == want["usage"]["prompt_tokens"]
    with pytest.raises(ApiError, match="expected text"):
        read_messages([{"role": "assistant", "content": None, "tool_calls": none}])


@pytest.mark.parametrize(
    "calls",
    [["x"], [{"function": {"name": "f", "arguments": "{bad"}}], [{"function": {"name": "f"}}], [{}], "x"],
)
def test_tool_calls_that_are_malformed_are_the_clients_error(engine, calls):
    with pytest.raises(ApiError, match="refuses these messages"):
        chat(engine, [*HELLO, {"role": "assistant", "content": "", "tool_calls": calls}])


@pytest.mark.parametrize("name", ["chat_template", "return_tensors", "padding", "tokenize", "conversation"])
def test_what_templates_are_given_is_theirs(engine, name):
    with pytest.raises(ApiError, match=f"chat_template_kwargs: {name} is not the template's"):
        chat(engine, HELLO, chat_template_kwargs={name: "pt"})
    assert chat(engine, HELLO, chat_template_kwargs={"enable_thinking": False})["choices"]


@pytest.mark.parametrize(
    "bias", [{"5": float("inf")}, {"5": float("nan")}, {"5": "nan"}, {"5": 1e300}, {"5": 10**400}, {"5": 101}]
)
def test_biases_are_numbers_that_count(bias):
    with pytest.raises(ApiError, match=r"logit_bias: expected an object of numbers from -100 to 100"):
        read_chat({"messages": HELLO, "logit_bias": bias}, "tiny")


def test_the_coldest_temperature_is_greedy(engine):
    want = complete(engine, "Hello", max_tokens=6)["choices"]
    assert complete(engine, "Hello", max_tokens=6, temperature=1e-40, seed=3)["choices"] == want


@pytest.mark.parametrize(
    ("own", "asked", "drawn"),
    [
        ({"do_sample": True, "temperature": 0.6}, {"top_p": 0.5}, (True, 0.6, 0.5)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {}, (True, 0.6, 0.9)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 1}, (True, 1.0, 0.9)),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0, "top_p": 0.5}, (False, None, None)),
        ({"do_sample": False}, {"top_p": 0.5}, (False, None, None)),
        ({"do_sample": False}, {"temperature": 0.8, "top_p": 0}, (True, 0.8, 1e-9)),
    ],
)
def test_what_is_not_asked_for_is_the_models_own(engine, monkeypatch, own, asked, drawn):
    monkeypatch.setattr(engine.model, "generation_config", GenerationConfig(**own))
    config = engine.generation_config(read_completion({"prompt": "a", **asked}, "tiny"), 5)
    assert (config.do_sample, config.temperature, config.top_p) == drawn


def test_half_of_a_surrogate_pair(engine):
    with pytest.raises(ApiError, match="the tokenizer does not read it"):
        complete(engine, "\ud800")
    for body in ({"model": "\ud800"}, {"\ud800": 1}):
        with pytest.raises(ApiError) as refusal:
            read_completion({"prompt": "a", **body}, "tiny")
        assert "\\ud800" in json.dumps(refusal.value.body, ensure_ascii=False).encode().decode()


def test_full_sliding_windows_are_not_cut_back():
    engine = make_engine("dots3_note")
    first, again = (complete(engine, "Hello there " * 6, max_tokens=8) for _ in range(2))
    assert first["choices"] == again["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_conversation_that_goes_on_makes_room_for_all_of_itself():
    """Two conversations fill the budget; one of them may then grow to nearly all of it."""
    model, config = (engine := make_engine()).model, engine.prefixes.config
    budget = config.cache_bytes(100, "fp32")
    prefixes = Prefixes(model, config, "fp32", budget=budget)
    one, other = list(range(1, 46)), list(range(101, 146))
    for tokens in (other, one):
        cache = prefixes.take(tokens, 45)
        with torch.no_grad():
            model(torch.tensor([tokens]), past_key_values=cache)
        prefixes.keep(tokens, cache)
    assert len(prefixes._kept) == 2
    longer = [*one, *range(50, 60)]
    cache = prefixes.take(longer, 98)
    assert cache.get_seq_length() == 45
    assert prefixes.nbytes + config.cache_bytes(98, "fp32") <= budget  # the other one has gone


def read(prefixes, tokens, wanted):
    """Take a cache for ``tokens``, read them, and keep it."""
    cache = prefixes.take(tokens, wanted)
    with torch.no_grad():
        prefixes._model(torch.tensor([tokens[cache.get_seq_length() :]]), past_key_values=cache)
    prefixes.keep(tokens, cache)
    return cache


def test_what_has_to_go_is_free_before_memory_is_asked_for(monkeypatch):
    """Else a request would need the memory of the conversation that makes room for it besides its own."""
    model, config = (engine := make_engine()).model, engine.prefixes.config
    prefixes = Prefixes(model, config, "fp32", budget=config.cache_bytes(200, "fp32"))
    one, other = list(range(1, 81)), [*range(1, 31), *range(101, 151)]
    old = weakref.ref(read(prefixes, list(range(151, 241)), 90))
    source = read(prefixes, one, 80)
    asked = []
    monkeypatch.setattr(
        "mla.integrations.prefixes.require_memory", lambda needed, purpose: asked.append((needed, old()))
    )
    cache = prefixes.take(other, 80)
    assert cache is not source
    assert asked == [(config.cache_bytes(80, "fp32"), None)]
    assert goes_on_as_alone(model, cache, other, 30)
    assert [kept.cache for kept in prefixes._kept] == [source]


@torch.no_grad()
def goes_on_as_alone(model, cache, tokens, held) -> bool:
    """Whether a cache that holds so many of the tokens gives the logits of a model that has read all."""
    assert cache.get_seq_length() == held
    rest = model(torch.tensor([tokens[held:]]), past_key_values=cache).logits[0, -1]
    return torch.allclose(rest, model(torch.tensor([tokens])).logits[0, -1], atol=1e-5)


def test_a_beginning_is_not_copied_where_two_caches_do_not_fit(monkeypatch):
    """For a moment both would be in memory, more than the budget allows: the one gives way to the other."""
    model, config = (engine := make_engine()).model, engine.prefixes.config
    budget = config.cache_bytes(100, "fp32")
    prefixes = Prefixes(model, config, "fp32", budget=budget)
    one, other = list(range(1, 81)), [*range(1, 31), *range(101, 151)]
    source = read(prefixes, one, 80)
    monkeypatch.setattr("mla.integrations.prefixes.copy_prefix", None)  # nothing is copied
    cache = prefixes.take(other, 95)
    assert cache is source
    assert prefixes._kept == []
    assert goes_on_as_alone(model, cache, other, 30)
    cache.crop(-1)
    model(torch.tensor([list(range(16))]), past_key_values=cache)
    assert cache.nbytes == config.cache_bytes(95, "fp32")  # the room that was made, and no more


def test_a_long_conversation_leaves_room_for_many_short_ones():
    """All chats begin with the same token; the room of the first would go from each of them to the next."""
    model, config = (engine := make_engine()).model, engine.prefixes.config
    prefixes = Prefixes(model, config, "fp32", budget=config.cache_bytes(100, "fp32"))
    chats = [[1, *range(first, first + 39)] for first in (10, 60, 110)]
    read(prefixes, list(range(1, 91)), 100)
    for chat in chats:
        cache = prefixes.take(chat, 45)
        assert goes_on_as_alone(model, cache, chat, 1)
        prefixes.keep(chat, cache)
    assert [kept.tokens.tolist() for kept in prefixes._kept] == chats[1:]
    assert prefixes.nbytes == config.cache_bytes(90, "fp32")


def test_conversations_make_room_where_the_machine_has_none(monkeypatch):
    """Within the budget, where others have taken the memory."""
    model, config = (engine := make_engine()).model, engine.prefixes.config
    prefixes = Prefixes(model, config, "fp32", budget=config.cache_bytes(500, "fp32"))
    for first in (1, 60, 120):
        read(prefixes, list(range(first, first + 50)), 50)
    last = prefixes._kept[-1]

    def two_at_once(needed, purpose):
        if needed + prefixes.nbytes > config.cache_bytes(100, "fp32"):
            raise MLAError(f"{purpose}: no memory")

    monkeypatch.setattr("mla.integrations.prefixes.require_memory", two_at_once)
    prefixes.new(50)
    assert prefixes._kept == [last]
    with pytest.raises(MLAError, match="a cache of 101 tokens: no memory"):
        prefixes.new(101)


def test_an_answer_grows_into_the_room_that_was_made_for_it():
    engine = make_engine()
    held = []

    def watch(module, args, kwargs):
        held.append(kwargs["past_key_values"].nbytes)

    engine.model.register_forward_pre_hook(watch, with_kwargs=True)
    complete(engine, "a" * 20, max_tokens=400)
    sizes = sorted(set(held) - {0})
    assert sizes == [engine.prefixes.config.cache_bytes(tokens, "fp32") for tokens in (276, 420)]


def test_what_is_only_copied_from_keeps_its_age():
    """All chats begin with the same few tokens: to begin like another one is no use of that one."""
    model, config = (engine := make_engine()).model, engine.prefixes.config
    prefixes = Prefixes(model, config, "fp32", budget=config.cache_bytes(150, "fp32"))
    one, two, three = ([1, 2, 3, *range(first, first + 45)] for first in (10, 60, 110))
    for tokens in (one, two, three):
        read(prefixes, tokens, 48)
    assert [kept.tokens.tolist() for kept in prefixes._kept] == [one, two, three]
    # Of three that begin alike the newest is taken, and the oldest makes room.
    assert prefixes._longest_kept([1, 2, 3, 4])[0].tokens.tolist() == three
    four = [1, 2, 3, *range(160, 205)]
    read(prefixes, four, 48)
    assert [kept.tokens.tolist() for kept in prefixes._kept] == [two, three, four]


def test_a_failed_request_leaves_no_memory_behind():
    engine = make_engine()
    caches = []

    def broken(*args, past_key_values, **kwargs):
        caches.append(weakref.ref(past_key_values))
        raise MLAError("no memory")  # which no log keeps

    engine.model.generate = broken
    gc.disable()
    try:
        with pytest.raises(ApiError, match="no memory"):
            complete(engine, "Hello")
        engine.thread.submit(lambda: None).result(timeout=60)
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


def test_a_file_that_breaks_after_room_was_made_for_it(tmp_path):
    notes = []
    engine = make_engine()
    marks = fingerprint(engine.model, "fp32")
    folder = PrefixFolder(tmp_path, marks, 10**9, notes.append)
    tokens = list(range(1, 80))
    writer = Prefixes(engine.model, engine.prefixes.config, "fp32", folder=folder)
    cache = writer.take(tokens, 80)
    with torch.no_grad():
        engine.model(torch.tensor([tokens]), past_key_values=cache)
    writer.keep(tokens, cache)
    (file,) = tmp_path.iterdir()
    # A reader in whose memory a shorter beginning lies, and no room beside it.
    budget = engine.prefixes.config.cache_bytes(100, "fp32")
    reader = Prefixes(
        engine.model, engine.prefixes.config, "fp32", budget=budget, folder=folder, note=notes.append
    )
    short = reader.new(20)
    with torch.no_grad():
        engine.model(torch.tensor([tokens[:5]]), past_key_values=short)
    reader._folder = None
    reader.keep(tokens[:5], short)
    reader._folder = folder
    folder.longest(tokens)  # knows the file's tokens
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    taken = reader.take(tokens, 100)
    assert taken.get_seq_length() == 0
    assert any("computed again" in note for note in notes)


def sentences() -> PreTrainedTokenizerFast:
    """As SentencePiece does it: words carry the space before them, and decoding strips the first one."""
    words = ["<unk>", "<s>", "▁", *(f"▁{word}" for word in ("Once", "upon", "a", "time")), "a", "s"]
    tokenizer = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def test_echoed_tokens_make_up_the_text_they_score(engine, monkeypatch):
    monkeypatch.setattr(engine, "tokenizer", sentences())
    bias = {str(token): 100 for token in range(3, 9)}
    options = {"max_tokens": 5, "logprobs": 3, "logit_bias": bias}
    for echo in (True, False):
        choice = complete(engine, "Once upon", echo=echo, **options)["choices"][0]
        scores = choice["logprobs"]
        assert "".join(scores["tokens"]) == choice["text"]
        assert choice["text"].startswith("Once upon ") == echo
        for word, own, top in zip(
            scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True
        ):
            assert top is None or top[word] == own


def test_offsets_are_places_in_the_text_where_a_tokenizer_adds_special_tokens(engine, monkeypatch):
    tokenizer = sentences()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    bias = {str(token): 100 for token in range(3, 9)}
    options = {"max_tokens": 5, "logprobs": 3, "logit_bias": bias}
    choice = complete(engine, "Once upon", echo=True, **options)["choices"][0]
    scores = choice["logprobs"]
    assert (scores["tokens"][:3], scores["text_offset"][:3]) == (["<s>", "Once", " upon"], [0, 0, 4])
    assert choice["text"].startswith("Once upon ")
    for word, offset in list(zip(scores["tokens"], scores["text_offset"], strict=True))[1:]:
        assert choice["text"][offset:].startswith(word)
    plain = complete(engine, "Once upon", **options)["choices"][0]
    assert "".join(plain["logprobs"]["tokens"]) == plain["text"]
    assert scores["tokens"][-5:] == plain["logprobs"]["tokens"]


def test_threads_find_a_tokenizer_that_they_need_not_change(engine):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding()
    Engine(engine.model, tokenizer, "tiny", engine.prefixes, limit=512)
    assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.backend_tokenizer.padding is None
