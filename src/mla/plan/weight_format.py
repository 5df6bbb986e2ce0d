"""The number format in which a checkpoint stores its weights, as its config.json tells, and its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Raw = Mapping[str, Any]
#: Bytes of one weight with its share of the scales: int4 a 16-bit one for every 32 weights, mxfp4 8 bits for
#: 32, nvfp4 8 bits for 16.
WEIGHT_BYTES: Mapping[str, float] = MappingProxyType(
    {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1, "int4": 0.5625, "mxfp4": 0.53125, "nvfp4": 0.5625}
)
_DTYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
    "None": "bf16",
}
#: What ``quant_method``, ModelOpt's ``quant_algo`` or Quanto's ``weights`` mean, in lower case.
_METHODS = {
    **dict.fromkeys(
        ("fp8", "fbgemm_fp8", "mxfp8", "fp8_pb_wo", "fp8_per_channel_per_token", "float8"), "fp8"
    ),
    **dict.fromkeys(("int8", "eetq", "w8a8_sq_per_channel", "w8a16"), "int8"),
    **dict.fromkeys(("int4", "int4_awq", "w4a16", "w4a16_awq", "w4a8_awq"), "int4"),
    **dict.fromkeys(("nvfp4", "nvfp4_awq", "w4a16_nvfp4"), "nvfp4"),
    "mxfp4": "mxfp4",
}
#: ``weights`` of one of ``config_groups``: bits, kind of number, and weights per scale where that decides.
_GROUPS = {
    "8 float": "fp8",
    "8 int": "int8",
    "4 int": "int4",
    "4 float 32": "mxfp4",
    "4 float 16": "nvfp4",
}


def stored_format(raw: Raw, text: Raw) -> str:
    """A name of :data:`WEIGHT_BYTES`; for weights of another format what the config.json says of them.

    Args:
        raw: the config.json. ``text``: its part about the language model.
    """
    quantised = raw.get("quantization_config") or text.get("quantization_config")
    if quantised:
        stated = quantised if isinstance(quantised, Mapping) else {"quant_method": quantised}
        return _quantised(stated) or _described(stated)
    places = (text.get("torch_dtype"), text.get("dtype"), raw.get("torch_dtype"), raw.get("dtype"))
    dtype = str(next((place for place in places if place is not None), None)).removeprefix("torch.")
    return _DTYPES.get(dtype, f"dtype {dtype!r}")


def _quantised(stated: Raw) -> str | None:
    """The format of a ``quantization_config``, None for one that is mixed or unknown."""
    groups = stated.get("config_groups")
    if isinstance(groups, Mapping) and groups:
        found = {_group(group) for group in groups.values()}
        return found.pop() if len(found) == 1 else None
    for bits in (4, 8):
        if stated.get(f"load_in_{bits}bit") or stated.get(f"_load_in_{bits}bit"):
            return f"int{bits}"
    inner = stated.get("quantization")
    algorithm = stated.get("quant_algo") or (inner.get("quant_algo") if isinstance(inner, Mapping) else None)
    method = str(algorithm or stated.get("weights") or stated.get("quant_method")).lower()
    if stated.get("bits") in (4, 8) and method not in _METHODS:
        return f"int{stated['bits']}"
    return _METHODS.get(method)


def _group(group: Any) -> str | None:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    number = f"{weights.get('num_bits')} {weights.get('type')}"
    return _GROUPS.get(f"{number} {weights.get('group_size')}" if number == "4 float" else number)


def _described(stated: Raw) -> str:
    said = [f"{key} {stated[key]!r}" for key in ("quant_method", "quant_algo", "bits") if stated.get(key)]
    return ", ".join(said) or "a quantization_config without quant_method"
