"""The layers around the attention: norms and projections."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mla.errors import MLAError
from mla.ops.linear import linear
from mla.ops.norm import rms_norm


class Linear(nn.Linear):
    """torch's linear layer, which for few rows, as in decoding, is computed by the C++ kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return linear(x, self.weight, self.bias)


def check_weight_says_all(name: str, projection: Any) -> None:
    """Refuse a projection that is more than its weight, which attention takes without ever calling it.

    Args:
        name: what the message calls it.
        projection: any module.

    Raises:
        MLAError: an adapter, a forward pass of its own (a subclass's, or one put into this layer alone), a
            bias, hooks, or a weight that is quantised or sharded.
    """
    # A subclass may add what computes the weight (parametrisations), not what is done with it.
    plain = isinstance(projection, nn.Linear) and _forward(projection) in (nn.Linear.forward, Linear.forward)
    if not plain or projection.bias is not None:
        kind = type(projection)
        came = kind.__name__ if plain else f"{kind.__module__}.{kind.__name__}"  # many are called Linear
        raise MLAError(
            f"{name}: expected a plain linear layer without bias, which is used by its weight, got {came}"
            f"{' with a bias' if plain else ''}; merge an adapter (merge_and_unload) or leave this layer out "
            "of it (exclude_modules), or load the layer unquantised"
        )
    weight = projection.weight
    shape = (projection.out_features, projection.in_features)
    # Quantised and sharded tensors say that they are floating, and hold something else, or nothing.
    if not weight.is_floating_point() or is_traceable_wrapper_subclass(weight) or weight.shape != shape:
        raise MLAError(
            f"{name}: expected a plain floating-point weight of shape {shape}, got {type(weight).__name__} "
            f"of {weight.dtype} {tuple(weight.shape)}; load this layer unquantised and whole"
        )
    if projection._forward_pre_hooks or projection._forward_hooks:
        # Pruning and torch's old weight_norm make the weight in one.
        raise MLAError(
            f"{name}: expected a layer without hooks, for it is never called, got some; make what they do "
            "permanent (torch.nn.utils.prune.remove, remove_weight_norm) or remove them"
        )


def _forward(layer: nn.Module) -> Any:
    """The forward pass that a layer has, without the hook of accelerate, which only moves tensors."""
    own = vars(layer)
    replaced = own.get("_old_forward" if "_hf_hook" in own else "forward")
    return type(layer).forward if replaced is None else getattr(replaced, "__func__", replaced)


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
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
