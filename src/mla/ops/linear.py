"""Linear layers as decoding needs them: for few rows by the C++ kernel, else torch's own."""

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear as torch_linear

from mla.ops import arguments, direct, native

#: Rows up to which the kernel is about as fast as torch's product or faster, by dtype
#: (docs/performance-experiments.md). In bf16 with AMX that is as far as reading the weight is all that it
#: costs.
FEW_ROWS = {torch.float32: 64, torch.bfloat16: 8 if torch.cpu._is_amx_tile_supported() else 64}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: x [..., k], weight [n, k], bias [n] to [..., n].

    With the kernel, a bias is added to the product as it is in the dtype of ``x``.
    """
    if not takes(x, weight, bias):
        return torch_linear(x, weight, bias)
    # The dispatcher costs as much as the product of a small layer.
    alone = not direct.is_followed() and direct.is_plain(x) and direct.is_plain(weight)
    if alone and not torch._C._autograd._profiler_enabled():  # a profile should name the operator
        out = native.compute_linear(x, weight)
    else:
        out = native.linear(x, weight)
    return out if bias is None else out.add_(bias)


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the kernel computes this: few rows on a CPU, no derivatives wanted, no other dtype."""
    return (
        direct.USED
        and x.dtype in FEW_ROWS
        and arguments.holds(x.numel() <= FEW_ROWS[x.dtype] * x.shape[-1])
        and x.is_cpu
        and weight.ndim == 2
        and _goes_with(x, weight)
        and (bias is None or _goes_with(x, bias))
        and x.layout is weight.layout is torch.strided
        and arguments.has_rows(weight)
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not arguments.forward_mode()
        and not torch.is_autocast_enabled("cpu")
    )


def _goes_with(x: Tensor, parameter: Tensor) -> bool:
    return (
        type(parameter) in (Parameter, Tensor)
        and parameter.dtype == x.dtype
        and parameter.is_cpu
        and not (torch.is_grad_enabled() and parameter.requires_grad)
    )
