"""From text to what is said, thought and called: nothing of an answer is lost."""

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest
from transformers.utils.chat_parsing import ResponseParser

from mla.integrations.serving.answers import ChatEndpoint, CompletionEndpoint
from mla.integrations.serving.requests import read_chat, read_completion
from mla.integrations.serving.text import Reader
from tests.integrations.serving.test_edges import HELLO, chat, sentences
from tests.integrations.serving.test_generation import complete, make_engine, written


def test_completions_keep_the_space_that_their_first_word_carries():
    tokenizer = sentences()
    prompt, answer = tokenizer("Once upon")["input_ids"], tokenizer("a time")["input_ids"]
    assert tokenizer.decode(answer) == "a time"

    engine = SimpleNamespace(tokenizer=tokenizer, end_tokens=set())
    request = read_completion({"prompt": "Once upon"}, "tiny")
    assert written(engine, request, prompt, answer) == " a time"
    request = read_chat({"messages": HELLO}, "tiny")
    assert written(engine, request, prompt, answer) == "a time"


TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant: ",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<end>", "content": "text"},
    },
}
BAD = "<tool_call>{bad}</tool_call>"
GOOD = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
NAMELESS = '<tool_call>{"name": 5, "arguments": {}}</tool_call>'


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "thought", "calls"),
    [
        ("Hi <b> there", "Hi <b> there", "", 0),
        ("<think>Hm</think>Hi" + GOOD, "Hi", "Hm", 1),
        (f"<think>Hm</think>Hi{BAD} there", f"Hi{BAD} there", "Hm", 0),
        ("Hi" + GOOD + BAD + GOOD, "Hi" + BAD + GOOD, "", 1),
        (GOOD + NAMELESS, NAMELESS, "", 1),
        ('<tool_call>["f"]</tool_call>', '<tool_call>["f"]</tool_call>', "", 0),
        # Cut off within a call, and within the mark that would open one.
        ('Hi<tool_call>{"name": "f", "argu', 'Hi<tool_call>{"name": "f", "argu', "", 0),
        (GOOD + "<tool_call>", "<tool_call>", "", 1),
        ("Hi<tool_", "Hi<tool_", "", 0),
        ("Hi <" + BAD, "Hi <" + BAD, "", 0),
        ("Hi<tool_call>{bad}<special></tool_call>", "Hi<tool_call>{bad}</tool_call>", "", 0),
    ],
)
def test_what_is_no_call_stays_text(text, said, thought, calls, size):
    reader = Reader(ResponseParser(TEMPLATE, prefix="assistant: "), ["<special>"])
    items = []
    for first in range(0, len(text), size):
        items += reader.feed(text[first : first + size])
    items += reader.finish()
    assert "".join(item for item in items if type(item) is str) == said
    assert "".join(item for item in items if isinstance(item, str) and type(item) is not str) == thought
    assert sum(not isinstance(item, str) for item in items) == calls


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.mark.parametrize("text", [f"Hi{BAD} there", f"Hi{GOOD}{NAMELESS}", 'Hi<tool_call>{"na'])
def test_streams_and_whole_answers_say_the_same_of_what_is_no_call(engine, monkeypatch, text):
    def writes(ids, stopping_criteria, **kwargs):
        for token in engine.tokenizer(text)["input_ids"]:
            stopping_criteria[0](ids.new_tensor([[token]]), None)

    monkeypatch.setattr(engine.model, "generate", writes)
    monkeypatch.setattr(engine.tokenizer, "response_template", TEMPLATE, raising=False)
    whole = chat(engine, HELLO, max_tokens=len(text))["choices"][0]

    async def read():
        body = {"messages": HELLO, "max_tokens": len(text), "stream": True}
        response = await ChatEndpoint(engine).handle_request(body, "id")
        return "".join([part async for part in response.body_iterator])

    lines = [line.removeprefix("data: ") for line in asyncio.run(read()).split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines]
    said = "".join(choice["delta"].get("content") or "" for choice in choices)
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls") or []]
    assert said == whole["message"]["content"] == text.replace(GOOD, "")
    assert len(calls) == len(whole["message"].get("tool_calls") or []) == text.count(GOOD)
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == ("tool_calls" if calls else "length")


def test_the_loop_does_no_work_that_grows_with_texts(engine, monkeypatch):
    threads = {}

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            threads.setdefault((owner, name), set()).add(threading.get_ident())
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(ChatEndpoint, "_encode")
    watch(CompletionEndpoint, "_encode")
    watch(CompletionEndpoint, "_logprobs")
    complete(engine, "Hello", logprobs=1)
    # However it is called, by us or by Transformers' handlers: the parser reads the prompt when it is made.
    watch(ResponseParser, "__init__")
    watch(ResponseParser, "feed")
    watch(ResponseParser, "finalize")
    watch(type(engine.tokenizer), "decode")
    monkeypatch.setattr(engine.tokenizer, "response_template", TEMPLATE, raising=False)
    chat(engine, HELLO)

    async def read():
        body = {"messages": HELLO, "max_tokens": 4, "stream": True}
        return [part async for part in (await ChatEndpoint(engine).handle_request(body, "id")).body_iterator]

    asyncio.run(read())
    assert len(threads) == 7
    assert threading.get_ident() not in set().union(*threads.values())
