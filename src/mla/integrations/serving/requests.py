"""What an OpenAI client may ask for: read, checked, and refused with a reason where it is not served."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

# They say nothing about the answer.
_IGNORED = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Only these values: they ask for what happens anyway.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "parallel_tool_calls": (True, False),
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}
_SHARED = {
    "model",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "seed",
    "max_tokens",
    "stop",
    "logit_bias",
}
_CHAT = _SHARED | {"messages", "max_completion_tokens", "tools", "tool_choice", "chat_template_kwargs"}
_COMPLETION = _SHARED | {"prompt", "echo", "logprobs"}
_CHAT_NEUTRAL: dict[str, tuple[object, ...]] = {"logprobs": (False,), "top_logprobs": (0,)}

#: OpenAI's legacy default, which vLLM keeps.
_COMPLETION_TOKENS = 16
_MOST_LOGPROBS = 20
_MOST_BIAS = 100
#: Letters of a refusal, and of a value or a name in it.
_MOST_MESSAGE, _MOST_SHOWN = 1000, 80


class ApiError(Exception):
    """A refusal as OpenAI's clients expect it: an HTTP status and the fields of the error object."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        # A client that sends millions of letters does not need to read them again.
        message = _printable(message[:_MOST_MESSAGE])
        param = None if param is None else _printable(param[:_MOST_SHOWN])
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Request:
    """What chat completions and completions have in common.

    ``max_tokens`` None is as much as fits. ``temperature`` and ``top_p`` None are the model's own.
    ``logprobs`` is how many of the most likely tokens to report beside each one; None reports nothing.
    ``continues``: the answer goes on with the prompt's own text, as completions do. ``one_call``: the answer
    ends with its first tool call.
    """

    stream: bool
    include_usage: bool
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    logit_bias: Mapping[int, float]
    echo: bool = False
    logprobs: int | None = None
    continues: bool = False
    one_call: bool = False


def read_chat(body: Mapping[str, Any], model: str) -> Request:
    """The request in the body of a chat completion; raises ApiError."""
    given = _check_fields(body, _CHAT, _CHAT_NEUTRAL, model)
    if not isinstance(given.get("tools", []), list):
        raise _wrong("tools", "a list", given["tools"])
    if not isinstance(given.get("chat_template_kwargs", {}), dict):
        raise _wrong("chat_template_kwargs", "an object", given["chat_template_kwargs"])
    name = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    request = _read_shared(given, _integer(given, name, 1))
    return replace(request, one_call=given.get("parallel_tool_calls") is False)


def read_completion(body: Mapping[str, Any], model: str) -> Request:
    """The request in the body of a completion; raises ApiError."""
    given = _check_fields(body, _COMPLETION, {}, model)
    echo = _flag(given, "echo")
    tokens = _integer(given, "max_tokens", 0 if echo else 1)
    logprobs = _integer(given, "logprobs", 0, _MOST_LOGPROBS)
    request = replace(
        _read_shared(given, _COMPLETION_TOKENS if tokens is None else tokens),
        echo=echo,
        logprobs=logprobs,
        continues=True,
    )
    if request.stream and (echo or logprobs is not None):
        raise ApiError("echo and logprobs are not available with stream", param="stream")
    return request


