"""Linear layers as decoding needs them: for few rows by the C++ kernel, else torch's own."""

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear as torch_linear

from mla.ops import arguments, native

#: Rows up to which the kernel is about as fast as torch's product or faster, by dtype (docs/performance.md).
#: In bf16 with AMX that is as far as reading the weight is all that it costs.
FEW_ROWS = {torch.float32: 64, torch.bfloat16: 8 if torch.cpu._is_amx_tile_supported() else 64}
# The generic kernel was not measured against torch on the processors that have no other, those of ARM.
USED = native.best() not in (None, "generic")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: x [..., k], weight [n, k], bias [n] to [..., n].

    With the kernel, a bias is added to the product as it is in the dtype of ``x``.
    """
    if not takes(x, weight, bias):
        return torch_linear(x, weight, bias)
    # The dispatcher costs as much as the product of a small layer.
    direct = not _is_followed() and _is_plain(x) and _is_plain(weight)
    out = native.compute_linear(x, weight) if direct else native.linear(x, weight)
    return out if bias is None else out.add_(bias)


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the kernel computes this: few rows on a CPU, no derivatives wanted, no other dtype."""
    return (
        USED
        and x.dtype in FEW_ROWS
        and x.numel() <= FEW_ROWS[x.dtype] * x.shape[-1]
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


def _keys(*names: str) -> int:
    found = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        found = found | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return found.raw_repr()


# What torch looks for by itself in every call of an operator, and in every tensor on a CPU.
_ALWAYS = _keys("BackendSelect", "ADInplaceOrView")
_PLAIN = _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")


def _is_followed() -> bool:
    """Whether anybody wants to see operators: a compiler or tracer, a mode, torch.func, a profiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._dispatch_tls_local_include_set().raw_repr() & ~_ALWAYS != 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._autograd._profiler_enabled()
    )


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor's numbers lie where it says: no wrapper of others, none with a sign to be turned."""
    return torch._C._dispatch_keys(x).raw_repr() & ~_PLAIN == 0


def _goes_with(x: Tensor, parameter: Tensor) -> bool:
    return (
        type(parameter) in (Parameter, Tensor)
        and parameter.dtype == x.dtype
        and parameter.is_cpu
        and not (torch.is_grad_enabled() and parameter.requires_grad)
    )
