"""Multi-head Latent Attention, stated once: expanded and absorbed, in fp32 or fp64, slow and plain.

Every faster path of this package is tested against these two functions, and they against each other.
Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1 and appendix C.

Shapes, here and everywhere in ``mla.ops``: b batch, s query tokens, t key tokens, h heads, n nope dim,
r latent rank, p rope dim, v value dim. RoPE has been applied to ``q_rope`` and ``k_rope`` by the caller.
"""

import torch
from torch import Tensor


def expanded(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as the paper defines it: rebuild every head's keys and values from the latents ("MHA mode").

    Args:
        q_nope: [b, s, h, n] queries without position.
        q_rope: [b, s, h, p] rotated queries.
        c_kv: [b, t, r] latents, after the latent norm.
        k_rope: [b, t, p] the rotated key that all heads share.
        w_uk: [h, n, r] up-projection of keys.
        w_uv: [h, v, r] up-projection of values.
        scale: factor on the scores before the softmax; never derived from a tensor's width here.
        causal: the s queries are the last s of the t keys, and each sees no key after itself.
        mask: broadcastable to [b, h, s, t]; bool (True attends) or floating (added to the scaled scores).
        sinks: [h] one more logit per head that takes part in the softmax and has no value.

    Returns:
        out [b, s, h, v] and lse [b, s, h], the natural log-sum-exp of the scaled, masked scores without
        the sink. A query that sees no key gives out = 0 and lse = -inf. Both in fp32, or fp64 for fp64 input.
    """
    q_nope, q_rope, c_kv, k_rope, w_uk, w_uv = _upcast(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv)
    k_nope = torch.einsum("btr,hnr->bthn", c_kv, w_uk)
    value = torch.einsum("btr,hvr->bthv", c_kv, w_uv)
    scores = torch.einsum("bshn,bthn->bhst", q_nope, k_nope) + torch.einsum("bshp,btp->bhst", q_rope, k_rope)
    probs, lse = _softmax(scores * scale, causal, mask, sinks)
    return torch.einsum("bhst,bthv->bshv", probs, value), lse


def absorbed(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same attention with ``w_uk`` moved into the queries and ``w_uv`` behind the sum ("MQA mode").

    Nothing of the size of the keys and values is built; arguments and results as for :func:`expanded`.
    """
    q_nope, q_rope, c_kv, k_rope, w_uk, w_uv = _upcast(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv)
    q_latent = torch.einsum("bshn,hnr->bshr", q_nope, w_uk)
    scores = torch.einsum("bshr,btr->bhst", q_latent, c_kv) + torch.einsum("bshp,btp->bhst", q_rope, k_rope)
    probs, lse = _softmax(scores * scale, causal, mask, sinks)
    out_latent = torch.einsum("bhst,btr->bshr", probs, c_kv)
    return torch.einsum("bshr,hvr->bshv", out_latent, w_uv), lse


def _upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(dtype) for x in tensors)


def _softmax(
    scores: Tensor, causal: bool, mask: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    s, t = scores.shape[-2:]
    if causal:
        hidden = torch.ones(s, t, dtype=torch.bool, device=scores.device).triu(t - s + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if mask is not None:
        hides = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if hides else scores + mask.to(scores.dtype)
    lse = torch.logsumexp(scores, dim=-1)  # [b, h, s]
    total = lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    probs = torch.exp(scores - total.masked_fill(total == -torch.inf, 0.0)[..., None])
    return probs, lse.transpose(1, 2)
