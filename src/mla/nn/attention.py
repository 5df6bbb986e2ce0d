"""``MultiheadLatentAttention``: the attention module to build a new model with.

Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1. Shapes are in the alphabet of ``mla.ops.reference``:
b batch, s query tokens, t key tokens, h heads, n nope dim, r latent rank, p rope dim, v value dim, d hidden.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mla.cache import LatentCache
from mla.config import MLAConfig
from mla.nn.layers import Linear, RMSNorm, check_weight_says_all
from mla.ops import arguments
from mla.ops import attention as ops
from mla.ops.latent import Latents
from mla.ops.rope import apply_rope, rope_table

PathChoice = ops.Path | Literal["auto"]

# Recomputation rebuilds this many scores at once in the backward pass (16 MiB in fp32), but at least one
# head's. Heads share nothing but the latents, so splitting them costs no operation.
_SCORES_AT_ONCE = 2**22


class MultiheadLatentAttention(nn.Module):
    """Multi-head Latent Attention: all heads' keys and values come from one latent of r numbers per token.

    The parameters have the names and shapes of Transformers' ``DeepseekV3Attention``, so that its state dict
    loads as it is. Long inputs are attended in the expanded form, short ones (decoding) in the absorbed form,
    by operation count (:func:`mla.ops.attention.make_plan`); the results are equal to rounding.

    ``kv_b_proj`` is used through its weight, never called: hooks on it, adapters around it, other
    forward passes and quantised weights are refused.

    Args:
        config: dimensions, RoPE and softmax scale. ``config.attention_bias`` gives ``q_a_proj``,
            ``kv_a_proj_with_mqa`` and ``o_proj`` a bias, as Transformers does.
        layer_idx: the layer of the cache that holds this module's latents. A self- and a cross-attention of
            one decoder layer need two layers of a cache, or two caches.
        context_size: None for self-attention. Else keys and values come from a context of this width
            (cross-attention), which is not causal.
        recompute_kv: keep only the queries and the latents for the backward pass, and rebuild keys, values
            and scores there, a few heads at a time. Gradients are the same; it costs one more forward pass
            of the attention, none of the projections. Not under torch.func's grad and vjp, which forbid the
            hooks that it takes.
        attention_dropout: probability with which an attention weight is dropped in training mode.
        device, dtype: of the parameters.

    Attributes:
        path: "auto", or "absorbed" or "expanded" for every call that does not say ``path=``.

    Raises:
        ValueError: ``context_size`` below 1, ``attention_dropout`` outside [0, 1), or a config with what this
            module does not have: layer groups, a sliding window, a sparse indexer, or, in cross-attention,
            RoPE whose frequencies follow the sequence's length ("dynamic", "longrope").
    """

    def __init__(
        self,
        config: MLAConfig,
        *,
        layer_idx: int = 0,
        context_size: int | None = None,
        recompute_kv: bool = False,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if context_size is not None and context_size < 1:
            raise ValueError(f"context_size: expected at least 1, or None, got {context_size}")
        if not 0.0 <= attention_dropout < 1.0:
            raise ValueError(f"attention_dropout: expected a number in [0, 1), got {attention_dropout}")
        _refuse_what_is_not_built(config, crosses=context_size is not None)
        self.config = config
        self.layer_idx = layer_idx
        self.context_size = context_size
        self.recompute_kv = recompute_kv
        self.attention_dropout = attention_dropout
        self.path: PathChoice = "auto"

        d, h, r = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        n, p, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        bias, eps = config.attention_bias, config.rms_norm_eps
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj: Linear | None = None
        self.q_a_proj: Linear | None = None
        self.q_a_layernorm: RMSNorm | None = None
        self.q_b_proj: Linear | None = None
        if config.q_lora_rank is None:
            self.q_proj = Linear(d, h * (n + p), bias=False, **factory)
        else:
            self.q_a_proj = Linear(d, config.q_lora_rank, bias=bias, **factory)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps, **factory)
            self.q_b_proj = Linear(config.q_lora_rank, h * (n + p), bias=False, **factory)
        width = d if context_size is None else context_size
        self.kv_a_proj_with_mqa = Linear(width, r + p, bias=bias, **factory)
        self.kv_a_layernorm = RMSNorm(r, eps, **factory)
        self.kv_b_proj = Linear(r, h * (n + v), bias=False, **factory)
        self.o_proj = Linear(h * v, d, bias=bias, **factory)

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"heads={c.num_attention_heads}, nope={c.qk_nope_head_dim}, rope={c.qk_rope_head_dim}, "
            f"value={c.v_head_dim}, rank={c.kv_lora_rank}, layer_idx={self.layer_idx}, "
            f"context_size={self.context_size}, recompute_kv={self.recompute_kv}, "
            f"attention_dropout={self.attention_dropout}, path={self.path}"
        )

    def forward(
        self,
        hidden_states: Tensor,
        *,
        context: Tensor | None = None,
        position_ids: Tensor | None = None,
        context_position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: LatentCache | None = None,
        is_causal: bool | None = None,
        path: PathChoice | None = None,
    ) -> Tensor:
        """Attend, and append the new latents to ``cache``.

        With a cache, t counts the cached tokens and the new ones. The cache holds values without gradients:
        they flow through the tokens of this call, and earlier tokens are constants.

        Args:
            hidden_states: [b, s, d] the queries' tokens; in self-attention the newest keys' as well.
            context: [b, t, context_size] for cross-attention only. With a cache, the first call passes it
                and its latents are stored; later calls leave it out and meet the stored ones.
            position_ids: [b, s], [1, s] or [s], integers. Default: count on from the cached tokens; with a
                [b, t] mask in self-attention, the number of real tokens before the token, so that padding on
                either side does not shift a sequence. Unused without RoPE.
            context_position_ids: [b, t], [1, t] or [t], integers, cross-attention only. Default: the same
                rule for the context.
            attention_mask: [b, t], bool or integers, 0 where the key is padding (either side); or
                [b, h, s, t], any of them 1, bool (True attends) or floating (added to the scaled scores).
                It narrows ``is_causal``, it does not replace it. A query that sees no key attends to nothing:
                its output is ``o_proj`` of zero.
            cache: latents of this module's ``layer_idx``; changed by this call. Not inside of
                torch.utils.checkpoint, whose second pass would write the tokens again; ``recompute_kv`` saves
                that memory.
            is_causal: None means True for self-attention and False for cross-attention.
            path: "auto", "absorbed" or "expanded" for this call; None takes the attribute ``path``.

        Returns:
            [b, s, d] in the dtype of ``o_proj``'s output.

        Raises:
            TypeError: another cache than a LatentCache.
            ValueError: shapes and dtypes other than these; a context without ``context_size``; neither a
                context nor a cached one; a context although the cache already holds one (reset the cache, or
                leave the context out), or holds the tokens of a self-attention there; cross-attention that is
                causal, or that has RoPE and meets a cached context without ``position_ids`` (the cache cannot
                know how far the queries are).
        """
        config = self.config
        _check_tokens("hidden_states", hidden_states, "[b, s, d]", None, config.hidden_size)
        b, s, _ = hidden_states.shape
        if not (cache is None or isinstance(cache, LatentCache)):
            raise TypeError(f"cache: expected a LatentCache or None, got {type(cache).__name__}")
        cached = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        source = self._source(hidden_states, context, cache, cached)
        if self.context_size is None:
            t = cached + s
        else:
            t = cached if source is None else source.shape[1]
            if is_causal:
                raise ValueError(
                    "is_causal: expected False or None in cross-attention, where queries and keys have no "
                    "common order, got True; pass a [b, 1, s, t] attention_mask instead"
                )
        causal = self.context_size is None if is_causal is None else is_causal
        check_weight_says_all("kv_b_proj", self.kv_b_proj)
        shape = (b, config.num_attention_heads, s, t)
        mask, padding = _read_mask(attention_mask, shape, hidden_states.device)
        # Everything that can be refused is refused before the cache changes.
        query_positions, key_positions = self._positions(
            position_ids, context_position_ids, padding, b, s, t, cached_context=source is None
        )
        plan = ops.make_plan(
            s=s,
            t=t,
            h=config.num_attention_heads,
            n=config.qk_nope_head_dim,
            r=config.kv_lora_rank,
            p=config.qk_rope_head_dim,
            v=config.v_head_dim,
            causal=causal,
            path=self.path if path is None else path,
        )

        q = self._queries(hidden_states, query_positions)
        rotation = self._rotation(query_positions, q.device)
        weight = self.kv_b_proj.weight
        if source is None:
            assert cache is not None  # _source has seen to that
            held = cache.layers[self.layer_idx].latents
            # Autograd saves what it reads; a reset writes over the rows.
            if arguments.needs_grad(q, weight, mask):
                held = Latents(*(x.clone() for x in held.numbers(q.dtype)))
        else:
            same = key_positions is query_positions
            key_rotation = rotation if same else self._rotation(key_positions, q.device)
            held = Latents(*self._latents(source, key_rotation))
            if cache is not None:
                needs_grad = arguments.needs_grad(q, held.c_kv, held.k_rope, weight, mask)
                held = self._store(cache, held, cached, needs_grad)
        out = self._attend(q, rotation, held, mask, causal, plan)
        projected: Tensor = self.o_proj(out.flatten(2))
        return projected

    def _source(
        self, hidden_states: Tensor, context: Tensor | None, cache: LatentCache | None, cached: int
    ) -> Tensor | None:
        """The tokens whose latents this call computes; None where the cache holds the context's."""
        if self.context_size is None:
            if context is not None:
                raise ValueError(
                    "context: expected None, because the module was built without context_size, got "
                    f"shape {tuple(context.shape)}"
                )
            if cache is not None and cache.holds_context(self.layer_idx):
                raise ValueError(
                    f"cache: expected earlier tokens or nothing in layer {self.layer_idx}, got the context "
                    "of a cross-attention; the two need different layer_idx, or different caches"
                )
            return hidden_states
        # Not by its length: a context may have no tokens, and tokens may be those of a self-attention.
        has_context = cache is not None and cache.holds_context(self.layer_idx)
        if context is None:
            if not has_context:
                raise ValueError(
                    f"context: expected [b, t, {self.context_size}], because no cached context exists for "
                    f"layer {self.layer_idx}, got None"
                )
            return None
        if has_context:
            raise ValueError(
                f"context: expected None, because layer {self.layer_idx} of the cache already holds a "
                f"context of {cached} tokens, got shape {tuple(context.shape)}; reset the cache for a new one"
            )
        if cached > 0:
            raise ValueError(
                f"cache: expected nothing in layer {self.layer_idx}, where the context goes, got {cached} "
                "tokens that are no context; a self-attention needs another layer_idx, or another cache"
            )
        _check_tokens("context", context, "[b, t, context_size]", hidden_states.shape[0], self.context_size)
        return context

    def _positions(
        self,
        position_ids: Tensor | None,
        context_position_ids: Tensor | None,
        padding: Tensor | None,
        b: int,
        s: int,
        t: int,
        *,
        cached_context: bool,
    ) -> tuple[Tensor, Tensor]:
        """Positions of the queries, [b, s] or [1, s], and of the source's tokens, likewise."""
        if padding is None:
            in_order = torch.arange(t, device="cpu")
        else:
            in_order = (padding.long().cumsum(-1) - 1).clamp_min(0)
        if self.context_size is None:
            if context_position_ids is not None:
                raise ValueError("context_position_ids: expected None in self-attention, got a tensor")
            positions = _read_positions("position_ids", position_ids, b, s, in_order[..., t - s :])
            return positions, positions
        if cached_context:
            if context_position_ids is not None:
                raise ValueError("context_position_ids: expected None for a cached context, got a tensor")
            if position_ids is None and (self._rotates or self._query_temperature is not None):
                raise ValueError(
                    "position_ids: expected [b, s] where RoPE meets a cached context, got None; the cache "
                    "knows the context's length only"
                )
        queries = _read_positions("position_ids", position_ids, b, s, torch.arange(s, device="cpu"))
        return queries, _read_positions("context_position_ids", context_position_ids, b, t, in_order)

    @property
    def _rotates(self) -> bool:
        return self.config.qk_rope_head_dim > 0 and self.config.rope.layout != "none"

    @property
    def _query_temperature(self) -> float | None:
        return self.config.rope.llama_4_scaling_beta

    def _queries(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """[b, s, h, n + p], not yet rotated."""
        if self.q_proj is not None:
            q = self.q_proj(hidden_states)
        else:
            assert self.q_a_proj is not None
            assert self.q_a_layernorm is not None
            assert self.q_b_proj is not None
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        heads: Tensor = q.unflatten(-1, (self.config.num_attention_heads, -1))
        beta, original = self._query_temperature, self.config.rope.original_max_position_embeddings
        if beta is None:
            return heads
        assert original is not None  # RopeConfig has seen to that
        growth = 1.0 + beta * torch.log1p((positions // original).float())
        return heads * growth.to(heads)[:, :, None, None]

    def _latents(self, source: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """c_kv [b, t, r] after its norm and the rotated k_rope [b, t, p] of the tokens ``source``."""
        rank = self.config.kv_lora_rank
        compressed = self.kv_a_proj_with_mqa(source)
        k_rope = compressed[..., rank:]
        if rotation is not None:
            k_rope = apply_rope(k_rope, *rotation, self.config.rope.layout)
        c_kv: Tensor = self.kv_a_layernorm(compressed[..., :rank])
        return c_kv, k_rope

    def _rotation(self, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """cos and sin, each [b, s, p/2] or [1, s, p/2]; None without RoPE."""
        if not self._rotates:
            return None
        return rope_table(
            self.config.rope,
            self.config.qk_rope_head_dim,
            positions,
            max_position_embeddings=self.config.max_position_embeddings,
            device=device,
        )

    def _store(self, cache: LatentCache, new: Latents, cached: int, needs_grad: bool) -> Latents:
        """Append to the cache; returns the latents of all tokens."""
        with torch.no_grad():  # else it would return a copy, which is made below, and only where it is needed
            cache.update(new.c_kv.detach()[:, None], new.k_rope.detach()[:, None], self.layer_idx)
        cache.layers[self.layer_idx].holds_context = self.context_size is not None
        held: Latents = cache.layers[self.layer_idx].latents
        if not needs_grad:
            return held
        if cached == 0:
            return new
        # Not the cache's own rows: the next token is written beside them, which autograd takes for a change
        # of what it saved.
        c_kv, k_rope = held.numbers(new.c_kv.dtype)
        return Latents(
            torch.cat([c_kv[:, :cached], new.c_kv], dim=1), torch.cat([k_rope[:, :cached], new.k_rope], dim=1)
        )

    def _attend(
        self,
        q: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        held: Latents,
        mask: Tensor | None,
        causal: bool,
        plan: ops.Plan,
    ) -> Tensor:
        """[b, s, h, v] of the queries q [b, s, h, n + p], not yet rotated."""
        b, s, h, _ = q.shape
        t = held.c_kv.shape[1]
        n, v = self.config.qk_nope_head_dim, self.config.v_head_dim
        w_kv = self.kv_b_proj.weight.view(h, n + v, -1)
        dropout = self.attention_dropout if self.training else 0.0

        def attend(q: Tensor, c_kv: Tensor, k_rope: Tensor, w_kv: Tensor, mask: Tensor | None) -> Tensor:
            q_rope = q[..., n:]
            if rotation is not None:
                cos, sin = rotation
                q_rope = apply_rope(q_rope, cos[:, :, None], sin[:, :, None], self.config.rope.layout)
            w_kv = w_kv.to(q.dtype)  # wider under autocast
            out, _ = ops.prefill(
                q[..., :n],
                q_rope,
                c_kv,
                k_rope,
                w_kv[:, :n],
                w_kv[:, n:],
                scale=self.config.softmax_scale,
                causal=causal,
                mask=mask,
                latent_scale=held.scale,
                dropout=dropout,
                plan=plan,
            )
            return out

        if not (self.recompute_kv and torch.is_grad_enabled()):
            return attend(q, held.c_kv, held.k_rope, w_kv, mask)
        width = min(h, max(1, _SCORES_AT_ONCE // max(b * s * t, 1)))
        parts = []
        for start in range(0, h, width):
            heads = slice(start, start + width)
            part: Tensor = checkpoint(
                attend,
                q[:, :, heads],
                held.c_kv,
                held.k_rope,
                w_kv[heads],
                mask if mask is None or mask.shape[1] == 1 else mask[:, heads],
                use_reentrant=False,
                preserve_rng_state=dropout > 0.0,
            )
            parts.append(part)
        return torch.cat(parts, dim=2)


def _refuse_what_is_not_built(config: MLAConfig, *, crosses: bool) -> None:
    if config.groups:
        raise ValueError(
            "config: expected the dimensions of one layer, got layer groups; pass config.at_layer(i)"
        )
    if config.sliding_window is not None:
        raise ValueError(f"config.sliding_window: expected None, got {config.sliding_window}; pass a mask")
    if config.indexer_layers:
        raise ValueError(
            f"config.indexer_layers: expected none, got {config.indexer_layers}; this module sees all keys"
        )
    if crosses and config.rope.rope_type in ("dynamic", "longrope"):
        raise ValueError(
            "config.rope.rope_type: expected one whose frequencies do not follow the length, because queries "
            f"and context have lengths of their own, got {config.rope.rope_type!r}"
        )


def _read_mask(
    attention_mask: Tensor | None, shape: tuple[int, int, int, int], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The mask in four dimensions, and the [b, t] padding mask (True is a real token) if it is one."""
    b, _, _, t = shape
    if attention_mask is None:
        return None, None
    have, dtype = tuple(attention_mask.shape), attention_mask.dtype
    if attention_mask.device != device:
        raise ValueError(
            f"attention_mask: expected one on {device}, as hidden_states, got one on {attention_mask.device}"
        )
    if attention_mask.ndim == 2:
        if have != (b, t):
            raise ValueError(
                f"attention_mask: expected [b, t] = {(b, t)}, cached and new tokens together, got {have}"
            )
        if dtype.is_floating_point or dtype.is_complex:
            raise ValueError(f"attention_mask [b, t]: expected bool or integers, 0 for padding, got {dtype}")
        padding = attention_mask != 0
        return padding[:, None, None], padding
    fits = len(have) == 4 and all(x in (1, want) for x, want in zip(have, shape, strict=True))
    if not fits:
        raise ValueError(
            f"attention_mask: expected [b, t] = {(b, t)} or a shape that broadcasts to [b, h, s, t] = "
            f"{shape}, got {have}"
        )
    if dtype != torch.bool and not dtype.is_floating_point:
        raise ValueError(f"attention_mask [b, h, s, t]: expected bool or a floating dtype, got {dtype}")
    return attention_mask, None


def _read_positions(name: str, given: Tensor | None, b: int, length: int, default: Tensor) -> Tensor:
    """Positions [b, length] or [1, length]."""
    positions = default if given is None else given
    if given is not None:
        if given.dtype == torch.bool or given.dtype.is_floating_point or given.dtype.is_complex:
            raise ValueError(f"{name}: expected integers, got {given.dtype}")
        if tuple(given.shape) not in ((b, length), (1, length), (length,)):
            raise ValueError(f"{name}: expected shape {(b, length)} or {(length,)}, got {tuple(given.shape)}")
    return positions[None] if positions.ndim == 1 else positions


def _check_tokens(name: str, x: Tensor, shape: str, b: int | None, width: int) -> None:
    if x.is_nested:
        raise ValueError(
            f"{name} {shape}: expected a plain tensor, got a nested one; pad it (to_padded_tensor) and say "
            "by a [b, t] attention_mask which tokens there are"
        )
    if x.ndim != 3 or x.shape[-1] != width or (b is not None and x.shape[0] != b):
        want = f"last dimension {width}" + ("" if b is None else f" and batch {b}")
        raise ValueError(f"{name} {shape}: expected {want}, got shape {tuple(x.shape)}")
