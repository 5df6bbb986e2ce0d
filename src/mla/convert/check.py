"""Which models can be stored as the target checkpoint, and why not the others. Looks at the config only."""

from __future__ import annotations

from typing import Any

from mla.convert.checkpoint import head_dim
from mla.errors import MLAError

_LLAMA_LIKE = {"llama", "mistral", "qwen2"}

# What fixes each pair's frequency once and for all, and leaves the fast ones alone. The target has the plain
# ladder; its slots meet the slowed pairs where they fit best (rope_split.py).
_ROPES = {"default", "llama3"}

# Why a family that people will try cannot be stored, by model_type.
_QK_NORM = "its QK-norm normalises every key after projection, which no shared latent can absorb"
_WRAPPER = (
    "it reads more than text; its language model alone can be converted, if that is of type llama, mistral "
    "or qwen2 and saved by itself"
)
_OTHER_TEXT = "it reads more than text, and its language model is of a type of its own"
_EXPERTS = "its feed-forward layers are experts, and what is written is a dense model"
_SCALED = "its multipliers on embeddings, residuals and logits have no place in the target"
_REASONS = {
    "qwen3": _QK_NORM,
    "gemma3_text": _QK_NORM,
    "olmo2": _QK_NORM,
    "olmo3": _QK_NORM,
    "qwen3_moe": f"{_QK_NORM}, and {_EXPERTS}",
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "granitemoe": f"{_EXPERTS}, and {_SCALED}",
    "gpt_oss": f"{_EXPERTS}, and its attention has sinks",
    "smollm3": "every fourth of its layers has no RoPE, and the target's rotary key is in every layer",
    "phi3": "its projections are fused (qkv_proj, gate_up_proj), which the converter does not take apart",
    "granite": _SCALED,
    "cohere": "its attention and feed-forward run side by side, and the target runs one after the other",
    "gemma": "its embeddings are scaled and its norms count from 1, which the conversion does not fold in",
    "gemma2": "it caps logits (softcapping) and norms every block's output, which the target does not",
    "gemma3": f"it reads more than text, and {_QK_NORM}",
    "llama4": f"it reads more than text, {_EXPERTS}, and some of its layers have no RoPE",
    "llava": _WRAPPER,
    "llava_next": _WRAPPER,
    "mistral3": _WRAPPER,
    "mllama": f"{_OTHER_TEXT}, with cross-attention to pictures",
    "qwen2_vl": _OTHER_TEXT,
    "qwen2_5_vl": _OTHER_TEXT,
    "qwen3_vl": f"it reads more than text, and {_QK_NORM}",
    "smolvlm": _WRAPPER,
}


def check_convertible(config: Any) -> None:
    """Refuse, before any work, a model whose attention the target checkpoint cannot hold.

    Args:
        config: the model's Transformers config.

    Raises:
        MLAError: says what stands in the way and, where there is one, the way round.
    """
    kind = getattr(config, "model_type", None)
    if getattr(config, "kv_lora_rank", None) is not None:
        raise MLAError(
            f"this model ({kind}) already has Multi-head Latent Attention: "
            "nothing to convert, use it as it is"
        )
    if kind in _REASONS:
        raise MLAError(f"cannot convert a {kind} model: {_REASONS[kind]}")
    if kind not in _LLAMA_LIKE:
        known = ", ".join(sorted(_LLAMA_LIKE))
        raise MLAError(f"cannot convert a model of type {kind!r}: expected Llama-type attention ({known})")
    quantised = config.to_dict().get("quantization_config")
    # A GGUF file's weights are dequantised as they are read; its config goes on to name the format.
    if quantised is not None and quantised.get("quant_method") != "gguf":
        raise MLAError(
            "cannot convert: the weights are quantised (quantization_config), and the conversion multiplies "
            "with plain ones; convert the model that they were made from, or save it dequantised "
            "(model.dequantize() in Transformers)"
        )
    if getattr(config, "mlp_bias", False):
        raise MLAError(
            "cannot convert: mlp_bias is true, and the target checkpoint has no MLP biases; a model trained "
            "without them is needed"
        )
    _check_window(config)
    _check_rope(config)
    width = head_dim(config)
    if width % 2:
        raise MLAError(f"cannot convert: head_dim {width} is odd, RoPE needs pairs")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if groups is not None and heads % groups:
        raise MLAError(f"cannot convert: {heads} heads do not divide evenly into {groups} key-value heads")
    if config.num_hidden_layers < 1:
        raise MLAError("cannot convert: the model has no layers")


def _check_window(config: Any) -> None:
    window = getattr(config, "sliding_window", None)
    # Qwen2 names the layers that have it.
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return
    if window is not None and window < config.max_position_embeddings:
        raise MLAError(
            f"cannot convert: a sliding window of {window} tokens is active (of "
            f"{config.max_position_embeddings} positions) and the target has none; for contexts "
            f"within it, set max_position_embeddings to {window} in its config and convert again"
        )


def _check_rope(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _ROPES:
        way = (
            "; for contexts within original_max_position_embeddings, remove the scaling from its config"
            if "original_max_position_embeddings" in rope
            else ""
        )
        raise MLAError(
            f"cannot convert: RoPE scaling {kind!r} does not survive in the target checkpoint "
            f"(loaders rewrite it for DeepSeek models){way}"
        )
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if partial is not None and partial != 1.0:
        raise MLAError(
            f"cannot convert: partial rotary embedding (factor {partial}), expected RoPE on all of d"
        )
    if "rope_theta" not in rope:
        raise MLAError("cannot convert: the config gives no rope_theta")
