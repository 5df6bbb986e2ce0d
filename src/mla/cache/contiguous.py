"""``LatentCache``: preallocated latents, one row [c_kv | k_rope] per token, usable as ``past_key_values``."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


class LatentCache(DynamicCache):
    """The cache of an MLA model: r + p numbers per token and layer, and nothing else.

    Layers that are not latent attention (linear attention, sliding windows) keep the layer that Transformers
    made for them. Pass it to a model as ``past_key_values``, or to ``MultiheadLatentAttention`` as ``cache``.

    Args:
        config: the model's Transformers configuration. None serves modules outside of Transformers: layers
            appear as they are first written.
        capacity: tokens to allocate at the first write, when the final length is known; more are still
            taken. With None the first write allocates what it needs. A full cache grows by 1% (at least 16
            tokens): it never holds much more than it uses, and a token is copied a hundred times less often
            than attention reads it.

    Raises:
        ValueError: ``capacity`` below 1, or (at a write) tensors that are not latents.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig | None = None, *, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity: expected at least 1 token, got {capacity}")
        self.capacity = capacity
        if config is None:
            Cache.__init__(self, layers=[])
        else:
            super().__init__(config=config)
            self.layers = [self._latent_twin(layer) for layer in self.layers]

    def _latent_twin(self, layer: Any) -> Any:
        # Exact types: a subclass of them stores something else besides, and keeps its own layer.
        if type(layer) is DynamicLayer:
            return LatentLayer(self.capacity)
        if type(layer) is DynamicIndexedLayer:
            return IndexedLatentLayer(self.capacity)
        return layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append latents [b, 1, s, r] and rotary keys [b, 1, s, p]; returns all of the layer's."""
        while len(self.layers) <= layer_idx:
            self.layers.append(LatentLayer(self.capacity))
        held: tuple[Tensor, Tensor] = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return held

    @property
    def latent_layers(self) -> list["LatentLayer"]:
        """The layers that hold latents, in order."""
        return [layer for layer in self.layers if isinstance(layer, LatentLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes really allocated for tokens: latents, indexer keys, and the windows of sliding layers."""
        windows = [layer for layer in self.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        tensors: list[Tensor] = [
            x for layer in windows if layer.is_initialized for x in (layer.keys, layer.values)
        ]
        return sum(layer.nbytes for layer in self.latent_layers) + sum(x.nbytes for x in tensors)


class LatentLayer(CacheLayerMixin):
    """One layer's latents. Rows lie in one buffer [b, capacity, r + p]; ``keys`` and ``values`` are views."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        self._rows = _Rows(capacity)
        self._rank = 0

    @property
    def c_kv(self) -> Tensor:
        """[b, t, r] the latents held, a view of the buffer."""
        return self._rows.held()[..., : self._rank]

    @property
    def k_rope(self) -> Tensor:
        """[b, t, p] the rotary keys held, a view of the buffer."""
        return self._rows.held()[..., self._rank :]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        return sum(rows.nbytes for rows in self._buffers())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is known before the first latents: they fix r, p, batch, dtype and device."""
        self._rank = key_states.shape[-1]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append latents [b, 1, s, r] and rotary keys [b, 1, s, p]; returns all held, as views."""
        if key_states.ndim != 4 or key_states.shape[1] != 1 or value_states.shape[:3] != key_states.shape[:3]:
            raise ValueError(
                "expected latents [b, 1, s, r] and rotary keys [b, 1, s, p], got "
                f"{tuple(key_states.shape)} and {tuple(value_states.shape)}; a LatentCache holds latents only"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        b, _, length, _ = key_states.shape
        slot = self._rows.reserve(b, length, self._rank + value_states.shape[-1], like=key_states)
        slot[..., : self._rank] = key_states[:, 0]
        slot[..., self._rank :] = value_states[:, 0]
        self._publish()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._rows.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that the next ``query_length`` queries will meet, position of the first key)."""
        return self._rows.length + query_length, 0

    def get_max_length(self) -> int:
        """-1, the word of Transformers for "no limit"."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens exactly; as in Transformers their number is given as a negative one."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected minus the number of tokens to remove, got {tokens_to_remove}")
        for rows in self._buffers():
            rows.crop(-tokens_to_remove)
        self._publish()

    def reset(self) -> None:
        """Forget every token, keep the allocation."""
        for rows in self._buffers():
            rows.crop(rows.length)
        self._publish()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times in a row."""
        for rows in self._buffers():
            rows.select(torch.arange(rows.batch).repeat_interleave(repeats))
        self._publish()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``, in that order, repetitions allowed."""
        for rows in self._buffers():
            rows.select(indices)
        self._publish()

    def offload(self) -> None:
        """Move the buffers to the CPU."""
        for rows in self._buffers():
            rows.to(torch.device("cpu"))
        self._publish()

    def prefetch(self) -> None:
        """Move the buffers back to the device of the first write."""
        for rows in self._buffers():
            rows.to(self.device)
        self._publish()

    def _buffers(self) -> list["_Rows"]:
        """The buffers that have been written: a layer may share the latents, or the indexer, of another."""
        return [rows for rows in self._all_buffers() if rows.batch]

    def _all_buffers(self) -> list["_Rows"]:
        return [self._rows]

    def _publish(self) -> None:
        # Transformers reads these two attributes of a layer; they follow the buffer.
        if self.is_initialized:
            self.keys, self.values = self.c_kv.unsqueeze(1), self.k_rope.unsqueeze(1)


class IndexedLatentLayer(LatentLayer):
    """A latent layer beside whose rows a sparse indexer (DeepSeek-V3.2, GLM-5) keeps its own keys."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity)
        self._indexer = _Rows(capacity)

    @property
    def is_indexer_initialized(self) -> bool:
        """Whether indexer keys have been written."""
        return self._indexer.length > 0

    @property
    def indexer_keys(self) -> Tensor | None:
        """[b, t, index head dim] the indexer's keys held, a view of their buffer."""
        return self._indexer.held() if self.is_indexer_initialized else None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Append indexer keys [b, s, index head dim]; returns all held."""
        b, s, width = indexer_key_states.shape
        self._indexer.reserve(b, s, width, like=indexer_key_states)[:] = indexer_key_states
        return self._indexer.held()

    def _all_buffers(self) -> list["_Rows"]:
        return [self._rows, self._indexer]


class _Rows:
    """A buffer [b, capacity, width] of which the first ``length`` rows are in use."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.length = 0
        self._buffer: Tensor | None = None

    @property
    def batch(self) -> int:
        return 0 if self._buffer is None else self._buffer.shape[0]

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    def held(self) -> Tensor:
        if self._buffer is None:
            raise RuntimeError("this cache layer has not been written yet")
        return self._buffer[:, : self.length]

    def reserve(self, b: int, s: int, width: int, like: Tensor) -> Tensor:
        """Room for s more rows of every sequence, [b, s, width], to be filled by the caller."""
        if self._buffer is not None and (b, width) != (self._buffer.shape[0], self._buffer.shape[2]):
            if self.length == 0:
                self._buffer = None  # reset for another batch
                return self.reserve(b, s, width, like)
            raise ValueError(
                f"expected rows of batch {self._buffer.shape[0]} and width {self._buffer.shape[2]}, "
                f"got batch {b} and width {width}"
            )
        start, end = self.length, self.length + s
        if self._buffer is None:
            self._buffer = like.new_empty(b, max(self.capacity or 0, end), width)
        elif end > self._buffer.shape[1]:
            grown = like.new_empty(b, end + max(16, end // 128), width)
            grown[:, :start] = self.held()
            self._buffer = grown
        self.length = end
        return self._buffer[:, start:end]

    def crop(self, count: int) -> None:
        if count > self.length:
            raise ValueError(f"cannot remove {count} tokens from a cache that holds {self.length}")
        self.length -= count

    def select(self, indices: Tensor) -> None:
        if self._buffer is not None:
            chosen = self.held().index_select(0, indices.to(self._buffer.device))
            self._buffer = chosen.new_empty(chosen.shape[0], *self._buffer.shape[1:])
            self._buffer[:, : self.length] = chosen

    def to(self, device: torch.device) -> None:
        if self._buffer is not None:
            self._buffer = self._buffer.to(device, non_blocking=True)
