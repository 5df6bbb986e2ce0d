"""From what the user asks for (a fraction, a rank, a rotary width) to the three numbers of the target."""

from __future__ import annotations

from dataclasses import dataclass

from mla.errors import MLAError


@dataclass(frozen=True)
class Budget:
    """Latent rank r, rotary width p (even) and rotary base θ' of the student; r + p numbers are cached."""

    rank: int
    rope: int
    theta: float


def choose_budget(
    *,
    cache: float | None,
    rank: int | None,
    rope: int | None,
    groups: int,
    head_dim: int,
    hidden: int,
    theta: float,
) -> Budget:
    """Settle r, p and θ'.

    The rotary width: three quarters of d at half the cache, shrinking as the cache to the power 4/5 down to a
    quarter, and d where one key-value head leaves room for all of it (then the conversion is exact). The
    ladder: θ' = θ^(p/d), which makes the slots the teacher's p/2 fastest frequencies exactly; beyond d the
    ladder is denser instead, below d/2 it stays at √θ, so that few slots still reach the middle frequencies.
    Slow pairs hardly turn within a window and lose little without RoPE (measured in
    docs/conversion-experiments.md).

    Args:
        cache: fraction of the original 2·G·d numbers per token and layer, in (0, 1].
        rank: latent rank, instead of or with ``rope``.
        rope: rotary width, even, at most 2·d.
        groups: key-value heads G. ``head_dim``: d. ``hidden``: model width. ``theta``: the teacher's base.

    Returns:
        The budget.

    Raises:
        MLAError: a combination that makes no sense, or a cache larger than the original's.
    """
    full = 2 * groups * head_dim
    if cache is None and rank is None and rope is None:
        raise MLAError("say how large the cache may be: cache (a fraction), or rank and/or rope")
    if cache is not None and rank is not None and rope is not None:
        raise MLAError("give cache, or rank and rope, not all three: they would have to agree")
    if cache is not None and not 0 < cache <= 1:
        raise MLAError(f"cache is a fraction of the original cache in (0, 1], got {cache}")
    if rank is not None and rank < 1:
        raise MLAError(f"rank must be at least 1, got {rank}")
    if rope is not None and (rope < 2 or rope % 2 or rope > 2 * head_dim):
        raise MLAError(
            f"rope must be even and between 2 and {2 * head_dim} (twice the head width), got {rope}"
        )

    total = None if cache is None else round(cache * full)
    rope_given = rope is not None or rank is not None
    if rope is None:
        if total is not None and rank is not None:
            rope = total - rank
            if rope < 2 or rope % 2 or rope > 2 * head_dim:
                raise MLAError(
                    f"cache {cache} is {total} numbers, rank {rank} leaves {rope} for rope: "
                    f"expected an even number between 2 and {2 * head_dim}"
                )
        else:
            wanted = (total if total is not None else rank or full) / full
            rope = _rule(wanted, groups, head_dim)
    if rank is None:
        rank = (total if total is not None else max(full // 2, rope + head_dim)) - rope
    most = min(hidden, full)
    if rank < 1:
        raise MLAError(
            f"cache {cache} is {total} numbers per token, which leaves no latent beside rope {rope}; "
            f"expected a fraction of at least {(rope + 1) / full:.3f}"
        )
    if total is None and rank + rope > full:
        raise MLAError(
            f"rank {rank} and rope {rope} are {rank + rope} numbers per token and layer, more than the "
            f"original's {full}: expected a smaller cache"
        )
    if rank > most and total is not None and not rope_given:
        # A latent as wide as what it encodes loses nothing: the rest of the budget goes to the rotation.
        rope = min(2 * head_dim, rope + (rank - most) // 2 * 2)
    return Budget(
        rank=rank if total is None else min(rank, most),
        rope=rope,
        theta=theta ** min(1.0, max(0.5, rope / head_dim)),
    )


def _rule(fraction: float, groups: int, head_dim: int) -> int:
    if groups == 1 and fraction >= 1:
        return head_dim
    share = min(1.0, max(0.25, 0.75 * (2 * fraction) ** 0.8))
    room = int(fraction * 2 * groups * head_dim) // 2
    return max(2, min(int(share * head_dim), room) // 2 * 2)
