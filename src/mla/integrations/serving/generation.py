"""One model, one thread, one request after another: Transformers' ``generate`` on latents that are kept."""

import asyncio
import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
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
from mla.integrations.loading import require_memory
from mla.integrations.prefixes import Prefixes, read_prompt, step_size
from mla.integrations.serving.requests import ApiError, Request, check_tokens
from mla.integrations.serving.text import Decoding, Reader, beginning_of_stop, cut_at
from mla.integrations.writing import write_in_order, writing_config

_log = logging.getLogger(__name__)

#: Tokens read in one step where scores of the prompt are kept: a number per word of the vocabulary each.
_SCORED_STEP = 128
#: Tokens of the answer for which room is made at a time: most answers end long before their limit.
_ANSWER_ROOM = 256


class Engine:
    """What serves all requests: the model, its tokenizer, its caches, and the thread that they run on.

    Args:
        model: an absorbed model; tokenizer: its tokenizer; name: what clients call it.
        prefixes: makes the caches.
        limit: tokens that prompt and answer may have together.

    Of the model's own generation config what cannot be served is taken out of it, into ``left_out`` by name.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, prefixes: Prefixes, limit: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.prefixes = prefixes
        self.limit = limit
        self.thread = InferenceThread()
        # The first call may set truncation and padding, which no thread must do while another one encodes.
        tokenizer("")
        own = model.generation_config
        self.left_out = write_in_order(model)
        self.end_tokens = set(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id])
        self.end_tokens -= {None}
        # Ours to find: generate() wants a tokenizer for them, and leaves them in the text.
        stops = own.stop_strings or []
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        own.stop_strings = None

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
        return replace(request, stop=request.stop + self._stops)

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


class _Gone(Exception):  # noqa: N818 - not an error
    """The client has gone: nobody reads the answer any more."""


class Stream:
    """Text of an answer as it is written: tokens from ``generate``, a queue for the handler.

    The queue carries what Transformers' handlers expect: text, reasoning, tool calls, and None at the end,
    whether the answer is complete or ``failure`` says why not. Text after a stop string is never sent, nor
    what may yet become one. ``begun`` is set with the first token or the failure. ``logits`` [1, V] are those
    from which the next token is drawn, where the request asks for log probabilities.
    """

    def __init__(
        self, engine: Engine, request: Request, prompt: Sequence[int], config: Any, parser: Any
    ) -> None:
        self.written: list[int] = []
        self.reused = 0  # tokens of the prompt whose latents were there already
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
        self._stopped = False
        self.is_complete = False
        self._decoding = Decoding(engine.tokenizer.decode, prompt if request.continues else [])
        self._held = ""  # text that may be the beginning of a stop string
        self._reader: Reader | None = None
        if parser is not None:
            added = engine.tokenizer.added_tokens_decoder.values()
            self._reader = Reader(parser, [token.content for token in added if token.special])
            for item in self._reader.initial:
                self._send(item)

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

    @property
    def is_gone(self) -> bool:
        """Whether the client has gone."""
        return self._gone.is_set()

    def check(self) -> None:
        """Raise _Gone if the client has gone."""
        if self.is_gone:
            raise _Gone

    def put(self, token: int) -> bool:
        """A new token; returns whether the answer ends with it: at a stop string, or the one call asked for.

        Raises:
            _Gone: the client has gone.
        """
        self.check()
        if not self.begun.is_set():
            self._loop.call_soon_threadsafe(self.begun.set)
        self.written.append(token)
        self._decoding.add(token)
        if self.logits is not None:
            self.scores += score(self.logits, [token], self._request.logprobs or 0)
        self._show()
        return self._stopped

    def end(self) -> None:
        """The answer is complete."""
        self._show(last=True)
        if self._reader is not None:
            self._take(self._reader.finish())
        self._send_held()
        if self._stopped or (self.written and self.written[-1] in self._engine.end_tokens):
            # Transformers' handlers tell "length" from "stop" by this number alone, wrongly where an answer
            # ends of itself at the last token it may have.
            self._config.max_new_tokens = None
        self.is_complete = True
        self._send(None)

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
        if not self.is_complete and not self.is_gone:
            self.failure = ApiError(str(error), status=503 if isinstance(error, MLAError) else 500)
            self._send(None)
            self._loop.call_soon_threadsafe(self.begun.set)

    def _show(self, last: bool = False) -> None:
        # The parser looks for special tokens.
        parsed = self._reader is not None and not self._reader.failed
        text = self._decoding.take(skip_special=not parsed, last=last)
        if text:
            self._take([text] if self._reader is None else self._reader.feed(text))

    def _take(self, items: Sequence[Any]) -> None:
        for item in items:
            if self._stopped:
                return
            if type(item) is not str:  # tool calls, and reasoning, a subclass of str
                self._send_held()
                self._send(item)
                self._stopped = self._request.one_call and isinstance(item, ToolCall)
                continue
            self._held += item
            found = cut_at(self._held, self._request.stop)
            if found is not None:
                self._held, self._stopped = found, True
                self._send_held()
                return
            keep = beginning_of_stop(self._held, self._request.stop)
            ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            if ready:
                self._send(ready)

    def _send_held(self) -> None:
        if self._held:
            self._send(self._held)
            self._held = ""

    def _send(self, item: Any) -> None:
        self._loop.call_soon_threadsafe(self.queue.put_nowait, item)


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
    if stream.is_gone:
        return
    room = len(tokens) + min(config.max_new_tokens, _ANSWER_ROOM)
    # The scores of a prompt need all of it to be read anew.
    scores = request.logprobs if request.echo else None
    cache = engine.prefixes.take(tokens, room) if scores is None else engine.prefixes.new(room)
    stream.reused = cache.get_seq_length()
    with contextlib.suppress(_Gone):
        if scores is not None:
            _score_prompt(engine, tokens, scores, stream, cache)
        else:
            read_prompt(engine.model, tokens, cache, lambda *_: stream.check())
        _write(engine, tokens, request, config, stream, cache)
    # Gone or not: the stream ends generation between two steps only, when the cache holds whole tokens.
    if scores is None:
        engine.prefixes.keep(tokens + stream.written, cache, len(stream.written))


@torch.no_grad()
def _score_prompt(engine: Engine, tokens: list[int], top: int, stream: Stream, cache: LatentCache) -> None:
    """Read a prompt but for its last token, which is left to ``generate``, and keep its scores."""
    stream.prompt_scores.append(Scored(tokens[0], None))
    first = 0
    while first < len(tokens) - 1:
        stream.check()
        size = step_size(engine.model.config, first, len(tokens), _SCORED_STEP)
        last = min(first + size, len(tokens) - 1)
        if size > _SCORED_STEP:  # as far as it has to be, which may be to the end
            require_memory(8 * size * engine.vocabulary, f"the scores of {size} tokens at once")
            last = min(first + size, len(tokens))
        ids = torch.tensor([tokens[first:last]], device=engine.model.device)
        output = engine.model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last - first
        )
        followers = tokens[first + 1 : last + 1]
        stream.prompt_scores += score(output.logits[0, : len(followers)], followers, top)
        first = last
    if cache.get_seq_length() == len(tokens):
        cache.crop(-1)


def _write(
    engine: Engine, tokens: list[int], request: Request, config: Any, stream: Stream, cache: LatentCache
) -> None:
    stream.check()
    if config.max_new_tokens == 0:
        stream.end()
        return
    if request.seed is None:
        torch.seed()
    else:
        torch.manual_seed(request.seed)
    ids = torch.tensor([tokens], device=engine.model.device)
    with _watched(engine.model, stream if request.logprobs is not None else None):
        engine.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            generation_config=config,
            stopping_criteria=[_step(engine, cache, stream, len(tokens), config.max_new_tokens)],
        )
    stream.end()


def _step(
    engine: Engine, cache: LatentCache, stream: Stream, prompt: int, most: int
) -> Callable[..., Tensor]:
    """The stopping criterion of ``generate``, called with each new token before the next step.

    A streamer would be given the token after ``generate`` has asked whether to stop: an answer would end one
    token and one step later. An answer of up to ``most`` tokens is given more room once it has filled what
    there is.
    """
    room = prompt + min(most, _ANSWER_ROOM)

    def step(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        nonlocal room
        token = int(ids[0, -1])
        stopped = stream.put(token)
        # After an end token generate() goes no step further, for which there would have to be room.
        if ids.shape[1] > room and not stopped and token not in engine.end_tokens:
            room = min(room + _ANSWER_ROOM, prompt + most)
            engine.prefixes.grow(cache, room)
        return torch.full((1,), stopped, device=ids.device)

    return step


@contextlib.contextmanager
def _watched(model: Any, stream: Stream | None) -> Iterator[None]:
    """Show the stream the logits as the model gives them, before temperature and the like change them."""
    if stream is None:
        yield
        return

    def see(model: Any, inputs: Any, output: Any) -> None:
        stream.logits = output.logits[0, -1:]

    handle = model.register_forward_hook(see)
    try:
        yield
    finally:
        handle.remove()
        stream.logits = None  # as long as a vocabulary, and other prompts of the request may follow


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
