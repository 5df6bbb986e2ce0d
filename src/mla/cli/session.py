"""A model opened for writing text: absorbed, with its latent cache, limits checked before anything runs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mla.cli import console
from mla.errors import MLAError
from mla.integrations.generation import Writer, Writing
from mla.integrations.loading import DtypeName, load_mla_model, load_tokenizer
from mla.integrations.prefixes import Prefixes, fingerprint, require_storable
from mla.integrations.transformers import absorb
from mla.integrations.writing import writing_config


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 always takes the most likely one."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise MLAError(f"--max-new-tokens: expected at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:  # not so of NaN
            raise MLAError(f"--temperature: expected 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise MLAError(f"--top-p: expected a number above 0 and up to 1, got {self.top_p}")
        if not -(2**63) <= self.seed < 2**64:
            raise MLAError(f"--seed: expected an integer from -2^63 to 2^64 - 1, got {self.seed}")


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost; speeds in tokens per second."""

    text: str
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    prefill_speed: float
    decode_speed: float
    cache_bytes: int
    cache_bytes_per_token: float


class Session(Writer):
    """A model, its tokenizer and one conversation's cache.

    Args:
        source: folder or Hub id of an MLA model.
        dtype, device: as for ``load_model``.
        max_model_len: limit on prompt plus answer; None takes the model's own.
        cache_format: as for ``choose_cache_format``.
        load_cache: a file with latents to begin with; where it cannot be used, people are told why.
        save_cache: the file that :meth:`save` writes.

    Raises:
        MLAError: the model cannot be opened or is not MLA, or its latents should be kept in files and cannot.
    """

    def __init__(
        self,
        source: str,
        *,
        dtype: DtypeName,
        device: str,
        max_model_len: int | None = None,
        cache_format: str = "auto",
        load_cache: Path | None = None,
        save_cache: Path | None = None,
    ) -> None:
        model, self.config, self.cache_format = load_mla_model(
            source, dtype=dtype, cache_format=cache_format, device=device, max_model_len=max_model_len
        )
        self.limit = max_model_len or self.config.max_position_embeddings
        absorb(model)
        super().__init__(model, load_tokenizer(source), Prefixes(model, self.config, self.cache_format))
        if self.left_out:
            console.say(f"left out of the model's generation config: {', '.join(self.left_out)}")
        self._file = save_cache
        if load_cache is not None or save_cache is not None:
            require_storable(model)
            self._identity = fingerprint(model, self.cache_format)
        if load_cache is not None:
            try:
                self.prefixes.load(load_cache, self._identity)
            except MLAError as error:
                console.say(f"{error}; the prefix is computed again")

    def save(self) -> None:
        """Keep the latents in the file that was named for them, if one was.

        Raises:
            MLAError: nothing has been read, or the file cannot be written.
        """
        if self._file is not None:
            self.prefixes.save(self._file, self._identity)

    @property
    def has_template(self) -> bool:
        """Whether the model knows of roles; without a chat template a conversation is one text."""
        return self.tokenizer.chat_template is not None

    def encode(self, messages: list[dict[str, str]], *, raw: bool = False) -> Tensor:
        """Token ids [1, s] of a conversation by the model's chat template, or of its texts as they are.

        Args:
            messages: role and content each. raw: leave the template aside.

        Raises:
            MLAError: nothing is left of them, or they are no text.
        """
        if raw or not self.has_template:
            # What was written goes on where a text ended; what is typed begins a line.
            text = messages[0]["content"]
            for message in messages[1:]:
                text += message["content"] if message["role"] == "assistant" else f"\n{message['content']}"
            ids = self.tokenizer(console.expect_text("the prompt", text), return_tensors="pt")["input_ids"]
        else:
            for message in messages:
                console.expect_text("the prompt", message["content"])
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        if ids.shape[1] == 0:
            raise MLAError("the prompt is empty")
        tokens: Tensor = ids
        return tokens

    def answer(
        self,
        ids: Tensor,
        sampling: Sampling,
        *,
        on_read: Callable[[int, int], object] = lambda read, total: None,
        on_text: Callable[[str], object] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Write the continuation of ``ids`` [1, s]; latents of a common beginning are used again.

        Args:
            ids: the conversation so far.
            sampling: how tokens are drawn, and how many.
            on_read: told (tokens read, tokens in all) while a long prompt is read, last when all of it is.
            on_text: told the text piece by piece, in whole letters.
            stopped: asked between steps of a long prompt and after every token; the answer ends where it says
                yes, without a token if that is before the first one.

        Raises:
            MLAError: prompt and answer exceed the limit, or the cache would not fit into memory.
        """
        s = ids.shape[1]
        if s >= self.limit:
            raise MLAError(f"the prompt has {s} tokens, the model takes {self.limit} with the answer")
        pieces: list[str] = []

        def send(piece: str) -> None:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

        writing = Writing(self.tokenizer, self.stops, send)
        most = min(sampling.max_new_tokens, self.limit - s)
        config = writing_config(
            self.model, self.tokenizer, most, temperature=sampling.temperature, top_p=sampling.top_p
        )
        cache = self.write(
            ids[0].tolist(),
            config,
            writing,
            seed=sampling.seed,
            room=most,  # all of it at once: what does not fit is refused before anything runs
            on_read=on_read,
            stopped=stopped,
        )
        reused, seconds = writing.reused, writing.times
        return Answer(
            text="".join(pieces),
            prompt_tokens=s,
            reused_tokens=reused,
            new_tokens=len(writing.written),
            prefill_speed=(s - reused) / max(seconds[1] - seconds[0], 1e-9) if len(seconds) > 1 else 0.0,
            decode_speed=(len(seconds) - 2) / (seconds[-1] - seconds[1]) if len(seconds) > 2 else 0.0,
            cache_bytes=cache.nbytes,
            # Not of the tensors: a cache that was cut back, or comes from a file, has room for other lengths.
            cache_bytes_per_token=self.config.cache_bytes_per_token(self.cache_format),
        )
