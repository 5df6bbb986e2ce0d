"""RMSNorm as DeepSeek's checkpoints were trained with it: one kernel in place of six operators."""

import torch
from torch import Tensor

from mla.ops import arguments, direct, native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / sqrt(mean(x²) + eps) over the last dimension.

    fp32 inside, rounded to the dtype of ``x``, then scaled; fp64 stays fp64.

    Args:
        x: [..., k], floating.
        weight: [k].
        eps: added to the mean square.

    Returns:
        [..., k] in the dtype of ``x``.
    """
    if takes(x, weight):
        return native.rms_norm(x, weight, eps)
    return in_torch(x, weight, eps)


def in_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same by torch's operators, with derivatives."""
    precise = x if x.dtype == torch.float64 else x.float()
    normed = precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + eps)
    # Under autocast the weight is wider than the activations; the result must not widen with it.
    return (weight * normed.to(x.dtype)).to(x.dtype)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes this."""
    return (
        direct.USED
        and not direct.is_followed()
        and x.dtype in arguments.QUERY_DTYPES
        and weight.dtype == x.dtype
        and direct.is_plain(x)
        and direct.is_plain(weight)
        and weight.shape == x.shape[-1:]
        and weight.is_contiguous()
        and not arguments.needs_grad(x, weight)
    )
