"""What is not attention in an absorbed model: its linear layers and experts, for few rows by the C++ kernel.

A decoded token reads the weights of all of them, and torch reads weights slowly (``mla.ops.linear``). Each
module gets a forward pass of its own, which hands on to its class, or to torch, what the kernel leaves.
"""

import warnings
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mla.ops import native
from mla.ops.linear import linear, takes
from mla.ops.norm import in_torch
from mla.ops.norm import takes as takes_norm


class Method:
    """``function(module, ...)`` as a method of one module alone, to be put into it.

    A bound method of no class could not be pickled, and functools.partial would hold the module, which holds
    it: neither would be freed, nor the weights, before Python looks for such circles.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.function = function
        self._module = weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self._module(), *args, **kwargs)

    def __reduce__(self) -> Any:
        return Method, (self.function, self._module())


def take_over(model: nn.Module, *, but: Collection[nn.Module] = ()) -> tuple[nn.Module, ...]:
    """Change the layers of a model in place; returns those that :func:`give_back` has to restore.

    Taken are torch's linear layers and experts of Transformers as they are: not subclasses, and none whose
    forward pass another library has replaced. Those in ``but`` stay.
    """
    changed = []
    for module in model.modules():
        forward = None if module in but else _forward_for(module)
        if forward is not None and ("forward" not in vars(module) or _has_ours(module)):
            module.forward = Method(forward, module)
            changed.append(module)
    return tuple(changed)


def give_back(modules: Iterable[nn.Module]) -> None:
    """Undo :func:`take_over`, except where another library has put a forward pass around ours since.

    That one stays, and ours in it, which computes the same: a hook may be what brings the weights to memory.
    """
    wrapped = 0
    for module in modules:
        if _has_ours(module):
            del module.forward
        elif "forward" in vars(module):
            wrapped += 1
    if wrapped:
        warnings.warn(
            f"{wrapped} layers keep their forward passes: another library has put its own around them since "
            "absorb(); to have Transformers' back, remove its hooks, then absorb() and restore() again",
            stacklevel=3,
        )


def _has_ours(module: nn.Module) -> bool:
    """Whether a module has a forward pass of this file, and nothing around it."""
    forward = vars(module).get("forward")
    return isinstance(forward, Method) and forward.function in (_linear, _norm, _experts)


def _forward_for(module: nn.Module) -> Any:
    if type(module) is nn.Linear:
        return _linear
    if _is_rms_norm(module):
        return _norm
    if _are_experts(module):
        return _experts
    return None


def _is_rms_norm(module: Any) -> bool:
    """Whether a module is an RMSNorm like ours: its class is asked, on a row of numbers.

    Many have the name, and count their weight from 1, or subtract the mean.
    """
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or weight.device.type != "cpu":
        return False
    x = torch.linspace(-2.0, 3.0, len(weight), dtype=torch.float32, device="cpu")[None].to(weight.dtype)
    with torch.no_grad():
        try:
            theirs = type(module).forward(module, x)
        except (TypeError, RuntimeError):  # it takes more than rows
            return False
        return torch.equal(theirs, in_torch(x, weight, module.variance_epsilon))


def _are_experts(module: Any) -> bool:
    """Whether a module holds gated experts [experts, 2·f, d] and [experts, d, f] that its class describes."""
    described = getattr(module, "has_gate", False) and not (
        module.has_bias or module.is_transposed or getattr(module, "has_post_expert_norm", False)
    )
    weights = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return described and all(isinstance(weight, nn.Parameter) and weight.ndim == 3 for weight in weights)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _norm(norm: Any, x: Tensor) -> Tensor:
    if takes_norm(x, norm.weight):
        return native.rms_norm(x, norm.weight, norm.variance_epsilon)
    out: Tensor = type(norm).forward(norm, x)
    return out


def _experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Tokens [tokens, d], the experts of each [tokens, k] and their shares [tokens, k] to [tokens, d]."""
    first_up, first_down = experts.gate_up_proj[0], experts.down_proj[0]
    one = hidden_states[:1]  # of many tokens an expert has few; one that has more is torch's
    suited = (
        takes(one, first_up)
        and takes(one, first_down)
        and not experts._is_expert_parallel
        and not torch.compiler.is_compiling()  # which experts are chosen is data
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )
    if not suited:
        out: Tensor = type(experts).forward(experts, hidden_states, top_k_index, top_k_weights)
        return out
    total = torch.zeros_like(hidden_states, dtype=torch.float32)
    for expert in sorted(set(top_k_index.flatten().tolist())):
        tokens, places = torch.where(top_k_index == expert)
        made = linear(hidden_states[tokens], experts.gate_up_proj[expert])
        made = linear(experts._apply_gate(made), experts.down_proj[expert])
        total.index_add_(0, tokens, made * top_k_weights[tokens, places, None].float())
    return total.to(hidden_states.dtype)
