"""The layers around the attention: norms and projections."""

import torch
from torch import Tensor, nn

from mla.ops.linear import linear


class Linear(nn.Linear):
    """torch's linear layer, which for few rows, as in decoding, is computed by the C++ kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension: fp32 inside, rounded to the input's dtype, then scaled.

    ``torch.nn.RMSNorm`` rounds once, after the scaling: in bf16 that is another number than the one that
    DeepSeek's checkpoints were trained with. fp64 input stays fp64.

    Args:
        size: width of the last dimension.
        eps: added to the mean square.
        device, dtype: of the weight [size].
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All weights one; what torch calls after ``to_empty``."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to [..., size], in the dtype of ``x``."""
        precise = x if x.dtype == torch.float64 else x.float()
        normed = precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + self.eps)
        # Under autocast the weight is wider than the activations; the result must not widen with it.
        return (self.weight * normed.to(x.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
