"""Models that vLLM would compute wrongly, in silence: the plugin refuses them, `mla serve` looks before."""

from collections.abc import Mapping
from typing import Any

from mla.integrations.prefixes import switching_length

#: Model types whose attention is vLLM's code for DeepSeek, or a copy of it.
_AS_DEEPSEEK = {
    "axk1",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "kimi_k2",
    "longcat_flash",
    "pangu_ultra_moe",
}
#: It takes every type of RoPE but the first for yarn, which gets one of the last two names as it is built.
_ROPE_OF_DEEPSEEK = {"default", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}


def why_unfit(config: Any, max_model_len: int, *, own_code: bool = True) -> str | None:
    """Why vLLM's answers would not be the model's, to be read after the model's name; None where they are.

    Args:
        config: of Transformers.
        max_model_len: the longest prompt with its answer.
        own_code: whether vLLM has code of its own for models that it knows, or takes Transformers' for all.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "attention_bias", False):  # loaders leave out what has no place
        return "has biases in its attention (attention_bias), for which vLLM has no place"
    if own_code and text.model_type in _AS_DEEPSEEK:
        if getattr(text, "rope_interleave", None) is False:
            return "rotates halves (rope_interleave: false), where vLLM always rotates pairs"
        rope = getattr(text, "rope_parameters", None) or {}
        rope_type = rope.get("rope_type", "default")
        if rope_type not in _ROPE_OF_DEEPSEEK:
            return f"has RoPE of type {rope_type}, where vLLM computes default and yarn only"
        if rope_type != "default" and (unread := _read_otherwise(rope)) is not None:
            return f"has yarn with {unread}, which vLLM does not compute as Transformers does"
    switch = switching_length(config)
    if switch is not None and max_model_len > switch:
        # Chunks of one prompt would differ, too.
        return (
            "has LongRoPE, whose frequencies would follow the longest of the requests that vLLM computes "
            f"together: expected --max-model-len up to {switch}, got {max_model_len}"
        )
    return None


def _read_otherwise(yarn: Mapping[str, Any]) -> str | None:
    """Settings of yarn that vLLM's code for DeepSeek leaves out, or completes with other defaults."""
    if yarn.get("attention_factor") is not None:
        return "attention_factor"
    if yarn.get("truncate") is False:
        return "truncate: false"
    if bool(yarn.get("mscale")) != bool(yarn.get("mscale_all_dim")):
        return "only one of mscale and mscale_all_dim"
    return None
