"""Which layers of a model without latents see every token, which a window, and which keep a fixed state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mla.errors import MLAError
from mla.families import LAYER_PATTERNS
from mla.reading import expect_list, integer

Raw = Mapping[str, Any]
Rule = Callable[[Raw, int], Sequence[str]]
KINDS = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
#: Keys of attentions that the planner's columns cannot hold: other widths, heads or contexts in some layers,
#: none, shared ones, sparse ones, or ones beside another kind of layer.
_STRANGE = (
    "_block_types",
    "attn_layer_indices",
    "block_types",
    "cross_attention_layers",
    "global_head_dim",
    "index_head_dim",
    "layer_group_size",
    "mamba_d_ssm",
    "num_global_key_value_heads",
    "num_key_value_heads_per_layer",
    "sparse_attention_config",
    "swa_head_dim",
    "swa_num_key_value_heads",
    "use_cla",
)


def _every(step: int, key: str | None = None, *, others: str = "sliding_attention") -> Rule:
    """Each ``step``-th layer sees everything, or as many as the config.json says under ``key``."""

    def rule(full: Raw, layers: int) -> Sequence[str]:
        every = step if key is None else integer(full, key, least=1, default=step)
        return [others if (i + 1) % every else "full_attention" for i in range(layers)]

    return rule


def _all(full: Raw, layers: int) -> Sequence[str]:
    return ["sliding_attention"] * layers


def _deep(first: int) -> Rule:
    """Windows from the ``max_window_layers``-th layer on."""

    def rule(full: Raw, layers: int) -> Sequence[str]:
        start = integer(full, "max_window_layers", default=first)
        return ["full_attention" if i < start else "sliding_attention" for i in range(layers)]

    return rule


def _llama4(full: Raw, layers: int) -> Sequence[str]:
    rotated = full.get("no_rope_layers")
    if not rotated:
        return _every(4, "no_rope_layer_interval", others="chunked_attention")(full, layers)
    rotated = expect_list("no_rope_layers", rotated, least=layers)
    return ["chunked_attention" if flag else "full_attention" for flag in rotated[:layers]]


_GEMMA3 = _every(6, "sliding_window_pattern")
_QWEN_NEXT = _every(4, "full_attention_interval", others="linear_attention")
#: Kinds of the layers where a config.json has no ``layer_types``, by model_type; source: configuration_*.py
#: of Transformers 5.23. A test compares them with the classes.
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "afmoe": _every(4, "global_attn_every_n_layers"),
        "cohere2": _every(4, "sliding_window_pattern"),
        "exaone4": _every(4, "sliding_window_pattern"),
        "gemma2": _every(2),
        "gemma3": _GEMMA3,
        "gemma3_text": _GEMMA3,
        "gpt_oss": _every(2),
        "llama4": _llama4,
        "llama4_text": _llama4,
        "ministral": _all,
        "ministral3": _all,
        "mistral": _all,
        "mixtral": _all,
        "olmo3": _every(4),
        "phi3": _all,
        "phi4_multimodal": _all,
        "phimoe": _all,
        "qwen2": _deep(28),
        "qwen2_5_vl_text": _deep(80),
        "qwen2_vl_text": _deep(80),
        "qwen3": _deep(28),
        "qwen3_5": _QWEN_NEXT,
        "qwen3_5_moe": _QWEN_NEXT,
        "qwen3_5_moe_text": _QWEN_NEXT,
        "qwen3_5_text": _QWEN_NEXT,
        "qwen3_moe": _all,
        "qwen3_next": _QWEN_NEXT,
        "starcoder2": _all,
        "vaultgemma": _every(2),
    }
)
#: Keys of LAYER_PATTERNS that the rules above read, or their classes have without using them.
_READ = {
    "attention_chunk_size": ("llama4", "llama4_text"),
    "full_attention_interval": ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    "global_attn_every_n_layers": ("afmoe",),
    "sliding_window_pattern": ("cohere2", "exaone4", "gemma3", "gemma3_text"),
}


def windows(full: Raw, notes: list[str]) -> list[int | None]:
    """For every layer the tokens that a query sees, 0 for all of them; None: a linear layer of fixed state.

    Args:
        full: the text part of a config.json with the defaults of its class.
        notes: what a reader must know is added.

    Raises:
        MLAError: layers that differ in a way no rule knows.
    """
    model_type = str(full.get("model_type"))
    _refuse_strange(full, model_type)
    layers = integer(full, "num_hidden_layers", least=1)
    # Qwen's classes forget the window unless told to use it.
    used = full.get("use_sliding_window", not model_type.startswith("qwen"))
    window = integer(full, "sliding_window", default=0) if used else 0
    kinds = full.get("layer_types")
    if kinds is None and model_type in RULES:
        kinds = RULES[model_type](full, layers)
    elif kinds is None:
        if window:
            raise MLAError(
                f"sliding_window: config.json does not say which layers of model_type {model_type!r} have "
                f"it; add layer_types ({', '.join(KINDS)}: one for each layer), or make it null for none"
            )
        kinds = ["full_attention"] * layers
    elif used and not window and "sliding_attention" in kinds:
        raise MLAError("layer_types has sliding_attention: expected sliding_window in tokens, got none")
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or len(kinds) < layers:
        raise MLAError(
            f"layer_types: expected {layers} of {', '.join(KINDS)}, got {len(kinds)}"
            + (f" with {', '.join(unknown)}" if unknown else "")
        )
    sizes: dict[str, int | None] = {
        "full_attention": 0,
        "sliding_attention": window,
        "linear_attention": None,
    }
    if "chunked_attention" in kinds:
        chunk = integer(full, "attention_chunk_size", least=1)
        sizes["chunked_attention"] = chunk
        notes.append(
            f"Chunks of {chunk:,} tokens are counted as windows: that many at most does a query see."
        )
    return [sizes[kind] for kind in kinds[:layers]]


def _refuse_strange(full: Raw, model_type: str) -> None:
    for key in (*LAYER_PATTERNS, *_STRANGE):
        value = full.get(key)
        # In MiniMax's list, 1 is softmax attention.
        plain = key == "attn_type_list" and isinstance(value, list) and set(map(str, value)) == {"1"}
        plain = plain or (key == "layer_group_size" and value == 1)
        if value and not plain and model_type not in _READ.get(key, ()):
            raise MLAError(
                f"{key}: the planner does not know what layers of {model_type!r} see and store by it; "
                "it can plan a copy of config.json without it, with layer_types where they differ "
                f"({', '.join(KINDS)}: one for each layer)"
            )
