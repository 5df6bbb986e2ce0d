"""The engine in this process: what ends a generation, what it keeps, and what does not fit."""

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest
import torch

from mla.config import MLAConfig
from mla.errors import MLAError
from mla.integrations.prefixes import Prefixes
from mla.integrations.serving import app as application
from mla.integrations.serving.answers import ChatEndpoint, CompletionEndpoint
from mla.integrations.serving.generation import Engine, Generation, Stream, read_all
from mla.integrations.serving.loading import _fitting
from mla.integrations.serving.requests import ApiError, read_completion, read_prompts
from mla.integrations.transformers import absorb
from tests.cli.conftest import make_tokenizer
from tests.families import FAMILIES, build


def make_engine(family="deepseek_v3", budget=10**7, **generation) -> Engine:
    """An engine of a tiny model, in whose generation config stands what is given."""
    model = absorb(build(family, vocab_size=256))
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    config = MLAConfig.from_transformers(model.config)
    prefixes = Prefixes(model, config, "fp32", budget=budget)
    return Engine(model, make_tokenizer(), "tiny", prefixes, limit=512)


def complete(engine, prompt, **body):
    answer = CompletionEndpoint(engine).handle_request({"prompt": prompt, "temperature": 0, **body}, "id")
    return json.loads(asyncio.run(answer).body)


def written(engine, request, prompt, tokens, parser=None) -> str:
    """The text of a stream that is given the prompt and then the tokens of an answer, until it stops."""

    async def stream() -> str:
        one = Stream(engine, request, prompt, SimpleNamespace(max_new_tokens=100), parser)
        for token in tokens:
            if one.put(token):
                break
        one.end()
        await asyncio.sleep(0.01)
        pieces = []
        while (item := one.queue.get_nowait()) is not None:
            pieces.append(item)
        return "".join(pieces)

    return asyncio.run(stream())


def test_generation_ends_when_its_task_does():
    """The task that answers a request is cancelled when the client has gone."""
    engine = make_engine()
    steps = []
    engine.model.register_forward_pre_hook(lambda *_: steps.append(None))

    async def run() -> int:
        request = CompletionEndpoint(engine).handle_request({"prompt": "Hi", "max_tokens": 400}, "id")
        task = asyncio.create_task(request)
        while len(steps) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return len(steps)

    seen = asyncio.run(run())
    engine.thread.submit(lambda: None).result(timeout=60)  # nothing is running any more
    assert len(steps) <= seen + 3
    assert engine.prefixes.nbytes > 0  # what was read is kept
    assert complete(engine, "Hi" * 20, max_tokens=3)["usage"]["completion_tokens"] == 3


def test_a_request_that_has_gone_before_its_turn_costs_nothing():
    engine = make_engine()
    steps = []
    engine.model.register_forward_pre_hook(lambda *_: steps.append(None))

    async def run() -> None:
        request = read_completion({"prompt": "Hi"}, "tiny")
        inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
        blocked = asyncio.Event()
        loop = asyncio.get_running_loop()
        gate = threading.Event()
        engine.thread.submit(lambda: (loop.call_soon_threadsafe(blocked.set), gate.wait(30)))
        await blocked.wait()
        generation = Generation(engine, request)
        generation.generate_streaming(None, None, inputs, engine.generation_config(request, 5), "id")
        generation.stream.cancel()
        gate.set()

    asyncio.run(run())
    engine.thread.submit(lambda: None).result(timeout=60)
    assert steps == []


def test_an_answer_that_ends_of_itself_at_its_last_token_has_stopped():
    engine = make_engine()
    text = complete(engine, "Hello", max_tokens=3)["choices"][0]
    assert text["finish_reason"] == "length"
    ids = engine.tokenizer("Hello")["input_ids"]
    third = int(engine.model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0, -1])
    engine.model.generation_config.eos_token_id = third
    engine.end_tokens = {third}
    assert complete(engine, "Hello", max_tokens=3)["choices"][0]["finish_reason"] == "stop"


