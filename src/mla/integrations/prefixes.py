"""Prefixes that a model has read before: their latents are used again, from memory or from files."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla.cache import LatentCache
from mla.cache.folder import PrefixFolder, common_length
from mla.cache.store import copy_prefix, is_storable, load_cache, save_cache
from mla.config import MLAConfig
from mla.digest import canonical, digest, digest_of_weights
from mla.errors import MLAError
from mla.integrations.loading import require_memory

#: Tokens of a prompt that run at once: what a step needs beside the cache does not grow with the prompt.
_STEP = 1024
#: So many tokens more must a file have in common with a prompt than memory has, to be read for it, and this
#: share of its own: all of it is read. A token is read some hundred times as fast as it is computed.
_WORTH_READING, _WORTH_READING_SHARE = 32, 32
#: So many tokens may a kept conversation lose by being cut back for another; beyond that it is copied.
_WORTH_KEEPING = 32


def fingerprint(model: Any, cache_format: str) -> dict[str, str]:
    """What must be equal for latents of one model to be latents of another, by name, readable where short.

    The weights are those in memory: a thousand numbers of every tensor, spread over it, so that merging an
    adapter or training a single matrix gives another digest, and file names and layouts none. To be taken
    before the model has run: the frequencies of dynamic RoPE change then.
    """
    config = model.config.to_dict()
    # Neither says what the model computes.
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    text = model.config.get_text_config(decoder=True)
    return {
        "family": str(model.config.model_type),
        "revision": str(getattr(model.config, "_commit_hash", None)),
        "config": digest(canonical(config)),
        "RoPE": canonical(getattr(text, "rope_parameters", None)).decode(),
        "weights": digest_of_weights(model),
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "cache format": cache_format,
    }


@dataclass(eq=False)
class _Conversation:
    """Token ids [t] int32 and the cache that holds exactly them."""

    tokens: Tensor
    cache: LatentCache


class Prefixes:
    """Makes the caches of a model, out of what earlier ones hold where a prompt begins as they do.

    With LongRoPE latents are others where a prompt is longer than the length that the model was first trained
    for: there a prompt up to that length goes on from what was kept up to it only, and a longer one from what
    is longer, and like it for longer. An answer that crosses it is kept up to it.

    Not for several threads at once.

    Args:
        model: an absorbed model.
        config: its dimensions.
        cache_format: one of ``mla.formats.CACHE_FORMATS``.
        budget: bytes that all caches may take together, the one in use included; the conversations not used
            for longest make room. None keeps one conversation and asks the machine what is free.
        folder: where prefixes are kept on disk, too; its fingerprint is the model's.
        note: told once about every file that is not used, and why.
    """

    def __init__(
        self,
        model: Any,
        config: MLAConfig,
        cache_format: str,
        *,
        budget: int | None = None,
        folder: PrefixFolder | None = None,
        note: Callable[[str], object] = warnings.warn,
    ) -> None:
        self.config = config
        self.cache_format = cache_format
        self.budget = budget
        self._model = model
        self._folder = folder
        self._note = note
        self._switch = switching_length(model.config)
        self._kept: list[_Conversation] = []  # the one used last is the last
        if folder is not None:
            require_storable(model)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches that are kept."""
        return sum(kept.cache.nbytes for kept in self._kept)

    def new(self, capacity: int) -> LatentCache:
        """An empty cache with room for ``capacity`` tokens; :meth:`grow` makes room for more.

        Raises:
            MLAError: they do not fit into the budget, or into the memory that is free now.
        """
        self._make_room(capacity)
        return self._empty(capacity)

    def take(self, tokens: list[int], capacity: int) -> LatentCache:
        """A cache that holds as long a beginning of ``tokens`` as is known, but never the last token: it must
        run to give the logits of the next. Arguments and errors as for :meth:`new`."""
        known = tokens[:-1]
        if self._folder is not None:
            have = self._longest_kept(known)[1]

            def is_worth(held: int, shared: int) -> bool:
                is_cheap = shared - have >= held // _WORTH_READING_SHARE
                return is_cheap and self._goes_on(held, shared, len(tokens))

            file, stored = self._folder.longest(known, is_worth, beyond=have + _WORTH_READING - 1)
            if file is not None:
                cache = self.new(capacity)
                try:
                    self._folder.load(file, cache, stored, self._model.device)
                    return cache
                except MLAError as error:
                    self._note(f"{error}; the prefix is computed again")
        kept, common = self._longest_kept(known)
        if kept is None:
            return self.new(capacity)
        lost = len(kept.tokens) - common
        if lost > _WORTH_KEEPING and is_storable(kept.cache) and self._fits_beside(kept.cache, capacity):
            # It keeps its age: the few words that all chats begin with are no use of it.
            self._make_room(capacity, spared=kept)
            cache = self._empty(capacity)
            copy_prefix(kept.cache, cache, common)
            return cache
        self._kept.remove(kept)
        self._make_room(capacity, held=kept.cache.nbytes)
        kept.cache.crop(common - kept.cache.get_seq_length())
        if lost > _WORTH_KEEPING:
            # Or one long conversation would leave its room to every short one after it, one at a time.
            kept.cache.shrink(capacity)
        kept.cache.reserve(capacity)
        return kept.cache

    def grow(self, cache: LatentCache, capacity: int) -> None:
        """Make room for ``capacity`` tokens in a cache that is in use; errors as for :meth:`new`."""
        self._make_room(capacity, held=cache.nbytes)
        cache.reserve(capacity)

    def keep(self, tokens: list[int], cache: LatentCache, answered: int = 0) -> None:
        """Remember a cache and the tokens it was given, the last ``answered`` of them not by a prompt; the
        newest may not have been read yet."""
        held = tokens[: cache.get_seq_length()]
        # Sliding windows say that they can be cut, but not once they are full.
        if not held or not cache.is_croppable or any(cache.is_sliding):
            return
        if self._switch is not None and len(tokens) - answered <= self._switch < len(held):
            cache.crop(self._switch - len(held))
            held = held[: self._switch]
        if self.budget is None:
            self._kept.clear()
        new = _Conversation(_token_ids(held), cache)

        def goes_on(before: int, shared: int) -> bool:
            return self._goes_on(before, shared, len(held))

        def is_part(kept: _Conversation) -> bool:
            shared = common_length(kept.tokens, new.tokens)
            return shared == len(kept.tokens) and goes_on(shared, shared)

        self._kept = [kept for kept in self._kept if not is_part(kept)]
        self._kept.append(new)
        if self._folder is not None and self._folder.wants(held, goes_on):
            try:
                self._folder.save(cache, held, goes_on)
            except MLAError as error:
                self._note(str(error))

    def save(self, file: Path, model: Mapping[str, str]) -> None:
        """Write the conversation used last to a file, with the model's fingerprint.

        Raises:
            MLAError: there is none, or the file cannot be written.
        """
        require_storable(self._model)
        if not self._kept:
            raise MLAError(f"{file}: nothing has been read yet that could be saved")
        save_cache(file, self._kept[-1].cache, self._kept[-1].tokens.tolist(), model)

    def load(self, file: Path, model: Mapping[str, str]) -> None:
        """Keep the conversation that :meth:`save` wrote; errors as for ``load_cache``."""
        require_storable(self._model)
        cache = LatentCache(self._model.config.get_text_config(decoder=True), format=self.cache_format)
        tokens = load_cache(file, cache, model, device=self._model.device)
        self._kept.append(_Conversation(_token_ids(tokens), cache))

    def _bytes(self, tokens: int) -> int:
        return self.config.cache_bytes(tokens, self.cache_format)

    def _empty(self, capacity: int) -> LatentCache:
        text = self._model.config.get_text_config(decoder=True)
        return LatentCache(text, capacity=capacity, format=self.cache_format)

    def _goes_on(self, held: int, common: int, prompt: int) -> bool:
        """Whether a prompt of so many tokens may go on from ``common`` of those ``held``: see the class."""
        if self._switch is None:
            return True
        return common > self._switch if prompt > self._switch else held <= self._switch

    def _longest_kept(self, tokens: list[int]) -> tuple[_Conversation | None, int]:
        """The one with the longest beginning in common with a prompt but for its last token, the newest of
        several, and how long that is."""
        best: tuple[_Conversation | None, int] = (None, 0)
        wanted = _token_ids(tokens)
        for kept in self._kept:
            common = common_length(kept.tokens, wanted)
            fits = self._goes_on(len(kept.tokens), common, len(tokens) + 1)
            if common and common >= best[1] and fits:
                best = (kept, common)
        return best

    def _fits_beside(self, cache: LatentCache, tokens: int) -> bool:
        """Whether a cache that is kept may stay while another one of ``tokens`` is in use."""
        return self.budget is not None and cache.nbytes + self._bytes(tokens) <= self.budget

    def _make_room(self, tokens: int, held: int = 0, spared: _Conversation | None = None) -> None:
        """Forget conversations, but not ``spared``, until a cache of ``tokens``, ``held`` bytes of it there
        already, fits beside the others, within the budget and the memory that is free."""
        needed = self._bytes(tokens)
        if self.budget is None:
            self._kept.clear()
        elif needed > self.budget:
            raise MLAError(
                f"a cache of {tokens} tokens would need {needed} bytes, the budget is {self.budget}"
            )
        else:
            while self.nbytes + max(needed, held) > self.budget and self._forget_oldest(spared):
                pass
        while self._model.device.type == "cpu":
            try:
                require_memory(needed - held, f"a cache of {tokens} tokens")
                break
            except MLAError:  # others have taken the machine's memory
                if not self._forget_oldest(spared):
                    raise

    def _forget_oldest(self, spared: _Conversation | None) -> bool:
        """Whether there was one."""
        oldest = next((kept for kept in self._kept if kept is not spared), None)
        if oldest is not None:
            self._kept.remove(oldest)
        return oldest is not None


