"""What clients ask for, as the model gets to see it, and how they are refused."""

import json

import pytest

from mla.integrations.serving.requests import ApiError, for_template, read_chat, read_messages
from tests.integrations.serving.test_edges import HELLO, chat
from tests.integrations.serving.test_generation import make_engine

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def test_developers_speak_as_the_system(engine):
    want = chat(engine, [{"role": "system", "content": "Be kind"}, *HELLO])
    got = chat(engine, [{"role": "developer", "content": "Be kind"}, *HELLO])
    assert got["usage"]["prompt_tokens"] == want["usage"]["prompt_tokens"]
    assert got["choices"] == want["choices"]
    assert read_messages([{"role": "developer", "content": "a"}]) == [{"role": "system", "content": "a"}]


def test_what_stands_beside_calls_is_told_to_the_model(engine, monkeypatch):
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": "I look",
            "reasoning_content": "Hm",
            "tool_calls": [CALL],
            "audio": None,
        },
        {"role": "tool", "content": [{"type": "text", "text": "4"}], "tool_call_id": "c", "name": "f"},
    ]
    seen = []
    honest = type(engine.tokenizer).apply_chat_template

    def apply(tokenizer, conversation, **options):
        seen.extend(conversation)
        return honest(tokenizer, conversation, **options)

    monkeypatch.setattr(type(engine.tokenizer), "apply_chat_template", apply)
    chat(engine, messages)
    call = {**CALL, "function": {"name": "f", "arguments": {"x": 1}}}
    assert seen == [
        *HELLO,
        {"role": "assistant", "content": "I look", "reasoning_content": "Hm", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "c", "name": "f"},
    ]
    assert json.loads(CALL["function"]["arguments"]) == {"x": 1}  # the request is left as it was


def test_a_message_of_calls_alone_says_nothing():
    (message,) = read_messages([{"role": "assistant", "content": None, "tool_calls": [CALL]}])
    assert for_template(message)["content"] == ""


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"model": "x" * 10**6}, "The model `x"),
        ({"x" * 10**6: 1}, "is not supported"),
        ({"n": "x" * 10**6}, "n: this server supports 1 only, got 'x"),
        ({"n": [1] * 10**6}, "n: this server supports 1 only, got [1, 1"),
        ({"temperature": "x" * 10**6}, "temperature: expected a number"),
    ],
)
def test_refusals_do_not_say_all_again(field, said):
    with pytest.raises(ApiError) as refusal:
        read_chat({"messages": HELLO, **field}, "tiny")
    body = json.dumps(refusal.value.body)
    assert said in body
    assert len(body) < 400


def test_templates_that_say_all_again_are_cut(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ raise_exception(messages[0]['content']) }}")
    with pytest.raises(ApiError, match="refuses these messages: xxx") as refusal:
        chat(engine, [{"role": "user", "content": "x" * 10**5}])
    assert len(str(refusal.value)) == 1000
