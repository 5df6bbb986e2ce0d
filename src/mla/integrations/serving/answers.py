"""Chat completions and completions: Transformers' handlers, with what OpenAI's clients rely on besides.

What takes as long as texts are long runs on threads: the loop goes on to send the streams of others.
"""

import asyncio
import inspect
import json
import time
from types import SimpleNamespace
from typing import Any

import torch
from fastapi.responses import JSONResponse, Response
from jinja2 import TemplateError
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import PromptTokensDetails
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import (
    ReasoningText,
    ToolCall,
    build_response_parser,
    get_response_template,
)

from mla.integrations.generation import cut_at
from mla.integrations.serving.generation import Engine, Generation, Scored, read_all, read_items
from mla.integrations.serving.requests import (
    ApiError,
    Request,
    for_template,
    read_chat,
    read_completion,
    read_messages,
    read_prompts,
)

# Parameters of the call around a chat template: they could replace the template, or what is made of it.
_ENCODING = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "documents",
    "kwargs",
}
# Given in place of model and tokenizer to Transformers' handlers, which would build a parser of their own on
# the loop, and decode the whole prompt for it.
_UNREAD = SimpleNamespace(response_template=None, config=SimpleNamespace(model_type=""))


class ChatEndpoint:
    """``/v1/chat/completions``: a handler for every request, since each has its own ways to end."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        """The answer; raises ApiError."""
        request = self.engine.complete(read_chat(body, self.engine.name))
        tools = self._tools(body)
        messages = read_messages(body.get("messages"))
        tokens = await asyncio.to_thread(self._encode, body, messages, tools)
        most = self.engine.check_length(len(tokens), request)
        return await _ChatAnswer(self.engine, request).give(request_id, tokens, most, tools=tools)

    def _tools(self, body: dict[str, Any]) -> Any:
        """The tools that the model is told of."""
        tools = None if body.get("tool_choice") == "none" else body.get("tools")
        template = get_response_template(self.engine.tokenizer, self.engine.model)
        if tools and "tool_calls" not in (template or {}).get("fields", {}):
            raise ApiError(
                "tools: expected a tokenizer with a response_template that reads tool calls, got none: "
                "this model's calls would come back as text; ask it without tools",
                param="tools",
            )
        return tools

    def _encode(self, body: dict[str, Any], messages: list[dict[str, Any]], tools: Any) -> list[int]:
        tokenizer = self.engine.tokenizer
        if tokenizer.chat_template is None:
            raise ApiError("this model has no chat template: use /v1/completions", param="messages")
        more = body.get("chat_template_kwargs") or {}
        if taken := sorted(set(more) & _ENCODING):
            raise ApiError(
                f"chat_template_kwargs: {taken[0]} is not the template's", param="chat_template_kwargs"
            )
        try:
            tokens: list[int] = tokenizer.apply_chat_template(
                [for_template(message) for message in messages],
                add_generation_prompt=True,
                tools=tools,
                return_dict=True,
                **more,
            )["input_ids"]
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ApiError(f"the model's chat template refuses these messages: {error}") from error
        return tokens


class CompletionEndpoint:
    """``/v1/completions``: one or several prompts, texts or token ids, with echo and logprobs."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        """The answer; raises ApiError."""
        engine = self.engine
        request = engine.complete(read_completion(body, engine.name))
        prompts = read_prompts(body.get("prompt"), engine.vocabulary)
        tokens = await asyncio.to_thread(self._encode, prompts)
        most = [engine.check_length(len(ids), request) for ids in tokens]
        if not request.stream:
            return await self._whole(request, request_id, tokens, most)
        if len(tokens) > 1:
            raise ApiError("several prompts are not available with stream", param="stream")
        answer = _CompletionAnswer(engine, request)
        return await answer.give(request_id, tokens[0], most[0])

    def _encode(self, prompts: list[str] | list[list[int]]) -> list[list[int]]:
        tokenizer = self.engine.tokenizer
        try:
            return [p if isinstance(p, list) else tokenizer(p)["input_ids"] for p in prompts]
        except TypeError as error:  # half of a surrogate pair
            raise ApiError(f"prompt: the tokenizer does not read it: {error}", param="prompt") from error

    async def _whole(
        self, request: Request, request_id: str, prompts: list[list[int]], most: list[int]
    ) -> Response:
        usages = []
        choices = []
        for index, (tokens, limit) in enumerate(zip(prompts, most, strict=True)):
            config = self.engine.generation_config(request, limit)
            queue, stream = Generation(self.engine, request).generate_streaming(
                self.engine.model, self.engine.tokenizer, _inputs(tokens), config, request_id
            )
            text = await read_all(queue, stream)
            usages.append(stream.usage(len(tokens)))
            if request.echo:
                text = self.engine.tokenizer.decode(tokens, skip_special_tokens=True) + text
            logprobs = None
            if request.logprobs is not None:
                scores = stream.prompt_scores + stream.scores
                logprobs = await asyncio.to_thread(self._logprobs, scores, tokens)
            choices.append(
                CompletionChoice(
                    index=index,
                    text=text,
                    finish_reason=stream.finish_reason,
                    logprobs=logprobs,
                )
            )
        result = Completion(
            id=request_id,
            object="text_completion",
            created=int(time.time()),
            model=self.engine.name,
            choices=choices,
            usage=_sum(usages),
        )
        return JSONResponse(result.model_dump(exclude_none=False))

    def _logprobs(self, scores: list[Scored], prompt: list[int]) -> Logprobs:
        # Special tokens have a score and a name, but no place in the text.
        special = {
            token for token, added in self.engine.tokenizer.added_tokens_decoder.items() if added.special
        }
        # What stands in the text before each token: the prompt's last one, or nothing where that is echoed.
        echoed = bool(scores) and scores[0].logprob is None
        shown = [] if echoed else [token for token in prompt if token not in special]
        before = []
        for scored in scores:
            before.append(shown[-1] if shown else None)
            if scored.token not in special:
                shown.append(scored.token)
        texts = [self._word(scored.token, last) for scored, last in zip(scores, before, strict=True)]
        tops: list[Any] = []
        for scored, last in zip(scores, before, strict=True):
            if scored.logprob is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for token, logprob in [(scored.token, scored.logprob), *scored.top]:
                # Several tokens may read alike, parts of letters for example: the most likely one counts.
                word = self._word(token, last)
                top[word] = max(logprob, top.get(word, logprob))
            tops.append(top)
        offsets = [0]
        for scored, text in zip(scores[:-1], texts, strict=False):
            offsets.append(offsets[-1] + (0 if scored.token in special else len(text)))
        return Logprobs.model_construct(
            tokens=texts,
            token_logprobs=[scored.logprob for scored in scores],
            top_logprobs=tops,
            text_offset=offsets,
        )

    def _word(self, token: int, last: int | None) -> str:
        """What a token adds to the text after token ``last``: alone, some lose the space they begin with."""
        decode = self.engine.tokenizer.decode
        alone: str = decode([token])
        if last is None:
            return alone
        before, both = decode([last]), decode([last, token])
        # Parts of one letter add nothing to see, or change what stood there.
        added: str = both[len(before) :] if both.startswith(before) else ""
        return added or alone


class _Answer:
    """What both handlers lack: OpenAI's end of a stream or its error, and usage only where asked for."""

    engine: Engine
    request: Request

    def __init__(self, engine: Engine, request: Request) -> None:
        super().__init__(model_manager=None, generation_state=None)  # type: ignore[call-arg]
        self.engine = engine
        self.request = request
        self.generation = Generation(engine, request)

    async def give(self, request_id: str, tokens: list[int], most: int) -> Response:
        """Generate and answer as a stream; raises ApiError.

        A stream is answered with its first token: until then what fails has a status of its own.
        """
        handler: Any = self
        config = self.engine.generation_config(self.request, most)
        response: Response = handler._streaming(
            request_id,
            _UNREAD,
            _UNREAD,
            self.engine.name,
            _inputs(tokens),
            config,
            gen_manager=self.generation,
        )
        stream = self.generation.stream
        assert stream is not None
        await stream.begun.wait()
        if stream.failure is not None:
            raise stream.failure
        return response

    def _usage(self, plain: CompletionUsage) -> CompletionUsage:
        """Usage with the tokens that were cached, which Transformers' handlers do not know."""
        assert self.generation.stream is not None
        return self.generation.stream.usage(plain.prompt_tokens)

    def _build_chunk_sse(self, *args: Any, usage: Any = None, **kwargs: Any) -> str:
        event: str = super()._build_chunk_sse(*args, **kwargs)  # type: ignore[misc]
        if usage is None:  # not the last one
            return event
        assert self.generation.stream is not None
        if self.generation.stream.failure is not None:
            return f"data: {json.dumps(self.generation.stream.failure.body)}\n\n"
        if self.request.include_usage:
            chunk = json.loads(event.removeprefix("data: "))
            chunk.update(choices=[], usage=self._usage(usage).model_dump(exclude_none=True))
            event += f"data: {json.dumps(chunk)}\n\n"
        return event + "data: [DONE]\n\n"