@torch.no_grad()
def read_prompt(
    model: Any, tokens: list[int], cache: LatentCache, check: Callable[[int, int], object]
) -> None:
    """Read what the cache does not hold of a prompt, but for the last step, which is left to ``generate``.

    Args:
        model: an absorbed model.
        tokens: the whole prompt.
        cache: what of it was read before; it holds whole steps whenever ``check`` is called.
        check: called as (tokens read, tokens in all) before every step, and with the prompt's length for both
            when none is left; what it raises ends the reading.
    """
    first = cache.get_seq_length()
    while (last := first + step_size(model.config, first, len(tokens), _STEP)) < len(tokens):
        check(first, len(tokens))
        ids = torch.tensor([tokens[first:last]], device=model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        first = last
    check(len(tokens), len(tokens))


def step_size(config: Any, first: int, prompt: int, most: int) -> int:
    """How many tokens to read at once of a prompt of which ``first`` are read: ``most``, or with LongRoPE as
    many more as take the step beyond the length at which the frequencies of all of them change.

    Args:
        config: of Transformers.
    """
    switch = switching_length(config)
    return most if switch is None or prompt <= switch else max(most, switch + 1 - first)


def switching_length(config: Any) -> int | None:
    """The length beyond which a model's RoPE takes other frequencies for all of a call (LongRoPE); None for
    models without such a length, or that never come to it. Argument as for :func:`step_size`."""
    text = config.get_text_config(decoder=True)
    given = getattr(text, "rope_parameters", None) or {}
    # A model may have several, by the kind of layer.
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):
        if rope.get("rope_type") == "longrope" and rope.get("short_factor") != rope.get("long_factor"):
            original = rope.get("original_max_position_embeddings") or text.max_position_embeddings
            return int(original) if original < text.max_position_embeddings else None
    return None


def require_storable(model: Any) -> None:
    """Refuse models whose caches hold more than latents.

    Raises:
        MLAError: the model has layers with linear attention or sliding windows.
    """
    if not is_storable(LatentCache(model.config.get_text_config(decoder=True))):
        raise MLAError(
            f"{model.config.model_type} has layers beside latent attention (linear attention or sliding "
            "windows), whose states cannot be cut back to a prefix: its caches are not kept in files"
        )


def _token_ids(tokens: list[int]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int32, device="cpu")
