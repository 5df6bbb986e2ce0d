"""The RoPE scaling of a GGUF file. Transformers' reader drops it, and the model would be another one.

llama.cpp writes Llama 3.1's scaling as a tensor of divisors, one for every frequency, and any other as keys.
Of the divisors the dictionary that Transformers wants is found again where it is the usual one, and taken
where it gives the file's frequencies exactly. Everything else is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mla.errors import MLAError

# What Llama 3.1, 3.2, 3.3 and their kin have; only the factor differs.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Divisors of the frequencies: Llama 3.1's, and Phi-3's for short and for long texts.
_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def restore_scaling(file: Path, config: Any) -> None:
    """Give ``config`` the RoPE scaling that the file holds and Transformers has left out.

    Args:
        file: the .gguf file.
        config: what Transformers has read of it; changed.

    Raises:
        MLAError: a scaling that cannot be said in ``config`` exactly.
    """
    from gguf import GGUFReader

    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default":
        return  # no rotation, or one that Transformers has read with its scaling
    reader = GGUFReader(file)
    divisors = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name in _TENSORS}
    kind = _scaling_keys(
        {name: field.contents() for name, field in reader.fields.items() if ".rope." in name}
    )
    if not divisors and kind is None:
        return
    scaled = None
    if list(divisors) == [_TENSORS[0]] and kind is None:
        scaled = _llama3(config, torch.tensor(divisors[_TENSORS[0]]).float().flatten())
    if scaled is None:
        found = ", ".join([*divisors, *([] if kind is None else [kind])])
        raise MLAError(
            f"{file}: its RoPE scaling ({found}) is not Llama 3.1's, the only one that can be read from a "
            "GGUF file: take the original model, a folder with config.json and safetensors"
        )
    config.rope_parameters = scaled


def _scaling_keys(keys: dict[str, Any]) -> str | None:
    """What the file's keys scale RoPE by, None where nothing; llama.cpp's defaults are linear and 1."""
    ends = {name.partition(".rope.")[2]: value for name, value in keys.items()}
    factor = ends.get("scaling.factor", ends.get("scale_linear", 1.0))
    kind = ends.get("scaling.type", "linear")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    return f"{kind}, factor {factor:g}"


def _llama3(config: Any, divisors: Tensor) -> dict[str, Any] | None:
    """The ``rope_parameters`` that divide the frequencies so; None where the usual ones do not."""
    plain = config.rope_parameters
    config.rope_parameters = {**plain, "rope_type": "llama3", **_LLAMA3, "factor": float(divisors.max())}
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    scaled, config.rope_parameters = config.rope_parameters, plain
    theta, count = float(plain["rope_theta"]), len(frequencies)
    if len(divisors) != count:
        return None
    wanted = theta ** -(torch.arange(count, dtype=torch.float64) / count) / divisors.double()
    # Both are computed in fp32, in which they lie a few roundings apart.
    return scaled if torch.allclose(frequencies.double(), wanted, rtol=1e-6, atol=0) else None