def read_prompts(prompt: object, vocabulary: int) -> list[str] | list[list[int]]:
    """The prompts of a completion: texts, or token ids below ``vocabulary``; raises ApiError."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, str) for part in prompt):
            return list(prompt)
        lists = [prompt] if all(isinstance(part, int) for part in prompt) else prompt
        if all(isinstance(ids, list) and all(type(x) is int for x in ids) for ids in lists):
            for ids in lists:
                check_tokens("prompt", ids, vocabulary)
            return [list(ids) for ids in lists]
    raise ApiError("prompt: expected a string, token ids, or a list of either", param="prompt")


def check_tokens(name: str, tokens: Iterable[int], vocabulary: int) -> None:
    """Refuse token ids that the model does not have; raises ApiError."""
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise _wrong(name, f"token ids from 0 to {vocabulary - 1}", token)


def check_model(asked: object, model: str) -> None:
    """Refuse every model but ``model``; raises ApiError."""
    if asked != model:
        raise ApiError(
            f"The model `{_shown(asked)}` does not exist; this server has `{model}`",
            status=404,
            param="model",
            code="model_not_found",
        )


def _check_fields(
    body: Mapping[str, Any], known: set[str], neutral: Mapping[str, tuple[object, ...]], model: str
) -> dict[str, Any]:
    """The fields that have a value and a meaning."""
    given = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    check_model(given.get("model", model), model)
    for name, value in given.items():
        accepted = {**_NEUTRAL, **neutral}.get(name)
        if accepted is not None and value not in accepted:
            served = " or ".join(repr(choice) for choice in accepted)
            got = repr(_shown(value) if isinstance(value, str) else value)[:_MOST_SHOWN]
            raise ApiError(f"{name}: this server supports {served} only, got {got}", param=name)
        if accepted is None and name not in known:
            raise ApiError(f"{_shown(name)} is not supported by this server", param=name)
    return given


def read_messages(messages: object) -> list[dict[str, Any]]:
    """The messages of a chat, without fields that are null or tool calls that are none; raises ApiError."""
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a list of at least one message", messages)
    read = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _wrong(name, "an object with role and content", message)
        # Clients send their own answers back with "tool_calls": null.
        message = {key: value for key, value in message.items() if value is not None}
        if not message.get("tool_calls", True):
            del message["tool_calls"]
        # OpenAI's newer word. Templates that do not know it would leave the message out without a word.
        if message["role"] == "developer":
            message["role"] = "system"
        read.append(message)
        content = message.get("content")
        if content is None and "tool_calls" in message:
            continue
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not all(_is_text(part) for part in parts):
            raise ApiError(f"{name}: expected text, got something else; this server reads text", param=name)
    return read


def for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of :func:`read_messages` as chat templates take it: content as text, arguments as objects.

    All else stays: what was said and thought beside calls, the name of a tool. Transformers' own server drops
    it. Raises what malformed calls make of it: KeyError, TypeError, ValueError, AttributeError.
    """
    content = message.get("content", "")
    if not isinstance(content, str):
        content = " ".join(part["text"] for part in content)
    read = {**message, "content": content}
    if "tool_calls" in message:
        read["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return read


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function") or call
    arguments = function["arguments"]
    read = {**function, "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}
    return {**call, "function": read} if call.get("function") else read


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _read_shared(given: Mapping[str, Any], max_tokens: int | None) -> Request:
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise _wrong("stream_options", "an object", options)
    return Request(
        stream=_flag(given, "stream"),
        include_usage=_flag(options, "include_usage"),
        max_tokens=max_tokens,
        temperature=_number(given, "temperature", 0, 2),
        top_p=_number(given, "top_p", 0, 1),
        seed=_integer(given, "seed", -(2**63), 2**63 - 1),
        stop=_stop(given.get("stop", [])),
        logit_bias=_bias(given.get("logit_bias", {})),
    )


def _printable(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON may carry and no answer can."""
    return text.encode("utf-8", "backslashreplace").decode()


def _wrong(name: str, expected: str, got: object) -> ApiError:
    return ApiError(f"{name}: expected {expected}, got {_shown(got)!r}", param=name)


def _shown(value: object) -> str:
    return str(value)[:_MOST_SHOWN]


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return bool(value)


def _integer(given: Mapping[str, Any], name: str, least: int, most: int | None = None) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if type(value) is not int or value < least or (most is not None and value > most):
        shown = f"an integer from {least}" + ("" if most is None else f" to {most}")
        raise _wrong(name, shown, value)
    return value


def _number(given: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise _wrong(name, f"a number from {least} to {most}", value)
    return float(value)


def _stop(stop: object) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise _wrong("stop", "a text or a list of texts, none of them empty", stop)
    return tuple(texts)


def _bias(bias: object) -> dict[int, float]:
    wrong = _wrong("logit_bias", f"an object of numbers from -{_MOST_BIAS} to {_MOST_BIAS} by token id", bias)
    if not isinstance(bias, dict):
        raise wrong
    try:
        read = {int(token): float(value) for token, value in bias.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong from error
    if not all(abs(value) <= _MOST_BIAS for value in read.values()):  # not so of NaN
        raise wrong
    return read
