"""One model, one thread, one request after another: Transformers' ``generate`` on latents that are kept."""

import asyncio
import contextlib
import copy
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from openai.types import CompletionUsage
from openai.types.completion_usage import PromptTokensDetails
from torch import Tensor
from transformers.cli.serving.utils import InferenceThread, ToolCall

from mla.cache import LatentCache
from mla.errors import MLAError
from mla.integrations.generation import Writer, Writing
from mla.integrations.loading import require_memory
from mla.integrations.prefixes import Prefixes, step_size
from mla.integrations.serving.requests import ApiError, Request, check_tokens
from mla.integrations.serving.text import Reader
from mla.integrations.writing import writing_config

_log = logging.getLogger(__name__)

#: Tokens read in one step where scores of the prompt are kept: a number per word of the vocabulary each.
_SCORED_STEP = 128
#: Tokens of the answer for which room is made at a time: most answers end long before their limit.
_ANSWER_ROOM = 256


class Engine(Writer):
    """What serves all requests: the model, its tokenizer, its caches, and the thread that they run on.

    Args:
        model, tokenizer, prefixes: as for ``Writer``; name: what clients call the model.
        limit: tokens that prompt and answer may have together.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, prefixes: Prefixes, limit: int) -> None:
        super().__init__(model, tokenizer, prefixes)
        self.name = name
        self.limit = limit
        self.thread = InferenceThread()
        # The first call may set truncation and padding, which no thread must do while another one encodes.
        tokenizer("")

    def check_length(self, prompt: int, request: Request) -> int:
        """How many tokens the answer to a prompt of ``prompt`` tokens may have.

        Raises:
            ApiError: the prompt is empty, or it and the answer do not fit.
        """
        if prompt == 0:
            raise ApiError("the prompt is empty", param="prompt")
        answer = max(self.limit - prompt, 1) if request.max_tokens is None else request.max_tokens
        if prompt + answer > self.limit:
            raise ApiError(
                f"This model's maximum context length is {self.limit} tokens here. However, you requested "
                f"{prompt + answer} tokens ({prompt} in the prompt, {answer} in the answer)",
                code="context_length_exceeded",
            )
        return answer

    def complete(self, request: Request) -> Request:
        """The request with the stop strings that the model has of its own."""
        return replace(request, stop=request.stop + self.stops)

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        size: int = self.model.get_input_embeddings().num_embeddings
        return size

    def generation_config(self, request: Request, max_new_tokens: int) -> Any:
        """The model's own generation config with what the request asks for."""
        config = writing_config(
            self.model, self.tokenizer, max_new_tokens, temperature=request.temperature, top_p=request.top_p
        )
        if request.logit_bias:
            check_tokens("logit_bias", request.logit_bias, self.vocabulary)
            config.sequence_bias = {(token,): value for token, value in request.logit_bias.items()}
        return config


