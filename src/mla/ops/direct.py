"""When a kernel may be called past torch's dispatcher, which costs as much as the work on a single token.

Only where nobody would notice: no compiler, tracer or mode follows operators, no derivative is wanted, and
the numbers of every tensor lie where it says.
"""

import torch
from torch import Tensor

from mla.ops import native

#: Whether kernels take the place of torch's operators that are not attention. The generic kernels were not
#: measured against torch on the processors that have no others, those of ARM.
USED = native.best() not in (None, "generic")


def _keys(*names: str) -> int:
    found = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        found = found | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return found.raw_repr()


# What torch looks for by itself in every call of an operator, and in every tensor on a CPU.
_ALWAYS = _keys("BackendSelect", "ADInplaceOrView")
_PLAIN = _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")


def is_followed() -> bool:
    """Whether code wants to see operators: a compiler, a tracer, a mode, torch.func. A profiler is none."""
    return (
        torch.compiler.is_compiling()
        or torch._C._dispatch_tls_local_include_set().raw_repr() & ~_ALWAYS != 0
        or torch._C._is_torch_function_mode_enabled()
    )


def is_plain(x: Tensor) -> bool:
    """Whether a tensor's numbers lie on the CPU where it says: no wrapper, no sign that is to be turned."""
    return torch._C._dispatch_keys(x).raw_repr() & ~_PLAIN == 0
