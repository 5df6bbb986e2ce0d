"""The number formats in which a checkpoint stores its weights, as its config.json tells, and their bytes."""

from __future__ import annotations

import re
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
#: Keys of a ``quantization_config`` that list modules which are not quantised.
_LEFT_OUT = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "llm_int8_skip_modules")
#: A whole attention in such a list, or its output projection: "model.layers.*.self_attn", "re:.*self_attn.*".
_ATTENTION = re.compile(r"(attention|(?<!linear_)attn)(\.o_proj)?[.*$]*$")
#: Parts that weigh something, and names in such a list that do not or belong to no language model.
_HEAVY = re.compile(r"lm_head|embed|self_attn|linear_attn|attention|shared_experts?(?!_gate)")
_LIGHT = re.compile(r"norm|conv1d|vision|visual|audio")


def stored_formats(raw: Raw, text: Raw, *, layers: int, experts: bool, notes: list[str]) -> tuple[str, str]:
    """Formats of the routed experts and of all other weights: each a name of :data:`WEIGHT_BYTES`.

    For weights of a format that has no name there: what the config.json says of them. The two differ where a
    model with experts leaves every attention unquantised; ``notes`` tell of other parts that are.

    Args:
        raw: the config.json. ``text``: its part about the language model.
        layers: of the model. ``experts``: whether it has routed ones.
    """
    quantised = raw.get("quantization_config") or text.get("quantization_config")
    if not quantised:
        return (_dtype(raw, text),) * 2
    stated = quantised if isinstance(quantised, Mapping) else {"quant_method": quantised}
    found = _quantised(stated) or _described(stated)
    left_out = _left_out(stated)
    if experts and _leaves_attention(left_out, layers):
        return found, _dtype(raw, text)
    if heavy := sorted({match[0] for name in left_out if (match := _HEAVY.search(name))}):
        notes.append(
            f"The checkpoint leaves modules unquantised ({', '.join(heavy)}); all weights are counted in one "
            "format, so they weigh more than is said here."
        )
    return found, found


def _left_out(stated: Raw) -> list[str]:
    """Names and patterns of the modules that a ``quantization_config`` leaves as they are."""
    inner = stated.get("quantization")
    places = (stated, inner if isinstance(inner, Mapping) else {})
    lists = [place[key] for place in places for key in _LEFT_OUT if isinstance(place.get(key), list | tuple)]
    names = [name for names in lists for name in names if isinstance(name, str)]
    return [name for name in names if not _LIGHT.search(name)]


def _leaves_attention(left_out: list[str], layers: int) -> bool:
    """Whether the attention of every layer stands in a list, by a pattern or one by one."""
    names = [name for name in left_out if _ATTENTION.search(name)]
    numbers = [re.search(r"\.(\d+)\.", name) for name in names]
    return None in numbers or len({number[1] for number in numbers if number}) >= layers


def _dtype(raw: Raw, text: Raw) -> str:
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
