"""Linear layers of MLA models in vLLM: for few rows by our kernel, on weights as they lie.

vLLM packs weights for oneDNN and drops them. A decoded token reads all of them, and the kernel reads plain
ones faster than oneDNN packed ones. Products of many rows are torch's, which packs as it goes: no second copy
is held.
"""

from typing import Any

import torch
from torch.nn.functional import linear as torch_linear

from mla.ops import arguments
from mla.ops.direct import USED
from mla.ops.linear import FEW_ROWS, linear

# With AMX a packed weight serves many rows much faster, and few rows were not compared.
_DTYPES = {dtype for dtype in FEW_ROWS if USED and not torch.cpu._is_amx_tile_supported()}


def with_plain_weights(original: Any) -> Any:
    """vLLM's choice of a product for a layer, which leaves the weights of MLA models as they are."""
    from vllm.config import get_current_vllm_config

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight
        suited = weight.ndim == 2 and weight.dtype in _DTYPES and weight.is_cpu and arguments.has_rows(weight)
        if not suited or not get_current_vllm_config().model_config.use_mla:
            original(layer, remove_weight)
            return
        # Not vLLM's own class of parameters, which have done their work when the weights are loaded.
        layer.weight = torch.nn.Parameter(weight.data, requires_grad=False)
        layer.cpu_linear = _product

    return dispatch_cpu_unquantized_gemm


def _product(x: Any, weight: Any, bias: Any) -> Any:
    compiling = torch.compiler.is_compiling()
    return torch.ops.mla.layer.default(x, weight, bias) if compiling else linear(x, weight, bias)


# An operator, because the number of rows is not known where vLLM compiles a model.
_library: Any = torch.library.Library("mla", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("layer(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("layer", linear, "CPU")
torch.library.register_fake("mla::layer", torch_linear)
