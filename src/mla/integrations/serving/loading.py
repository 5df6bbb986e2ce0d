"""Open a model for serving: absorbed, with a budget for its caches and a limit that fits into it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mla.cache.folder import PrefixFolder
from mla.config import MLAConfig
from mla.errors import MLAError
from mla.integrations.loading import (
    GIB,
    DtypeName,
    load_mla_model,
    load_tokenizer,
)
from mla.integrations.prefixes import Prefixes, fingerprint, require_storable
from mla.integrations.serving.generation import Engine
from mla.integrations.transformers import absorb
from mla.machine import free_memory


@dataclass(frozen=True)
class Served:
    """An engine, and what fits into its budget."""

    engine: Engine
    budget: int
    bytes_per_token: float

    @property
    def tokens(self) -> int:
        """Tokens of context that fit, over all conversations."""
        return int(self.budget // self.bytes_per_token)

    def words(self) -> str:
        """One line for people."""
        each = f"{self.bytes_per_token:.0f} bytes each ({self.engine.prefixes.cache_format})"
        return (
            f"{self.tokens} tokens of context fit into {self.budget / GIB:.2f} GiB at {each}; "
            f"one request takes up to {self.engine.limit}"
        )


def load_engine(
    source: str,
    *,
    name: str,
    dtype: DtypeName,
    cache_format: str,
    max_model_len: int | None,
    budget: int | None,
    cache_dir: Path | None,
    cache_dir_size: int,
    note: Callable[[str], object],
) -> Served:
    """The engine for a model.

    Args:
        source, dtype: as for ``load_model``. cache_format: as for ``choose_cache_format``.
        name: what clients call the model.
        max_model_len: tokens of prompt and answer; None takes what model and budget allow.
        budget: bytes for all caches; None takes half of what is free once the weights are loaded: the rest
            is for the steps of long prompts, and for others.
        cache_dir, cache_dir_size: where to keep prefixes, and how many bytes of them.
        note: told about stored prefixes that are not used, and why, and about what of the model's generation
            config cannot be served.

    Raises:
        MLAError: as for ``load_model``; or not a single token fits; or the model's prefixes cannot be kept.
    """
    model, config, chosen = load_mla_model(
        source, dtype=dtype, cache_format=cache_format, max_model_len=max_model_len
    )
    absorb(model)
    folder = None
    if cache_dir is not None:
        require_storable(model)
        folder = PrefixFolder(cache_dir, fingerprint(model, chosen), cache_dir_size, note)
    budget = free_memory() // 2 if budget is None else budget
    per_token = config.cache_bytes_per_token(chosen)
    limit = min(max_model_len or config.max_position_embeddings, _fitting(config, chosen, budget))
    if limit < (max_model_len or 1):
        raise MLAError(
            f"--memory: {budget / GIB:.2f} GiB hold {limit} tokens of this model, "
            f"expected room for {max_model_len or 1}"
        )
    prefixes = Prefixes(model, config, chosen, budget=budget, folder=folder, note=note)
    engine = Engine(model, load_tokenizer(source), name, prefixes, limit)
    if engine.left_out:
        note(f"left out of the model's generation config: {', '.join(engine.left_out)}")
    return Served(engine, budget, per_token)


def _fitting(config: MLAConfig, cache_format: str, budget: int) -> int:
    """The longest sequence whose cache fits into the budget: sliding windows stop growing."""
    low, high = 0, config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        if config.cache_bytes(middle, cache_format) <= budget:
            low = middle
        else:
            high = middle - 1
    return low