@dataclass(frozen=True)
class Scored:
    """A token, its log probability (None where nothing stands before it), and the most likely ones there."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Stream(Writing):
    """An answer on its way to a client: tokens from ``generate``, a queue for the handler.

    The queue carries what Transformers' handlers expect: text, reasoning, tool calls, and None at the end,
    whether the answer is complete or ``failure`` says why not. ``begun`` is set with the first token or the
    failure. ``logits`` [1, V] are those from which the next token is drawn, where the request asks for log
    probabilities.
    """

    def __init__(
        self, engine: Engine, request: Request, prompt: Sequence[int], config: Any, parser: Any
    ) -> None:
        reader = None
        if parser is not None:
            added = engine.tokenizer.added_tokens_decoder.values()
            reader = Reader(parser, [token.content for token in added if token.special])
        before = prompt if request.continues else []
        super().__init__(engine.tokenizer, request.stop, self._post, prompt=before, reader=reader)
        self.prompt_scores: list[Scored] = []
        self.scores: list[Scored] = []
        self.failure: ApiError | None = None
        self.begun = asyncio.Event()
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        self._request = request
        self._config = config
        self.logits: Tensor | None = None
        self._gone = threading.Event()
        self.is_complete = False
        for item in reader.initial if reader is not None else []:
            self._post(item)

    @property
    def total_tokens(self) -> int:
        """Tokens written so far."""
        return len(self.written)

    def cancel(self) -> None:
        """Nobody reads any more: generation ends at its next step."""
        self._gone.set()

    def usage(self, prompt_tokens: int) -> CompletionUsage:
        """What the answer has cost so far."""
        return CompletionUsage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self.total_tokens,
            total_tokens=prompt_tokens + self.total_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.reused),
        )

    def is_gone(self) -> bool:
        """Whether the client has gone."""
        return self._gone.is_set()

    @torch.no_grad()
    def score_prompt(
        self, tokens: list[int], cache: LatentCache, check: Callable[[int, int], object]
    ) -> None:
        """Read a prompt but for its last token, as ``Writer.write`` asks for it, and keep its scores."""
        model, top = self._engine.model, self._request.logprobs or 0
        self.prompt_scores.append(Scored(tokens[0], None))
        first = 0
        while first < len(tokens) - 1:
            check(first, len(tokens))
            size = step_size(model.config, first, len(tokens), _SCORED_STEP)
            last = min(first + size, len(tokens) - 1)
            if size > _SCORED_STEP:  # as far as it has to be, which may be to the end
                require_memory(8 * size * self._engine.vocabulary, f"the scores of {size} tokens at once")
                last = min(first + size, len(tokens))
            ids = torch.tensor([tokens[first:last]], device=model.device)
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last - first)
            followers = tokens[first + 1 : last + 1]
            self.prompt_scores += score(output.logits[0, : len(followers)], followers, top)
            first = last
        if cache.get_seq_length() == len(tokens):
            cache.crop(-1)
        check(len(tokens), len(tokens))

    def see(self, model: Any, inputs: Any, output: Any) -> None:
        """A hook of the model's: its logits, before temperature and the like change them."""
        self.logits = output.logits[0, -1:].clone()  # a step of a prompt may have many more

    def put(self, token: int) -> bool:
        """A new token; returns whether the answer ends with it: a stop string, or the one call asked for."""
        if not self.begun.is_set():
            self._tell(self.begun.set)
        if self.logits is not None:
            self.scores += score(self.logits, [token], self._request.logprobs or 0)
        return super().put(token)

    def end(self) -> None:
        """The answer is complete."""
        super().end()
        self.logits = None  # as long as a vocabulary, and other prompts of the request may follow
        if self.stopped or (self.written and self.written[-1] in self._engine.end_tokens):
            # Transformers' handlers tell "length" from "stop" by this number alone, wrongly where an answer
            # ends of itself at the last token it may have.
            self._config.max_new_tokens = None
        self.is_complete = True
        self._post(None)

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Why a complete answer ended, in OpenAI's words."""
        return "stop" if self._config.max_new_tokens is None else "length"

    @property
    def message(self) -> dict[str, Any] | None:
        """A complete answer as the parser reads it; None without one, or where something is not readable."""
        return None if self._reader is None else self._reader.message

    def finish(self, job: Future[None]) -> None:
        """The job that wrote this is over: what went wrong is the client's to know."""
        error = job.exception()
        if error is None:
            return
        if not isinstance(error, MLAError):
            _log.error("a request failed", exc_info=error)
        # Its frames hold the cache, which must not wait for whoever holds the exception.
        error.__traceback__ = None
        if not self.is_complete:
            self.failure = ApiError(str(error), status=503 if isinstance(error, MLAError) else 500)
            self._post(None)
            self._tell(self.begun.set)

    def _post(self, item: Any) -> None:
        self._tell(self.queue.put_nowait, item)
        self.stopped = self.stopped or (self._request.one_call and isinstance(item, ToolCall))

    def _tell(self, call: Callable[..., object], *arguments: Any) -> None:
        if not self.is_gone():  # with its client the loop may have ended
            self._loop.call_soon_threadsafe(call, *arguments)


class Generation:
    """The generation of one request, in the form in which Transformers' handlers ask for it.

    ``parser`` is Transformers' parser of responses, fresh; None takes all of the answer for text.
    """

    def __init__(self, engine: Engine, request: Request, parser: Any = None) -> None:
        self.engine = engine
        self.request = request
        self.parser = parser
        self.stream: Stream | None = None

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], Stream]:
        """Queue the request; text comes out of the queue returned."""
        tokens: list[int] = inputs["input_ids"][0].tolist()
        self.stream = stream = Stream(self.engine, self.request, tokens, gen_config, self.parser)
        # The task that answers the request ends when the answer is sent, or the client has gone.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: stream.cancel())
        job = self.engine.thread.submit(
            _run, self.engine, tokens, self.request, copy.copy(gen_config), stream
        )
        job.add_done_callback(stream.finish)
        return stream.queue, stream


async def read_items(queue: asyncio.Queue[Any], stream: Stream) -> list[Any]:
    """All of an answer, text, reasoning and calls in order; raises ApiError where generation failed."""
    items = []
    while (item := await queue.get()) is not None:
        items.append(item)
    if stream.failure is not None:
        raise stream.failure
    return items


async def read_all(queue: asyncio.Queue[Any], stream: Stream) -> str:
    """The whole text of an answer, without reasoning and calls; raises ApiError where generation failed."""
    return "".join(item for item in await read_items(queue, stream) if type(item) is str)


def _run(engine: Engine, tokens: list[int], request: Request, config: Any, stream: Stream) -> None:
    """On the engine's thread: answer one request."""
    if stream.is_gone():
        return
    with contextlib.ExitStack() as watching:
        if request.logprobs is not None:
            watching.callback(engine.model.register_forward_hook(stream.see).remove)
        # The scores of a prompt need all of it to be read anew.
        scored = request.echo and request.logprobs is not None
        read = functools.partial(stream.score_prompt, tokens) if scored else None
        room, stopped = _ANSWER_ROOM, stream.is_gone
        engine.write(tokens, config, stream, seed=request.seed, room=room, stopped=stopped, read=read)


def score(logits: Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """Log probabilities of ``tokens`` [n] under ``logits`` [n, V], each with the ``top`` most likely ones."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(top)
    likely = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Scored(token, logprob, tuple(zip(*rivals, strict=True)))
        for token, logprob, rivals in zip(tokens, own, likely, strict=True)
    ]