class _ChatAnswer(_Answer, ChatCompletionHandler):  # type: ignore[misc]
    async def give(self, request_id: str, tokens: list[int], most: int, tools: Any = None) -> Response:
        """Generate and answer, as a stream or whole; raises ApiError."""
        self.generation.parser = await asyncio.to_thread(self._parser, tokens, tools)
        if self.request.stream:
            return await super().give(request_id, tokens, most)
        return await self._whole(request_id, tokens, most)

    def _parser(self, tokens: list[int], tools: Any) -> Any:
        # Transformers 5.19 finds tool calls without being told of the tools.
        told = {"tools": tools} if "tools" in inspect.signature(build_response_parser).parameters else {}
        return build_response_parser(self.engine.tokenizer, self.engine.model, tokens, **told)

    async def _whole(self, request_id: str, tokens: list[int], most: int) -> Response:
        """What a stream says, in one piece."""
        config = self.engine.generation_config(self.request, most)
        queue, stream = self.generation.generate_streaming(None, None, _inputs(tokens), config, request_id)
        items = await read_items(queue, stream)
        text = "".join(item for item in items if type(item) is str)
        if stream.message is not None:
            # A template says what of the space around a text belongs to it. The parser has read on to the end
            # of a stop string.
            text = stream.message.get("content") or ""
            found = cut_at(text, self.request.stop)
            text = text if found is None else found
        thought = "".join(item for item in items if isinstance(item, ReasoningText)).strip()
        calls = [
            {
                "id": f"{request_id}_tool_call_{index}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for index, call in enumerate(item for item in items if isinstance(item, ToolCall))
        ]
        return JSONResponse(
            self._build_completion(
                request_id,
                text,
                self.engine.name,
                finish_reason="tool_calls" if calls else stream.finish_reason,
                usage=stream.usage(len(tokens)),
                tool_calls=calls or None,
                reasoning_content=thought or None,
            )
        )


class _CompletionAnswer(_Answer, CompletionHandler):  # type: ignore[misc]
    """Streams only: whole answers have what Transformers' handler cannot give."""


def _inputs(tokens: list[int]) -> dict[str, Any]:
    return {"input_ids": torch.tensor([tokens])}


def _sum(usages: list[CompletionUsage]) -> CompletionUsage:
    details = [usage.prompt_tokens_details for usage in usages]
    cached = sum(detail.cached_tokens or 0 for detail in details if detail is not None)
    return CompletionUsage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        total_tokens=sum(usage.total_tokens for usage in usages),
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )
