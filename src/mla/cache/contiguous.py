"""``LatentCache``: preallocated latents, one row [c_kv | k_rope] per token, usable as ``past_key_values``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from mla.formats import cache_format
from mla.ops import latent
from mla.ops.arguments import forward_mode


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
        format: "fp32", "fp16", "bf16" or "int8" (``ops.latent``: int8 latents with a scale per token, rotary
            keys in bf16), whatever the model computes in; None is the dtype of a layer's first
            write. Only absorbed models and ``MultiheadLatentAttention`` read a format that is not the model's
            own.

    Raises:
        ValueError: ``capacity`` below 1, an unknown format, or (at a write) tensors that are not latents.
    """

    layers: list[Any]

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        capacity: int | None = None,
        format: str | None = None,  # noqa: A002 - the field's word
    ) -> None:
        if capacity is not None:
            _check_capacity(capacity)
        if format is not None:
            cache_format(format)
        self.capacity = capacity
        self.format = format
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise TypeError(
                "config: expected a configuration of Transformers, or None (for MultiheadLatentAttention), "
                f"got {type(config).__name__}"
            )
        if config is None:
            Cache.__init__(self, layers=[])
        else:
            super().__init__(config=config)
            self.layers = [self._latent_twin(layer) for layer in self.layers]

    def _latent_twin(self, layer: Any) -> Any:
        # Exact types: a subclass of them stores something else besides, and keeps its own layer.
        if type(layer) is DynamicLayer:
            return LatentLayer(self.capacity, self.format)
        if type(layer) is DynamicIndexedLayer:
            return IndexedLatentLayer(self.capacity, self.format)
        return layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append latents [b, 1, s, r] and rotary keys [b, 1, s, p]; returns all of the layer's.

        The cache holds constants. Under ``torch.no_grad()`` what is returned are its own rows. Else it is a
        copy, which carries the gradients of the new latents and stays as it is until the backward pass.

        Raises:
            ValueError: tensors that are not latents, or not as those held; latents with gradients in the int8
                format, whose rows of bytes have none.
        """
        layer = self.layer_at(layer_idx)
        held: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        return held

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of every layer, or of none; their number is given as a negative one.

        Raises:
            ValueError: a positive number, or more tokens than a layer holds.
            RuntimeError: linear attention, or a full sliding window, that has not kept its past: see
                ``activate_past_recording`` of Transformers.
        """
        for index, layer in enumerate(self.layers):
            if isinstance(layer, LatentLayer):
                layer.check_crop(tokens_to_remove)
            elif not _can_go_back(layer):
                raise RuntimeError(
                    f"crop: expected layers that can go back, got {type(layer).__name__} as layer {index}, "
                    "which keeps no past; call activate_past_recording() before the model reads the tokens"
                )
        super().crop(tokens_to_remove)

    def reserve(self, capacity: int) -> None:
        """Tokens for which the next allocation makes room: a full cache grows to them at once, not by 1%.

        Nothing is allocated yet, and a smaller number than before changes nothing.

        Raises:
            ValueError: ``capacity`` below 1.
        """
        _check_capacity(capacity)
        self.capacity = max(capacity, self.capacity or 0)
        for layer in self.latent_layers:
            layer.reserve(capacity)

    def shrink(self, capacity: int) -> None:
        """Give back the memory of what is allocated beyond ``capacity`` tokens, or beyond those held if they
        are more; one layer after another, so that no second cache is needed meanwhile.

        Raises:
            ValueError: ``capacity`` below 1.
        """
        _check_capacity(capacity)
        self.capacity = min(capacity, self.capacity or capacity)
        for layer in self.latent_layers:
            layer.shrink(capacity)

    def layer_at(self, layer_idx: int) -> Any:
        """A layer by its index; made where there is none yet."""
        while len(self.layers) <= layer_idx:
            self.layers.append(LatentLayer(self.capacity, self.format))
        return self.layers[layer_idx]

    def holds_context(self, layer_idx: int) -> bool:
        """Whether a layer holds the context of a cross-attention, which may be one without tokens."""
        there_yet = self.layers[layer_idx : layer_idx + 1]
        return any(isinstance(layer, LatentLayer) and layer.holds_context for layer in there_yet)

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
    """One layer's latents, one row per token in one buffer [b, capacity, width].

    ``keys`` and ``values``, which Transformers hands on to attention, are views: latents [b, 1, t, r] and
    rotary keys [b, 1, t, p]; in the int8 format ``keys`` are the whole rows, [b, 1, t, bytes]. ``rank`` and
    ``rope`` are r and p, 0 before the first write.
    ``holds_context`` says that the rows belong to the context of a cross-attention: no query is one of them,
    so a roll-back leaves them alone; a reset forgets them.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, capacity: int | None = None, format: str | None = None) -> None:  # noqa: A002
        super().__init__()
        self.format = format
        self._rows = _Rows(capacity)
        self.rank = self.rope = 0
        self.holds_context = False

    @property
    def latents(self) -> latent.Latents:
        """What is held, as views of the buffer."""
        rows = self._rows.held()
        if self.format == "int8":
            return latent.split_rows(rows, self.rank, self.rope)
        return latent.Latents(rows[..., : self.rank], rows[..., self.rank :])

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        return sum(rows.nbytes for rows in self._buffers())

    def held(self) -> dict[str, Tensor]:
        """The rows in use as they are stored, [b, t, width] by the name of their buffer; views."""
        return {name: rows.held() for name, rows in self._all_buffers().items() if rows.is_written}

    def reserve(self, capacity: int) -> None:
        """As for ``LatentCache``."""
        for rows in self._all_buffers().values():
            rows.capacity = max(capacity, rows.capacity)

    def shrink(self, capacity: int) -> None:
        """As for ``LatentCache``."""
        for rows in self._all_buffers().values():
            rows.shrink(capacity)
        self._publish()

    def restore(self, held: Mapping[str, Tensor], *, rank: int, rope: int, device: torch.device) -> None:
        """Make an empty layer hold a copy of what another one's :meth:`held` gave, with that one's ``rank``
        and ``rope``."""
        if "rows" in held:
            self.rank, self.rope, self.is_initialized = rank, rope, True
        for name, rows in held.items():
            b, s, width = rows.shape
            self._all_buffers()[name].reserve(b, s, width, rows.dtype, device)[:] = rows
        self._publish()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The first latents, also after a reset, fix r, p, batch, dtype and device."""
        self.rank, self.rope = key_states.shape[-1], value_states.shape[-1]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append latents [b, 1, s, r] and rotary keys [b, 1, s, p]; returns ``keys`` and ``values``."""
        if key_states.ndim != 4 or key_states.shape[1] != 1 or value_states.shape[:3] != key_states.shape[:3]:
            raise ValueError(
                "expected latents [b, 1, s, r] and rotary keys [b, 1, s, p], got "
                f"{tuple(key_states.shape)} and {tuple(value_states.shape)}; a LatentCache holds latents only"
            )
        b, _, s, r = key_states.shape
        p = value_states.shape[-1]
        if self.format == "int8" and (_has_gradients(key_states) or _has_gradients(value_states)):
            raise ValueError(
                "expected latents without gradients, which int8 rows cannot carry, got some with them; call "
                "the model under torch.no_grad(), or train with a cache of another format"
            )
        before = self._rows.length
        if not before:
            self.lazy_initialization(key_states, value_states)
        if (r, p) != (self.rank, self.rope):
            raise ValueError(
                f"expected latents of {self.rank} numbers and rotary keys of {self.rope}, as held, "
                f"got {r} and {p}"
            )
        c_kv, k_rope = key_states[:, 0], value_states[:, 0]
        if self.format == "int8":
            slot = self._rows.reserve(b, s, latent.row_bytes(r, p), torch.uint8, c_kv.device)
            latent.store(latent.split_rows(slot, r, p), c_kv, k_rope)
        else:
            slot = self._rows.reserve(b, s, r + p, self._dtype_of(c_kv), c_kv.device)
            latent.store(latent.Latents(slot[..., :r], slot[..., r:]), c_kv, k_rope)
        self._publish()
        if not (torch.is_grad_enabled() or forward_mode()):
            return self.keys, self.values
        # Copies, of constants as well: autograd saves what learning queries read, and takes the next token,
        # which is written beside it, for a change of it.
        if self.format == "int8":
            return self.keys.clone(), self.values.clone()
        return (
            torch.cat([self.keys[:, :, :before], key_states.to(self.keys.dtype)], dim=2),
            torch.cat([self.values[:, :, :before], value_states.to(self.values.dtype)], dim=2),
        )

    def _dtype_of(self, states: Tensor) -> torch.dtype:
        return latent.FORMAT_DTYPES.get(self.format or "", states.dtype)

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
        self.check_crop(tokens_to_remove)
        if not self.holds_context:
            for rows in self._buffers():
                rows.crop(-tokens_to_remove)
            self._publish()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse, by a ValueError, what :meth:`crop` cannot do."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected minus the number of tokens to remove, got {tokens_to_remove}")
        for rows in [] if self.holds_context else self._buffers():
            if -tokens_to_remove > rows.length:
                raise ValueError(
                    f"cannot remove {-tokens_to_remove} tokens from a cache that holds {rows.length}"
                )

    def reset(self) -> None:
        """Forget every token, also those of a context; keep the allocation."""
        self.holds_context = False
        for rows in self._buffers():
            rows.crop(rows.length)
        self._publish()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times in a row."""
        for rows in self._buffers():
            rows.select(torch.arange(rows.batch, device="cpu").repeat_interleave(repeats))
        self._publish()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``, in that order and as often; of bools, those that are True."""
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
            rows.to(rows.home)
        self._publish()

    def _buffers(self) -> list["_Rows"]:
        """The buffers that have been written: a layer may share the latents, or the indexer, of another."""
        return [rows for rows in self._all_buffers().values() if rows.is_written]

    def _all_buffers(self) -> dict[str, "_Rows"]:
        return {"rows": self._rows}

    def _publish(self) -> None:
        # Transformers reads these two attributes of a layer; they follow the buffer.
        if self.is_initialized:
            held = self.latents
            keys = self._rows.held() if self.format == "int8" else held.c_kv
            self.keys, self.values = keys.unsqueeze(1), held.k_rope.unsqueeze(1)


class IndexedLatentLayer(LatentLayer):
    """A latent layer beside whose rows a sparse indexer (DeepSeek-V3.2, GLM-5) keeps its own keys."""

    def __init__(self, capacity: int | None = None, format: str | None = None) -> None:  # noqa: A002
        super().__init__(capacity, format)
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
        # Not in int8: the few largest of their scores choose the keys, and those lie close together.
        dtype = torch.bfloat16 if self.format == "int8" else self._dtype_of(indexer_key_states)
        slot = self._indexer.reserve(b, s, width, dtype, indexer_key_states.device)
        slot[:] = indexer_key_states.detach()  # they choose keys: nothing flows back through them
        return self._indexer.held()

    def _all_buffers(self) -> dict[str, "_Rows"]:
        return {"rows": self._rows, "indexer": self._indexer}


def _check_capacity(capacity: int) -> None:
    if capacity < 1:
        raise ValueError(f"capacity: expected at least 1 token, got {capacity}")


def _can_go_back(layer: Any) -> bool:
    """Whether a layer of Transformers takes a crop now: it refuses only when the layers before it are cut."""
    is_full = isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() >= layer.sliding_window
    if is_full or isinstance(layer, LinearAttentionCacheLayerMixin):
        return bool(layer.record_past)
    return True


def _has_gradients(x: Tensor) -> bool:
    """Whether autograd follows ``x``, backward or forward."""
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    return forward_mode() and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


class _Rows:
    """A buffer [b, capacity, width] of which the first ``length`` rows are in use."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity or 0
        self.length = 0
        self.home = torch.device("cpu")  # where the first rows came from
        self._buffer: Tensor | None = None

    @property
    def is_written(self) -> bool:
        return self._buffer is not None

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

    def reserve(self, b: int, s: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for s more rows of every sequence, [b, s, width], to be filled by the caller."""
        old = self._buffer
        if old is not None and self.length == 0:
            # After a reset the allocation serves again, if it fits what comes now.
            if (old.shape[0], old.shape[2], old.dtype, old.device) != (b, width, dtype, device):
                self._buffer = None
        elif old is not None and (old.shape[0], old.shape[2]) != (b, width):
            raise ValueError(
                f"expected rows of batch {old.shape[0]} and width {old.shape[2]}, "
                f"got batch {b} and width {width}"
            )
        start, end = self.length, self.length + s
        if self._buffer is None:
            size = (b, max(self.capacity, end), width)
            self._buffer, self.home = torch.empty(size, dtype=dtype, device=device), device
        elif (
            not torch.compiler.is_compiling()  # which does not know the question
            and self._buffer.is_inference()
            and not torch.is_inference_mode_enabled()
        ):
            self._buffer = self._buffer.clone()  # torch refuses to write into the other one here
        if end > self._buffer.shape[1]:
            # What was asked for, exactly; beyond it a little more than what is needed.
            most = self.capacity if self.capacity >= end else end + max(16, end // 128)
            grown = self._buffer.new_empty(b, most, width)
            grown[:, :start] = self.held()
            self._buffer = grown
        self.length = end
        return self._buffer[:, start:end]

    def crop(self, count: int) -> None:
        self.length -= count

    def shrink(self, capacity: int) -> None:
        self.capacity = min(capacity, self.capacity)
        most = max(capacity, self.length)
        if self._buffer is not None and self._buffer.shape[1] > most:
            old = self.held()
            self._buffer = self._buffer.new_empty(old.shape[0], most, old.shape[2])
            self._buffer[:, : self.length] = old

    def select(self, indices: Tensor) -> None:
        if self._buffer is not None:
            chosen = self.held()[indices.to(self._buffer.device)]
            self._buffer = chosen.new_empty(chosen.shape[0], *self._buffer.shape[1:])
            self._buffer[:, : self.length] = chosen

    def to(self, device: torch.device) -> None:
        if self._buffer is not None:
            self._buffer = self._buffer.to(device, non_blocking=True)
