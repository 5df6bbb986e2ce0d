"""Rotary position embedding: every layout and scaling that the MLA families use. Level 1.

A rotary part of width p holds p/2 pairs; pair i is rotated by the angle position * f_i. ``rope_table`` gives
the cosines and sines, ``apply_rope`` rotates. Only products q·k matter to attention, so the order in which
the rotated numbers are written is free as long as q and k agree: here every number stays in its place. The
latent cache of Transformers' ``apply_rotary_pos_emb_interleave`` holds the same numbers in another order (the
pairs taken apart into halves), so a cache filled there must not be read with a query rotated here.

Sources: RoFormer (arXiv:2104.09864) section 3.2; position interpolation (arXiv:2306.15595); dynamic NTK and
YaRN (arXiv:2309.00071) sections 3.1 to 3.4; LongRoPE (arXiv:2402.13753) section 3; Llama 3
(arXiv:2407.21783) section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mla.config import RopeConfig
from mla.errors import MLAError

#: (rope, base inverse frequencies f [p/2] in fp32, p, sequence length, longest trained length) -> f [p/2]
_Scaling = Callable[[RopeConfig, torch.Tensor, int, int, int | None], torch.Tensor]


def rope_table(
    rope: RopeConfig,
    dim: int,
    positions: torch.Tensor,
    *,
    seq_len: int | None = None,
    max_position_embeddings: int | None = None,
    log_frequency_scale: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotation angles, times the scaling's attention factor.

    Args:
        rope: layout (unused here), base and scaling.
        dim: p, the width of the rotary part; even.
        positions: integer positions, any shape ``[...]``.
        seq_len: length of the sequence so far, for the scalings that depend on it ("dynamic", "longrope");
            by default the largest position plus one.
        max_position_embeddings: the model's longest sequence; needed by "dynamic", and by "yarn" and
            "longrope" without a factor.
        log_frequency_scale: ``[p/2]``, logarithms of learned frequency factors (Mistral Large 4), or None.
        device: of the result; by default that of ``positions``.
        dtype: of the result. Angles are computed in fp32 whatever it is.

    Returns:
        (cos, sin), each ``[..., p/2]``.

    Raises:
        MLAError: odd ``dim``, a missing length, or factor lists of the wrong length.
    """
    if dim < 0 or dim % 2:
        raise MLAError(f"rotary dim: expected an even number, got {dim}")
    device = positions.device if device is None else torch.device(device)
    if seq_len is None:
        # Read off only where it matters: on an accelerator it waits for the device.
        needed = rope.rope_type in ("dynamic", "longrope") and positions.numel() > 0
        seq_len = int(positions.max()) + 1 if needed else 0
    frequencies = inverse_frequencies(
        rope, dim, seq_len=seq_len, max_position_embeddings=max_position_embeddings
    ).to(device)
    if log_frequency_scale is not None:
        frequencies = frequencies * log_frequency_scale.to(device, torch.float32).exp()
    angles = positions.to(device, torch.float32)[..., None] * frequencies
    scale = rope.attention_scaling(max_position_embeddings)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> torch.Tensor:
    """Rotates the pairs of ``x`` and leaves every number in its place.

    Args:
        x: ``[..., p]``, any floating dtype; the product is computed in the wider of its dtype and cos's.
        cos, sin: ``[..., p/2]`` from :func:`rope_table`, broadcastable to the pairs of ``x``: with
            x ``[b, h, s, p]`` and tables ``[b, s, p/2]`` pass ``cos[:, None]``.
        layout: "interleaved" pairs (2i, 2i+1), "half" pairs (i, i + p/2), "none" returns ``x``.

    Returns:
        ``[..., p]`` in the dtype of ``x``.

    Raises:
        MLAError: unknown layout, or tables whose width is not half that of ``x``.
    """
    if layout == "none":
        return x
    if layout not in ("interleaved", "half"):
        raise MLAError(f"RoPE layout: expected interleaved, half or none, got {layout!r}")
    p = x.shape[-1]
    if cos.shape[-1] * 2 != p or sin.shape != cos.shape:
        raise MLAError(
            f"RoPE tables: expected [..., {p // 2}] for x [..., {p}], got {list(cos.shape)} and "
            f"{list(sin.shape)}"
        )
    if layout == "interleaved":
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x[..., : p // 2], x[..., p // 2 :]
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    if layout == "interleaved":
        return torch.stack((rotated_first, rotated_second), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat((rotated_first, rotated_second), dim=-1).to(x.dtype)


def inverse_frequencies(
    rope: RopeConfig, dim: int, *, seq_len: int = 0, max_position_embeddings: int | None = None
) -> torch.Tensor:
    """Angle per position of every pair, ``[p/2]`` in fp32 on the CPU; arguments as in :func:`rope_table`."""
    base = _geometric(rope.theta, dim)
    return _SCALINGS[rope.rope_type](rope, base, dim, seq_len, max_position_embeddings)


def _geometric(theta: float, dim: int) -> torch.Tensor:
    """theta^(-2i/p) for the pairs i (RoFormer, equation 15)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / max(dim, 1)
    return torch.pow(theta, -exponents)


def _unscaled(
    rope: RopeConfig, base: torch.Tensor, dim: int, seq_len: int, longest: int | None
) -> torch.Tensor:
    return base


def _linear(
    rope: RopeConfig, base: torch.Tensor, dim: int, seq_len: int, longest: int | None
) -> torch.Tensor:
    return base / (rope.factor or 1.0)


def _dynamic(
    rope: RopeConfig, base: torch.Tensor, dim: int, seq_len: int, longest: int | None
) -> torch.Tensor:
    # NTK-aware: enlarge theta with the length, so that the slowest pair just fits the longer sequence.
    if longest is None:
        raise MLAError("rope_type 'dynamic' needs max_position_embeddings")
    assert rope.factor is not None
    length = max(seq_len, longest)
    growth = rope.factor * length / longest - (rope.factor - 1)
    # A single pair is the fastest one, which this scaling leaves alone.
    return _geometric(rope.theta * growth ** (dim / (dim - 2)), dim) if dim > 2 else base


def _yarn(rope: RopeConfig, base: torch.Tensor, dim: int, seq_len: int, longest: int | None) -> torch.Tensor:
    # Pairs that turn often within the original length keep their speed, those that turn less than once are
    # slowed by the whole factor, and a ramp over the pair index joins the two (NTK-by-parts).
    original = rope.original_max_position_embeddings
    assert original is not None

    def pair_with(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # A step instead of a ramp.
    pairs = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    ramp = ((pairs - low) / (high - low)).clamp(0, 1)
    return base / rope.scaling_factor(longest) * ramp + base * (1 - ramp)


def _longrope(
    rope: RopeConfig, base: torch.Tensor, dim: int, seq_len: int, longest: int | None
) -> torch.Tensor:
    original = rope.original_max_position_embeddings
    assert original is not None
    factors = rope.long_factor if seq_len > original else rope.short_factor
    if factors is None or len(factors) != dim // 2:
        raise MLAError(f"longrope: expected {dim // 2} factors, got {len(factors or ())}")
    return base / torch.tensor(factors, dtype=torch.float32, device="cpu")


def _llama3(
    rope: RopeConfig, base: torch.Tensor, dim: int, seq_len: int, longest: int | None
) -> torch.Tensor:
    # Like YaRN with the ramp taken over the number of turns within the original length.
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    assert original is not None
    assert low is not None
    assert high is not None
    turns = original * base / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return base * keep + base / (rope.factor or 1.0) * (1 - keep)


_SCALINGS: dict[str, _Scaling] = {
    "default": _unscaled,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    # Meant for heads that rotate a part only; MLA's rotary part is all of what it is given.
    "proportional": _linear,
}