def test_an_answer_ends_with_the_token_that_completes_a_stop_string():
    """No step more, no token more in the usage, and no score of one."""
    engine = make_engine()
    steps = []
    engine.model.register_forward_pre_hook(lambda *_: steps.append(None))
    text = complete(engine, "Hello", max_tokens=12)["choices"][0]["text"]
    stop = text[3:6]
    assert text.index(stop) == 3
    steps.clear()
    answer = complete(engine, "Hello", max_tokens=12, stop=stop, logprobs=1)
    assert answer["choices"][0]["text"] == text[:3]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(steps) == 6
    assert answer["choices"][0]["logprobs"]["tokens"] == list(text[:6])


def test_logits_go_with_the_answer_they_were_for():
    engine = make_engine()

    async def run() -> Stream:
        generation = Generation(engine, read_completion({"prompt": "", "logprobs": 1}, "tiny"))
        config = engine.generation_config(generation.request, 3)
        queue, stream = generation.generate_streaming(
            engine.model, engine.tokenizer, {"input_ids": torch.tensor([[5, 6]])}, config, "id"
        )
        await read_all(queue, stream)
        return stream

    stream = asyncio.run(run())
    assert len(stream.scores) == 3
    assert stream.logits is None


def test_a_model_whose_own_config_asks_for_other_ways_writes_in_order():
    """Several texts, or several tokens at once, go with no answer that is sent as it is written."""
    text = "Hello Hello Hello"  # of which prompt lookup finds a part again
    want = complete(plain := make_engine(), text, max_tokens=12)
    for field, value in (
        ("num_beams", 3),
        ("prompt_lookup_num_tokens", 4),
        ("assistant_early_exit", 1),
        ("use_mtp", True),
        ("cache_implementation", "static"),
        ("use_cache", False),
        ("token_healing", True),
    ):
        engine = make_engine(**{field: value})
        assert engine.left_out == [field]
        for cached in (0, len(text) - 1):
            got = complete(engine, text, max_tokens=12)
            assert got["choices"] == want["choices"], field
            assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
    assert plain.left_out == []


def test_stop_strings_of_the_models_own_end_an_answer():
    text = complete(make_engine(), "Hello", max_tokens=12)["choices"][0]["text"]
    for own, stop, left in ((text[5:7], [], 5), ([text[5:7]], [text[3:5]], 3)):
        engine = make_engine(stop_strings=own)
        choice = complete(engine, "Hello", max_tokens=12, stop=stop)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text[:left], "stop")


def test_the_first_token_may_be_the_padding():
    engine = make_engine()
    engine.model.generation_config.pad_token_id = None
    engine.tokenizer.eos_token = "b"
    assert engine.tokenizer.pad_token_id == 0
    request = read_completion({"prompt": "a"}, "tiny")
    assert engine.generation_config(request, 5).pad_token_id == 0
    engine.tokenizer.pad_token = None
    assert engine.generation_config(request, 5).pad_token_id == engine.tokenizer.eos_token_id


def test_what_goes_wrong_is_told_and_the_next_request_is_served():
    engine = make_engine()
    honest = engine.model.generate

    def broken(*args, **kwargs):
        raise RuntimeError('a "broken" kernel')

    engine.model.generate = broken
    with pytest.raises(ApiError, match='a "broken" kernel') as error:
        complete(engine, "Hello")
    assert error.value.status == 500
    engine.model.generate = honest
    assert complete(engine, "Hello")["usage"]["completion_tokens"] == 16


def test_a_budget_too_small_is_an_error_of_the_request():
    engine = make_engine(budget=480 * 100)
    with pytest.raises(ApiError, match="a cache of 110 tokens would need 52800 bytes") as error:
        complete(engine, "x" * 100, max_tokens=10)
    assert error.value.status == 503
    assert complete(engine, "x" * 50, max_tokens=10)["usage"]["total_tokens"] == 60


@pytest.mark.parametrize(
    "family", [name for name in ("deepseek_v3", "deepseek_v32", "mistral_large4") if name in FAMILIES]
)
def test_conversations_share_a_beginning_and_keep_their_own(family):
    engine = make_engine(family)
    start = "a common beginning of both conversations, "
    texts = [start + end * 30 for end in ("one", "two")]
    first, second = (complete(engine, text, max_tokens=40) for text in texts)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == len(start)
    again = complete(engine, texts[0], max_tokens=40)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(texts[0]) - 1
    assert again["choices"] == first["choices"]
    fresh = make_engine(family)
    assert complete(fresh, texts[1], max_tokens=40)["choices"] == second["choices"]


def test_memory_stays_within_the_budget():
    engine = make_engine(budget=480 * 600)
    for number in range(8):
        complete(engine, chr(97 + number) * (50 + 40 * number), max_tokens=30)
        assert engine.prefixes.nbytes <= engine.prefixes.budget


def kept(engine) -> int:
    """How many conversations are kept once nothing runs: an answer is complete before its cache is kept."""
    engine.thread.submit(lambda: None).result(timeout=60)
    return len(engine.prefixes._kept)


def test_an_answer_makes_room_as_it_grows():
    """Most end long before their limit: they need not push out what they never come to need."""
    engine = make_engine(budget=480 * 500)
    held = []

    def watch(module, args, kwargs):
        held.append(kwargs["past_key_values"].nbytes + engine.prefixes.nbytes)

    engine.model.register_forward_pre_hook(watch, with_kwargs=True)
    complete(engine, "a" * 150, max_tokens=10)
    first = complete(engine, "b" * 20, max_tokens=1)["choices"][0]["text"]
    complete(engine, "b" * 20, max_tokens=400, stop=first)
    assert kept(engine) == 2
    complete(engine, "b" * 20, max_tokens=400)
    assert kept(engine) == 1  # 420 and 160 tokens are too many
    assert max(held) <= engine.prefixes.budget


def test_memory_that_is_gone_when_an_answer_grows(monkeypatch):
    engine = make_engine()

    def full(needed, purpose):
        if "400" in purpose:
            raise MLAError(f"{purpose}: no memory")

    monkeypatch.setattr("mla.integrations.prefixes.require_memory", full)
    assert complete(engine, "x" * 20, max_tokens=256)["usage"]["completion_tokens"] == 256
    with pytest.raises(ApiError, match="a cache of 400 tokens: no memory") as error:
        complete(engine, "x" * 20, max_tokens=380)
    assert error.value.status == 503


def test_models_with_other_layers_are_served_without_reuse():
    engine = make_engine("kimi_linear")
    first, again = (complete(engine, "Hello there", max_tokens=8) for _ in range(2))
    assert first == {**again, "created": first["created"], "id": first["id"]}
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "minicpm3", "kimi_linear"])
def test_long_prompts_are_read_in_steps(family, monkeypatch):
    want = complete(make_engine(family), "abcdefg" * 20, max_tokens=12)["choices"]
    monkeypatch.setattr("mla.integrations.prefixes._STEP", 16)
    assert complete(make_engine(family), "abcdefg" * 20, max_tokens=12)["choices"] == want


def test_prompts():
    assert read_prompts("a", 10) == ["a"]
    assert read_prompts(["a", "b"], 10) == ["a", "b"]
    assert read_prompts([1, 2], 10) == [[1, 2]]
    assert read_prompts([[1], [2, 3]], 10) == [[1], [2, 3]]
    for wrong in ([], None, [1, "a"], [[1], "a"], [True], 5, [[-1]], [10]):
        with pytest.raises(ApiError, match="prompt: expected"):
            read_prompts(wrong, 10)


def test_templates_that_refuse_are_the_clients_error():
    engine = make_engine()
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ApiError, match="roles must alternate"):
        asyncio.run(ChatEndpoint(engine).handle_request(body, "id"))
    engine.tokenizer.chat_template = None
    with pytest.raises(ApiError, match="this model has no chat template: use /v1/completions"):
        asyncio.run(ChatEndpoint(engine).handle_request(body, "id"))


def test_another_transformers_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(application, "build_server", lambda model_manager, chat_handler: None)
    said = r"without completion_handler, generation_state; .* pip install 'transformers<.*>="
    with pytest.raises(ValueError, match=said):
        application.build_app(make_engine())


def test_what_fits():
    config = MLAConfig.from_transformers(build("deepseek_v3").config)
    assert [_fitting(config, "fp32", budget) for budget in (0, 479, 480, 4800, 10**9)] == [0, 0, 1, 10, 512]
